//! Errors in this wire's words: `{"error", "error_type"}`, both strings.

use crate::api::http::respond::{status, tell};
use crate::error::{Error, Kind};
use axum::http::StatusCode;
use serde_json::{Value, json as value};

/// The status and the body of an error. A kind that this wire has no word for keeps the table's status,
/// by which its clients then tell errors apart.
pub fn refusal(error: &Error) -> (StatusCode, Value) {
    let message = tell(error).message;
    let (status, name, message) = match error.kind {
        Kind::Invalid | Kind::ContextLength => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "validation",
            format!("Input validation error: {}", renamed(message, error.param.as_deref())),
        ),
        Kind::TooLarge | Kind::MediaType => (status(error), "validation", message.to_owned()),
        Kind::Overloaded => (status(error), "overloaded", message.to_owned()),
        Kind::Internal => (
            StatusCode::FAILED_DEPENDENCY,
            "generation",
            format!("Request failed during generation: {message}"),
        ),
        Kind::Unavailable => (status(error), "healthcheck", message.to_owned()),
        _ => return (status(error), value!({"error": message})),
    };
    (status, value!({"error": message, "error_type": name}))
}

/// The message with the field at fault called as this wire calls it.
fn renamed(message: &str, param: Option<&str>) -> String {
    match param {
        Some("max_tokens") => message.replace("max_tokens", "max_new_tokens"),
        Some("logprobs") => message.replace("logprobs", "top_n_tokens"),
        _ => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_statuses_and_words() {
        let cases = [
            (Kind::Invalid, 422, Some("validation")),
            (Kind::ContextLength, 422, Some("validation")),
            (Kind::TooLarge, 413, Some("validation")),
            (Kind::NotFound, 404, None),
            (Kind::Unauthenticated, 401, None),
            (Kind::Overloaded, 429, Some("overloaded")),
            (Kind::Internal, 424, Some("generation")),
            (Kind::Unavailable, 503, Some("healthcheck")),
            (Kind::Deadline, 504, None),
        ];
        for (kind, want, name) in cases {
            let (status, body) = refusal(&Error::new(kind, "a reason"));
            assert_eq!((status.as_u16(), body["error_type"].as_str()), (want, name), "{kind:?}");
            let hidden = kind == Kind::Internal;
            assert_eq!(body["error"].as_str().unwrap().ends_with("a reason"), !hidden);
        }
        let error = Error::invalid("max_tokens", "max_tokens is 9");
        assert_eq!(refusal(&error).1["error"], "Input validation error: max_new_tokens is 9");
    }
}
