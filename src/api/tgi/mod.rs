//! Text-generation-inference's wire, for those who have its clients: a prompt and `parameters` in, a text
//! and the tokens it was made of out. Its words for errors are in [`refusal()`], its words for requests
//! in [`ask`], its answers in [`answer`].

mod answer;
mod ask;
mod docs;
mod refusal;

pub use docs::describe;
pub use refusal::refusal;

use super::http::App;
use super::http::call::Head;
use crate::error::Result;
use answer::{Shape, TgiWriter};
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use axum::routing::post;
use std::sync::Arc;

/// Whether errors on this path are in this wire's words.
pub fn has(path: &str) -> bool {
    matches!(path, "/" | "/generate" | "/generate_stream")
}

/// The routes of this wire.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/", post(root))
        .route("/generate", post(generate))
        .route("/generate_stream", post(generate_stream))
}

/// `POST /`: a whole answer is a list of one.
async fn root(State(app): State<Arc<App>>, head: Head, body: Body) -> Result<Response> {
    respond(&app, &head, body, Shape::List, false).await
}

/// `POST /generate`.
async fn generate(State(app): State<Arc<App>>, head: Head, body: Body) -> Result<Response> {
    respond(&app, &head, body, Shape::Object, false).await
}

/// `POST /generate_stream`.
async fn generate_stream(State(app): State<Arc<App>>, head: Head, body: Body) -> Result<Response> {
    respond(&app, &head, body, Shape::Object, true).await
}

async fn respond(
    app: &App,
    head: &Head,
    body: Body,
    shape: Shape,
    always_stream: bool,
) -> Result<Response> {
    let read = |fields, call: &_| ask::read(fields, call, &app.bundle, always_stream);
    let (request, wanted) = app.read(head, body, read).await?;
    let ticket = app.service.submit(request).await?;
    let stream = wanted.stream;
    let writer = TgiWriter::new(&app.service, &ticket, &head.record, wanted, shape);
    app.answer(ticket, writer, stream).await
}
