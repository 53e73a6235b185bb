//! Shoal's own wire: tasks, their controls, texts by task, and how likely a task finds texts.

mod docs;
mod generate;
mod score;
mod tasks;

pub use docs::describe;
pub use generate::{NativeWriter, Piece};
pub use tasks::task_entry;

use super::http::App;
use axum::Router;
use axum::routing::{get, post};
use std::sync::Arc;

/// The routes of this wire.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/tasks", get(tasks::tasks))
        .route("/v1/tasks/{task}/generate", post(generate::generate))
        .route("/v1/tasks/{task}/score", post(score::score))
}
