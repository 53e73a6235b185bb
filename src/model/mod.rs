//! Compute: what a step is.

pub mod step;
