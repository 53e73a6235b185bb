//! Answers of this wire: the text, and the tokens it was made of.
//!
//! Texts are decoded here from their tokens and not taken from the chunks, since this wire leaves a stop
//! string at its text's end and shows the token that ended it.

use super::ask::Wanted;
use super::refusal::refusal;
use crate::api::Service;
use crate::api::http::answer::{Frames, Progress, Writer};
use crate::api::http::respond::to_json;
use crate::api::ticket::{Chunk, End, Reply, ScoredToken, Ticket};
use crate::error::Error;
use crate::request::{Finish, Usage};
use crate::telemetry::{Record, now};
use crate::text::{Incremental, Tokenizer};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};
use utoipa::ToSchema;

/// How a whole answer stands in its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// By itself.
    Object,
    /// In a list of one.
    List,
}

/// Writes this wire's answers.
pub struct TgiWriter {
    wanted: Wanted,
    shape: Shape,
    seed: u64,
    record: Arc<Record>,
    /// When the engine had taken the request.
    admitted: Instant,
    /// What was streamed.
    streamed: Transcript,
}

/// A text and how many tokens it was made of.
struct Transcript {
    tokenizer: Arc<Tokenizer>,
    decoder: Incremental,
    text: String,
    tokens: u32,
}

#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = TgiToken)]
struct Token {
    id: u32,
    text: String,
    logprob: Option<f32>,
    special: bool,
}

#[derive(Serialize, ToSchema)]
#[schema(as = TgiPromptToken)]
struct PromptToken {
    id: u32,
    text: String,
    logprob: Option<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = TgiFinishReason)]
enum Reason {
    Length,
    EosToken,
    StopSequence,
}

#[derive(Serialize, ToSchema)]
pub struct Answer {
    generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = TgiDetails)]
struct Details {
    finish_reason: Reason,
    generated_tokens: u32,
    seed: Option<u64>,
    prefill: Vec<PromptToken>,
    tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Vec<Token>>,
}

#[derive(Serialize, ToSchema)]
pub struct Frame {
    /// Counted from 1.
    index: u32,
    token: Token,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Token>,
    generated_text: Option<String>,
    details: Option<StreamDetails>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = TgiStreamDetails)]
struct StreamDetails {
    finish_reason: Reason,
    generated_tokens: u32,
    seed: Option<u64>,
    input_length: u32,
}

/// A token by itself.
fn lone(tokenizer: &Tokenizer, id: u32, logprob: Option<f32>) -> Token {
    Token { id, text: tokenizer.decode(&[id]), logprob, special: tokenizer.is_special(id) }
}

impl Transcript {
    fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, decoder: Incremental::new(&[]), text: String::new(), tokens: 0 }
    }

    /// Adds a token. Bytes of an unfinished character come with the token that finishes it.
    fn push(&mut self, scored: &ScoredToken) -> Token {
        self.tokens += 1;
        let mut token = lone(&self.tokenizer, scored.id, scored.logprob);
        if !token.special {
            token.text = self.decoder.push(self.tokenizer.token_bytes(scored.id)).text;
            self.text.push_str(&token.text);
        }
        token
    }

    /// Ends the text: why, and the token that ended it, if one did, which counts as one of its tokens.
    fn end(&mut self, end: &End) -> (Reason, Option<Token>) {
        self.text.push_str(&self.decoder.finish());
        let reason = match end.finish {
            // This wire has no other word for a text that is complete.
            Finish::EndToken | Finish::Grammar => Reason::EosToken,
            Finish::StopString => Reason::StopSequence,
            Finish::Length => Reason::Length,
        };
        let token = end.stop_token.as_ref();
        let token = token.map(|token| lone(&self.tokenizer, token.id, token.logprob));
        self.tokens += u32::from(token.is_some());
        (reason, token)
    }
}

impl TgiWriter {
    /// A writer for a request that the engine has just taken.
    pub fn new(
        service: &Service,
        ticket: &Ticket,
        record: &Arc<Record>,
        wanted: Wanted,
        shape: Shape,
    ) -> Self {
        Self {
            wanted,
            shape,
            seed: ticket.seed(),
            record: record.clone(),
            admitted: now(),
            streamed: Transcript::new(service.tokenizer().clone()),
        }
    }

    fn seed(&self) -> Option<u64> {
        self.wanted.sampled.then_some(self.seed)
    }

    fn top_tokens(&self, scored: &ScoredToken) -> Vec<Token> {
        let top = scored.top.iter().filter(|_| self.wanted.top_tokens);
        top.map(|&(id, logprob)| lone(&self.streamed.tokenizer, id, Some(logprob))).collect()
    }

    fn prompt_token(&self, scored: &ScoredToken) -> PromptToken {
        let Token { id, text, logprob, .. } =
            lone(&self.streamed.tokenizer, scored.id, scored.logprob);
        PromptToken { id, text, logprob }
    }

    /// The text of a whole answer, and all that can be said of it.
    fn answer(&self, reply: &Reply) -> (String, Details) {
        let (prompt, scored) = self.scored(reply);
        let mut text = Transcript::new(self.streamed.tokenizer.clone());
        let mut tokens: Vec<Token> = scored.iter().map(|token| text.push(token)).collect();
        let end = reply.choices.iter().find_map(|choice| choice.end.as_ref());
        let (finish_reason, last) = end.map_or((Reason::Length, None), |end| text.end(end));
        tokens.extend(last);
        let top = scored.iter().filter(|_| self.wanted.top_tokens);
        let details = Details {
            finish_reason,
            generated_tokens: text.tokens,
            seed: self.seed(),
            prefill: prompt.iter().map(|token| self.prompt_token(token)).collect(),
            tokens,
            top_tokens: top.map(|token| self.top_tokens(token)).collect(),
        };
        (self.wanted.prefix.clone() + &text.text, details)
    }

    /// The tokens of the prompt, if they were asked for, and those of the text.
    fn scored<'a>(&self, reply: &'a Reply) -> (&'a [ScoredToken], &'a [ScoredToken]) {
        let prompt = if self.wanted.prefill { reply.usage.prompt_tokens as usize } else { 0 };
        let scored = reply.choices.iter().find_map(|choice| choice.logprobs.as_deref());
        let scored = scored.unwrap_or_default();
        scored.split_at(prompt.min(scored.len()))
    }
}

impl Writer for TgiWriter {
    fn whole(&self, reply: &Reply) -> Vec<u8> {
        let (generated_text, details) = self.answer(reply);
        let answer =
            Answer { generated_text, details: Some(details).filter(|_| self.wanted.details) };
        match self.shape {
            Shape::Object => to_json(&answer),
            Shape::List => to_json(&[answer]),
        }
    }

    /// Where the time went: `x-compute-time` in seconds, all others in whole milliseconds.
    fn headers(&self, reply: &Reply) -> HeaderMap {
        let generated = self.answer(reply).1.generated_tokens;
        let total = now() - self.record.arrived;
        let validation = self.admitted - self.record.arrived;
        let queue = reply.timing.queue.saturating_sub(validation);
        let inference = reply.timing.prefill + reply.timing.decode;
        let ms = |time: Duration| time.as_millis().to_string();
        [
            ("x-compute-type", "cpu".to_owned()),
            ("x-compute-time", total.as_secs_f64().to_string()),
            ("x-compute-characters", self.wanted.characters.to_string()),
            ("x-total-time", ms(total)),
            ("x-validation-time", ms(validation)),
            ("x-queue-time", ms(queue)),
            ("x-inference-time", ms(inference)),
            ("x-time-per-token", ms(inference / generated.max(1))),
            ("x-prompt-tokens", reply.usage.prompt_tokens.to_string()),
            ("x-generated-tokens", generated.to_string()),
        ]
        .into_iter()
        .filter_map(|(name, value)| {
            Some((HeaderName::from_static(name), HeaderValue::try_from(value).ok()?))
        })
        .collect()
    }

    fn chunk(&mut self, chunk: &Chunk, sofar: &Progress, frames: &mut Frames) {
        let mut tokens = Vec::new();
        for scored in chunk.logprobs.iter().flatten() {
            tokens.push((self.streamed.push(scored), self.top_tokens(scored)));
        }
        let mut reason = None;
        if let Some(end) = &chunk.end {
            let (why, token) = self.streamed.end(end);
            reason = Some(why);
            tokens.extend(token.map(|token| (token, Vec::new())));
        }
        let first = self.streamed.tokens + 1 - tokens.len() as u32;
        let count = tokens.len();
        for (i, (token, top_tokens)) in tokens.into_iter().enumerate() {
            let reason = reason.filter(|_| i + 1 == count);
            let frame = Frame {
                index: first + i as u32,
                token,
                top_tokens,
                generated_text: reason.map(|_| self.wanted.prefix.clone() + &self.streamed.text),
                details: reason.filter(|_| self.wanted.details).map(|finish_reason| {
                    StreamDetails {
                        finish_reason,
                        generated_tokens: self.streamed.tokens,
                        seed: self.seed(),
                        input_length: sofar.usage.prompt_tokens,
                    }
                }),
            };
            frames.push_back(to_json(&frame));
        }
    }

    /// This wire's streams end with their last token.
    fn end(&mut self, _: Usage, _: &mut Frames) {}

    fn error(&self, error: &Error) -> Vec<u8> {
        to_json(&refusal(error).1)
    }
}
