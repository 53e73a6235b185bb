//! Text to tokens and back.
//!
//! Owns the tokenizer, the incremental decoder, the templates of prompts and chats, what a control's value
//! becomes in a prompt, and the grammars that a text can be held to. Knows no sockets, no sequences and no
//! weights.
//!
//! One invariant rules here: *trusted* text (a template's literals, control tokens) may name special
//! tokens, a user's text never does. The two are kept apart as [`Segment`]s until they are ids.

/// What GPT-2 calls the token that ends a text.
pub const END_OF_TEXT: &str = "<|endoftext|>";

mod chat;
mod controls;
mod decode;
mod disguise;
mod encode;
mod guide;
mod jinja;
mod prompt;
mod template;

pub use chat::{ChatSettings, ChatTemplate, MAX_MESSAGES};
pub use controls::resolve_controls;
pub use decode::{Incremental, Piece};
pub use encode::{LoadError, Tokenizer};
pub use guide::Grammars;
pub use prompt::{Prompt, Prompts};
pub use template::{Segment, Template};

#[cfg(test)]
pub(crate) mod fixture;
