//! Errors and JSON values as HTTP responses. Every error of this server has OpenAI's body.

use crate::error::{Error, Kind};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json as value};
use std::time::Duration;

/// What a client is told of an error, on every wire.
pub struct Told<'a> {
    /// What is wrong and what is allowed.
    pub message: &'a str,
    /// The field at fault.
    pub param: Option<&'a str>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// When to try again, in whole seconds, where that can help.
    pub retry_after: Option<u64>,
}

/// What a client is told of `error`. The cause of an internal error is logged here and not told.
pub fn tell(error: &Error) -> Told<'_> {
    if error.kind == Kind::Internal {
        tracing::error!(%error, "internal error");
    }
    let again = error.kind.row().retry.then_some(Duration::from_secs(1));
    let seconds = |after: Duration| after.as_secs_f64().ceil().max(1.0) as u64;
    Told {
        message: start_of(error.public_message(), 1000),
        param: error.param.as_deref().map(|param| start_of(param, 100)),
        code: error.public_code(),
        retry_after: error.retry_after.or(again).map(seconds),
    }
}

/// OpenAI's `{"error": {...}}`.
pub fn error_body(error: &Error) -> Vec<u8> {
    body(error, &tell(error))
}

fn body(error: &Error, told: &Told) -> Vec<u8> {
    let body = value!({"error": {
        "message": told.message,
        "type": error.kind.row().openai_type,
        "param": told.param,
        "code": told.code,
    }});
    body.to_string().into_bytes()
}

/// At most `characters` of a text that may hold what the client sent.
pub fn start_of(text: &str, characters: usize) -> &str {
    text.char_indices().nth(characters).map_or(text, |(end, _)| &text[..end])
}

/// A value as JSON.
pub fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("strings, numbers and maps with string keys are always JSON")
}

/// A response with a JSON body.
pub fn json(status: StatusCode, body: Vec<u8>) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// A 200 with a JSON body.
pub fn reply(body: &Value) -> Response {
    json(StatusCode::OK, body.to_string().into_bytes())
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.kind.row().http).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let told = tell(&self);
        let mut response = json(status, body(&self, &told));
        if let Some(seconds) = told.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_in_whole_seconds() {
        let header = |ms| {
            let after = Duration::from_millis(ms);
            let error = Error::new(Kind::Overloaded, "full").with_retry_after(after);
            error.into_response().headers()["retry-after"].to_str().unwrap().to_string()
        };
        assert_eq!([header(0), header(1000), header(1001)], ["1", "1", "2"]);
    }

    #[test]
    fn bodies_are_openais() {
        let error = Error::invalid("n", "n is 0");
        let body = String::from_utf8(error_body(&error)).unwrap();
        assert_eq!(
            body,
            r#"{"error":{"message":"n is 0","type":"invalid_request_error","param":"n","code":null}}"#
        );
        let long = error_body(&Error::invalid("é".repeat(5000), "é".repeat(5000)));
        assert!(long.len() < 2500, "what a client sent is not sent back whole");
        let hidden = error_body(&Error::internal("secret", "cause"));
        assert!(!String::from_utf8(hidden).unwrap().contains("secret"));
    }
}
