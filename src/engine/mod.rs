//! The core: one thread that owns all sequences and decides, step by step, who runs next.
//!
//! The shell hands in a [`Job`] and reads [`Event`]s; each job gets exactly one terminal event
//! ([`Event::Done`] or [`Event::Failed`]). Dropping the receiver *is* cancellation. The channel is sized
//! so that sending never waits: a slow reader never stalls a batch.

use crate::error::Error;
use crate::ids::TaskId;
use crate::request::{Finish, Sampling, Timing, TokenLogprob};
use std::sync::Arc;
use std::time::Instant;

/// One sequence to generate or score.
#[derive(Clone, Debug)]
pub struct Job {
    /// Selects queue, weight and metrics.
    pub task: TaskId,
    /// The prompt; at least one token.
    pub tokens: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Arc<Sampling>,
    /// Determines the random draws, whatever else is in the batch.
    pub seed: u64,
    /// Most new tokens; 0 only scores the prompt.
    pub max_new: u32,
    /// Stop tokens are impossible before this many new tokens.
    pub min_new: u32,
    /// Tokens that end the text (and are not part of it); empty ignores end-of-text.
    pub stop_ids: Arc<[u32]>,
    /// Ask for the prompt's own log-probabilities, with this many alternatives each.
    pub score_prompt: Option<u32>,
    /// When the request came in.
    pub arrived: Instant,
    /// When it must have ended.
    pub deadline: Option<Instant>,
    /// When its first token must be out.
    pub first_token_deadline: Option<Instant>,
}

/// What a job hears.
#[derive(Debug)]
pub enum Event {
    /// The prompt's log-probabilities, if asked for: one per prompt token, the first `None`.
    Prompt(Vec<Option<TokenLogprob>>),
    /// One new token. A stop token is not reported.
    Token {
        /// The token.
        id: u32,
        /// If [`Sampling::logprobs`] asks for it.
        logprob: Option<TokenLogprob>,
    },
    /// The end, well.
    Done {
        /// Why.
        finish: Finish,
        /// Where the time went.
        timing: Timing,
    },
    /// The end, badly.
    Failed(Error),
}

/// What the engine is able to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Weights are being read.
    Loading,
    /// Accepting work.
    Ready,
    /// Finishing what runs; new work is refused.
    Draining,
    /// Three steps in a row failed, or loading did; nothing is accepted.
    Failed,
}
