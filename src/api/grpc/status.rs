//! Errors as gRPC has them: the code of the error table, the message, and what else a client is told as
//! metadata.

use crate::api::http::respond::{log, start_of, tell};
use crate::error::Error;
use axum::response::Response;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

/// Metadata: the field at fault, its characters beyond ASCII escaped.
const PARAM: &str = "shoal-param";
/// Metadata: a word for programs.
const CODE: &str = "shoal-code";
/// Metadata: when to try again, in whole seconds.
const RETRY_AFTER: &str = "retry-after";

/// The longest message, in characters: clients bound what all metadata may take.
const MESSAGE: usize = 500;

/// An error as the end of a call.
pub fn status(error: &Error) -> Status {
    log(error);
    let told = tell(error);
    let mut metadata = MetadataMap::new();
    let param = told.param.map(|param| param.escape_default().to_string());
    if let Some(Ok(param)) = param.map(MetadataValue::try_from) {
        metadata.insert(PARAM, param);
    }
    if let Some(code) = told.code {
        metadata.insert(CODE, MetadataValue::from_static(code));
    }
    if let Some(seconds) = told.retry_after {
        metadata.insert(RETRY_AFTER, seconds.into());
    }
    let code = Code::from(error.kind.row().grpc);
    Status::with_metadata(code, start_of(told.message, MESSAGE), metadata)
}

/// An error as the whole answer to a call, for what stands before the wires.
pub fn refusal(error: &Error) -> Response {
    status(error).into_http()
}
