//! `grpc.health.v1`: whether this server takes work now, as `/readyz` has it, asked once or followed.

use super::SERVICES;
use super::status::status;
use crate::api::App;
use crate::api::http::health::check_ready;
use crate::error::Error;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_server};

/// How often a watch looks whether the engine still lives: nobody tells of one that stands still.
const LOOK: Duration = Duration::from_secs(1);

/// The service.
pub struct Health(pub Arc<App>);

#[tonic::async_trait]
impl health_server::Health for Health {
    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        known(request.get_ref())?;
        Ok(Response::new(response(serving(&self.0))))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        // What is not there may be watched until it is.
        let known = known(request.get_ref()).is_ok();
        let (app, state) = (self.0.clone(), self.0.service.engine().watch());
        let changes =
            stream::unfold((app, state, None), move |(app, mut state, told)| async move {
                loop {
                    let now = if known { serving(&app) } else { ServingStatus::ServiceUnknown };
                    if told != Some(now) {
                        return Some((Ok(response(now)), (app, state, Some(now))));
                    }
                    // A drain comes before the closing, so that whoever watches has heard of it.
                    if app.closing.is_cancelled() {
                        return None;
                    }
                    tokio::select! {
                        changed = state.changed() => changed.ok()?,
                        () = tokio::time::sleep(LOOK) => {}
                        () = app.closing.cancelled() => {}
                    }
                }
            });
        Ok(Response::new(changes.boxed()))
    }
}

/// Refuses a service that is not there. The empty name is the whole server.
fn known(request: &HealthCheckRequest) -> Result<(), Status> {
    let name = request.service.as_str();
    if name.is_empty() || SERVICES.contains(&name) {
        return Ok(());
    }
    let message = format!("no such service; allowed: nothing, {}", SERVICES.join(", "));
    Err(status(&Error::not_found(message).with_param("service")))
}

fn serving(app: &App) -> ServingStatus {
    match check_ready(app) {
        Ok(()) => ServingStatus::Serving,
        Err(_) => ServingStatus::NotServing,
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}
