//! The wires over gRPC: Shoal's own, KServe's (in [`oip`]), health and reflection. What all of them share stands here: the
//! generated messages, the routes, how a call's one message is read, and its identity and deadlines.
//!
//! A call passes through the same middleware as a request over HTTP: its id, its line in the access log,
//! its panics. Must not know what a wire's messages mean. Invariants: every error is a row of the error
//! table ([`mod@status`]); a call that the server does not understand is counted as over HTTP. Where a call
//! has one message, it is read within the limits of bodies; a call with many has each message's size
//! bounded, and otherwise only the limits of its connection.

mod call;
mod health;
mod route;
mod shoal;
mod status;

pub use call::{messages, submit, unreadable};
pub use status::{refusal, status};

use super::http::call::Head;
use super::http::{self, observe, panic_error};
use super::{App, oip};
use crate::error::{Error, Kind};
use crate::telemetry::Record;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use axum::{Router, middleware};
use inference::grpc_inference_service_server::{self, GrpcInferenceServiceServer};
use proto::shoal_server::ShoalServer;
use route::{SETS, mount};
use std::any::Any;
use std::sync::Arc;
use tonic_health::pb::health_server::HealthServer;
use tonic_reflection::server::Builder;
use tower_http::catch_panic::CatchPanicLayer;

/// The messages, client and server of `shoal.v1`, as the file describes them.
#[allow(missing_docs, unused_qualifications, clippy::too_many_lines)]
pub mod proto {
    tonic::include_proto!("shoal.v1");
}

/// The messages, client and server of KServe's protocol.
#[allow(missing_docs, unused_qualifications, clippy::too_many_lines)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// Every file below `proto/` and what they import, encoded.
pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("descriptors");

/// The services that do work, by their full names.
const SERVICES: [&str; 2] =
    [proto::shoal_server::SERVICE_NAME, grpc_inference_service_server::SERVICE_NAME];

impl App {
    /// The routes of the gRPC port.
    pub fn grpc_router(self: &Arc<Self>) -> Router {
        let most = self.limits.max_body_bytes;
        let shoal = ShoalServer::new(shoal::Wire(self.clone())).max_decoding_message_size(most);
        let inference = GrpcInferenceServiceServer::new(oip::Wire(self.clone()));
        let router = mount(Router::new(), self, shoal);
        let router = mount(router, self, inference.max_decoding_message_size(most));
        let router = mount(router, self, HealthServer::new(health::Health(self.clone())));
        let router = reflection(router, self);
        let guard = middleware::from_fn_with_state(self.clone(), guard);
        self.around(router.fallback(no_such_method).layer(guard))
    }

    /// The routes of a connection beyond the limit: everything is refused.
    pub fn full_grpc_router(self: &Arc<Self>) -> Router {
        self.around(Router::new().fallback(full).with_state(self.clone()))
    }

    /// Puts around a router what surrounds every call.
    fn around(&self, router: Router) -> Router {
        let panicked = |cause: Box<dyn Any + Send>| refusal(&panic_error(cause));
        router
            .layer(CatchPanicLayer::custom(panicked))
            .layer(middleware::from_fn_with_state(self.traces.clone(), observe::observe))
    }
}

/// Adds reflection, in the version that is meant to last and the one that most clients speak.
fn reflection(router: Router, app: &Arc<App>) -> Router {
    let builder = || {
        let builder = Builder::configure().include_reflection_service(false);
        SETS.into_iter().fold(builder, Builder::register_encoded_file_descriptor_set)
    };
    let broken = "the descriptors are the compiler's";
    let router = mount(router, app, builder().build_v1().expect(broken));
    mount(router, app, builder().build_v1alpha().expect(broken))
}

/// The middleware that asks for keys. Over HTTP/2 a client that is still writing hears the answer.
async fn guard(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    request: Request,
    next: Next,
) -> Response {
    match app.let_in(&record, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => refusal(&error),
    }
}

async fn no_such_method() -> Response {
    refusal(&Error::new(Kind::MethodNotAllowed, "no such service or method"))
}

async fn full(state: State<Arc<App>>, head: Head, body: Body) -> Response {
    refusal(&http::full(state, head, body).await)
}
