//! Around every request, on every wire: its id in and out, and one line in the access log when its last
//! byte is written or its client has left. The line never holds a prompt, a text or a query.

use super::call::{Head, REQUEST_ID};
use crate::telemetry::traces::{self, Exchange, Traces};
use crate::telemetry::{Record, now};
use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use opentelemetry::propagation::Extractor;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// The middleware; where there are traces, each request becomes a part of one.
pub async fn observe(
    State(traces): State<Option<Arc<Traces>>>,
    mut request: Request,
    next: Next,
) -> Response {
    if let Some(key) = request.headers_mut().get_mut(header::AUTHORIZATION) {
        // Whoever writes headers to a log leaves it out.
        key.set_sensitive(true);
    }
    let headers = request.headers();
    let record = Record::with_parent(Head::id(headers), traces::parent(&Caller(headers)));
    request.extensions_mut().insert(record.clone());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut line = Line::new(record, request.method().clone(), route, traces);
    let mut response = next.run(request).await;
    if let Ok(id) = HeaderValue::from_str(&line.record.id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    line.status = Some(response.status());
    line.grpc = grpc_status(response.headers());
    line.whole = response.body().is_end_stream() || line.method == Method::HEAD;
    response.map(|inner| Body::new(Logged { inner, line }))
}

/// Headers, as W3C's trace context is read from them.
struct Caller<'a>(&'a HeaderMap);

impl Extractor for Caller<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

/// The code of gRPC that these headers or trailers hold.
fn grpc_status(headers: &HeaderMap) -> Option<i32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// The access log's line, written when dropped, and the end of the request's trace.
pub struct Line {
    route: Option<MatchedPath>,
    method: Method,
    record: Arc<Record>,
    traces: Option<Arc<Traces>>,
    /// `None` while there is no response yet.
    status: Option<StatusCode>,
    /// How a call over gRPC ended, if its end was written.
    grpc: Option<i32>,
    bytes: usize,
    /// Whether the body was written to its end.
    whole: bool,
}

impl Line {
    /// The line of a request that has just arrived.
    pub fn new(
        record: Arc<Record>,
        method: Method,
        route: Option<MatchedPath>,
        traces: Option<Arc<Traces>>,
    ) -> Self {
        let (status, grpc) = (None, None);
        Self { route, method, record, traces, status, grpc, bytes: 0, whole: false }
    }

    /// Adds a message of so many bytes of a call that brings many requests; `last` is the code that this
    /// one ended with.
    pub fn message(&mut self, bytes: usize, last: Option<i32>) {
        self.bytes += bytes;
        if last.is_some() {
            (self.status, self.grpc, self.whole) = (Some(StatusCode::OK), last, true);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let facts = self.record.facts();
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        // 499 is what the error table calls a client that left.
        let status = self.status.filter(|_| self.whole).map_or(499, |status| status.as_u16());
        let route = self.route.as_ref().map(MatchedPath::as_str);
        if let Some(traces) = &self.traces {
            traces.record(
                &self.record,
                &Exchange { method: self.method.as_str(), route, status, grpc: self.grpc },
            );
        }
        tracing::info!(
            target: "shoal::access",
            id = self.record.id,
            trace = self.record.parent.as_ref().map(|parent| parent.trace_id().to_string()),
            method = %self.method,
            route = route.unwrap_or("none"),
            status,
            grpc = self.grpc,
            bytes = self.bytes,
            ms = ms(now() - self.record.arrived),
            key = facts.key.as_deref(),
            task = facts.model,
            adapter = (!facts.adapters.is_empty()).then(|| facts.adapters.join("+")),
            outcome = facts.outcome,
            queue_ms = facts.outcome.map(|_| ms(facts.timing.queue)),
            prefill_ms = facts.outcome.map(|_| ms(facts.timing.prefill)),
            decode_ms = facts.outcome.map(|_| ms(facts.timing.decode)),
            prompt_tokens = facts.outcome.map(|_| facts.usage.prompt_tokens),
            generated_tokens = facts.outcome.map(|_| facts.usage.completion_tokens),
        );
    }
}

/// A body that tells its line how much of it was written.
struct Logged {
    inner: Body,
    line: Line,
}

impl HttpBody for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        match &frame {
            Poll::Ready(Some(Ok(frame))) => {
                self.line.bytes += frame.data_ref().map_or(0, Bytes::len);
                self.line.grpc = self.line.grpc.or(frame.trailers_ref().and_then(grpc_status));
            }
            Poll::Ready(None) => self.line.whole = true,
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        if self.inner.is_end_stream() {
            self.line.whole = true;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
