//! `POST /v2/models/{model}/generate` and `.../generate_stream`: one text in, one text out.
//!
//! KServe has the parameters in `parameters`, Triton beside the text; either will do.

use super::infer::{INPUT, generation, single};
use super::{Named, VERSION, refusal};
use crate::api::http::App;
use crate::api::http::answer::{Frames, Progress, Writer};
use crate::api::http::call::{Call, Head};
use crate::api::http::fields::{Fields, missing};
use crate::api::http::respond::to_json;
use crate::api::ticket::{Chunk, End, Reply};
use crate::error::{Error, Result};
use crate::request::{Request, Usage};
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use serde_json::{Map, Value};
use std::sync::Arc;
use utoipa::ToSchema;

/// `POST .../generate`.
pub async fn generate(
    State(app): State<Arc<App>>,
    model: Result<Named>,
    head: Head,
    body: Body,
) -> Result<Response> {
    respond(&app, model, &head, body, false).await
}

/// `POST .../generate_stream`.
pub async fn generate_stream(
    State(app): State<Arc<App>>,
    model: Result<Named>,
    head: Head,
    body: Body,
) -> Result<Response> {
    respond(&app, model, &head, body, true).await
}

async fn respond(
    app: &App,
    model: Result<Named>,
    head: &Head,
    body: Body,
    stream: bool,
) -> Result<Response> {
    let read = |bytes: &[u8], call: &Call| read(app, model?, bytes, call, stream);
    let (request, writer) = app.read_bytes(head, body, read).await?;
    let ticket = app.service.submit(request).await?;
    app.answer(ticket, writer, stream).await
}

fn read(
    app: &App,
    model: Named,
    body: &[u8],
    call: &Call,
    stream: bool,
) -> Result<(Request, GenerateWriter)> {
    let mut fields = Fields::parse(body)?;
    let text = fields.take(INPUT)?.ok_or_else(|| missing(INPUT))?;
    for (name, value) in fields.take::<Map<String, Value>>("parameters")?.unwrap_or_default() {
        fields.put(&name, value)?;
    }
    if fields.take("stream")?.is_some_and(|asked: bool| asked != stream) {
        let message = "stream must be true on generate_stream and false on generate";
        return Err(Error::invalid("stream", message));
    }
    let writer = GenerateWriter {
        id: fields.take("id")?,
        model: model.0.clone(),
        details: fields.take("details")?.unwrap_or(false),
    };
    let request = generation(app, model, vec![text], fields.rest(), call)?;
    Ok((single(request)?, writer))
}

/// Writes the answer to a generation.
struct GenerateWriter {
    id: Option<String>,
    model: String,
    details: bool,
}

#[derive(Serialize, ToSchema)]
pub struct Answer<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    model_name: &'a str,
    model_version: &'static str,
    /// The whole text, or more of it.
    text_output: &'a str,
    /// In a stream, whether this is its last frame.
    #[serde(skip_serializing_if = "Option::is_none")]
    done: Option<bool>,
    /// At the text's end, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = OipDetails)]
struct Details {
    finish_reason: &'static str,
    prompt_tokens: u32,
    completion_tokens: u32,
}

impl GenerateWriter {
    fn answer(&self, text: &str, end: Option<(&End, Usage)>, done: Option<bool>) -> Vec<u8> {
        to_json(&Answer {
            id: self.id.as_deref(),
            model_name: &self.model,
            model_version: VERSION,
            text_output: text,
            done,
            details: end.filter(|_| self.details).map(|(end, tokens)| Details {
                finish_reason: end.finish.as_str(),
                prompt_tokens: tokens.prompt_tokens,
                completion_tokens: tokens.completion_tokens,
            }),
        })
    }
}

impl Writer for GenerateWriter {
    fn whole(&self, reply: &Reply) -> Vec<u8> {
        let choice = reply.choices.first();
        let end = choice.and_then(|choice| choice.end.as_ref());
        let text = choice.map_or("", |choice| &choice.text);
        self.answer(text, end.map(|end| (end, reply.usage)), None)
    }

    fn chunk(&mut self, chunk: &Chunk, sofar: &Progress, frames: &mut Frames) {
        let end = chunk.end.as_ref().map(|end| (end, sofar.usage));
        frames.push_back(self.answer(&chunk.text, end, Some(sofar.over)));
    }

    /// This wire's streams end with the frame that says so.
    fn end(&mut self, _: Usage, _: &mut Frames) {}

    fn error(&self, error: &Error) -> Vec<u8> {
        to_json(&refusal(error).1)
    }
}
