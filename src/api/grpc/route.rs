//! Routes of gRPC services, one for each method that the descriptors know, so that the access log names
//! methods and nothing that a client made up.

use super::DESCRIPTORS;
use super::call::{many, whole};
use crate::api::App;
use axum::body::Body;
use axum::extract::Request;
use axum::routing::post_service;
use axum::{Router, middleware};
use prost::Message;
use prost_types::FileDescriptorSet;
use std::convert::Infallible;
use std::sync::Arc;
use tonic::codegen::Service;
use tonic::codegen::http::Response;
use tonic::server::NamedService;
use tonic_reflection::pb::{v1, v1alpha};

/// What is known of all services.
pub const SETS: [&[u8]; 4] = [
    DESCRIPTORS,
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    v1::FILE_DESCRIPTOR_SET,
    v1alpha::FILE_DESCRIPTOR_SET,
];

/// Adds the methods of a service.
pub fn mount<S>(router: Router, app: &Arc<App>, service: S) -> Router
where
    S: Service<Request<Body>, Response = Response<tonic::body::Body>, Error = Infallible>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send,
{
    methods(S::NAME).into_iter().fold(router, |router, (path, takes_stream)| {
        let route = post_service(service.clone());
        let route = match takes_stream {
            true => route.layer(middleware::from_fn_with_state(app.clone(), many)),
            false => route.layer(middleware::from_fn_with_state(app.clone(), whole)),
        };
        router.route(&path, route)
    })
}

/// The paths of a service's methods, and whether they take a stream of messages.
fn methods(service: &str) -> Vec<(String, bool)> {
    let decode = |set| FileDescriptorSet::decode(set).expect("the descriptors are the compiler's");
    let files = SETS.into_iter().flat_map(|set| decode(set).file);
    let described = files.flat_map(|file| {
        let package = file.package().to_owned();
        file.service.into_iter().map(move |one| (format!("{package}.{}", one.name()), one))
    });
    let ours = described.filter(|(name, _)| name == service);
    ours.flat_map(|(name, one)| {
        let method = move |m: prost_types::MethodDescriptorProto| {
            (format!("/{name}/{}", m.name()), m.client_streaming())
        };
        one.method.into_iter().map(method)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_found_with_what_they_take() {
        let paths = methods("shoal.v1.Shoal");
        assert!(paths.contains(&("/shoal.v1.Shoal/Generate".into(), false)), "{paths:?}");
        let paths = methods("grpc.reflection.v1.ServerReflection");
        let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        assert_eq!(paths, [(path.to_owned(), true)]);
    }
}
