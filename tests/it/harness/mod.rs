//! What the tests share: a server on port 0 and a client that sees bytes.

mod client;
mod server;

pub use client::{Client, Reply, Stream, texts};
pub use server::{BUNDLE, CONTEXT, Server, Setup, bundle, repeater, tokenizer, tokenizer_json};
