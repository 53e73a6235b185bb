//! The commands that put the rooms together: what is no library's business, but the program's.

pub mod check;
pub mod generate;
mod heatmap;
pub mod inspect;
pub mod serve;

use anyhow::Result;
use shoal::config::Compute;

/// How a command ended, unless by an error.
pub enum Outcome {
    /// It did what was asked.
    Done,
    /// It did not, or not all of it.
    Failed,
    /// The engine stopped working.
    EngineFailed,
}

/// Gives compute its threads; before anything computes.
pub fn set_threads(compute: &Compute) -> Result<()> {
    if let Some(threads) = compute.threads {
        let _ = shoal::kernels::set_threads(threads);
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    Ok(())
}
