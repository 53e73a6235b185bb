//! `shoal.v1`: the native wire in messages. What a message holds becomes a [`Request`] here, and what
//! the native reply says becomes a message.

use super::call::{messages, read, submit};
use super::proto::{self, generate_request, shoal_server};
use super::status::status;
use crate::api::App;
use crate::api::http::answer::{Tokens, server_timing, unix_time};
use crate::api::http::call::{Call, Head, milliseconds};
use crate::api::http::debug::Debug;
use crate::api::http::fields::missing;
use crate::api::native::{NativeWriter, Piece};
use crate::api::openai::{Logprobs, Top};
use crate::api::score::Score;
use crate::api::ticket::{Chunk, Ticket};
use crate::error::{Error, Result as Checked};
use crate::request::{Grammar, Input, Params, Request, Timing, Usage};
use crate::task::{Control, ControlKind, Task};
use futures::StreamExt;
use futures::stream::BoxStream;
use prost_types::value::Kind as Value;
use serde_json::{Number, Value as Json};
use std::collections::BTreeMap;
use std::sync::Arc;
use tonic::metadata::MetadataValue;
use tonic::{Response, Status};

/// The service.
pub struct Wire(pub Arc<App>);

#[tonic::async_trait]
impl shoal_server::Shoal for Wire {
    type GenerateStream = BoxStream<'static, Result<proto::GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: tonic::Request<proto::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (ticket, writer) = self.open(request).await?;
        let answer = messages(ticket, move |chunk, ticket| {
            let chunk = chunk.map_err(|error| status(&error))?;
            let last = ticket.is_over().then(|| ticket.usage());
            Ok(message(&writer, &[chunk], last))
        });
        Ok(Response::new(answer.boxed()))
    }

    async fn generate_once(
        &self,
        request: tonic::Request<proto::GenerateRequest>,
    ) -> Result<Response<proto::GenerateResponse>, Status> {
        let (ticket, writer) = self.open(request).await?;
        let reply = ticket.collect().await.map_err(|error| status(&error))?;
        Ok(timed(message(&writer, &reply.choices, Some(reply.usage)), &reply.timing))
    }

    async fn score(
        &self,
        request: tonic::Request<proto::ScoreRequest>,
    ) -> Result<Response<proto::ScoreResponse>, Status> {
        let refused = |error| status(&named(error));
        let head = Head::new(request.metadata().as_ref(), request.extensions());
        let asked = read(&self.0, &head, request.into_inner(), understand_labels);
        let asked = asked.map_err(refused)?;
        let (task, labels) = (asked.model.clone(), asked.labels.clone());
        let scores = self.0.service.score(asked).await.map_err(refused)?;
        let score = |(label, score): (String, &Score)| proto::LabelScore {
            label,
            logprob: score.logprob,
            probability: score.probability,
            tokens: score.tokens,
        };
        let response = proto::ScoreResponse {
            id: format!("score-{}", head.record.id),
            task,
            model: self.0.bundle.as_ref().into(),
            created: unix_time() as i64,
            scores: labels.into_iter().zip(&scores.labels).map(score).collect(),
            usage: Some(scores.usage.into()),
        };
        Ok(timed(response, &scores.timing))
    }

    async fn list_tasks(
        &self,
        _: tonic::Request<proto::ListTasksRequest>,
    ) -> Result<Response<proto::ListTasksResponse>, Status> {
        let listing = self.0.service.catalog().listing();
        let data = listing.tasks.named().map(|task| entry(task)).collect();
        Ok(Response::new(proto::ListTasksResponse { data }))
    }
}

impl Wire {
    async fn open(
        &self,
        request: tonic::Request<proto::GenerateRequest>,
    ) -> Result<(Ticket, NativeWriter), Status> {
        let head = Head::new(request.metadata().as_ref(), request.extensions());
        let read = |message, call: &_| Ok((understand(message, call)?, ()));
        let ticket = submit(&self.0, &head, request.into_inner(), read).await;
        let (ticket, ()) = ticket.map_err(|error| status(&named(error)))?;
        let writer = NativeWriter::new(&self.0.service, &ticket, self.0.bundle.clone());
        Ok((ticket, writer))
    }
}

/// Names fields as this wire does.
fn named(error: Error) -> Error {
    match error.param.as_deref() {
        Some("task") => error.with_param("as_task"),
        _ => error,
    }
}

/// A whole answer that says where its time went.
fn timed<T>(message: T, timing: &Timing) -> Response<T> {
    let mut response = Response::new(message);
    if let Ok(timing) = MetadataValue::try_from(server_timing(timing).as_bytes()) {
        response.metadata_mut().insert("server-timing", timing);
    }
    response
}

/// A message as what it asks for: nothing of it is about sampling.
fn understand_labels(message: proto::ScoreRequest, call: &Call) -> Checked<Request> {
    let proto::ScoreRequest { task, input, controls, labels, adapters, timeout_ms, as_task } =
        message;
    let rest = proto::GenerateRequest {
        task,
        input,
        controls,
        adapters,
        timeout_ms,
        as_task,
        ..proto::GenerateRequest::default()
    };
    Ok(Request { labels, ..understand(rest, call)? })
}

/// A message as what it asks for.
fn understand(message: proto::GenerateRequest, call: &Call) -> Checked<Request> {
    let params = params(&message);
    let timeout = message.timeout_ms.map(|ms| milliseconds("timeout_ms", ms)).transpose()?;
    let (deadline, first_token_deadline) = call.deadlines(timeout);
    let mixture = |mixture: proto::AdapterMixture| {
        mixture.adapters.into_iter().map(|part| (part.name, part.weight)).collect()
    };
    let input = message.input.ok_or_else(|| missing("input"))?;
    Ok(Request {
        record: call.record.clone(),
        model: message.task,
        adapters: message.adapters.map(mixture),
        task: message.as_task,
        debug: message.debug.is_some_and(|debug| debug.routing),
        inputs: vec![Input::Text(input)],
        prompt_field: "input",
        controls: controls(message.controls.unwrap_or_default())?,
        params,
        labels: Vec::new(),
        grammar: message.grammar.map(grammar).transpose()?,
        usual_max_tokens: None,
        deadline,
        first_token_deadline,
    })
}

fn params(message: &proto::GenerateRequest) -> Params {
    let (stop, bias) = (&message.stop, &message.logit_bias);
    Params {
        truncate: None,
        max_tokens: message.max_tokens,
        min_tokens: message.min_tokens,
        temperature: message.temperature,
        top_k: message.top_k,
        top_p: message.top_p,
        min_p: message.min_p,
        repetition_penalty: message.repetition_penalty,
        presence_penalty: message.presence_penalty,
        frequency_penalty: message.frequency_penalty,
        seed: message.seed,
        stop: (!stop.is_empty()).then(|| stop.clone()),
        logit_bias: (!bias.is_empty()).then(|| bias.iter().map(|(&id, &b)| (id, b)).collect()),
        logprobs: message.logprobs,
        ignore_eos: message.ignore_eos,
        echo: message.echo,
        n: message.n,
    }
}

/// What texts must look like, and the field that says so.
fn grammar(given: generate_request::Grammar) -> Checked<(&'static str, Grammar)> {
    use generate_request::Grammar as Given;
    Ok(match given {
        Given::Choice(texts) => ("choice", Grammar::Choice(texts.values)),
        Given::Regex(regex) => ("regex", Grammar::Regex(regex)),
        Given::JsonSchema(text) => {
            let schema = serde_json::from_str(&text);
            let bad = |e| Error::invalid("json_schema", format!("json_schema must be JSON: {e}"));
            ("json_schema", Grammar::JsonSchema(schema.map_err(bad)?))
        }
    })
}

fn controls(given: prost_types::Struct) -> Checked<BTreeMap<String, Json>> {
    let read = |(name, value): (String, prost_types::Value)| {
        let value = json(value).ok_or_else(|| {
            let message = format!("controls.{name} holds a number that is not finite");
            Error::invalid(format!("controls.{name}"), message)
        })?;
        Ok((name, value))
    };
    given.fields.into_iter().map(read).collect()
}

/// A value as JSON, where numbers that are whole are integers; `None` if a number is not finite.
fn json(value: prost_types::Value) -> Option<Json> {
    /// Beyond it a double has no room for every integer.
    const MOST: f64 = (1u64 << 53) as f64;
    Some(match value.kind {
        None | Some(Value::NullValue(_)) => Json::Null,
        Some(Value::NumberValue(n)) if n.fract() == 0.0 && n.abs() <= MOST => (n as i64).into(),
        Some(Value::NumberValue(n)) => Json::Number(Number::from_f64(n)?),
        Some(Value::StringValue(text)) => text.into(),
        Some(Value::BoolValue(yes)) => yes.into(),
        Some(Value::ListValue(list)) => list.values.into_iter().map(json).collect::<Option<_>>()?,
        Some(Value::StructValue(object)) => {
            let fields = object.fields.into_iter();
            fields.map(|(name, value)| Some((name, json(value)?))).collect::<Option<_>>()?
        }
    })
}

fn message(
    writer: &NativeWriter,
    chunks: &[Chunk],
    usage: Option<Usage>,
) -> proto::GenerateResponse {
    proto::GenerateResponse {
        id: writer.id.clone(),
        task: writer.task.clone(),
        model: writer.bundle.as_ref().into(),
        created: writer.created as i64,
        choices: chunks.iter().map(|chunk| writer.piece(chunk).into()).collect(),
        usage: usage.map(Into::into),
    }
}

impl From<Usage> for proto::Usage {
    fn from(usage: Usage) -> Self {
        let Tokens { prompt_tokens, completion_tokens, total_tokens } = usage.into();
        Self { prompt_tokens, completion_tokens, total_tokens }
    }
}

impl From<Piece<'_>> for proto::Choice {
    fn from(piece: Piece) -> Self {
        Self {
            index: piece.index as u32,
            text: piece.text.into(),
            logprobs: piece.logprobs.map_or_else(Vec::new, tokens),
            finish_reason: piece.finish_reason.map(Into::into),
            words: piece.words,
            debug: piece.debug.map(Into::into),
        }
    }
}

/// OpenAI's parallel arrays as one message a token.
fn tokens(all: Logprobs) -> Vec<proto::TokenLogprob> {
    let Logprobs { tokens, token_logprobs, top_logprobs, text_offset } = all;
    let scored = tokens.into_iter().zip(token_logprobs).zip(top_logprobs).zip(text_offset);
    let message = |(((token, logprob), best), offset): (((_, _), Option<Top>), usize)| {
        let best = best.map_or_else(Vec::new, |best| best.0).into_iter();
        let best = best.map(|(token, logprob)| proto::TopLogprob { token, logprob });
        let (top_logprobs, text_offset) = (best.collect(), offset as u32);
        proto::TokenLogprob { token, logprob, top_logprobs, text_offset }
    };
    scored.map(message).collect()
}

impl From<Debug<'_>> for proto::Routing {
    fn from(debug: Debug) -> Self {
        let adapters = debug.adapters.iter().map(|part| proto::AdapterUse {
            name: part.name.clone(),
            generation: part.generation,
            weight: part.weight,
        });
        let routing = debug.routing.iter().map(|used| proto::ExpertUse {
            layer: used.layer as u32,
            rows_per_expert: used.rows_per_expert.to_vec(),
        });
        Self { adapters: adapters.collect(), routing: routing.collect() }
    }
}

/// A task as it is listed.
fn entry(task: &Task) -> proto::Task {
    let controls = task.controls.iter();
    proto::Task {
        id: task.name.clone(),
        description: task.description.clone(),
        adapter: task.adapter.clone(),
        controls: controls.map(|(name, control)| (name.clone(), schema(control))).collect(),
    }
}

fn schema(control: &Control) -> proto::Control {
    let default = control.default.as_ref();
    let value = |kind| prost_types::Value { kind: Some(kind) };
    match &control.kind {
        ControlKind::Integer { minimum, maximum } => proto::Control {
            r#type: "integer".into(),
            minimum: Some(*minimum),
            maximum: Some(*maximum),
            default: default.and_then(|d| d.parse().ok()).map(|n| value(Value::NumberValue(n))),
            ..proto::Control::default()
        },
        ControlKind::Enum(words) => proto::Control {
            r#type: "string".into(),
            r#enum: words.clone(),
            default: default.map(|word| value(Value::StringValue(word.clone()))),
            ..proto::Control::default()
        },
    }
}
