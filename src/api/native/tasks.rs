//! `GET /v1/tasks`: the tasks, with the schema of their controls.

use crate::api::http::App;
use crate::api::http::respond::reply;
use crate::task::{Control, ControlKind, Task};
use axum::extract::State;
use axum::response::Response;
use serde_json::{Map, Value, json as value};
use std::sync::Arc;

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
