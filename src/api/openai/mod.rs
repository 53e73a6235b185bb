//! OpenAI's wire, as its official clients speak it: chat, completions, models; and vLLM's two routes
//! beside it, which tell what a text is in tokens.

mod chat;
mod completions;
mod docs;
mod logprobs;
mod models;
mod tokenize;

pub use docs::describe;
pub use logprobs::{Logprobs, Top};

use super::http::App;
use super::http::answer::{Progress, Tokens};
use super::http::fields::Fields;
use crate::error::{Error, Result};
use axum::Router;
use axum::routing::{get, post};
use std::sync::Arc;

/// The routes of this wire.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/models", get(models::models))
        .route("/v1/models/{id}", get(models::model))
}

/// What made an answer, as far as OpenAI's clients ask.
const FINGERPRINT: &str = concat!("shoal-", env!("CARGO_PKG_VERSION"));

/// How a client wants its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Delivery {
    /// As server-sent events.
    stream: bool,
    /// With a frame of usage at the stream's end, and a field for it in all others.
    include_usage: bool,
    /// With the usage so far in that field; vLLM's.
    continuous_usage: bool,
}

impl Delivery {
    fn read(body: &mut Fields) -> Result<Self> {
        let mut delivery =
            Self { stream: body.take("stream")?.unwrap_or(false), ..Self::default() };
        let Some(mut options) = body.take_object("stream_options", "stream_options.")? else {
            return Ok(delivery);
        };
        if !delivery.stream {
            let message = "stream_options is allowed only with stream";
            return Err(Error::invalid("stream_options", message));
        }
        delivery.include_usage = options.take("include_usage")?.unwrap_or(false);
        delivery.continuous_usage = options.take("continuous_usage_stats")?.unwrap_or(false);
        options.finish()?;
        Ok(delivery)
    }

    /// `usage` of a frame with text: absent, `null`, or a value.
    fn usage_of(self, sofar: &Progress) -> Option<Option<Tokens>> {
        self.include_usage.then(|| self.continuous_usage.then(|| sofar.usage.into()))
    }
}
