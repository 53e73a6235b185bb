//! Log-probabilities in the shapes of OpenAI's legacy completions and of its chat.

use crate::api::ticket::ScoredToken;
use crate::text::Tokenizer;
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// The least log-probability that is written; JSON has no infinity.
const LEAST: f32 = -9999.0;

/// Parallel arrays, one entry per token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Logprobs {
    /// The tokens' text; `bytes:\xNN` for one that is not whole characters.
    pub tokens: Vec<String>,
    /// `None` for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens, and the token itself.
    #[schema(value_type = Vec<Option<BTreeMap<String, f32>>>)]
    pub top_logprobs: Vec<Option<Top>>,
    /// Where the token begins in the text, in characters.
    pub text_offset: Vec<usize>,
}

/// Tokens' text and log-probability, the likeliest first; a JSON object.
#[derive(Clone, Debug, PartialEq)]
pub struct Top(pub Vec<(String, f32)>);

impl Serialize for Top {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, logprob)| (name, logprob)))
    }
}

impl Logprobs {
    /// These tokens.
    pub fn of(tokenizer: &Tokenizer, tokens: &[ScoredToken]) -> Self {
        let mut all = Self::default();
        for token in tokens {
            let chosen = token.logprob.map(|logprob| (token.id, logprob));
            all.tokens.push(name(tokenizer.token_bytes(token.id)));
            all.token_logprobs.push(token.logprob.map(|logprob| logprob.max(LEAST)));
            all.top_logprobs.push(chosen.map(|chosen| top(tokenizer, &token.top, chosen)));
            all.text_offset.push(token.offset);
        }
        all
    }
}

fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_string(),
        Err(_) => bytes.iter().fold("bytes:".into(), |name, b| format!("{name}\\x{b:02x}")),
    }
}

fn top(tokenizer: &Tokenizer, best: &[(u32, f32)], chosen: (u32, f32)) -> Top {
    let mut named: Vec<(String, f32)> = Vec::with_capacity(best.len() + 1);
    for (token, logprob) in best.iter().copied().chain([chosen]) {
        let name = name(tokenizer.token_bytes(token));
        if named.iter().all(|(other, _)| *other != name) {
            named.push((name, logprob.max(LEAST)));
        }
    }
    Top(named)
}

/// `logprobs` of a chat's message.
#[derive(Serialize, ToSchema)]
pub struct ChatLogprobs {
    content: Vec<ChatToken>,
    /// Nothing here refuses in words.
    #[schema(value_type = Option<String>)]
    refusal: Option<()>,
}

#[derive(Serialize, ToSchema)]
struct ChatToken {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = ChatAlternative)]
struct Alternative {
    token: String,
    logprob: f32,
    #[schema(value_type = Vec<u32>)]
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// These tokens.
    pub fn of(tokenizer: &Tokenizer, tokens: &[ScoredToken]) -> Self {
        let alternative = |(id, logprob): (u32, f32)| {
            let bytes = tokenizer.token_bytes(id);
            Alternative { token: name(bytes), logprob: logprob.max(LEAST), bytes: bytes.to_vec() }
        };
        let token = |token: &ScoredToken| ChatToken {
            token: alternative((token.id, token.logprob.unwrap_or(0.0))),
            top_logprobs: token.top.iter().copied().map(alternative).collect(),
        };
        Self { content: tokens.iter().map(token).collect(), refusal: None }
    }
}
