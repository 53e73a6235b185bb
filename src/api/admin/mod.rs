//! What changes a running server: adapters come and go, tasks come. Off unless it was enabled, and then
//! for those alone who hold the admin key. Which folders may be read is the server's to say, not theirs.

mod docs;

pub use docs::describe;

use super::http::App;
use super::http::call::{json_fields, read_body};
use super::http::fields::{Fields, missing};
use super::http::respond::{json, reply};
use super::native::task_entry;
use crate::adapter::registry::{Info, Wanted, confined};
use crate::error::{Error, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::{get, post};
use serde_json::{Value, json as value};
use std::sync::Arc;

/// The routes for administrators.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/adapters", get(list))
        .route("/v1/load_lora_adapter", post(load))
        .route("/v1/unload_lora_adapter", post(unload))
        .route("/v1/tasks", post(add_task))
}

/// `POST /v1/load_lora_adapter`: `{"lora_name", "lora_path", "load_inplace", "expected_generation",
/// "pinned"}`, as vLLM has it and a little more. The path is below the adapter root.
async fn load(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Result<Response> {
    let mut fields = authorised(&app, &headers, body).await?;
    let name: String = fields.take("lora_name")?.ok_or_else(|| missing("lora_name"))?;
    let path: String = fields.take("lora_path")?.ok_or_else(|| missing("lora_path"))?;
    let in_place = fields.take("load_inplace")?.unwrap_or(false);
    let expected_generation = fields.take("expected_generation")?;
    let pinned = fields.take("pinned")?.unwrap_or(false);
    check_base(&mut fields, &app)?;
    if fields.take("is_3d_lora_weight")? == Some(true) {
        let message = "is_3d_lora_weight is for models that are not served here";
        return Err(Error::invalid("is_3d_lora_weight", message));
    }
    fields.finish()?;
    let load = move || {
        let path = confined(&app.adapter_root, &path)?;
        let wanted = Wanted { name, path, in_place, expected_generation, pinned };
        app.service.catalog().load_adapter(&wanted)
    };
    // It reads files and packs weights, which no socket should wait for.
    let loaded = tokio::task::spawn_blocking(load).await;
    let info = loaded.map_err(|e| Error::internal("an adapter was not loaded", e))??;
    tracing::info!(adapter = info.name, generation = info.generation, "adapter loaded");
    Ok(reply(&adapter_entry(&info)))
}

/// `POST /v1/unload_lora_adapter`: `{"lora_name", "expected_generation"}`.
async fn unload(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Result<Response> {
    let mut fields = authorised(&app, &headers, body).await?;
    let name: String = fields.take("lora_name")?.ok_or_else(|| missing("lora_name"))?;
    let expected_generation = fields.take("expected_generation")?;
    // vLLM's own number of an adapter, which means nothing here.
    fields.take_value("lora_int_id");
    fields.finish()?;
    let info = app.service.catalog().unload_adapter(&name, expected_generation)?;
    tracing::info!(adapter = info.name, generation = info.generation, "adapter unloaded");
    Ok(reply(&adapter_entry(&info)))
}

/// `GET /v1/adapters`: those that are loaded, with their generations.
async fn list(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Response> {
    app.keys.administer(&headers)?;
    let adapters = app.service.catalog().adapter_list();
    let data: Vec<Value> = adapters.iter().map(adapter_entry).collect();
    Ok(reply(&value!({"object": "list", "data": data})))
}

/// `POST /v1/tasks`: `{"name", "toml"}`, the text of a task file.
async fn add_task(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Result<Response> {
    let mut fields = authorised(&app, &headers, body).await?;
    let name: String = fields.take("name")?.ok_or_else(|| missing("name"))?;
    let text: String = fields.take("toml")?.ok_or_else(|| missing("toml"))?;
    fields.finish()?;
    let service = &app.service;
    let task = service.catalog().add_task(&name, &text, service.engine(), service.metrics())?;
    tracing::info!(task = task.name, "task added");
    Ok(json(StatusCode::CREATED, task_entry(&task).to_string().into_bytes()))
}

/// The fields of a request by somebody who may change the server. The body is read first: a client that
/// is still writing would not hear the answer.
async fn authorised(app: &App, headers: &HeaderMap, body: Body) -> Result<Fields> {
    let body = read_body(body, &app.limits, &app.room).await?;
    app.keys.administer(headers)?;
    json_fields(headers, &body)
}

/// `base_model_name` may be said, if it is what is served.
fn check_base(fields: &mut Fields, app: &App) -> Result<()> {
    match fields.take::<String>("base_model_name")? {
        Some(base) if base != *app.bundle => {
            let message = format!("base_model_name is {base:?}; allowed: {:?}", app.bundle);
            Err(Error::invalid("base_model_name", message))
        }
        _ => Ok(()),
    }
}

/// An adapter as it is listed.
fn adapter_entry(info: &Info) -> Value {
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
