//! `POST /v1/tasks/{task}/score`: a task's input and labels in, how likely each is out.

use crate::api::http::answer::{Tokens, server_timing, unix_time};
use crate::api::http::call::{Call, Head};
use crate::api::http::fields::{Fields, missing};
use crate::api::http::params::{Asked, request};
use crate::api::http::respond::reply;
use crate::api::http::{App, Segment, segment};
use crate::error::Result;
use crate::request::{Input, Params, Request};
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;

/// The handler.
pub async fn score(
    State(app): State<Arc<App>>,
    task: Segment,
    head: Head,
    body: Body,
) -> Result<Response> {
    let understand = |fields: Fields, call: &Call| read(fields, segment(task)?, call);
    let request = app.read(&head, body, understand).await?;
    let (task, labels) = (request.model.clone(), request.labels.clone());
    let scores = app.service.score(request).await?;
    let data = labels.iter().zip(&scores.labels).map(|(label, score)| {
        json!({
            "label": label,
            "logprob": score.logprob,
            "probability": score.probability,
            "tokens": score.tokens,
        })
    });
    let mut response = reply(&json!({
        "id": format!("score-{}", head.record.id),
        "task": task,
        "model": app.bundle.as_ref(),
        "created": unix_time(),
        "scores": data.collect::<Vec<Value>>(),
        "usage": Tokens::from(scores.usage),
    }));
    response.headers_mut().insert("server-timing", server_timing(&scores.timing));
    Ok(response)
}

/// What bodies share and what means nothing where no text is generated.
pub const REFUSED: [&str; 5] = ["debug", "choice", "regex", "json_schema", "response_format"];

/// Reads a body: nothing of it is about sampling.
fn read(mut body: Fields, task: String, call: &Call) -> Result<Request> {
    for name in REFUSED {
        body.refuse(name)?;
    }
    let input: String = body.take("input")?.ok_or_else(|| missing("input"))?;
    let labels: Vec<String> = body.take("labels")?.ok_or_else(|| missing("labels"))?;
    let (inputs, params) = (vec![Input::Text(input)], Params::default());
    let prompt_field = "input";
    let asked = Asked { model: task, inputs, prompt_field, params, usual_max_tokens: None };
    Ok(Request { labels, ..request(body, call, asked)? })
}
