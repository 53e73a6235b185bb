//! `POST /v2/models/{model}/infer`: JSON, with Triton's extension for tensors as bytes. Those follow the
//! JSON, in the order of the tensors, and a header says how long the JSON is.

use super::Named;
use super::infer::{Form, Infer, understand};
use super::tensor::{Head as TensorHead, Tensor};
use crate::api::http::App;
use crate::api::http::answer::{Frames, Progress, Writer};
use crate::api::http::call::{Call, Head};
use crate::api::http::fields::{Fields, missing};
use crate::api::http::respond::to_json;
use crate::api::ticket::{Chunk, Reply};
use crate::error::{Error, Result};
use crate::request::Request;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use serde_json::{Map, Value, json as value};
use std::sync::Arc;

/// How many bytes of a body are JSON.
const JSON_LENGTH: &str = "inference-header-content-length";

/// The handler.
pub async fn infer(
    State(app): State<Arc<App>>,
    model: Result<Named>,
    head: Head,
    body: Body,
) -> Result<Response> {
    let read = |bytes: &[u8], call: &Call| read(&app, model?, &head.headers, bytes, call);
    let (request, writer) = app.read_bytes(&head, body, read).await?;
    let ticket = app.service.submit(request).await?;
    app.answer(ticket, writer, false).await
}

fn read(
    app: &App,
    model: Named,
    headers: &HeaderMap,
    body: &[u8],
    call: &Call,
) -> Result<(Request, InferWriter)> {
    let (json, mut rest) = split(headers, body)?;
    let mut fields = Fields::parse(json)?;
    let mut parameters = Fields::of(fields.take("parameters")?.unwrap_or_default(), "parameters.");
    let all_binary = parameters.take("binary_data_output")?.unwrap_or(false);
    let mut ask =
        Infer { id: fields.take("id")?, parameters: parameters.rest(), ..Infer::default() };
    let inputs: Vec<_> = fields.take("inputs")?.ok_or_else(|| missing("inputs"))?;
    for tensor in inputs {
        ask.inputs.push(input(tensor, &mut rest)?);
    }
    if !rest.is_empty() {
        let message = format!("the body has {} bytes more than its tensors", rest.len());
        return Err(Error::invalid("inputs", message));
    }
    let outputs: Vec<_> = fields.take("outputs")?.unwrap_or_default();
    fields.finish()?;
    let mut binary = Vec::new();
    for asked in outputs {
        let (name, as_bytes) = output(asked)?;
        ask.outputs.push(name);
        binary.push(as_bytes.unwrap_or(all_binary));
    }
    let (request, form) = understand(app, model, ask, call)?;
    binary.resize(form.outputs.len(), all_binary);
    Ok((request, InferWriter { form, binary }))
}

/// A body's JSON, and the bytes after it.
fn split<'a>(headers: &HeaderMap, body: &'a [u8]) -> Result<(&'a [u8], &'a [u8])> {
    let Some(length) = headers.get(JSON_LENGTH) else { return Ok((body, &[])) };
    let length = length.to_str().ok().and_then(|length| length.parse().ok());
    length.and_then(|length| body.split_at_checked(length)).ok_or_else(|| {
        let message = format!("{JSON_LENGTH} must be a number up to the body's {}", body.len());
        Error::invalid(JSON_LENGTH, message)
    })
}

/// A tensor, whose elements may be the first of the bytes that are left.
fn input(tensor: Map<String, Value>, rest: &mut &[u8]) -> Result<Tensor> {
    let mut fields = Fields::of(tensor, "inputs.");
    let head = TensorHead {
        name: fields.take("name")?.ok_or_else(|| fields.missing("name"))?,
        datatype: fields.take("datatype")?.ok_or_else(|| fields.missing("datatype"))?,
        shape: fields.take("shape")?.ok_or_else(|| fields.missing("shape"))?,
    };
    let mut size = None;
    if let Some(mut parameters) = fields.take_object("parameters", "inputs.parameters.")? {
        size = parameters.take("binary_data_size")?;
        parameters.finish()?;
    }
    let data = fields.take_value("data");
    fields.finish()?;
    match (data, size) {
        (Some(data), None) => head.with_json(data),
        (None, Some(size)) => {
            let Some((bytes, after)) = rest.split_at_checked(size) else {
                let left = rest.len();
                return Err(head.fault(format!("it has {size} bytes, but {left} are left")));
            };
            *rest = after;
            head.with_bytes(bytes)
        }
        _ => Err(head.fault("it needs either data or parameters.binary_data_size")),
    }
}

/// The name of a tensor that the answer is to have, and whether it is to be bytes, if that is said.
fn output(asked: Map<String, Value>) -> Result<(String, Option<bool>)> {
    let mut fields = Fields::of(asked, "outputs.");
    let name = fields.take("name")?.ok_or_else(|| fields.missing("name"))?;
    let mut binary = None;
    if let Some(mut parameters) = fields.take_object("parameters", "outputs.parameters.")? {
        binary = parameters.take("binary_data")?;
        parameters.finish()?;
    }
    fields.finish()?;
    Ok((name, binary))
}

/// Writes the answer to an inference.
struct InferWriter {
    form: Form,
    /// For each tensor of the answer, whether it is bytes.
    binary: Vec<bool>,
}

impl InferWriter {
    /// The JSON, and the bytes that follow it.
    fn parts(&self, reply: &Reply) -> (Vec<u8>, Vec<u8>) {
        let (mut outputs, mut bytes) = (Vec::new(), Vec::new());
        for (tensor, binary) in self.form.tensors(&reply.choices).iter().zip(&self.binary) {
            let before = bytes.len();
            if *binary {
                bytes.extend(tensor.bytes());
            }
            outputs.push(tensor.json(binary.then_some(bytes.len() - before)));
        }
        let mut json = self.form.json(reply);
        json.insert("outputs".into(), value!(outputs));
        (to_json(&json), bytes)
    }
}

impl Writer for InferWriter {
    fn whole(&self, reply: &Reply) -> Vec<u8> {
        let (mut json, bytes) = self.parts(reply);
        json.extend(bytes);
        json
    }

    fn headers(&self, reply: &Reply) -> HeaderMap {
        if !self.binary.contains(&true) {
            return HeaderMap::new();
        }
        let length = self.parts(reply).0.len();
        HeaderMap::from_iter([
            (HeaderName::from_static(JSON_LENGTH), HeaderValue::from(length)),
            (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        ])
    }

    /// An inference over HTTP is answered whole.
    fn chunk(&mut self, _: &Chunk, _: &Progress, _: &mut Frames) {}
}
