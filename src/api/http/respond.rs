//! Errors and JSON values as HTTP responses. Every error of this server has OpenAI's body, except on the
//! routes of wires that have words of their own: [`reword`] puts those in their place, whoever refused.

use crate::error::{Error, Kind};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json as value};
use std::sync::Arc;
use std::time::Duration;

/// How a wire words an error: its status and its body.
pub type Wording = fn(&Error) -> (StatusCode, Value);

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

/// What a client is told of `error`.
pub fn tell(error: &Error) -> Told<'_> {
    let again = error.kind.row().retry.then_some(Duration::from_secs(1));
    let seconds = |after: Duration| after.as_secs_f64().ceil().max(1.0) as u64;
    Told {
        message: start_of(error.public_message(), 1000),
        param: error.param.as_deref().map(|param| start_of(param, 100)),
        code: error.public_code(),
        retry_after: error.retry_after.or(again).map(seconds),
    }
}

/// OpenAI's wording: the table's status, and `{"error": {...}}`.
pub fn usual(error: &Error) -> (StatusCode, Value) {
    let Told { message, param, code, .. } = tell(error);
    let kind = error.kind.row().openai_type;
    let body = value!({
        "error": {"message": message, "type": kind, "param": param, "code": code},
    });
    (status(error), body)
}

/// OpenAI's body of an error.
pub fn error_body(error: &Error) -> Vec<u8> {
    usual(error).1.to_string().into_bytes()
}

/// Logs the cause of an internal error, which is not sent.
pub fn log(error: &Error) {
    if error.kind == Kind::Internal {
        tracing::error!(%error, "internal error");
    }
}

/// The status of an error in the table.
pub fn status(error: &Error) -> StatusCode {
    StatusCode::from_u16(error.kind.row().http).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
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
        log(&self);
        let mut response = json(status(&self), error_body(&self));
        if self.kind == Kind::Unauthenticated {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        if let Some(seconds) = tell(&self).retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(Arc::new(self));
        response
    }
}

/// The middleware that puts an error into the words of the wire whose route it is on.
pub async fn reword(
    State(wording): State<fn(&str) -> Option<Wording>>,
    request: Request,
    next: Next,
) -> Response {
    let wording = wording(request.uri().path());
    let mut response = next.run(request).await;
    if let (Some(wording), Some(error)) = (wording, response.extensions().get::<Arc<Error>>()) {
        let (status, body) = wording(error);
        *response.status_mut() = status;
        *response.body_mut() = body.to_string().into();
    }
    response
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
