//! Integration tests: one binary, so that the crate is linked once.

// Clippy knows test functions, but not the functions that they share.
#![allow(clippy::unwrap_used)]

/// Adapters in one batch, swapped while they serve, and who may do that.
mod adapters;
/// What gRPC alone has: a call's deadline and end, limits of HTTP/2, health, reflection.
mod calls;
/// OpenAI's chat, and the words of its templates.
mod chat;
/// The program as a user runs it: arguments, output, exit codes, signals.
mod cli;
/// The OpenAI wire, byte by byte.
mod completions;
/// The document of all routes, and the page over it.
mod docs;
/// What depends on the task that raw text is for: mixtures of task adapters, gates of experts.
mod experts;
/// The real decoder behind the sockets, against PyTorch.
mod golden;
/// The same requests over gRPC and over HTTP.
mod grpc;
/// A server on a port of its own, a client that sees bytes.
mod harness;
/// What holds for every route.
mod http;
/// Which experts and adapters work for which task.
mod inspect;
/// Who may ask, with which key, from which page.
mod keys;
/// Who may import whom; `unsafe`, candle and long files.
mod layout;
/// Start, overload, deadlines, clients that leave, failing steps, drain.
mod lifecycle;
/// What a client may cost.
mod limits;
/// What `/metrics` says after known traffic.
mod metrics;
/// The native wire, which knows tasks.
mod native;
/// KServe's Open Inference Protocol.
mod oip;
/// The same over gRPC.
mod oip_grpc;
/// Clients of gRPC that stand still.
mod patience;
/// The examples of the README, as they stand.
mod readme;
/// Text-generation-inference's wire.
mod tgi;
/// Spans, as a collector gets them.
mod traces;
/// From examples to an endpoint.
mod training;
