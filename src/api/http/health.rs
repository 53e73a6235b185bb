//! Probes: whether this process lives, has started, and can take work. They read the engine's state
//! and heartbeat, never its queue.

use super::App;
use super::respond::json;
use crate::engine::State as EngineState;
use crate::error::{Error, Kind, Result};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use std::sync::Arc;
use std::time::Duration;

/// A tick that takes longer than this is late: no new work should come here.
const LATE: Duration = Duration::from_secs(10);
/// A tick that takes longer than this will never end.
const STUCK: Duration = Duration::from_secs(120);

/// `/livez`: not in need of a restart.
pub async fn live(State(app): State<Arc<App>>) -> Result<Response> {
    check_live(&app)?;
    Ok(ok("alive"))
}

/// Whether a restart is not needed.
pub fn check_live(app: &App) -> Result<()> {
    if app.service.engine().state() == EngineState::Failed {
        return Err(Error::new(Kind::Unavailable, "the engine has failed"));
    }
    fresh(app, STUCK)
}

/// `/readyz` and `/health`: able to take work now.
pub async fn ready(State(app): State<Arc<App>>) -> Result<Response> {
    check_ready(&app)?;
    Ok(ok("ready"))
}

/// Whether work can be taken now.
pub fn check_ready(app: &App) -> Result<()> {
    app.service.engine().ready()?;
    fresh(app, LATE)
}

/// `/startupz`: start-up is over.
pub async fn started(State(app): State<Arc<App>>) -> Result<Response> {
    match app.service.engine().state() {
        EngineState::Ready | EngineState::Draining => Ok(ok("started")),
        EngineState::Loading | EngineState::Failed => {
            app.service.engine().ready()?;
            Ok(ok("started"))
        }
    }
}

fn fresh(app: &App, limit: Duration) -> Result<()> {
    let age = app.service.engine().heartbeat_age();
    if age <= limit {
        return Ok(());
    }
    let message = format!("the engine has been silent for {} s", age.as_secs());
    Err(Error::new(Kind::Unavailable, message))
}

fn ok(status: &str) -> Response {
    json(StatusCode::OK, format!(r#"{{"status":"{status}"}}"#).into_bytes())
}
