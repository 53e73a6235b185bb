//! `POST /v1/completions`: OpenAI's legacy completions, with a task, the bundle or an adapter as the model.

use super::logprobs::Logprobs;
use super::{Delivery, FINGERPRINT};
use crate::api::http::App;
use crate::api::http::answer::{Frames, Progress, Tokens, Writer, unix_time};
use crate::api::http::call::{Call, Head};
use crate::api::http::debug::{Debug, Reported};
use crate::api::http::fields::{Fields, missing};
use crate::api::http::params::{Asked, params, request};
use crate::api::http::respond::to_json;
use crate::api::ticket::{Chunk, Reply, Ticket};
use crate::error::{Error, Result};
use crate::request::{Input, Request, Usage};
use crate::text::Tokenizer;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use serde_json::Value;
use std::sync::Arc;
use utoipa::ToSchema;

/// `max_tokens` where nobody says; OpenAI's.
const USUAL_MAX_TOKENS: u32 = 16;

/// The handler.
pub async fn completions(State(app): State<Arc<App>>, head: Head, body: Body) -> Result<Response> {
    let (request, delivery) = app.read(&head, body, completion).await?;
    let ticket = app.service.submit(request).await?;
    let tokenizer = app.service.tokenizer().clone();
    let writer = CompletionWriter::new(&ticket, tokenizer, delivery);
    app.answer(ticket, writer, delivery.stream).await
}

/// Reads a body.
fn completion(mut body: Fields, call: &Call) -> Result<(Request, Delivery)> {
    let model = body.take("model")?.ok_or_else(|| missing("model"))?;
    let prompt = body.take_value("prompt").ok_or_else(|| missing("prompt"))?;
    let inputs = prompts(prompt)?;
    let delivery = Delivery::read(&mut body)?;
    let params = params(&mut body)?;
    let (prompt_field, usual_max_tokens) = ("prompt", Some(USUAL_MAX_TOKENS));
    let asked = Asked { model, inputs, prompt_field, params, usual_max_tokens };
    Ok((request(body, call, asked)?, delivery))
}

/// The four forms of `prompt`: a string, strings, token ids, or arrays of token ids.
fn prompts(value: Value) -> Result<Vec<Input>> {
    let bad = || {
        let message = "prompt must be a string, an array of strings, an array of token ids, or an \
                       array of arrays of token ids";
        Error::invalid("prompt", message)
    };
    let list = match value {
        Value::String(text) => return Ok(vec![Input::Text(text)]),
        Value::Array(list) => list,
        _ => return Err(bad()),
    };
    if list.first().is_some_and(Value::is_number) {
        return Ok(vec![Input::Tokens(token_ids(Value::Array(list)).ok_or_else(bad)?)]);
    }
    let texts = match list.first() {
        Some(first) => first.is_string(),
        None => return Err(Error::invalid("prompt", "prompt is empty; allowed: 1 or more")),
    };
    list.into_iter()
        .map(|entry| match entry {
            Value::String(text) if texts => Ok(Input::Text(text)),
            entry if !texts => token_ids(entry).map(Input::Tokens).ok_or_else(bad),
            _ => Err(bad()),
        })
        .collect()
}

fn token_ids(value: Value) -> Option<Vec<u32>> {
    serde_json::from_value(value).ok()
}

/// Writes completions.
struct CompletionWriter {
    id: String,
    /// The name that the client asked for.
    model: String,
    created: u64,
    delivery: Delivery,
    reported: Reported,
    tokenizer: Arc<Tokenizer>,
}

#[derive(Serialize, ToSchema)]
pub struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    model: &'a str,
    system_fingerprint: &'static str,
    created: u64,
    choices: &'a [Piece<'a>],
    /// Absent, `null`, or a value.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Tokens>)]
    usage: Option<Option<Tokens>>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = CompletionChoice)]
struct Piece<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    debug: Option<Debug<'a>>,
}

impl CompletionWriter {
    fn new(ticket: &Ticket, tokenizer: Arc<Tokenizer>, delivery: Delivery) -> Self {
        Self {
            id: format!("cmpl-{}", ticket.id()),
            model: ticket.model().to_owned(),
            created: unix_time(),
            delivery,
            reported: Reported::of(ticket),
            tokenizer,
        }
    }

    fn piece<'a>(&'a self, chunk: &'a Chunk) -> Piece<'a> {
        let end = chunk.end.as_ref();
        Piece {
            index: chunk.index,
            text: &chunk.text,
            logprobs: chunk.logprobs.as_ref().map(|tokens| Logprobs::of(&self.tokenizer, tokens)),
            finish_reason: end.map(|end| end.finish.as_str()),
            debug: self.reported.debug(end),
        }
    }

    fn body(&self, choices: &[Piece], usage: Option<Option<Tokens>>) -> Vec<u8> {
        to_json(&Completion {
            id: &self.id,
            object: "text_completion",
            model: &self.model,
            system_fingerprint: FINGERPRINT,
            created: self.created,
            choices,
            usage,
        })
    }
}

impl Writer for CompletionWriter {
    fn whole(&self, reply: &Reply) -> Vec<u8> {
        let choices: Vec<Piece> = reply.choices.iter().map(|choice| self.piece(choice)).collect();
        self.body(&choices, Some(Some(reply.usage.into())))
    }

    fn chunk(&mut self, chunk: &Chunk, sofar: &Progress, frames: &mut Frames) {
        frames.push_back(self.body(&[self.piece(chunk)], self.delivery.usage_of(sofar)));
    }

    fn end(&mut self, usage: Usage, frames: &mut Frames) {
        if self.delivery.include_usage {
            frames.push_back(self.body(&[], Some(Some(usage.into()))));
        }
        frames.push_back(b"[DONE]".to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn read(body: &str) -> Result<Request> {
        completion(Fields::parse(body.as_bytes())?, &Call::test()).map(|(request, _)| request)
    }

    #[test]
    fn the_four_forms_of_a_prompt() {
        let forms = [
            (r#""a b""#, vec![Input::Text("a b".into())]),
            (r#"["a", ""]"#, vec![Input::Text("a".into()), Input::Text(String::new())]),
            ("[1, 2]", vec![Input::Tokens(vec![1, 2])]),
            ("[[1], [2, 3]]", vec![Input::Tokens(vec![1]), Input::Tokens(vec![2, 3])]),
        ];
        for (json, want) in forms {
            let asked = read(&format!(r#"{{"model": "m", "prompt": {json}}}"#)).unwrap();
            assert_eq!(asked.inputs, want, "{json}");
        }
        for json in ["3", "{}", "[]", "[1, \"a\"]", "[\"a\", 1]", "[-1]", "[1.5]", "[[\"a\"]]"] {
            let error = read(&format!(r#"{{"model": "m", "prompt": {json}}}"#)).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("prompt"), "{json}");
        }
    }

    #[test]
    fn what_is_refused_is_named() {
        let cases = [
            (r#""top_kk": 3"#, "top_kk"),
            (r#""temperature": "hot""#, "temperature"),
            (r#""max_tokens": -1"#, "max_tokens"),
            (r#""max_tokens": 2, "max_completion_tokens": 3"#, "max_completion_tokens"),
            (r#""stop": 3"#, "stop"),
            (r#""logit_bias": {"x": 1}"#, "logit_bias"),
            (r#""suffix": "x""#, "suffix"),
            (r#""best_of": 2"#, "best_of"),
            (r#""stream_options": {}"#, "stream_options"),
            (r#""stream": true, "stream_options": {"x": 1}"#, "stream_options.x"),
            (r#""timeout_ms": 0"#, "timeout_ms"),
            (r#""controls": 3"#, "controls"),
            (r#""adapters": {"a": 1}"#, "adapters"),
            (r#""adapters": [["a", 1]]"#, "adapters"),
            (r#""adapters": [{"name": "a"}]"#, "adapters.weight"),
            (r#""adapters": [{"name": "a", "weight": 1, "rank": 2}]"#, "adapters.rank"),
            (r#""task": 3"#, "task"),
            (r#""debug": {"router": true}"#, "debug.router"),
        ];
        for (fields, param) in cases {
            let body = format!(r#"{{"model": "m", "prompt": "p", {fields}}}"#);
            assert_eq!(read(&body).unwrap_err().param.as_deref(), Some(param), "{fields}");
        }
        let error = read(r#"{"prompt": "p"}"#).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("model"));
    }

    #[test]
    fn what_has_no_effect_is_accepted() {
        let body = r#"{"model": "m", "prompt": "p", "user": "u", "metadata": {}, "store": false,
            "service_tier": "auto", "parallel_tool_calls": true, "suffix": null, "n": 2,
            "best_of": 2, "stop": null, "max_completion_tokens": 7, "logit_bias": {"5": -100}}"#;
        let params = read(body).unwrap().params;
        assert_eq!((params.n, params.max_tokens), (Some(2), Some(7)));
        assert_eq!(params.logit_bias, Some([(5, -100.0)].into()));
    }

    #[test]
    fn the_smallest_time_limit_wins() {
        let call = Call { timeout: Some(Duration::from_millis(50)), ..Call::test() };
        let body = br#"{"model": "m", "prompt": "x", "timeout_ms": 20.5}"#;
        let (request, _) = completion(Fields::parse(body).unwrap(), &call).unwrap();
        let arrived = call.record.arrived;
        assert_eq!(request.deadline, Some(arrived + Duration::from_micros(20_500)));
    }
}
