//! The shell: sockets in, text out.
//!
//! A body becomes a [`crate::request::Request`] in [`wire`]; [`service::Service`] checks it and hands
//! it to the engine; the [`ticket::Ticket`] that comes back is the request's life: `reply` and `sse`
//! write what it says, and dropping it cancels. [`http`] only connects these, [`mod@serve`] listens and
//! drains.
//!
//! Must not know tensors, schedulers or how text is tokenised. Invariants: whatever can be refused is
//! refused before the 200; every error has one shape; every request is counted once.

mod admin;
mod call;
pub mod catalog;
mod encode;
mod fields;
mod health;
pub mod http;
mod listing;
mod logprobs;
mod observe;
mod reply;
mod respond;
pub mod serve;
pub mod service;
mod socket;
mod sse;
pub mod ticket;
pub mod wire;

pub use admin::Admin;
pub use http::{App, Limits};
pub use serve::{Ended, serve, signals};
pub use service::Service;
