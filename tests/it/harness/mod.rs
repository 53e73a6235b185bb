//! What the tests share: a server on port 0 over a pretend or a real model, and a client that
//! sees bytes.

mod client;
mod decoder;
pub mod routes;
mod rpc;
mod server;

pub use client::{Client, Reply, Stream, texts};
pub use decoder::{AUTHORISED, COMPLETIONS, LOAD, golden_model, goldens, prompts};
pub use rpc::{called, message};
pub use server::{BUNDLE, CONTEXT, Server, Setup, repeater, tokenizer, tokenizer_json};
