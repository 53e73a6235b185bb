//! What this server has: models, tasks and their controls, limits.

use super::http::{App, segment};
use super::respond::json;
use crate::engine::State as EngineState;
use crate::error::Result;
use crate::task::{Control, ControlKind, Task};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json as value};
use std::sync::Arc;

/// `GET /v1/models`: the bundle, then its tasks.
pub async fn models(State(app): State<Arc<App>>) -> Response {
    let all = app.service.tasks();
    let bundle = all.iter().filter(|task| app.service.is_bundle(task));
    let tasks = all.iter().filter(|task| !app.service.is_bundle(task));
    let data: Vec<Value> = bundle.chain(tasks).map(|task| card(&app, task)).collect();
    reply(&value!({"object": "list", "data": data}))
}

/// `GET /v1/models/{id}`.
pub async fn model(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response> {
    let id = segment(id)?;
    Ok(reply(&card(&app, app.service.find(&id)?)))
}

/// `GET /v1/tasks`: the tasks, with the schema of their controls.
pub async fn tasks(State(app): State<Arc<App>>) -> Response {
    let tasks = app.service.tasks().iter().filter(|task| !app.service.is_bundle(task));
    let data: Vec<Value> = tasks
        .map(|task| {
            value!({
                "id": task.name,
                "description": task.description,
                "adapter": task.adapter,
                "controls": controls(task),
            })
        })
        .collect();
    reply(&value!({"object": "list", "data": data}))
}

/// `GET /info`.
pub async fn info(State(app): State<Arc<App>>) -> Response {
    let engine = app.service.engine();
    let capacity = engine.capacity();
    let state = match engine.state() {
        EngineState::Loading => "loading",
        EngineState::Ready => "ready",
        EngineState::Draining => "draining",
        EngineState::Failed => "failed",
    };
    let tasks = app.service.tasks();
    let names: Vec<&str> =
        tasks.iter().filter(|t| !app.service.is_bundle(t)).map(|t| t.name.as_str()).collect();
    reply(&value!({
        "model": app.bundle.as_ref(),
        "version": env!("CARGO_PKG_VERSION"),
        "state": state,
        "dtype": app.dtype,
        "tasks": names,
        "limits": {
            "context": capacity.map(|c| c.context),
            "vocabulary": capacity.map(|c| c.vocab),
            "kv_tokens": capacity.map(|c| c.blocks * c.block_size),
            "max_body_bytes": app.limits.max_body_bytes,
            "max_n": crate::request::MAX_N,
            "max_stop_strings": crate::request::MAX_STOP,
            "max_logprobs": crate::request::MAX_LOGPROBS,
            "max_waiting": tasks.iter().map(|t| (t.name.clone(), t.slo.max_waiting.into()))
                .collect::<Map<String, Value>>(),
        },
    }))
}

fn reply(body: &Value) -> Response {
    json(StatusCode::OK, body.to_string().into_bytes())
}

fn card(app: &App, task: &Task) -> Value {
    let parent = (!app.service.is_bundle(task)).then(|| app.bundle.as_ref());
    value!({
        "id": task.name,
        "object": "model",
        "created": app.created,
        "owned_by": "shoal",
        "parent": parent,
        "root": app.bundle.as_ref(),
    })
}

fn controls(task: &Task) -> Map<String, Value> {
    task.controls.iter().map(|(name, control)| (name.clone(), schema(control))).collect()
}

fn schema(control: &Control) -> Value {
    match &control.kind {
        ControlKind::Integer { minimum, maximum } => {
            let default: Option<i64> = control.default.as_ref().and_then(|d| d.parse().ok());
            value!({
                "type": "integer", "minimum": minimum, "maximum": maximum, "default": default,
            })
        }
        ControlKind::Enum(words) => {
            value!({"type": "string", "enum": words, "default": control.default})
        }
    }
}
