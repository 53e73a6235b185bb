//! JSON out: whole answers and stream frames, in the two dialects that differ only in their shape.

use super::logprobs::Logprobs;
use super::ticket::{Chunk, End, Reply, Ticket};
use crate::error::Error;
use crate::request::{ExpertUse, Usage};
use serde::Serialize;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Whose shape an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI's legacy completions.
    Completion,
    /// `POST /v1/tasks/{task}/generate`.
    Native,
}

impl Dialect {
    /// Names the prompt as this dialect's bodies do.
    pub fn name(self, error: Error) -> Error {
        match error.param.as_deref() {
            Some("prompt") if self == Dialect::Native => error.with_param("input"),
            _ => error,
        }
    }
}

/// Writes the answer to one request.
#[derive(Clone, Debug)]
pub struct Writer {
    dialect: Dialect,
    id: String,
    /// The name that the client asked for.
    model: String,
    /// The bundle's id.
    bundle: Arc<str>,
    created: u64,
    /// Whether frames have a field for usage, and the stream a frame for it.
    include_usage: bool,
    /// The adapters, where they are to be reported.
    adapters: Option<Vec<AdapterPart>>,
}

#[derive(Serialize)]
struct Body<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    task: Option<&'a str>,
    model: &'a str,
    created: u64,
    choices: &'a [Piece<'a>],
    /// Absent, `null`, or a value.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Tokens>>,
}

#[derive(Serialize)]
struct Piece<'a> {
    index: usize,
    text: &'a str,
    /// Absent, `null`, or a value.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Option<&'a Logprobs>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    words: Option<Option<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    debug: Option<Debug<'a>>,
}

/// What computed a text.
#[derive(Serialize)]
struct Debug<'a> {
    adapters: &'a [AdapterPart],
    routing: Vec<Layer<'a>>,
}

#[derive(Clone, Debug, Serialize)]
struct AdapterPart {
    name: String,
    generation: u64,
    weight: f32,
}

/// How many rows each expert of a layer computed.
#[derive(Serialize)]
struct Layer<'a> {
    layer: usize,
    rows_per_expert: &'a [u64],
}

#[derive(Serialize)]
struct Tokens {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
}

impl<'a> Layer<'a> {
    fn of(used: &'a ExpertUse) -> Self {
        Self { layer: used.layer, rows_per_expert: &used.rows }
    }
}

impl From<Usage> for Tokens {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
        }
    }
}

/// Seconds since 1970, for `created` fields.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Writer {
    /// A writer of the answer to `ticket`.
    pub fn new(dialect: Dialect, ticket: &Ticket, bundle: Arc<str>, include_usage: bool) -> Self {
        let prefix = if dialect == Dialect::Completion { "cmpl" } else { "gen" };
        let part = |(name, generation, weight): &(String, u64, f32)| AdapterPart {
            name: name.clone(),
            generation: *generation,
            weight: *weight,
        };
        Self {
            adapters: ticket.debug().map(|parts| parts.iter().map(part).collect()),
            dialect,
            id: format!("{prefix}-{}", ticket.id()),
            model: ticket.model().to_string(),
            bundle,
            created: unix_time(),
            include_usage,
        }
    }

    /// The whole answer.
    pub fn whole(&self, reply: &Reply) -> Vec<u8> {
        let choices: Vec<Piece> = reply
            .choices
            .iter()
            .enumerate()
            .map(|(index, choice)| {
                self.piece(index, &choice.text, choice.logprobs.as_ref(), Some(&choice.end))
            })
            .collect();
        self.body(&choices, Some(Some(reply.usage.into())))
    }

    /// One frame; `last` is the usage if no chunk follows.
    pub fn frame(&self, chunk: &Chunk, last: Option<Usage>) -> Vec<u8> {
        let end = chunk.end.as_ref();
        let piece = self.piece(chunk.index, &chunk.text, chunk.logprobs.as_ref(), end);
        let usage = match self.dialect {
            Dialect::Completion => self.include_usage.then_some(None),
            Dialect::Native => Some(last.map(Tokens::from)),
        };
        self.body(&[piece], usage)
    }

    /// The frame after the last, if the client asked for it.
    pub fn usage_frame(&self, usage: Usage) -> Option<Vec<u8>> {
        let wanted = self.dialect == Dialect::Completion && self.include_usage;
        wanted.then(|| self.body(&[], Some(Some(usage.into()))))
    }

    fn piece<'a>(
        &'a self,
        index: usize,
        text: &'a str,
        logprobs: Option<&'a Logprobs>,
        end: Option<&'a End>,
    ) -> Piece<'a> {
        let native = self.dialect == Dialect::Native;
        Piece {
            index,
            text,
            logprobs: if native { logprobs.map(Some) } else { Some(logprobs) },
            finish_reason: end.map(|end| end.finish.as_str()),
            words: native.then(|| end.map(|end| end.words)),
            debug: self.adapters.as_ref().zip(end).map(|(adapters, end)| Debug {
                adapters,
                routing: end.experts.iter().map(Layer::of).collect(),
            }),
        }
    }

    fn body(&self, choices: &[Piece], usage: Option<Option<Tokens>>) -> Vec<u8> {
        let native = self.dialect == Dialect::Native;
        let body = Body {
            id: &self.id,
            object: (!native).then_some("text_completion"),
            task: native.then_some(&self.model),
            model: if native { &self.bundle } else { &self.model },
            created: self.created,
            choices,
            usage,
        };
        serde_json::to_vec(&body).expect("strings and numbers are always JSON")
    }
}
