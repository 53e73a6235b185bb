//! Log-probabilities in the shape of OpenAI's legacy completions.

use crate::request::TokenLogprob;
use crate::text::Tokenizer;
use serde::{Serialize, Serializer};

/// The least log-probability that is written; JSON has no infinity.
const LEAST: f32 = -9999.0;

/// Parallel arrays, one entry per token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Logprobs {
    /// The tokens' text; `bytes:\xNN` for one that is not whole characters.
    pub tokens: Vec<String>,
    /// `None` for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens, and the token itself.
    pub top_logprobs: Vec<Option<Top>>,
    /// Where the token begins in the text, in characters.
    pub text_offset: Vec<usize>,
}

/// Tokens' text and log-probability, the likeliest first; a JSON object.
#[derive(Clone, Debug, PartialEq)]
pub struct Top(Vec<(String, f32)>);

impl Serialize for Top {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, logprob)| (name, logprob)))
    }
}

impl Logprobs {
    /// Adds what follows.
    pub fn append(&mut self, mut more: Self) {
        self.tokens.append(&mut more.tokens);
        self.token_logprobs.append(&mut more.token_logprobs);
        self.top_logprobs.append(&mut more.top_logprobs);
        self.text_offset.append(&mut more.text_offset);
    }
}

/// Writes [`Logprobs`] of one text, token after token.
#[derive(Debug, Default)]
pub struct Scribe {
    /// Characters that began so far.
    characters: usize,
}

impl Scribe {
    /// The log-probabilities of a whole prompt.
    pub fn prompt(
        &mut self,
        tokenizer: &Tokenizer,
        tokens: &[u32],
        scores: &[Option<TokenLogprob>],
    ) -> Logprobs {
        let mut all = Logprobs::default();
        for (i, &token) in tokens.iter().enumerate() {
            let score = scores.get(i).and_then(Option::as_ref);
            all.append(self.token(tokenizer, token, score, true));
        }
        all
    }

    /// The log-probability of the next token; `shown` is whether it is part of the text.
    pub fn token(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
        score: Option<&TokenLogprob>,
        shown: bool,
    ) -> Logprobs {
        let bytes = tokenizer.token_bytes(token);
        let starts = bytes.iter().filter(|&&b| !is_continuation(b)).count();
        let inside = bytes.first().is_some_and(|&b| is_continuation(b)) && self.characters > 0;
        let offset = self.characters - usize::from(inside);
        self.characters += if shown { starts } else { 0 };
        Logprobs {
            tokens: vec![name(bytes)],
            token_logprobs: vec![score.map(|s| s.logprob.max(LEAST))],
            top_logprobs: vec![score.map(|s| top(tokenizer, s))],
            text_offset: vec![offset],
        }
    }
}

fn is_continuation(byte: u8) -> bool {
    byte & 0xC0 == 0x80
}

fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_string(),
        Err(_) => bytes.iter().fold("bytes:".into(), |name, b| format!("{name}\\x{b:02x}")),
    }
}

fn top(tokenizer: &Tokenizer, score: &TokenLogprob) -> Top {
    let chosen = (score.token, score.logprob);
    let mut named: Vec<(String, f32)> = Vec::with_capacity(score.top.len() + 1);
    for (token, logprob) in score.top.iter().copied().chain([chosen]) {
        let name = name(tokenizer.token_bytes(token));
        if named.iter().all(|(other, _)| *other != name) {
            named.push((name, logprob.max(LEAST)));
        }
    }
    Top(named)
}
