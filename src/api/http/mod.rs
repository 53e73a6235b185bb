//! What every wire over HTTP shares: the routes, who a request is, how its body is read and its answer
//! written, probes and pages for operators. A handler reads, asks [`Service`] and writes; it decides
//! nothing.

pub mod answer;
pub mod call;
mod cors;
pub mod debug;
mod docs;
pub mod fields;
pub mod grammar;
pub mod health;
mod info;
pub mod observe;
pub mod params;
pub mod respond;
pub mod schema;

use super::keys::{self, Keys};
use super::{Service, admin, docs as document, native, oip, openai, tgi};
use crate::error::{Error, Kind, Result};
use crate::telemetry::traces::Traces;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Router, middleware};
use call::{Call, Head, check_encoding, discard, json_fields, read_body};
pub use docs::describe;
use fields::Fields;
use respond::{Wording, reword};
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;

/// When to come back to a replica that has no connection left.
const RETRY_FULL: Duration = Duration::from_secs(1);

/// What clients may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest body.
    pub max_body_bytes: usize,
    /// Bytes of all bodies that are being read; those beyond it are told to come back. At least the
    /// largest body has room, whatever this says.
    pub max_reading_bytes: usize,
    /// Largest head, with its first line; over HTTP/2 uncompressed, as HPACK counts.
    pub max_header_bytes: usize,
    /// Most headers over HTTP/1; over HTTP/2 the size of the head bounds them.
    pub max_headers: usize,
    /// Longest time for the head, and again for the body, to arrive.
    pub body_timeout: Duration,
    /// How long a connection may stay open without a request.
    pub idle_timeout: Duration,
    /// Silence on a stream after which a comment is sent, or on a connection of gRPC a ping.
    pub keep_alive: Duration,
    /// How long a client may take nothing of what is written to it.
    pub write_timeout: Duration,
    /// Connections at once; those beyond it are told to come back.
    pub max_connections: usize,
    /// Calls at once on one connection of gRPC; those beyond it wait at the client.
    pub max_streams: u32,
    /// How long connections that wait for no answer may take to end when the server does.
    pub closing_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: 2 << 20,
            max_reading_bytes: 256 << 20,
            max_header_bytes: 32 << 10,
            max_headers: 100,
            body_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(120),
            keep_alive: Duration::from_secs(10),
            write_timeout: Duration::from_secs(30),
            max_connections: 1024,
            max_streams: 128,
            closing_grace: Duration::from_secs(5),
        }
    }
}

/// What all handlers share.
pub struct App {
    /// The one path of a request.
    pub service: Service,
    /// What clients may cost.
    pub limits: Limits,
    /// Bytes that bodies which are being read may still have.
    pub room: Semaphore,
    /// Who may ask, and who may change the server.
    pub keys: Keys,
    /// Web pages of other origins that may ask, if any.
    pub cors: Option<CorsLayer>,
    /// While serving, adapters are loaded from below this folder only.
    pub adapter_root: PathBuf,
    /// The bundle's id.
    pub bundle: Arc<str>,
    /// Where traces of requests go, if anywhere.
    pub traces: Option<Arc<Traces>>,
    /// What the weights are held in, for `/info`.
    pub dtype: String,
    /// When the server started, in seconds since 1970.
    pub created: u64,
    /// Cancelled when connections are to close: what would go on for ever ends then.
    pub closing: CancellationToken,
}

/// A path that was taken apart by us, so that its complaint has our shape.
pub type Segment = Result<Path<String>, PathRejection>;

impl App {
    /// An app that all may ask and nobody may change.
    pub fn new(service: Service, limits: Limits, dtype: impl Into<String>) -> Self {
        let bundle = service.catalog().listing().tasks.bundle().name.as_str().into();
        let created = answer::unix_time();
        Self {
            service,
            limits,
            room: Semaphore::new(limits.max_reading_bytes.max(limits.max_body_bytes)),
            keys: Keys::default(),
            cors: None,
            adapter_root: PathBuf::new(),
            bundle,
            traces: None,
            dtype: dtype.into(),
            created,
            closing: CancellationToken::new(),
        }
    }

    /// The same, for those who hold `keys`; whoever may change it loads adapters from `adapter_root`.
    pub fn with_keys(self, keys: Keys, adapter_root: PathBuf) -> Self {
        Self { keys, adapter_root, ..self }
    }

    /// The same, for web pages of these origins too; `*` is every origin.
    pub fn with_origins(self, origins: &[String]) -> Self {
        Self { cors: cors::layer(origins), ..self }
    }

    /// The same, with traces of its requests.
    pub fn with_traces(self, traces: Option<Arc<Traces>>) -> Self {
        Self { traces, ..self }
    }

    /// The routes.
    pub fn router(self: Arc<Self>) -> Router {
        let router = Router::new()
            .merge(openai::routes())
            .merge(native::routes())
            .merge(tgi::routes())
            .merge(oip::routes())
            // Where KServe's clients look for it.
            .nest("/openai", openai::routes())
            .merge(admin::routes())
            .merge(document::routes())
            .route("/info", get(info::info))
            .route("/livez", get(health::live))
            .route("/readyz", get(health::ready))
            .route("/health", get(health::ready))
            .route("/startupz", get(health::started))
            .route("/metrics", get(metrics))
            .fallback(not_found)
            .method_not_allowed_fallback(method_not_allowed)
            .layer(middleware::from_fn_with_state(self.clone(), keys::guard));
        // Around the guard: browsers ask without a key what they may ask.
        let router = match self.cors.clone() {
            Some(cors) => router.layer(cors),
            None => router,
        };
        router
            .layer(CatchPanicLayer::custom(panicked))
            .layer(middleware::from_fn_with_state(wording as fn(&str) -> _, reword))
            .layer(middleware::from_fn_with_state(self.traces.clone(), observe::observe))
            .with_state(self)
    }

    /// The routes of a connection beyond the limit: it lives, and everything else is refused.
    pub fn full_router(self: Arc<Self>) -> Router {
        Router::new()
            .route("/livez", get(health::live))
            .fallback(full)
            .layer(middleware::from_fn_with_state(wording as fn(&str) -> _, reword))
            .layer(middleware::from_fn_with_state(self.traces.clone(), observe::observe))
            .with_state(self)
    }

    /// Reads a body and understands it as a wire does. What cannot be understood is counted here.
    ///
    /// The body is read before anything is refused: a client that is still writing would not hear it.
    pub async fn read<T>(
        &self,
        head: &Head,
        body: Body,
        understand: impl FnOnce(Fields, &Call) -> Result<T>,
    ) -> Result<T> {
        let json = |bytes: &[u8], call: &Call| understand(json_fields(&head.headers, bytes)?, call);
        self.read_bytes(head, body, json).await
    }

    /// The same for a body that need not say what it is.
    pub async fn read_bytes<T>(
        &self,
        head: &Head,
        body: Body,
        understand: impl FnOnce(&[u8], &Call) -> Result<T>,
    ) -> Result<T> {
        let read = async {
            let body = read_body(body, &self.limits, &self.room).await?;
            let call = Call::new(head)?;
            check_encoding(&head.headers)?;
            understand(&body, &call)
        };
        read.await.inspect_err(|error| self.service.count_refused(&head.record, error))
    }
}

/// How errors are worded on a path, where that is not OpenAI's way.
fn wording(path: &str) -> Option<Wording> {
    if tgi::has(path) {
        return Some(tgi::refusal);
    }
    oip::has(path).then_some(oip::refusal)
}

async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    let text = app.service.metrics().render();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// Refuses a request on a connection beyond the limit.
pub async fn full(State(app): State<Arc<App>>, head: Head, body: Body) -> Error {
    let error = Error::new(Kind::Unavailable, "too many connections").with_retry_after(RETRY_FULL);
    app.service.count_refused(&head.record, &error);
    discard(body, &app.limits).await;
    error
}

async fn not_found() -> Error {
    Error::not_found("no such route").with_code("route_not_found")
}

async fn method_not_allowed() -> Error {
    Error::new(Kind::MethodNotAllowed, "the route does not take this method")
}

/// A path's one parameter.
pub fn segment(path: Segment) -> Result<String> {
    path.map(|Path(name)| name).map_err(|e| Error::new(Kind::Invalid, e.body_text()))
}

fn panicked(cause: Box<dyn Any + Send>) -> Response {
    panic_error(cause).into_response()
}

/// What a panic is to a client.
pub fn panic_error(cause: Box<dyn Any + Send>) -> Error {
    let text = cause.downcast_ref::<String>().cloned();
    let text = text.or_else(|| cause.downcast_ref::<&str>().map(|s| (*s).to_string()));
    Error::internal("a handler panicked", text.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::extract::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    async fn panics() -> Error {
        panic!("a secret")
    }

    #[tokio::test]
    async fn a_panic_is_an_internal_error_with_our_body() {
        let router: Router =
            Router::new().route("/", get(panics)).layer(CatchPanicLayer::custom(panicked));
        let response = router.oneshot(Request::new(Body::empty())).await.unwrap();
        assert_eq!(response.status(), 500);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8(body.to_vec()).unwrap();
        assert!(body.contains(r#""type":"server_error""#) && !body.contains("secret"), "{body}");
    }
}
