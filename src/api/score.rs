//! Scoring: how likely a model finds each of several continuations of one prompt. What a classifier is
//! made of, without generating anything.

use super::Service;
use super::ticket::Chunk;
use crate::error::{Error, Result};
use crate::request::{Request, Timing, Usage};
use std::collections::BTreeSet;

/// The most labels of one request.
pub const MAX_LABELS: usize = 256;

/// Bytes of all labels together.
pub const MAX_LABEL_BYTES: usize = 1 << 16;

/// What is known of each label, in the order that they were given.
#[derive(Debug)]
pub struct Scores {
    /// One for each label.
    pub labels: Vec<Score>,
    /// The prompt's tokens, counted once, and the labels'.
    pub usage: Usage,
    /// The slowest label's.
    pub timing: Timing,
}

/// What is known of one label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// The natural log-probability of its tokens after the prompt: their sum.
    pub logprob: f32,
    /// How many tokens those are.
    pub tokens: u32,
    /// Its share among the labels: the softmax over their log-probabilities.
    pub probability: f32,
}

impl Service {
    /// Scores a request's labels as continuations of its one prompt. A label's tokens follow the prompt's
    /// as they are; white space that belongs between them is part of the label.
    ///
    /// # Errors
    /// Those of [`Service::submit`] and of its answer; `Invalid` for `labels` that are none, too many,
    /// empty or twice the same.
    pub async fn score(&self, request: Request) -> Result<Scores> {
        check(&request).inspect_err(|error| self.count_refused(&request.record, error))?;
        let reply = self.submit(request).await?.collect().await?;
        Ok(Scores { labels: normalised(&reply.choices), usage: reply.usage, timing: reply.timing })
    }
}

fn check(Request { labels, grammar, .. }: &Request) -> Result<()> {
    if let Some((field, _)) = grammar {
        return Err(Error::invalid(*field, format!("{field} is for texts that are generated")));
    }
    let bytes: usize = labels.iter().map(String::len).sum();
    let different = labels.iter().collect::<BTreeSet<_>>().len();
    let fault = if labels.is_empty() || labels.len() > MAX_LABELS {
        format!("labels has {} entries; allowed: 1 to {MAX_LABELS}", labels.len())
    } else if labels.iter().any(String::is_empty) {
        "labels has an empty text, which has no probability".into()
    } else if different < labels.len() {
        "labels has a text twice".into()
    } else if bytes > MAX_LABEL_BYTES {
        format!("labels have {bytes} bytes; allowed: up to {MAX_LABEL_BYTES}")
    } else {
        return Ok(());
    };
    Err(Error::invalid("labels", fault))
}

/// The labels' scores, each from the log-probabilities of its tokens.
fn normalised(choices: &[Chunk]) -> Vec<Score> {
    let sums: Vec<(f64, u32)> = choices
        .iter()
        .map(|choice| {
            let tokens = choice.logprobs.as_deref().unwrap_or_default();
            let sum = tokens.iter().filter_map(|token| token.logprob).map(f64::from).sum();
            (sum, tokens.len() as u32)
        })
        .collect();
    let best = sums.iter().map(|(sum, _)| *sum).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = sums.iter().map(|(sum, _)| (sum - best).exp()).sum();
    let score = |(sum, tokens): (f64, u32)| Score {
        logprob: sum as f32,
        tokens,
        probability: ((sum - best).exp() / total) as f32,
    };
    sums.into_iter().map(score).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ticket::ScoredToken;

    fn label(logprobs: &[f32]) -> Chunk {
        let token = |&logprob: &f32| ScoredToken {
            id: 0,
            logprob: Some(logprob),
            top: Vec::new(),
            offset: 0,
        };
        let logprobs = Some(logprobs.iter().map(token).collect());
        Chunk { index: 0, text: String::new(), logprobs, end: None }
    }

    #[test]
    fn a_share_is_the_softmax_over_sums() {
        let scores = normalised(&[label(&[-1.0, -2.0]), label(&[-1000.0]), label(&[-3.0])]);
        let of = |i: usize| (scores[i].logprob, scores[i].tokens, scores[i].probability);
        assert_eq!(of(0), (-3.0, 2, 0.5));
        assert_eq!(of(1), (-1000.0, 1, 0.0));
        assert_eq!(of(2), (-3.0, 1, 0.5));
    }
}
