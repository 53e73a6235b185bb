//! One error type and one table: a kind's HTTP status, gRPC code, metric label and whether a retry
//! can help. Both wires, the metrics and the logs read the same row, so they cannot disagree.
//! Beside it [`Faults`], for files.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Malformed, out of range, or not possible for this task.
    Invalid,
    /// No key, or not a valid one.
    Unauthenticated,
    /// A valid key without the right.
    Forbidden,
    /// No such route, task, adapter or model.
    NotFound,
    /// The route exists, the method does not.
    MethodNotAllowed,
    /// The request's head or body came too slowly.
    RequestTimeout,
    /// The state changed under the caller (a generation mismatch, a name in use).
    Conflict,
    /// More bytes than the limit.
    TooLarge,
    /// More tokens than the context.
    ContextLength,
    /// The body is not of a media type that the route reads.
    MediaType,
    /// The queue is full: try again later, here or elsewhere.
    Overloaded,
    /// The client left. Never sent, only logged and counted.
    Cancelled,
    /// Ours. The cause is logged, not sent.
    Internal,
    /// Loading, draining or failed: this replica cannot, another may.
    Unavailable,
    /// The request's deadline passed.
    Deadline,
}

/// The row of one [`Kind`] in the error table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The kind this row describes.
    pub kind: Kind,
    /// HTTP status.
    pub http: u16,
    /// gRPC status code.
    pub grpc: i32,
    /// Whether the same request may succeed later.
    pub retry: bool,
    /// Value of the metric label `outcome`.
    pub outcome: &'static str,
    /// OpenAI's `error.type`.
    pub openai_type: &'static str,
    /// OpenAI's `error.code` unless the error carries a narrower one.
    pub code: Option<&'static str>,
}

/// One row per kind, in the order of the kinds.
#[rustfmt::skip]
pub const TABLE: [Row; 15] = {
    use Kind::*;
    const fn row(
        kind: Kind, http: u16, grpc: i32, retry: bool,
        outcome: &'static str, openai_type: &'static str, code: Option<&'static str>,
    ) -> Row {
        Row { kind, http, grpc, retry, outcome, openai_type, code }
    }
    [
        row(Invalid,          400, 3,  false, "invalid",     "invalid_request_error", None),
        row(Unauthenticated,  401, 16, false, "invalid",     "authentication_error",  Some("invalid_api_key")),
        row(Forbidden,        403, 7,  false, "invalid",     "permission_error",      None),
        row(NotFound,         404, 5,  false, "not_found",   "not_found_error",       None),
        row(MethodNotAllowed, 405, 12, false, "invalid",     "invalid_request_error", Some("method_not_allowed")),
        row(RequestTimeout,   408, 4,  true,  "invalid",     "invalid_request_error", Some("request_timeout")),
        row(Conflict,         409, 10, false, "invalid",     "invalid_request_error", None),
        row(TooLarge,         413, 11, false, "too_large",   "invalid_request_error", Some("request_too_large")),
        row(ContextLength,    400, 11, false, "too_large",   "invalid_request_error", Some("context_length_exceeded")),
        row(MediaType,        415, 3,  false, "invalid",     "invalid_request_error", Some("unsupported_media_type")),
        row(Overloaded,       429, 8,  true,  "overloaded",  "rate_limit_error",      Some("overloaded")),
        row(Cancelled,        499, 1,  false, "cancelled",   "cancelled",             None),
        row(Internal,         500, 13, false, "internal",    "server_error",          None),
        row(Unavailable,      503, 14, true,  "unavailable", "unavailable_error",     Some("unavailable")),
        row(Deadline,         504, 4,  true,  "deadline",    "timeout_error",         Some("deadline_exceeded")),
    ]
};

impl Kind {
    /// This kind's row in the table.
    pub fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }
}

/// An error on its way to a client.
#[derive(Debug)]
pub struct Error {
    /// Selects the row of the table.
    pub kind: Kind,
    /// For the client: what is wrong and what is allowed. Hidden when the kind is `Internal`.
    pub message: String,
    /// The request field at fault, such as `controls.words`.
    pub param: Option<String>,
    /// A narrower machine-readable code than the row's.
    pub code: Option<&'static str>,
    /// When to try again, for `Overloaded` and `Unavailable`.
    pub retry_after: Option<Duration>,
    /// The cause, for the log.
    pub source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Shoal's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` with a message for the client.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            param: None,
            code: None,
            retry_after: None,
            source: None,
        }
    }

    /// [`Kind::Invalid`], naming the field at fault.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(Kind::Invalid, message) }
    }

    /// [`Kind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// [`Kind::Internal`] with its cause; the client sees neither.
    pub fn internal(
        message: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { source: Some(source.into()), ..Self::new(Kind::Internal, message) }
    }

    /// Names the request field at fault.
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Sets a narrower code than the kind's own.
    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// Says when a retry may succeed.
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// What the client may read.
    pub fn public_message(&self) -> &str {
        if self.kind == Kind::Internal { "internal error" } else { &self.message }
    }

    /// OpenAI's `error.code`.
    pub fn public_code(&self) -> Option<&'static str> {
        self.code.or(self.kind.row().code)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}

/// Everything that is wrong with something on disk: at least one sentence, each naming file and key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(pub Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl StdError for Faults {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_finds_its_own_row() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.kind as usize, i);
            assert_eq!(row.kind.row(), row);
        }
    }

    #[test]
    fn internal_errors_hide_their_text() {
        let e = Error::internal("matmul failed at layer 3", "shape mismatch");
        assert_eq!(e.public_message(), "internal error");
        assert_eq!(e.to_string(), "matmul failed at layer 3: shape mismatch");
    }
}
