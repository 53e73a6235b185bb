//! `POST /v1/tasks/{task}/generate`: a task's input and controls in, texts with their words out.

use crate::api::Service;
use crate::api::http::answer::{Frames, Progress, Tokens, Writer, unix_time};
use crate::api::http::call::{Call, Head};
use crate::api::http::debug::{Debug, Reported};
use crate::api::http::fields::{Fields, missing};
use crate::api::http::params::{Asked, params, request};
use crate::api::http::respond::to_json;
use crate::api::http::{App, Segment, segment};
use crate::api::openai::Logprobs;
use crate::api::ticket::{Chunk, Reply, Ticket};
use crate::error::Result;
use crate::request::{Input, Request, Usage};
use crate::text::Tokenizer;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// The handler.
pub async fn generate(
    State(app): State<Arc<App>>,
    task: Segment,
    head: Head,
    body: Body,
) -> Result<Response> {
    let read = |fields: Fields, call: &Call| native(fields, segment(task)?, call);
    let (request, stream) = app.read(&head, body, read).await?;
    let ticket = app.service.submit(request).await?;
    let writer = NativeWriter::new(&app.service, &ticket, app.bundle.clone());
    app.answer(ticket, writer, stream).await
}

/// Reads a body, and whether its answer is to be streamed.
fn native(mut body: Fields, task: String, call: &Call) -> Result<(Request, bool)> {
    let input: String = body.take("input")?.ok_or_else(|| missing("input"))?;
    let stream = body.take("stream")?.unwrap_or(false);
    let params = params(&mut body)?;
    let inputs = vec![Input::Text(input)];
    let prompt_field = "input";
    let asked = Asked { model: task, inputs, prompt_field, params, usual_max_tokens: None };
    Ok((request(body, call, asked)?, stream))
}

/// Writes the native reply.
pub struct NativeWriter {
    /// The reply's id.
    pub id: String,
    /// What was named.
    pub task: String,
    /// The bundle's id.
    pub bundle: Arc<str>,
    /// Seconds since 1970.
    pub created: u64,
    reported: Reported,
    tokenizer: Arc<Tokenizer>,
}

#[derive(Serialize, ToSchema)]
pub struct Answer<'a> {
    id: &'a str,
    task: &'a str,
    model: &'a str,
    created: u64,
    choices: &'a [Piece<'a>],
    usage: Option<Tokens>,
}

/// One text, or more of it.
#[derive(Serialize, ToSchema)]
#[schema(as = TaskChoice)]
pub struct Piece<'a> {
    /// Which one.
    pub index: usize,
    /// All of it, or what follows.
    pub text: &'a str,
    /// Its tokens, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Logprobs>,
    /// At its end.
    pub finish_reason: Option<&'static str>,
    /// At its end.
    pub words: Option<u32>,
    /// At its end, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debug: Option<Debug<'a>>,
}

impl NativeWriter {
    /// A writer of this ticket's reply.
    pub fn new(service: &Service, ticket: &Ticket, bundle: Arc<str>) -> Self {
        Self {
            id: format!("gen-{}", ticket.id()),
            task: ticket.model().to_owned(),
            bundle,
            created: unix_time(),
            reported: Reported::of(ticket),
            tokenizer: service.tokenizer().clone(),
        }
    }

    /// What one chunk says.
    pub fn piece<'a>(&'a self, chunk: &'a Chunk) -> Piece<'a> {
        let end = chunk.end.as_ref();
        Piece {
            index: chunk.index,
            text: &chunk.text,
            logprobs: chunk.logprobs.as_ref().map(|tokens| Logprobs::of(&self.tokenizer, tokens)),
            finish_reason: end.map(|end| end.finish.as_str()),
            words: end.map(|end| end.words),
            debug: self.reported.debug(end),
        }
    }

    fn answer(&self, choices: &[Piece], usage: Option<Usage>) -> Vec<u8> {
        let answer = Answer {
            id: &self.id,
            task: &self.task,
            model: &self.bundle,
            created: self.created,
            choices,
            usage: usage.map(Tokens::from),
        };
        to_json(&answer)
    }
}

impl Writer for NativeWriter {
    fn whole(&self, reply: &Reply) -> Vec<u8> {
        let choices: Vec<Piece> = reply.choices.iter().map(|choice| self.piece(choice)).collect();
        self.answer(&choices, Some(reply.usage))
    }

    fn chunk(&mut self, chunk: &Chunk, sofar: &Progress, frames: &mut Frames) {
        frames.push_back(self.answer(&[self.piece(chunk)], sofar.over.then_some(sofar.usage)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Request> {
        native(Fields::parse(body.as_bytes())?, "image".into(), &Call::test()).map(|(r, _)| r)
    }

    #[test]
    fn the_fields_are_those_of_completions() {
        let with =
            |fields: &str| read(&format!(r#"{{"input": "x", "suffix": null, "n": 2, {fields}}}"#));
        assert_eq!(with(r#""best_of": 2"#).unwrap().params.n, Some(2));
        assert_eq!(with(r#""best_of": 3"#).unwrap_err().param.as_deref(), Some("best_of"));
    }
}
