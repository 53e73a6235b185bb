//! The core: one thread that owns all sequences and decides, step by step, who runs next.
//!
//! The shell hands in a [`Job`] and reads [`Event`]s; each job gets exactly one terminal event
//! ([`Event::Done`] or [`Event::Failed`]). Dropping the receiver *is* cancellation. The channel is sized
//! so that sending never waits: a slow reader never stalls a batch.
//!
//! Reading order: `handle` (submit, start, drain), `core` (one tick: drop, plan, run, apply, send),
//! [`scheduler`] (policy, in whole numbers), `seq`, [`blocks`] and [`prefix`] (what it decides over),
//! [`plan`] (what compute gets), `experts` (what it says of its experts), `gate` and `meter` (bounded queues, measured rates), [`fake`] (a pretend model).
//!
//! It knows neither text, sockets nor tensors, and reads no clock but the one it is handed.

mod core;
mod experts;
mod gate;
mod handle;
mod meter;
mod seq;

pub mod blocks;
pub mod fake;
pub mod plan;
pub mod prefix;
pub mod scheduler;

#[cfg(test)]
mod tests;

pub use crate::model::step::{Capacity, Experts, Mix, Sampled};
pub use handle::{EngineHandle, start};
pub use seq::{Content, Seq};

use crate::error::Error;
use crate::ids::TaskId;
use crate::request::{ExpertUse, Finish, Guide, Sampling, Timing, TokenLogprob};
use std::sync::Arc;
use std::time::Instant;

/// One sequence to generate or score.
#[derive(Clone, Debug)]
pub struct Job {
    /// Selects queue, weight and metrics.
    pub task: TaskId,
    /// The prompt; at least one token.
    pub tokens: Vec<u32>,
    /// The adapters that it runs with from its first step to its last, whatever is loaded meanwhile.
    pub adapters: Option<Arc<Mix>>,
    /// Its task as the gates of experts count it.
    pub gate: Option<u32>,
    /// Say at the end which experts its tokens went to.
    pub report_experts: bool,
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
    /// Keeps the text inside a grammar, whatever the model and [`Job::min_new`] want.
    pub guide: Option<Box<dyn Guide>>,
    /// Ask for the prompt's own log-probabilities, with this many alternatives each.
    pub score_prompt: Option<u32>,
    /// The first prompt token that they are asked of; what comes before need not be computed again.
    pub score_from: usize,
    /// When the request came in.
    pub arrived: Instant,
    /// When it must have ended.
    pub deadline: Option<Instant>,
    /// When its first token must be out.
    pub first_token_deadline: Option<Instant>,
}

impl Job {
    /// A job for the base model that came in at `arrived`: nothing scored, nothing that stops it but
    /// `max_new`, no deadline.
    pub fn new(
        task: TaskId,
        tokens: Vec<u32>,
        sampling: Arc<Sampling>,
        max_new: u32,
        arrived: Instant,
    ) -> Self {
        Self {
            task,
            tokens,
            adapters: None,
            gate: None,
            report_experts: false,
            sampling,
            seed: 0,
            max_new,
            min_new: 0,
            stop_ids: Arc::new([]),
            guide: None,
            score_prompt: None,
            score_from: 0,
            arrived,
            deadline: None,
            first_token_deadline: None,
        }
    }
}

/// What a job hears.
#[derive(Debug)]
pub enum Event {
    /// The prompt's log-probabilities, if asked for: one per token from [`Job::score_from`] on; that of a
    /// prompt's very first is `None`.
    Prompt(Vec<Option<TokenLogprob>>),
    /// One new token. A stop token is not reported.
    Token {
        /// The token.
        id: u32,
        /// If [`Sampling::logprobs`] asks for it.
        logprob: Option<TokenLogprob>,
        /// Where the time went so far, for a client that ends here of its own accord.
        timing: Timing,
        /// Whether the end is all that follows.
        last: bool,
    },
    /// The end, well.
    Done {
        /// Why.
        finish: Finish,
        /// The one of [`Job::stop_ids`] that ended the text, with its log-probability if
        /// [`Sampling::logprobs`] asks for it.
        stop: Option<Sampled>,
        /// Where the time went.
        timing: Timing,
        /// Which experts its tokens went to, if that was asked for and the model has any.
        experts: Vec<ExpertUse>,
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

/// How much the engine takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Token budget of a step, decodes and prefill together.
    pub max_rows: usize,
    /// Sequences in the running batch; at most `max_rows`.
    pub max_running: usize,
    /// Sequences that wait, over all tasks.
    pub max_waiting: usize,
    /// Most rows of one sequence in a step, so that a long prompt delays the others' tokens little.
    pub prefill_chunk: usize,
    /// Whether a sequence may take over what another one computed of the same beginning.
    pub prefix_cache: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_rows: 512,
            max_running: 256,
            max_waiting: 2048,
            prefill_chunk: 256,
            prefix_cache: true,
        }
    }
}
