//! The words that every wire shares: what is asked ([`Request`], [`Params`]), what the core needs of
//! it ([`Sampling`]) and what comes back ([`Finish`], [`Usage`], [`TokenLogprob`], [`Timing`]).
//!
//! `Params` is sparse: a request, a task's defaults and the server's defaults are three of them, laid
//! over each other. [`Params::check`] refuses what is out of range before any work is done.

use crate::error::{Error, Result};
use crate::telemetry::Record;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a client asks for, whichever wire it came by.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its id, its arrival, and what is found out about it.
    pub record: Arc<Record>,
    /// A task's name; the bundle's id or an adapter's name for raw text.
    pub model: String,
    /// Adapters with their weights, in place of the task's own; none of them is the base alone.
    pub adapters: Option<Vec<(String, f32)>>,
    /// Which task raw text is for, where adapters or experts depend on it.
    pub task: Option<String>,
    /// Report which adapters and experts computed the answer.
    pub debug: bool,
    /// The prompts; every one gives `n` texts.
    pub inputs: Vec<Input>,
    /// What the client calls them.
    pub prompt_field: &'static str,
    /// Control name to value, as given; checked against the task.
    pub controls: BTreeMap<String, serde_json::Value>,
    /// Sampling and lengths, as given.
    pub params: Params,
    /// The texts that are to be scored after the one prompt; none are to be generated then.
    pub labels: Vec<String>,
    /// What every text must look like, and the name of the field that says so.
    pub grammar: Option<(&'static str, Grammar)>,
    /// What `max_tokens` is where neither the request nor the task says; `None` is all that the
    /// context leaves.
    pub usual_max_tokens: Option<u32>,
    /// The whole request must end by then.
    pub deadline: Option<Instant>,
    /// The first token must be out by then.
    pub first_token_deadline: Option<Instant>,
}

/// The prompt's form.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Plain text: never parsed for special tokens.
    Text(String),
    /// Token ids, for the bundle's and adapters' ids only.
    Tokens(Vec<u32>),
    /// A conversation, which a chat template makes a text: never parsed for special tokens either.
    Chat(Vec<Message>),
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: one of [`ROLES`].
    pub role: String,
    /// What was said.
    pub content: String,
}

/// Who can speak in a conversation.
pub const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// Sampling and length parameters; `None` is "not given".
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// At most this many new tokens.
    pub max_tokens: Option<u32>,
    /// The end-of-text token is impossible before this many new tokens.
    pub min_tokens: Option<u32>,
    /// 0 is greedy; 0..=2.
    pub temperature: Option<f32>,
    /// Keep the k most likely tokens; 0 or -1 keeps all.
    pub top_k: Option<i64>,
    /// Keep the smallest set of tokens whose probability reaches this; (0, 1].
    pub top_p: Option<f32>,
    /// Drop tokens below this share of the likeliest one's probability; [0, 1].
    pub min_p: Option<f32>,
    /// Divides (or multiplies, if negative) the logits of tokens seen in prompt or output; (0, 10].
    pub repetition_penalty: Option<f32>,
    /// Subtracted once from the logits of tokens in the output; [-2, 2].
    pub presence_penalty: Option<f32>,
    /// Subtracted per occurrence in the output; [-2, 2].
    pub frequency_penalty: Option<f32>,
    /// Same seed, same text, whatever shares the batch.
    pub seed: Option<i64>,
    /// The text ends before the first of these.
    pub stop: Option<Vec<String>>,
    /// Token id to an addend of its logit; [-100, 100].
    pub logit_bias: Option<BTreeMap<u32, f32>>,
    /// Report the sampled token's log-probability and this many alternatives; 0..=20.
    pub logprobs: Option<u32>,
    /// Generate past the end-of-text token.
    pub ignore_eos: Option<bool>,
    /// Return the prompt before the text.
    pub echo: Option<bool>,
    /// How many texts; 1..=16.
    pub n: Option<u32>,
    /// Keep only this many of a raw prompt's tokens, the last ones; 1 or more.
    #[serde(skip)]
    pub truncate: Option<u32>,
}

/// The most texts that one request may ask for.
pub const MAX_N: u32 = 16;
/// The most stop strings.
pub const MAX_STOP: usize = 16;
/// The most `logit_bias` entries.
pub const MAX_BIAS: usize = 1024;
/// The most log-probability alternatives.
pub const MAX_LOGPROBS: u32 = 20;

fn in_range<T: PartialOrd + std::fmt::Display + Copy>(
    param: &str,
    value: Option<T>,
    ok: impl Fn(T) -> bool,
    allowed: &str,
) -> Result<()> {
    match value {
        Some(v) if !ok(v) => {
            Err(Error::invalid(param, format!("{param} is {v}; allowed: {allowed}")))
        }
        _ => Ok(()),
    }
}

impl Params {
    /// Refuses what is out of range, naming the field and what is allowed.
    pub fn check(&self) -> Result<()> {
        in_range("temperature", self.temperature, |v| (0.0..=2.0).contains(&v), "0 to 2")?;
        in_range(
            "top_k",
            self.top_k,
            |v| (-1..=1 << 20).contains(&v),
            "-1 (off), 0 (off) or more",
        )?;
        in_range("top_p", self.top_p, |v| v > 0.0 && v <= 1.0, "above 0, up to 1")?;
        in_range("min_p", self.min_p, |v| (0.0..=1.0).contains(&v), "0 to 1")?;
        let repetition = self.repetition_penalty;
        in_range("repetition_penalty", repetition, |v| v > 0.0 && v <= 10.0, "above 0, up to 10")?;
        in_range("presence_penalty", self.presence_penalty, |v| v.abs() <= 2.0, "-2 to 2")?;
        in_range("frequency_penalty", self.frequency_penalty, |v| v.abs() <= 2.0, "-2 to 2")?;
        in_range("logprobs", self.logprobs, |v| v <= MAX_LOGPROBS, "0 to 20")?;
        in_range("n", self.n, |v| (1..=MAX_N).contains(&v), "1 to 16")?;
        in_range("truncate", self.truncate, |v| v > 0, "1 or more")?;
        self.check_lists()?;
        if let (Some(min), Some(max)) = (self.min_tokens, self.max_tokens)
            && min > max
        {
            let message = format!("min_tokens is {min}, above max_tokens {max}");
            return Err(Error::invalid("min_tokens", message));
        }
        if self.max_tokens == Some(0) && self.echo != Some(true) {
            let message = "max_tokens is 0; that is allowed only with echo (it scores a prompt)";
            return Err(Error::invalid("max_tokens", message));
        }
        Ok(())
    }

    fn check_lists(&self) -> Result<()> {
        if let Some(stop) = &self.stop {
            if stop.len() > MAX_STOP {
                let message = format!("stop has {} strings; allowed: up to {MAX_STOP}", stop.len());
                return Err(Error::invalid("stop", message));
            }
            if stop.iter().any(|s| s.is_empty() || s.len() > 1024) {
                let message = "a stop string must have 1 to 1024 bytes";
                return Err(Error::invalid("stop", message));
            }
        }
        if let Some(bias) = &self.logit_bias {
            if bias.len() > MAX_BIAS {
                let message =
                    format!("logit_bias has {} entries; allowed: up to {MAX_BIAS}", bias.len());
                return Err(Error::invalid("logit_bias", message));
            }
            if let Some((id, v)) = bias.iter().find(|(_, v)| !v.is_finite() || v.abs() > 100.0) {
                let message = format!("logit_bias of token {id} is {v}; allowed: -100 to 100");
                return Err(Error::invalid("logit_bias", message));
            }
        }
        Ok(())
    }

    /// These parameters, with what is missing taken from `defaults`.
    pub fn over(self, defaults: &Params) -> Params {
        let d = defaults.clone();
        Params {
            max_tokens: self.max_tokens.or(d.max_tokens),
            min_tokens: self.min_tokens.or(d.min_tokens),
            temperature: self.temperature.or(d.temperature),
            top_k: self.top_k.or(d.top_k),
            top_p: self.top_p.or(d.top_p),
            min_p: self.min_p.or(d.min_p),
            repetition_penalty: self.repetition_penalty.or(d.repetition_penalty),
            presence_penalty: self.presence_penalty.or(d.presence_penalty),
            frequency_penalty: self.frequency_penalty.or(d.frequency_penalty),
            seed: self.seed.or(d.seed),
            stop: self.stop.or(d.stop),
            logit_bias: self.logit_bias.or(d.logit_bias),
            logprobs: self.logprobs.or(d.logprobs),
            ignore_eos: self.ignore_eos.or(d.ignore_eos),
            echo: self.echo.or(d.echo),
            n: self.n.or(d.n),
            truncate: self.truncate.or(d.truncate),
        }
    }

    /// The part that compute needs, with the field's usual defaults (OpenAI's: temperature 1).
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.map_or(0, |k| k.max(0) as u32),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias: self.logit_bias.iter().flatten().map(|(&id, &v)| (id, v)).collect(),
            logprobs: self.logprobs,
        }
    }
}

/// How one token is chosen from logits. Log-probabilities are of the raw logits, before any of this.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// Token id, addend of its logit.
    pub logit_bias: Vec<(u32, f32)>,
    /// Alternatives to report beside the chosen token; `None` reports nothing.
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// Whether choosing a token needs the tokens before it.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// What a text must look like, from its first character to its last.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// One of these.
    Choice(Vec<String>),
    /// All of it matches this regular expression, anchored or not.
    Regex(String),
    /// JSON that is valid under this schema.
    JsonSchema(serde_json::Value),
    /// A JSON object.
    Json,
}

/// Keeps one text inside its grammar: says what may follow, and is told what did.
pub trait Guide: Debug + Send {
    /// What may follow.
    fn allowed(&self) -> &Allowed;

    /// Takes the token that followed, which was allowed. False if the text is complete: nothing but
    /// its end may follow. It must then not be asked again.
    ///
    /// # Errors
    /// If what may follow cannot be told; the text cannot go on.
    fn accept(&mut self, token: u32) -> Result<bool>;

    /// Another one, for a text that is the same so far.
    fn fork(&self) -> Box<dyn Guide>;
}

impl Clone for Box<dyn Guide> {
    fn clone(&self) -> Self {
        self.fork()
    }
}

/// What a [`Guide`] lets follow: at least one token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Token `id` may follow if bit `id % 32` of word `id / 32` is set; those beyond may not.
    pub tokens: Vec<u32>,
    /// Whether the text may end here.
    pub end: bool,
}

/// Why a text ended, when it ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A token that ends texts.
    EndToken,
    /// A stop string.
    StopString,
    /// Its grammar, behind which nothing may follow.
    Grammar,
    /// `max_tokens` or the end of the context.
    Length,
}

impl Finish {
    /// OpenAI's `finish_reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::EndToken | Finish::StopString | Finish::Grammar => "stop",
            Finish::Length => "length",
        }
    }
}

/// Tokens of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt as the model saw it.
    pub prompt_tokens: u32,
    /// Tokens generated over all choices.
    pub completion_tokens: u32,
}

/// The log-probability of one token, by log-softmax of the raw logits.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// The likeliest tokens with theirs, best first; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Where the tokens of one text went, in one layer of experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertUse {
    /// The transformer block.
    pub layer: usize,
    /// Rows that each expert computed, prompt and output together.
    pub rows: Vec<u64>,
}

/// Where the time of one sequence went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// From arrival to the first step that ran any of it.
    pub queue: Duration,
    /// From there to its first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_range_is_named() {
        let bad = [
            (Params { temperature: Some(f32::NAN), ..Params::default() }, "temperature"),
            (Params { top_p: Some(0.0), ..Params::default() }, "top_p"),
            (Params { n: Some(0), ..Params::default() }, "n"),
            (Params { stop: Some(vec![String::new()]), ..Params::default() }, "stop"),
            (Params { max_tokens: Some(0), ..Params::default() }, "max_tokens"),
            (Params { logit_bias: Some([(1, 101.0)].into()), ..Params::default() }, "logit_bias"),
        ];
        for (params, param) in bad {
            assert_eq!(params.check().unwrap_err().param.as_deref(), Some(param));
        }
        Params { max_tokens: Some(0), echo: Some(true), ..Params::default() }.check().unwrap();
    }

    #[test]
    fn given_wins_over_default() {
        let given = Params { temperature: Some(0.0), ..Params::default() };
        let task = Params { temperature: Some(0.7), max_tokens: Some(9), ..Params::default() };
        let merged = given.over(&task);
        assert_eq!((merged.temperature, merged.max_tokens), (Some(0.0), Some(9)));
    }
}
