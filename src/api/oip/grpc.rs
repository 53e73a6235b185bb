//! `inference.GRPCInferenceService`: the protocol in messages. What a message holds becomes an [`Infer`],
//! and tensors become a message; what they mean is [`super::infer`]'s.
//!
//! Each message of a stream is a request of its own: it is counted, logged and traced as one, and its time
//! limits, which the stream's metadata may give, count from its own arrival.

use super::infer::{Form, INPUT, Infer, OUTPUTS, single, understand};
use super::tensor::{Datatype, Head as TensorHead, Tensor};
use super::{EXTENSIONS, Named, VERSION};
use crate::api::App;
use crate::api::grpc::inference::grpc_inference_service_server::GrpcInferenceService;
use crate::api::grpc::inference::infer_parameter::ParameterChoice;
use crate::api::grpc::inference::model_infer_request::InferInputTensor;
use crate::api::grpc::inference::model_infer_response::InferOutputTensor;
use crate::api::grpc::inference::model_metadata_response::TensorMetadata;
use crate::api::grpc::inference::*;
use crate::api::grpc::{messages, status, submit, unreadable};
use crate::api::http::call::{Call, Head};
use crate::api::http::health;
use crate::api::http::observe::Line;
use crate::api::http::respond::{log, tell};
use crate::api::ticket::{Chunk, Ticket};
use crate::error::{Error, Result as Checked};
use crate::request::{self, Usage};
use crate::telemetry::Record;
use axum::extract::MatchedPath;
use axum::http::Method;
use futures::StreamExt;
use futures::stream::{self, BoxStream, Stream};
use prost::Message;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::sync::Arc;
use tonic::{Code, Request, Response, Status, Streaming};

/// How many requests of one stream are worked on at once; those beyond it wait.
const AT_ONCE: usize = 256;

/// The parameter with which a client may ask for a last response without tensors. It has no effect: the
/// last response is always marked.
const EMPTY_FINAL: &str = "triton_enable_empty_final_response";
/// Whether a response is the last to its request.
const FINAL: &str = "triton_final_response";

/// The service.
#[derive(Clone)]
pub struct Wire(pub Arc<App>);

/// What the messages of an answer depend on.
struct Reply {
    form: Form,
    /// Whether elements are bytes, as those of the request were.
    raw: bool,
}

#[tonic::async_trait]
impl GrpcInferenceService for Wire {
    type ModelStreamInferStream = BoxStream<'static, Result<ModelStreamInferResponse, Status>>;

    async fn server_live(
        &self,
        _: Request<ServerLiveRequest>,
    ) -> Result<Response<ServerLiveResponse>, Status> {
        let live = health::check_live(&self.0).is_ok();
        Ok(Response::new(ServerLiveResponse { live }))
    }

    async fn server_ready(
        &self,
        _: Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        let ready = health::check_ready(&self.0).is_ok();
        Ok(Response::new(ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<ModelReadyRequest>,
    ) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let ready = self.known(&name, &version).is_ok() && health::check_ready(&self.0).is_ok();
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: "shoal".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: EXTENSIONS.map(str::to_owned).into(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        self.known(&name, &version).map_err(|error| status(&error))?;
        let tensor = |name: &str| TensorMetadata {
            name: name.into(),
            datatype: Datatype::Bytes.to_string(),
            shape: vec![-1],
        };
        Ok(Response::new(ModelMetadataResponse {
            name,
            versions: vec![VERSION.into()],
            platform: "shoal".into(),
            inputs: vec![tensor(INPUT)],
            outputs: OUTPUTS.map(tensor).into(),
        }))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        let head = Head::new(request.metadata().as_ref(), request.extensions());
        let (ticket, reply) =
            self.open(&head, request.into_inner(), false).await.map_err(|error| status(&error))?;
        let done = ticket.collect().await.map_err(|error| status(&error))?;
        Ok(Response::new(reply.message(&done.choices, done.usage)))
    }

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let head = Head::new(request.metadata().as_ref(), request.extensions());
        let route = request.extensions().get::<MatchedPath>().cloned();
        let wire = self.clone();
        let answers = request.into_inner().map(move |message| match message {
            Ok(message) => {
                let head = Head { record: Record::within(&head.record), ..head.clone() };
                let (record, traces) = (head.record.clone(), wire.0.traces.clone());
                let line = Line::new(record, Method::POST, route.clone(), traces);
                wire.clone().answers(head, message, line).map(Ok).boxed()
            }
            Err(broken) => stream::iter([Err(wire.refuse(&head, broken))]).boxed(),
        });
        Ok(Response::new(answers.flatten_unordered(AT_ONCE).boxed()))
    }
}

impl Wire {
    fn known(&self, name: &str, version: &str) -> Checked<()> {
        let Named(model) = Named::new(name, version)?;
        self.0.service.catalog().find(&model).map(|_| ())
    }

    /// Hands a message to the service; `stream` is whether its one text is to come in pieces.
    async fn open(
        &self,
        head: &Head,
        message: ModelInferRequest,
        stream: bool,
    ) -> Checked<(Ticket, Reply)> {
        let read = |message, call: &Call| read(&self.0, message, call, stream);
        submit(&self.0, head, message, read).await
    }

    /// The end of a stream that something came on that is no message.
    fn refuse(&self, head: &Head, broken: Status) -> Status {
        let Some(error) = unreadable(&broken) else { return broken };
        self.0.service.count_refused(&head.record, &error);
        status(&error)
    }

    /// All responses to one message of a stream, the last of them marked, and told to its line.
    fn answers(
        self,
        head: Head,
        message: ModelInferRequest,
        mut line: Line,
    ) -> impl Stream<Item = ModelStreamInferResponse> + Send {
        let id = message.id.clone();
        let open = async move {
            let (ticket, reply) = match self.open(&head, message, true).await {
                Ok(opened) => opened,
                Err(error) => return stream::iter([failed(&error, id, &mut line)]).boxed(),
            };
            let response = move |chunk: Checked<Chunk>, ticket: &Ticket| match chunk {
                Ok(chunk) => piece(&reply, chunk, ticket, &mut line),
                Err(error) => failed(&error, id.clone(), &mut line),
            };
            messages(ticket, response).boxed()
        };
        stream::once(open).flatten()
    }
}

/// A response with more of a text.
fn piece(
    reply: &Reply,
    chunk: Chunk,
    ticket: &Ticket,
    line: &mut Line,
) -> ModelStreamInferResponse {
    let over = ticket.is_over();
    let mut message = reply.message(&[chunk], ticket.usage());
    message.parameters.insert(FINAL.into(), flag(over));
    let response =
        ModelStreamInferResponse { error_message: String::new(), infer_response: Some(message) };
    line.message(response.encoded_len(), over.then_some(Code::Ok as i32));
    response
}

/// The last response to a request that failed.
fn failed(error: &Error, id: String, line: &mut Line) -> ModelStreamInferResponse {
    log(error);
    let parameters = HashMap::from([(FINAL.to_owned(), flag(true))]);
    let response = ModelStreamInferResponse {
        error_message: tell(error).message.to_owned(),
        infer_response: Some(ModelInferResponse { id, parameters, ..Default::default() }),
    };
    line.message(response.encoded_len(), Some(error.kind.row().grpc));
    response
}

fn read(
    app: &App,
    message: ModelInferRequest,
    call: &Call,
    stream: bool,
) -> Checked<(request::Request, Reply)> {
    let model = Named::new(&message.model_name, &message.model_version)?;
    let raw = !message.raw_input_contents.is_empty();
    let (request, form) = understand(app, model, ask(message)?, call)?;
    let request = if stream { single(request)? } else { request };
    Ok((request, Reply { form, raw }))
}

/// What a message asks for.
fn ask(message: ModelInferRequest) -> Checked<Infer> {
    let (inputs, raw) = (message.inputs, message.raw_input_contents);
    if !raw.is_empty() && raw.len() != inputs.len() {
        let message = format!("{} inputs have {} raw contents", inputs.len(), raw.len());
        return Err(Error::invalid("raw_input_contents", message));
    }
    let mut raw = raw.into_iter();
    let inputs = inputs.into_iter().map(|input| tensor(input, raw.next()));
    let mut outputs = Vec::new();
    for output in message.outputs {
        refuse_parameters("outputs", &output.parameters)?;
        outputs.push(output.name);
    }
    let mut parameters = message.parameters;
    parameters.remove(EMPTY_FINAL);
    Ok(Infer {
        id: Some(message.id).filter(|id| !id.is_empty()),
        inputs: inputs.collect::<Checked<_>>()?,
        parameters: parameters.into_iter().map(|(name, p)| (name, value(p))).collect::<Map<_, _>>(),
        outputs,
    })
}

fn refuse_parameters(of: &str, parameters: &HashMap<String, InferParameter>) -> Checked<()> {
    match parameters.keys().min() {
        None => Ok(()),
        Some(name) => {
            let name = format!("{of}.parameters.{name}");
            let message = format!("unknown field {name}");
            Err(Error::invalid(name, message).with_code("unknown_field"))
        }
    }
}

/// A parameter's value; one that is not said is `null`.
fn value(parameter: InferParameter) -> Value {
    match parameter.parameter_choice {
        None => Value::Null,
        Some(ParameterChoice::BoolParam(value)) => value.into(),
        Some(ParameterChoice::Int64Param(value)) => value.into(),
        Some(ParameterChoice::StringParam(value)) => value.into(),
        Some(ParameterChoice::DoubleParam(value)) => value.into(),
        Some(ParameterChoice::Uint64Param(value)) => value.into(),
    }
}

fn tensor(input: InferInputTensor, raw: Option<Vec<u8>>) -> Checked<Tensor> {
    refuse_parameters("inputs", &input.parameters)?;
    let fault =
        |what: String| Error::invalid(&input.name, format!("tensor {}: {what}", input.name));
    let datatype = Datatype::deserialize(Value::from(input.datatype.as_str()));
    let shape = input.shape.iter().map(|&size| u64::try_from(size).ok()).collect();
    let head = TensorHead {
        datatype: datatype.map_err(|e| fault(format!("datatype: {e}")))?,
        shape: Option::<_>::ok_or_else(shape, || fault(format!("its shape is {:?}", input.shape)))?,
        name: input.name.clone(),
    };
    match (raw, input.contents) {
        (Some(_), Some(_)) => Err(head.fault("it has both contents and raw contents")),
        (Some(bytes), None) => head.with_bytes(&bytes),
        (None, contents) => {
            let elements = elements(head.datatype, contents.unwrap_or_default());
            let Some(elements) = elements else { return Err(head.fault("it is not UTF-8")) };
            head.with(elements)
        }
    }
}

/// The elements of a tensor of this type; `None` if they are texts that are not UTF-8.
fn elements(datatype: Datatype, contents: InferTensorContents) -> Option<Vec<Value>> {
    fn all<T: Into<Value>>(list: Vec<T>) -> Option<Vec<Value>> {
        Some(list.into_iter().map(Into::into).collect())
    }
    match datatype {
        Datatype::Bool => all(contents.bool_contents),
        Datatype::Int8 | Datatype::Int16 | Datatype::Int32 => all(contents.int_contents),
        Datatype::Int64 => all(contents.int64_contents),
        Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 => all(contents.uint_contents),
        Datatype::Uint64 => all(contents.uint64_contents),
        Datatype::Fp32 => all(contents.fp32_contents),
        Datatype::Fp64 => all(contents.fp64_contents),
        Datatype::Bytes => {
            let text = |bytes| String::from_utf8(bytes).ok().map(Value::String);
            contents.bytes_contents.into_iter().map(text).collect()
        }
    }
}

impl Reply {
    fn message(&self, choices: &[Chunk], usage: Usage) -> ModelInferResponse {
        let tensors = self.form.tensors(choices);
        let output = |tensor: &Tensor| InferOutputTensor {
            name: tensor.name.clone(),
            datatype: tensor.datatype.to_string(),
            shape: tensor.shape.iter().map(|&size| size as i64).collect(),
            parameters: HashMap::new(),
            contents: (!self.raw).then(|| InferTensorContents {
                bytes_contents: tensor.texts().map(|text| text.as_bytes().to_vec()).collect(),
                ..Default::default()
            }),
        };
        let count = |tokens: u32| InferParameter {
            parameter_choice: Some(ParameterChoice::Int64Param(tokens.into())),
        };
        ModelInferResponse {
            model_name: self.form.model.clone(),
            model_version: VERSION.into(),
            id: self.form.id.clone().unwrap_or_default(),
            parameters: HashMap::from([
                ("prompt_tokens".to_owned(), count(usage.prompt_tokens)),
                ("completion_tokens".to_owned(), count(usage.completion_tokens)),
            ]),
            outputs: tensors.iter().map(output).collect(),
            raw_output_contents: match self.raw {
                true => tensors.iter().map(Tensor::bytes).collect(),
                false => Vec::new(),
            },
        }
    }
}

fn flag(value: bool) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(value)) }
}
