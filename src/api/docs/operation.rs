//! One operation of the document: a method on a path, what it takes and everything that it may answer.

use super::{MAX_TIMEOUT_MS, reference};
use crate::api::http::respond::{Wording, usual};
use crate::error::{Error, Kind};
use serde_json::{Map, Value, json};

/// What the operations of one wire have in common.
#[derive(Clone, Copy)]
pub struct Wire {
    /// Its heading.
    pub tag: &'static str,
    /// The name of the schema of its errors.
    pub error: &'static str,
    /// How it words them.
    pub wording: Wording,
}

impl Wire {
    /// A wire with OpenAI's errors.
    pub const fn usual(tag: &'static str) -> Self {
        Self { tag, error: "Error", wording: usual }
    }
}

/// Errors of every route that reads a body.
const READING: [Kind; 4] = [Kind::Invalid, Kind::RequestTimeout, Kind::TooLarge, Kind::Internal];

/// Errors of every route that asks the model, beside those of reading.
const ASKING: [Kind; 5] =
    [Kind::NotFound, Kind::ContextLength, Kind::Overloaded, Kind::Unavailable, Kind::Deadline];

/// A method on a path.
pub struct Operation {
    /// In lower case, as the document has it.
    pub method: &'static str,
    wire: Wire,
    /// Whether it is for administrators alone.
    admin: bool,
    value: Value,
    responses: Map<String, Value>,
}

impl Operation {
    /// A `GET` that needs a key where there are keys, and may fail as everything may.
    pub fn get(wire: Wire, id: &str, summary: &str) -> Self {
        Self::new("get", wire, id, summary).errors(&[Kind::Internal])
    }

    /// A `POST` with a body in JSON, that needs a key where there are keys.
    pub fn post(wire: Wire, id: &str, summary: &str) -> Self {
        Self::new("post", wire, id, summary).errors(&READING)
    }

    fn new(method: &'static str, wire: Wire, id: &str, summary: &str) -> Self {
        let value = json!({
            "tags": [wire.tag],
            "operationId": id,
            "summary": summary,
            "parameters": [{"$ref": "#/components/parameters/RequestId"}],
        });
        Self { method, wire, admin: false, value, responses: Map::new() }
            .errors(&[Kind::Unauthenticated])
    }

    /// Says more.
    pub fn describe(mut self, text: &str) -> Self {
        self.value["description"] = text.into();
        self
    }

    /// Needs no key.
    pub fn public(mut self) -> Self {
        self.value["security"] = json!([]);
        self.responses.shift_remove("401");
        self
    }

    /// Is for administrators alone.
    pub fn for_administrators(self) -> Self {
        Self { admin: true, ..self }.errors(&[Kind::Forbidden])
    }

    /// Needs the admin key, if it is for administrators and there can be some.
    pub fn administered(mut self, possible: bool) -> Self {
        if self.admin && possible {
            self.value["security"] = json!([{"admin": []}]);
        }
        self
    }

    /// Has a parameter in its path, such as `example`.
    pub fn path(mut self, name: &str, text: &str, example: &str) -> Self {
        let parameter = json!({
            "name": name, "in": "path", "required": true, "description": text,
            "schema": {"type": "string", "minLength": 1}, "example": example,
        });
        self.parameter(parameter);
        // It may be no text.
        self.errors(&[Kind::Invalid])
    }

    /// Has a header that may be given.
    pub fn header(mut self, name: &str, text: &str, schema: Value) -> Self {
        self.parameter(
            json!({"name": name, "in": "header", "description": text, "schema": schema}),
        );
        self
    }

    fn parameter(&mut self, parameter: Value) {
        self.value["parameters"]
            .as_array_mut()
            .into_iter()
            .for_each(|all| all.push(parameter.clone()));
    }

    /// Reads a body of this schema, which must say that it is JSON. `examples` have a name and a body.
    pub fn body(self, schema: Value, examples: &[(&str, Value)]) -> Self {
        self.body_of_any_type(schema, examples).errors(&[Kind::MediaType])
    }

    /// The same for a body that need not say what it is, as long as it is not compressed.
    pub fn body_of_any_type(mut self, schema: Value, examples: &[(&str, Value)]) -> Self {
        let examples: Map<String, Value> = examples
            .iter()
            .map(|(name, body)| ((*name).to_owned(), json!({"value": body})))
            .collect();
        let content = json!({"application/json": {"schema": schema, "examples": examples}});
        self.value["requestBody"] = json!({"required": true, "content": content});
        self.errors(&[Kind::MediaType])
    }

    /// Asks the model, within the time that headers give.
    pub fn asks_the_model(mut self) -> Self {
        for name in ["RequestTimeout", "FirstTokenTimeout"] {
            self.parameter(json!({"$ref": format!("#/components/parameters/{name}")}));
        }
        self.errors(&ASKING)
    }

    /// Answers with JSON of this schema.
    pub fn answers(self, status: &str, text: &str, schema: Value) -> Self {
        self.answers_with(status, text, "application/json", schema)
    }

    /// Answers with something of this media type; a second one for a status is another form of its answer.
    pub fn answers_with(mut self, status: &str, text: &str, media: &str, schema: Value) -> Self {
        let new = || json!({"description": text, "headers": headers(&[]), "content": {}});
        let response = self.responses.entry(status).or_insert_with(new);
        response["content"][media] = json!({"schema": schema});
        self
    }

    /// Answers with another place.
    pub fn redirects(mut self, status: &str, text: &str) -> Self {
        self.responses.insert(status.to_owned(), json!({"description": text}));
        self
    }

    /// Answers a body with `stream` by server-sent events, each of which has `frame` as its data.
    pub fn streams(self, text: &str, frame: Value) -> Self {
        let of = |schema: Value| json!({"contentMediaType": "application/json", "contentSchema": schema});
        let error = reference(self.wire.error);
        let data = json!({"type": "string", "anyOf": [of(frame), of(error), {"const": "[DONE]"}]});
        // Before OpenAPI 3.2 this is the schema of one event.
        let schema = json!({
            "type": "object", "required": ["data"], "properties": {"data": data},
        });
        self.answers_with("200", text, "text/event-stream", schema)
    }

    /// May answer with errors of these kinds, in the words of its wire.
    pub fn errors(mut self, kinds: &[Kind]) -> Self {
        for kind in kinds {
            let error = Error::new(*kind, "");
            let status = (self.wire.wording)(&error).0.as_str().to_owned();
            let text = meaning(*kind);
            match self.responses.get_mut(&status) {
                Some(response) => {
                    let said = response["description"].as_str().unwrap_or_default();
                    if !said.contains(text) {
                        response["description"] = format!("{said} {text}").into();
                    }
                }
                None => {
                    let schema = reference(self.wire.error);
                    let response = json!({
                        "description": text,
                        "headers": headers(&extra_headers(*kind)),
                        "content": {"application/json": {"schema": schema}},
                    });
                    self.responses.insert(status, response);
                }
            }
        }
        self
    }

    /// As it stands in the document.
    pub fn build(self) -> Value {
        let Self { mut value, mut responses, .. } = self;
        responses.sort_keys();
        value["responses"] = Value::Object(responses);
        value
    }
}

/// The headers of an answer: those that all have, and some more.
fn headers(more: &[&str]) -> Value {
    let all = ["x-request-id"].iter().chain(more);
    all.map(|name| (name.to_string(), json!({"$ref": format!("#/components/headers/{name}")})))
        .collect()
}

fn extra_headers(kind: Kind) -> Vec<&'static str> {
    match kind {
        Kind::Unauthenticated => vec!["www-authenticate"],
        kind if kind.row().retry => vec!["retry-after"],
        _ => Vec::new(),
    }
}

/// What an error means to whoever asked.
fn meaning(kind: Kind) -> &'static str {
    match kind {
        Kind::Invalid => {
            "The request is malformed, out of range, or not possible for what it names."
        }
        Kind::Unauthenticated => "A key is needed, or the one given is not one of this server's.",
        Kind::Forbidden => "The admin key is needed, or administration is off.",
        Kind::NotFound => "There is no model, task or adapter of that name.",
        Kind::MethodNotAllowed => {
            "The route does not take this method; `Allow` says which it takes."
        }
        Kind::RequestTimeout => "The body came too slowly.",
        Kind::Conflict => "The state changed, or the name is in use.",
        Kind::TooLarge => "The body is larger than the server's limit.",
        Kind::ContextLength => {
            "The prompt and what is to follow have more tokens than the context."
        }
        Kind::MediaType => "The body is compressed, or is not of the media type that is read here.",
        Kind::Overloaded => "The queue is full; `Retry-After` says when to come back.",
        Kind::Cancelled => "The client left.",
        Kind::Internal => "The server is at fault.",
        Kind::Unavailable => "The model is loading, the server is about to end, or it has failed.",
        Kind::Deadline => "The time that the request gave has passed.",
    }
}

/// What operations refer to: parameters and headers.
pub fn components() -> Value {
    let milliseconds = json!({"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_MS});
    let header = |text: &str, kind: &str| json!({"description": text, "schema": {"type": kind}});
    json!({
        "parameters": {
            "RequestId": {
                "name": "x-request-id", "in": "header",
                "description": "The request's id, for logs and answers: 1 to 128 letters, digits or \
                                -_.:/+=. Anything else is replaced by a new one.",
                "schema": {"type": "string"}, "example": "my-request-1",
            },
            "RequestTimeout": {
                "name": "x-request-timeout-ms", "in": "header",
                "description": "Within how many milliseconds the whole answer must be out.",
                "schema": milliseconds, "example": 60000,
            },
            "FirstTokenTimeout": {
                "name": "x-llm-d-slo-ttft-ms", "in": "header",
                "description": "Within how many milliseconds the first token must be out.",
                "schema": milliseconds, "example": 60000,
            },
        },
        "headers": {
            "x-request-id": header("The request's id.", "string"),
            "retry-after": header("When to come back, in seconds.", "integer"),
            "www-authenticate": header("The scheme of keys.", "string"),
        },
        "securitySchemes": {
            "key": {
                "type": "http", "scheme": "bearer",
                "description": "One of the server's API keys, or its admin key. A server without API \
                                keys lets everybody in.",
            },
            "admin": {
                "type": "http", "scheme": "bearer",
                "description": "The admin key of a server that was started with --enable-adapter-admin.",
            },
        },
    })
}
