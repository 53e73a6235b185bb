//! `/v1/models`: the bundle, its tasks, its adapters.

use crate::api::http::respond::reply;
use crate::api::http::{App, Segment, segment};
use crate::error::Result;
use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json as value};
use std::sync::Arc;

/// `GET /v1/models`: the bundle, its tasks, its adapters.
pub async fn models(State(app): State<Arc<App>>) -> Response {
    let listing = app.service.catalog().listing();
    let tasks = listing.tasks.named().map(|task| card(&app, &task.name, task.adapter.as_deref()));
    let adapters =
        app.service.catalog().adapter_list().into_iter().map(|info| card(&app, &info.name, None));
    let data: Vec<Value> = std::iter::once(bundle(&app)).chain(tasks).chain(adapters).collect();
    reply(&value!({"object": "list", "data": data}))
}

/// `GET /v1/models/{id}`.
pub async fn model(State(app): State<Arc<App>>, id: Segment) -> Result<Response> {
    let id = segment(id)?;
    let (task, _) = app.service.catalog().find(&id)?;
    Ok(reply(&match id == *app.bundle {
        true => bundle(&app),
        false => card(&app, &id, task.adapter.as_deref()),
    }))
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
