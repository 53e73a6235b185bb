//! Around every request, on every wire: its id in and out, and one line in the access log when its last
//! byte is written or its client has left. The line never holds a prompt, a text or a query.

use super::call::{Head, REQUEST_ID};
use crate::telemetry::{Record, now};
use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// The middleware.
pub async fn observe(mut request: Request, next: Next) -> Response {
    let record = Record::new(Head::id(request.headers()));
    request.extensions_mut().insert(record.clone());
    let mut line = Line {
        route: request.extensions().get::<MatchedPath>().cloned(),
        method: request.method().clone(),
        record,
        status: None,
        bytes: 0,
        whole: false,
    };
    let mut response = next.run(request).await;
    if let Ok(id) = HeaderValue::from_str(&line.record.id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    line.status = Some(response.status());
    line.whole = response.body().is_end_stream() || line.method == Method::HEAD;
    response.map(|inner| Body::new(Logged { inner, line }))
}

/// The access log's line, written when dropped.
struct Line {
    route: Option<MatchedPath>,
    method: Method,
    record: Arc<Record>,
    /// `None` while there is no response yet.
    status: Option<StatusCode>,
    bytes: usize,
    /// Whether the body was written to its end.
    whole: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        let facts = self.record.facts();
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        tracing::info!(
            target: "shoal::access",
            id = self.record.id,
            method = %self.method,
            route = self.route.as_ref().map_or("none", MatchedPath::as_str),
            // 499 is what the error table calls a client that left.
            status = self.status.filter(|_| self.whole).map_or(499, |s| s.as_u16()),
            bytes = self.bytes,
            ms = ms(now() - self.record.arrived),
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
            Poll::Ready(Some(Ok(data))) => self.line.bytes += data.data_ref().map_or(0, Bytes::len),
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
