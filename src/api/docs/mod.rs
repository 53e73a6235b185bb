//! `GET /openapi.json`, the OpenAPI 3.1 document of every route over HTTP, and `GET /docs`, Swagger UI over
//! it, out of this binary.
//!
//! Each wire describes its own routes in its own folder: what a body may hold is written beside its
//! reader, what an answer holds is derived from what is serialised. This module puts that together. The
//! document is the same whatever is served, but for who may ask; a task's controls are in `/v1/tasks`. Must
//! not know what any field means.

mod operation;

pub use operation::{Operation, Wire};

use super::http::call::MAX_TIMEOUT_MS;
use super::http::respond::reply;
use super::http::{App, Segment, segment};
use super::{Keys, admin, http, native, oip, openai, tgi};
use crate::error::{Error, Kind, Result};
use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};
use utoipa_swagger_ui::Config;

/// What Swagger UI is told: nothing is asked of other servers.
static PAGE: LazyLock<Arc<Config>> = LazyLock::new(|| {
    Arc::new(Config::new(["../openapi.json"]).display_request_duration(true).validator_url("none"))
});

const ABOUT: &str = "\
Every route over HTTP. A task, the bundle itself or an adapter is what other servers call a model; \
`/v1/tasks` and `/v1/models` list them. Unknown fields are refused by name; `null` is the same as nothing. \
A method that a route does not take is answered 405 with `Allow`, a path that is not here 404. \
With API keys, everything but the probes needs one: also this document.";

/// The routes of the document.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/openapi.json", get(openapi))
        // Its files are beside it.
        .route("/docs", get(async || Redirect::permanent("docs/")))
        .route("/docs/", get(async || file("index.html")))
        .route("/docs/{file}", get(async |name: Segment| file(&segment(name)?)))
}

async fn openapi(State(app): State<Arc<App>>) -> Response {
    reply(&document(&app.keys))
}

/// A file of Swagger UI.
fn file(name: &str) -> Result<Response> {
    let found = utoipa_swagger_ui::serve(name, PAGE.clone());
    let found = found.map_err(|e| Error::internal("a page was not made", e.to_string()))?;
    let file = found.ok_or_else(|| Error::not_found("no such file"))?;
    let mut response = file.bytes.into_owned().into_response();
    let headers = response.headers_mut();
    if let Ok(media) = file.content_type.parse() {
        headers.insert(header::CONTENT_TYPE, media);
    }
    if file.gzpipped {
        headers.insert(header::CONTENT_ENCODING, header::HeaderValue::from_static("gzip"));
    }
    Ok(response)
}

/// The document while it is put together.
pub struct Document<'a> {
    keys: &'a Keys,
    paths: BTreeMap<String, Map<String, Value>>,
    schemas: BTreeMap<String, Value>,
}

impl Document<'_> {
    /// Adds an operation on a path, which needs a key unless the keys say that the path does not.
    pub fn add(&mut self, path: &str, operation: Operation) {
        let public = self.keys.is_public(path);
        let operation = if public { operation.public() } else { operation };
        let operation = operation.administered(self.keys.have_admin());
        let methods = self.paths.entry(path.to_owned()).or_default();
        methods.insert(operation.method.to_owned(), operation.build());
    }

    /// Adds a schema, and returns what refers to it.
    pub fn schema(&mut self, name: &str, schema: Value) -> Value {
        self.schemas.insert(name.to_owned(), schema);
        reference(name)
    }

    /// Adds the schema of what is serialised, by this name and with all that it refers to.
    pub fn derived<T: ToSchema>(&mut self, name: &str) -> Value {
        let mut parts = Vec::new();
        T::schemas(&mut parts);
        for (part, schema) in parts {
            self.schema(&part, plain(&schema));
        }
        self.schema(name, plain(&<T as PartialSchema>::schema()))
    }
}

/// What refers to the schema of this name.
pub fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn plain(schema: &RefOr<Schema>) -> Value {
    json!(schema)
}

/// Adds the routes of the document itself.
fn describe(document: &mut Document) {
    const WIRE: Wire = Wire::usual("Operations");
    let operation = Operation::get(WIRE, "getOpenApi", "This document");
    let operation = operation.answers("200", "OpenAPI 3.1.", json!({"type": "object"}));
    document.add("/openapi.json", operation);
    let page = json!({"type": "string"});
    let operation = Operation::get(WIRE, "getDocs", "The way to the page over it");
    document.add("/docs", operation.redirects("308", "It is at `/docs/`."));
    let operation = Operation::get(WIRE, "getDocsPage", "A page over this document");
    document.add("/docs/", operation.answers_with("200", "The page.", "text/html", page.clone()));
    let operation = Operation::get(WIRE, "getDocsFile", "A file of that page")
        .path("file", "Its name.", "swagger-ui.css")
        .errors(&[Kind::NotFound])
        .answers_with("200", "The file.", "*/*", page);
    document.add("/docs/{file}", operation);
}

/// The whole document, for a server with these keys.
pub fn document(keys: &Keys) -> Value {
    let mut document = Document { keys, paths: BTreeMap::new(), schemas: BTreeMap::new() };
    openai::describe(&mut document);
    native::describe(&mut document);
    tgi::describe(&mut document);
    oip::describe(&mut document);
    admin::describe(&mut document);
    http::describe(&mut document);
    describe(&mut document);
    let mut components = operation::components();
    components["schemas"] = json!(document.schemas);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Shoal",
            "version": env!("CARGO_PKG_VERSION"),
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": if keys.are_open() { json!([]) } else { json!([{"key": []}]) },
        "paths": document.paths,
        "components": components,
    })
}

#[cfg(test)]
mod tests;
