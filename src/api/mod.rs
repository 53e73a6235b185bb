//! The shell: sockets in, text out.
//!
//! A wire is one folder: [`openai`], [`native`], [`tgi`], [`oip`], [`grpc`]. It parses its own words into a
//! [`crate::request::Request`]; [`service::Service`] checks it and hands it to the engine; the
//! [`ticket::Ticket`] that comes back is the request's life: the wire writes what it says, and dropping it
//! cancels. [`http`] holds what all wires over HTTP share, [`mod@serve`] listens and drains.
//!
//! Must not know tensors, schedulers or how text is tokenised. Invariants: whatever can be refused is
//! refused before the 200; every error has one shape on a wire; every request is counted once.

mod admin;
pub mod catalog;
mod docs;
mod encode;
pub mod grpc;
pub mod http;
mod jobs;
pub mod keys;
mod native;
mod oip;
mod openai;
mod pulse;
pub mod score;
pub mod serve;
pub mod service;
mod socket;
mod stall;
mod tgi;
pub mod ticket;

pub use http::{App, Limits};
pub use keys::Keys;
pub use serve::{Ended, Listeners, serve, signals};
pub use service::{Caps, Service};
