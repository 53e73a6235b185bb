//! KServe's Open Inference Protocol v2, as Triton's clients speak it: a model is a task, the bundle or an
//! adapter; the tensor `text_input` goes in, `text_output` comes out. [`generate`] is the same for texts
//! without tensors.
//!
//! What an inference asks for is read by [`infer`], whichever way it came; [`tensor`] knows how tensors
//! stand in bytes and in JSON. Invariants: health is the truth of the probes; there is one version, 1.

mod docs;
mod generate;
mod grpc;
mod http;
mod infer;
mod tensor;

pub use docs::describe;
pub use grpc::Wire;

use super::http::respond::{reply, start_of, status};
use super::http::{App, health};
use crate::error::{Error, Result};
use axum::Router;
use axum::extract::{FromRequestParts, RawPathParams, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;
use axum::routing::{get, post};
use infer::{INPUT, OUTPUTS};
use serde_json::{Value, json as value};
use std::sync::Arc;
use tensor::Datatype;

/// The one version of every model.
const VERSION: &str = "1";

/// What this server has beyond the protocol.
const EXTENSIONS: [&str; 3] = ["binary_tensor_data", "generate", "parameters"];

/// Whether errors on this path are in this wire's words.
pub fn has(path: &str) -> bool {
    path.strip_prefix("/v2").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The status and the body of an error: the table's, and a string.
pub fn refusal(error: &Error) -> (StatusCode, Value) {
    (status(error), value!({"error": start_of(error.public_message(), 1000)}))
}

/// The routes of this wire.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{model}", get(metadata))
        .route("/v2/models/{model}/ready", get(model_ready))
        .route("/v2/models/{model}/infer", post(http::infer))
        .route("/v2/models/{model}/generate", post(generate::generate))
        .route("/v2/models/{model}/generate_stream", post(generate::generate_stream))
        .route("/v2/models/{model}/versions/{version}", get(metadata))
        .route("/v2/models/{model}/versions/{version}/ready", get(model_ready))
        .route("/v2/models/{model}/versions/{version}/infer", post(http::infer))
        .route("/v2/models/{model}/versions/{version}/generate", post(generate::generate))
        .route(
            "/v2/models/{model}/versions/{version}/generate_stream",
            post(generate::generate_stream),
        )
}

/// The model that a path names, which need not exist.
#[derive(Clone, Debug)]
struct Named(String);

impl Named {
    /// A model by its name and version; no version is the one that there is.
    fn new(model: &str, version: &str) -> Result<Self> {
        if version.is_empty() || version == VERSION {
            return Ok(Self(model.to_owned()));
        }
        let message = format!("version {version:?} is not here; the only one is {VERSION:?}");
        Err(Error::not_found(message).with_param("version"))
    }
}

impl<S: Sync + Send> FromRequestParts<S> for Named {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let params = RawPathParams::from_request_parts(parts, state).await;
        let params = params.map_err(|e| Error::invalid("model", e.body_text()))?;
        let param = |name: &str| params.iter().find(|(key, _)| *key == name).map_or("", |p| p.1);
        Self::new(param("model"), param("version"))
    }
}

/// `GET /v2`.
async fn server() -> Response {
    let version = env!("CARGO_PKG_VERSION");
    reply(&value!({"name": "shoal", "version": version, "extensions": EXTENSIONS}))
}

/// `GET /v2/health/live`: as `/livez`.
async fn live(State(app): State<Arc<App>>) -> Result<Response> {
    health::check_live(&app)?;
    Ok(reply(&value!({"live": true})))
}

/// `GET /v2/health/ready`: as `/readyz`.
async fn ready(State(app): State<Arc<App>>) -> Result<Response> {
    health::check_ready(&app)?;
    Ok(reply(&value!({"ready": true})))
}

/// `GET /v2/models/{model}/ready`: the model exists and this server is ready.
async fn model_ready(State(app): State<Arc<App>>, Named(model): Named) -> Result<Response> {
    app.service.catalog().find(&model)?;
    health::check_ready(&app)?;
    Ok(reply(&value!({"name": model, "ready": true})))
}

/// `GET /v2/models/{model}`: its tensors.
async fn metadata(State(app): State<Arc<App>>, Named(model): Named) -> Result<Response> {
    app.service.catalog().find(&model)?;
    let tensor = |name: &str| value!({"name": name, "datatype": Datatype::Bytes, "shape": [-1]});
    Ok(reply(&value!({
        "name": model,
        "versions": [VERSION],
        "platform": "shoal",
        "inputs": [tensor(INPUT)],
        "outputs": OUTPUTS.map(tensor),
    })))
}
