//! One sequence, in its two halves: [`Seq`] is what policy sees (lengths, order, blocks), [`Body`] is
//! what the core keeps with it (tokens, client, times).
//!
//! One counter says how far a sequence's KV is valid: `computed`. Prefill, a chunk of prefill, decode
//! and resumption after preemption all mean "run the rows from `computed` on".

use super::gate::Permit;
use super::prefix::{Node, Variant};
use super::{Event, Job};
use crate::error::{Error, Kind};
use crate::ids::{BlockId, SeqId, TaskId};
use crate::request::{ExpertUse, Timing, TokenLogprob};
use std::ops::Range;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;

/// What policy knows of a sequence. `T` is carried along and never looked at.
#[derive(Debug)]
pub struct Seq<T> {
    /// Its identity; a smaller id is older.
    pub id: SeqId,
    /// Its queue.
    pub task: TaskId,
    /// Its place in the queue: earlier runs first.
    pub due: Instant,
    /// How many of its tokens are to be run.
    pub len: usize,
    /// For how many of them K and V are in the cache.
    pub computed: usize,
    /// Where K and V are: position `p` in block `p / block_size`.
    pub blocks: Vec<BlockId>,
    /// How many of its first blocks are full and remembered.
    pub remembered: usize,
    /// The place that those lead to.
    pub node: Node,
    /// Whether it holds a seat in the running batch.
    pub running: bool,
    /// Whether it was preempted: it then waits before those that never ran.
    pub resumed: bool,
    /// The core's half.
    pub body: T,
}

/// What policy asks the core's half, to find out what need not be computed again.
pub trait Content {
    /// What beside the tokens decides keys and values.
    fn variant(&self) -> Variant;

    /// The tokens so far; what is not among them is never shared.
    fn tokens(&self) -> &[u32];

    /// Rows at the beginning that may be left out if their keys and values are known.
    fn skippable(&self) -> usize;
}

impl<T: Content> Seq<T> {
    /// A sequence that has not run yet.
    pub fn new(id: SeqId, task: TaskId, due: Instant, len: usize, body: T) -> Self {
        let (computed, blocks, remembered) = (0, Vec::new(), 0);
        let (node, running, resumed) = (Node::Root(body.variant()), false, false);
        Self { id, task, due, len, computed, blocks, remembered, node, running, resumed, body }
    }
}

impl<T> Seq<T> {
    /// Rows that are still to be run.
    pub fn pending(&self) -> usize {
        self.len - self.computed
    }
}

/// The sending half of a job's event stream. It sees to it that the stream ends with exactly one
/// terminal event, whatever happens to its owner.
#[derive(Debug)]
pub struct Reply {
    events: Sender<Event>,
    ended: bool,
}

impl Reply {
    /// Wraps the sender of a channel with room for every event of the job.
    pub fn new(events: Sender<Event>) -> Self {
        Self { events, ended: false }
    }

    /// Whether the client has left.
    pub fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Sends an event that is not the last.
    pub fn send(&self, event: Event) {
        // The channel has room for all events of a job, so sending fails only if the client has left;
        // the next tick notices that.
        let _ = self.events.try_send(event);
    }

    /// Ends the stream with its terminal event.
    pub fn end(mut self, event: Event) {
        self.send(event);
        self.ended = true;
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.ended {
            let message = "the engine stopped before the request ended";
            self.send(Event::Failed(Error::new(Kind::Unavailable, message)));
        }
    }
}

/// What the core keeps with a sequence.
#[derive(Debug)]
pub struct Body {
    /// The job; its `tokens` grow by what is generated.
    pub job: Job,
    /// How many of `job.tokens` are the prompt's.
    pub prompt_len: usize,
    /// Where its events go.
    pub reply: Reply,
    /// Its place in the bounded queue, until it first runs.
    pub permit: Option<Permit>,
    /// The first prompt position whose next token is still to be scored. Preemption does not take it
    /// back, so that each is scored once.
    pub scored: usize,
    /// The scores, until the prompt is complete.
    pub scores: Vec<Option<TokenLogprob>>,
    /// Where its rows went so far, if that was asked for.
    pub experts: Vec<ExpertUse>,
    /// How many positions are counted in that.
    pub routed: usize,
    first_step: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Content for Body {
    fn variant(&self) -> Variant {
        Self::variant_of(&self.job)
    }

    fn tokens(&self) -> &[u32] {
        &self.job.tokens
    }

    fn skippable(&self) -> usize {
        match &self.job {
            // A position that is to be scored must run.
            Job { score_prompt: Some(_), .. } if self.scored + 1 < self.prompt_len => self.scored,
            // Whoever asks where its rows went wants to hear of all of them.
            Job { report_experts: true, .. } => 0,
            job => job.tokens.len(),
        }
    }
}

impl Body {
    /// The core's half of a new sequence.
    pub fn new(job: Job, reply: Reply, permit: Permit) -> Self {
        let prompt_len = job.tokens.len();
        // Nothing precedes the first token, so it has no score.
        let first = job.score_prompt.filter(|_| job.score_from == 0);
        let scores = first.map_or_else(Vec::new, |_| vec![None]);
        let scored = job.score_from.saturating_sub(1);
        Self {
            job,
            prompt_len,
            reply,
            permit: Some(permit),
            scored,
            scores,
            experts: Vec::new(),
            routed: 0,
            first_step: None,
            first_token: None,
            last_token: None,
        }
    }

    /// What beside its tokens decides a job's keys and values.
    pub fn variant_of(job: &Job) -> Variant {
        Variant { mix: job.adapters.as_ref().map_or(0, |mix| mix.key), gate: job.gate }
    }

    /// How many tokens were generated.
    pub fn generated(&self) -> usize {
        self.job.tokens.len() - self.prompt_len
    }

    /// How many tokens may still be generated.
    pub fn remaining(&self) -> usize {
        self.job.max_new as usize - self.generated()
    }

    /// Whether all scores that were asked for are there, and were not sent yet.
    pub fn is_scored(&self) -> bool {
        let due = self.prompt_len - self.job.score_from;
        self.job.score_prompt.is_some() && self.scores.len() == due
    }

    /// How many of a new sequence's tokens must run. Without generation the prompt's last token need
    /// not: no score depends on what follows it.
    pub fn rows_to_run(&self) -> usize {
        match (self.job.max_new, self.job.score_prompt) {
            (0, None) => 0,
            (0, Some(_)) => self.prompt_len - 1,
            _ => self.prompt_len,
        }
    }

    /// The prompt positions among `start..start + rows` whose next token is to be scored now.
    pub fn positions_to_score(&self, start: usize, rows: usize) -> Range<usize> {
        match self.job.score_prompt {
            Some(_) => self.scored.max(start)..(start + rows).min(self.prompt_len - 1),
            None => 0..0,
        }
    }

    /// The moment after which the client no longer wants what comes next.
    pub fn deadline(&self) -> Option<Instant> {
        match self.first_token {
            None => earliest(self.job.deadline, self.job.first_token_deadline),
            Some(_) => self.job.deadline,
        }
    }

    /// Records that a step runs a part of it. The first time, its place in the bounded queue is free
    /// and the time that it queued is returned.
    pub fn step_started(&mut self, now: Instant) -> Option<Duration> {
        if self.first_step.is_some() {
            return None;
        }
        self.permit = None;
        self.first_step = Some(now);
        Some(now.saturating_duration_since(self.job.arrived))
    }

    /// Records a token. Returns the time since the token before it, if there was one.
    pub fn token_came(&mut self, now: Instant) -> Option<Duration> {
        self.first_token.get_or_insert(now);
        let before = self.last_token.replace(now);
        before.map(|before| now.saturating_duration_since(before))
    }

    /// Where the time went until `now`, the end.
    pub fn timing(&self, now: Instant) -> Timing {
        let first_step = self.first_step.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        Timing {
            queue: first_step.saturating_duration_since(self.job.arrived),
            prefill: first_token.saturating_duration_since(first_step),
            decode: self.last_token.map_or(Duration::ZERO, |last| last - first_token),
        }
    }
}

/// The earlier of two moments that may not be set.
pub fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    a.into_iter().chain(b).min()
}
