//! Web pages of other origins: none may ask unless it was let in. Keys go in a header and never in a
//! cookie, so that no page can use what a browser keeps.

use super::call::REQUEST_ID;
use axum::http::{HeaderName, HeaderValue, Method, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// What lets pages of `origins` ask; `*` is every origin, none of them is no layer.
pub fn layer(origins: &[String]) -> Option<CorsLayer> {
    let name = HeaderName::from_static;
    let allowed = match origins {
        [] => return None,
        all if all.iter().any(|origin| origin == "*") => AllowOrigin::any(),
        some => AllowOrigin::list(some.iter().filter_map(|o| HeaderValue::from_str(o).ok())),
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::OPTIONS])
        // Clients have headers of their own (OpenAI's have eight); the wall is the origin.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([name(REQUEST_ID), header::RETRY_AFTER, name("server-timing")]);
    Some(layer)
}
