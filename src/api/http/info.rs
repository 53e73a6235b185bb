//! `GET /info`: what this server is and what it takes.

use super::App;
use super::respond::reply;
use crate::engine::State as EngineState;
use axum::extract::State;
use axum::response::Response;
use serde_json::{Map, Value, json as value};
use std::sync::Arc;

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
    let adapters: Vec<String> =
        app.service.catalog().adapter_list().into_iter().map(|info| info.name).collect();
    let caps = app.service.caps();
    reply(&value!({
        "model": app.bundle.as_ref(),
        // These are what text-generation-inference calls them.
        "model_id": app.bundle.as_ref(),
        "model_sha": Value::Null,
        "model_dtype": app.dtype,
        "model_device_type": "cpu",
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": caps.requests.unwrap_or(usize::MAX).min(engine.max_waiting()),
        "max_best_of": 1,
        "max_stop_sequences": crate::request::MAX_STOP,
        "max_input_tokens": capacity.map(|c| {
            caps.input_tokens.unwrap_or(usize::MAX).min(c.context.saturating_sub(1))
        }),
        "max_total_tokens": capacity.map(|c| c.context),
        "auto_truncate": false,
        "router": "shoal",
        "sha": Value::Null,
        "docker_label": Value::Null,
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
            "max_input_tokens": caps.input_tokens,
            "max_concurrent_requests": caps.requests,
            "max_body_bytes": app.limits.max_body_bytes,
            "max_header_bytes": app.limits.max_header_bytes,
            "max_headers": app.limits.max_headers,
            "max_n": crate::request::MAX_N,
            "max_stop_strings": crate::request::MAX_STOP,
            "max_logprobs": crate::request::MAX_LOGPROBS,
            "max_waiting": listing.tasks.iter()
                .map(|t| (t.name.clone(), t.slo.max_waiting.into()))
                .collect::<Map<String, Value>>(),
        },
    }))
}
