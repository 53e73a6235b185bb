//! Shoal makes, serves and measures small multitask language models.
//!
//! Three rings, two seams. The *shell* ([`api`], [`text`]) is asynchronous and knows sockets and
//! text; the *core* ([`engine`]) is one synchronous thread that decides who runs next; *compute*
//! ([`model`], [`kernels`]) knows what a step is. Seam 1 is [`engine::EngineHandle::submit`], which
//! turns a [`engine::Job`] into a stream of [`engine::Event`]. Seam 2 is
//! [`model::step::Runner::step`]: flat host vectors both ways. The shell never names candle; the core
//! names neither candle, nor axum, nor a clock; compute knows no requests.
//!
//! Reading order: [`request`] (the words), [`api::service`] (one path for every wire), [`engine`]
//! (the schedule / run / apply step), [`model::step`] and [`model::decoder`] (what a step computes),
//! [`kernels`] (how), [`train`] (where the weights come from).

pub mod config;
pub mod error;
pub mod ids;
pub mod metrics;
pub mod request;
pub mod task;
pub mod telemetry;

pub mod adapter;
pub mod api;
pub mod bench;
pub mod bundle;
pub mod engine;
pub mod eval;
pub mod kernels;
pub mod model;
pub mod text;
pub mod train;
