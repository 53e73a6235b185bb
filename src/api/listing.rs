//! What this server has: models, tasks and their controls, limits.

use super::http::{App, segment};
use super::respond::json;
use crate::adapter::registry::Info;
use crate::engine::State as EngineState;
use crate::error::Result;
use crate::task::{Control, ControlKind, Task};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json as value};
use std::sync::Arc;

/// `GET /v1/models`: the bundle, its tasks, its adapters.
pub async fn models(State(app): State<Arc<App>>) -> Response {
    let listing = app.service.catalog().listing();
    let tasks = listing.tasks.named().map(|task| card(&app, &task.name, task.adapter.as_deref()));
    let adapters = adapters_of(&app).into_iter().map(|info| card(&app, &info.name, None));
    let data: Vec<Value> = std::iter::once(bundle(&app)).chain(tasks).chain(adapters).collect();
    reply(&value!({"object": "list", "data": data}))
}

/// `GET /v1/models/{id}`.
pub async fn model(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response> {
    let id = segment(id)?;
    let (task, _) = app.service.catalog().find(&id)?;
    Ok(reply(&match id == *app.bundle {
        true => bundle(&app),
        false => card(&app, &id, task.adapter.as_deref()),
    }))
}

/// `GET /v1/tasks`: the tasks, with the schema of their controls.
pub async fn tasks(State(app): State<Arc<App>>) -> Response {
    let listing = app.service.catalog().listing();
    let data: Vec<Value> = listing.tasks.named().map(|task| task_entry(task)).collect();
    reply(&value!({"object": "list", "data": data}))
}

/// A task as it is listed.
pub fn task_entry(task: &Task) -> Value {
    value!({
        "id": task.name,
        "description": task.description,
        "adapter": task.adapter,
        "controls": controls(task),
    })
}

/// An adapter as it is listed.
pub fn adapter_entry(info: &Info) -> Value {
    value!({
        "id": info.name,
        "object": "adapter",
        "generation": info.generation,
        "kind": info.kind,
        "rank": info.rank,
        "bytes": info.bytes,
        "pinned": info.pinned,
        "tasks": info.tasks,
    })
}

fn adapters_of(app: &App) -> Vec<Info> {
    app.service.catalog().adapters().map_or_else(Vec::new, |adapters| adapters.list())
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
    let listing = app.service.catalog().listing();
    let names: Vec<&str> = listing.tasks.named().map(|task| task.name.as_str()).collect();
    let adapters: Vec<String> = adapters_of(&app).into_iter().map(|info| info.name).collect();
    reply(&value!({
        "model": app.bundle.as_ref(),
        "version": env!("CARGO_PKG_VERSION"),
        "state": state,
        "dtype": app.dtype,
        "tasks": names,
        "adapters": adapters,
        "experts": engine.experts().map(|experts| value!({
            "layers": experts.layers,
            "num_experts": experts.count,
            "top_k": experts.top_k,
            "tasks": experts.tasks,
        })),
        "limits": {
            "context": capacity.map(|c| c.context),
            "vocabulary": capacity.map(|c| c.vocab),
            "kv_tokens": capacity.map(|c| c.blocks * c.block_size),
            "max_body_bytes": app.limits.max_body_bytes,
            "max_n": crate::request::MAX_N,
            "max_stop_strings": crate::request::MAX_STOP,
            "max_logprobs": crate::request::MAX_LOGPROBS,
            "max_waiting": listing.tasks.iter()
                .map(|t| (t.name.clone(), t.slo.max_waiting.into()))
                .collect::<Map<String, Value>>(),
        },
    }))
}

fn reply(body: &Value) -> Response {
    json(StatusCode::OK, body.to_string().into_bytes())
}

/// The bundle itself among the models.
fn bundle(app: &App) -> Value {
    value!({
        "id": app.bundle.as_ref(),
        "object": "model",
        "created": app.created,
        "owned_by": "shoal",
        "parent": Value::Null,
        "root": app.bundle.as_ref(),
    })
}

/// A task or an adapter among the models: its parent is what it adds to, the task's adapter or the bundle.
fn card(app: &App, name: &str, adapter: Option<&str>) -> Value {
    value!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "shoal",
        "parent": adapter.unwrap_or(&app.bundle),
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
