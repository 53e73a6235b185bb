//! OpenAI's wire, as its official clients speak it: completions and models.

mod completions;
mod logprobs;
mod models;

pub use logprobs::Logprobs;

use super::http::App;
use super::http::fields::Fields;
use crate::error::{Error, Result};
use axum::Router;
use axum::routing::{get, post};
use std::sync::Arc;

/// The routes of this wire.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models::models))
        .route("/v1/models/{id}", get(models::model))
}

/// How a client wants its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Delivery {
    /// As server-sent events.
    stream: bool,
    /// With a frame of usage at the stream's end.
    include_usage: bool,
}

impl Delivery {
    fn read(body: &mut Fields) -> Result<Self> {
        let stream = body.take("stream")?.unwrap_or(false);
        let Some(mut options) = body.take_object("stream_options", "stream_options.")? else {
            return Ok(Self { stream, include_usage: false });
        };
        if !stream {
            let message = "stream_options is allowed only with stream";
            return Err(Error::invalid("stream_options", message));
        }
        let include_usage = options.take("include_usage")?.unwrap_or(false);
        options.finish()?;
        Ok(Self { stream, include_usage })
    }
}
