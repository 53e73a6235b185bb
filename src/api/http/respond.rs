//! Errors and JSON values as HTTP responses. Every error of this server has OpenAI's body.

use crate::error::{Error, Kind};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json as value};
use std::time::Duration;

/// OpenAI's `{"error": {...}}`. The cause of an internal error is logged here and not sent.
pub fn error_body(error: &Error) -> Vec<u8> {
    if error.kind == Kind::Internal {
        tracing::error!(%error, "internal error");
    }
    let body = value!({"error": {
        "message": start_of(error.public_message(), 1000),
        "type": error.kind.row().openai_type,
        "param": error.param.as_deref().map(|param| start_of(param, 100)),
        "code": error.public_code(),
    }});
    body.to_string().into_bytes()
}

/// At most `characters` of a text that may hold what the client sent.
fn start_of(text: &str, characters: usize) -> &str {
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
        let mut response = json(status, error_body(&self));
        let again = self.kind.row().retry;
        if let Some(after) = self.retry_after.or(again.then_some(Duration::from_secs(1))) {
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
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
