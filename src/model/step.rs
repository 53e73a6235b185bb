//! Seam 2, between core and compute: flat host vectors both ways, so that a fake runner can stand in
//! for the model and a GPU could take its place.
//!
//! A step advances some sequences by one slice each: rows `[positions]` of one sequence, contiguous,
//! whose K and V go into the blocks that its table names. Prefill, a chunk of prefill, decode and
//! resumption after preemption are the same thing with different lengths.

pub use crate::adapter::Mix;

use crate::request::{Sampling, TokenLogprob};
use std::ops::Range;
use std::sync::Arc;

/// One step's work: `rows` tokens of several sequences.
#[derive(Clone, Debug, Default)]
pub struct StepInput {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence; 0 is the first token.
    pub positions: Vec<u32>,
    /// One slice per sequence, covering all rows in order.
    pub slices: Vec<Slice>,
    /// The slices' block tables, one after the other.
    pub block_tables: Vec<u32>,
    /// The rows that run with adapters: in order, neighbours of one mix as one entry.
    pub adapters: Vec<AdapterRows>,
    /// Rows that need a next token; at most one per slice, its last row.
    pub samples: Vec<SampleRow>,
    /// Rows whose next token is known and to be scored.
    pub scores: Vec<ScoreRow>,
}

/// Consecutive rows of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Rows of the step.
    pub rows: Range<usize>,
    /// Where this sequence's blocks stand in [`StepInput::block_tables`]. Position `p` of the sequence
    /// lives in slot `p % block_size` of block `table[p / block_size]`.
    pub table: Range<usize>,
    /// The task of these rows as the gates of experts count it ([`Experts::tasks`]).
    pub gate: Option<u32>,
}

/// Consecutive rows, of one or more slices, that run with one mix of adapters.
#[derive(Clone, Debug)]
pub struct AdapterRows {
    /// Rows of the step.
    pub rows: Range<usize>,
    /// What they add to the base weights.
    pub mix: Arc<Mix>,
}

/// A row whose logits give a new token.
#[derive(Clone, Debug)]
pub struct SampleRow {
    /// Row of the step.
    pub row: usize,
    /// How to choose.
    pub sampling: Arc<Sampling>,
    /// With `index` it determines the random draw, whatever else is in the batch.
    pub seed: u64,
    /// How many tokens were generated before this one.
    pub index: u32,
    /// Prompt and output so far, if [`Sampling::needs_history`]; else empty.
    pub history: Vec<u32>,
    /// How many tokens of `history` are the prompt's.
    pub prompt_len: usize,
    /// Tokens that must not be chosen now (end-of-text before `min_tokens`).
    pub banned: Vec<u32>,
    /// If there, only these may be chosen: token `id` if bit `id % 32` of word `id / 32` is set.
    pub allowed: Option<Vec<u32>>,
}

/// A row whose next token is known: its log-probability is asked for.
#[derive(Clone, Debug)]
pub struct ScoreRow {
    /// Row of the step.
    pub row: usize,
    /// The token that follows it.
    pub target: u32,
    /// How many of the likeliest tokens to report beside it.
    pub top: u32,
}

/// What a step computed, in the order of [`StepInput::samples`] and [`StepInput::scores`]. A row that
/// came to nothing, perhaps by its own adapter's weights, says nothing about the others.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// The chosen tokens.
    pub sampled: Vec<Result<Sampled, RowError>>,
    /// The scored tokens.
    pub scored: Vec<Result<TokenLogprob, RowError>>,
    /// Which experts the rows went to; empty for a model without.
    pub routing: Routing,
}

/// Which experts a step's rows went to, layer by layer of [`Experts::layers`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    /// `[layers, rows, top_k]`, best first; [`Routing::NONE`] where a row was not computed, because
    /// nobody needed it behind the last layer's attention.
    pub experts: Vec<u16>,
    /// `[layers, rows]`: entropy of the gate's softmax in nats; NaN where a row was not computed.
    pub entropy: Vec<f32>,
}

impl Routing {
    /// In place of an expert: none was asked.
    pub const NONE: u16 = u16::MAX;
}

/// The experts of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Layers whose feed-forward network is a mixture, ascending.
    pub layers: Vec<usize>,
    /// Experts in each.
    pub count: usize,
    /// Experts that a row is sent to.
    pub top_k: usize,
    /// Names of the tasks that the gates know, in the order of their rows; empty if gates look at tokens
    /// alone.
    pub tasks: Vec<String>,
}

/// One chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Present if [`Sampling::logprobs`] was.
    pub logprob: Option<TokenLogprob>,
}

/// What a runner can hold; fixed for its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// KV blocks in the pool.
    pub blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Longest sequence, prompt and output together.
    pub context: usize,
    /// Token ids are below this.
    pub vocab: usize,
}

/// Why a row has no answer; the engine fails its request and no other.
pub type RowError = String;

/// Why a step failed; the engine fails the step's requests and goes on.
pub type StepError = Box<dyn std::error::Error + Send + Sync>;

/// Runs steps. The engine owns it and calls it from its one thread.
pub trait Runner {
    /// What it can hold.
    fn capacity(&self) -> Capacity;

    /// Its experts, if it has any.
    fn experts(&self) -> Option<Experts> {
        None
    }

    /// Runs one step: writes the rows' K and V, then computes the asked-for rows. In each layer all rows
    /// write before any looks: a slice may share a block that another slice of the step fills, whichever
    /// comes first.
    fn step(&mut self, input: &StepInput) -> Result<StepOutput, StepError>;
}
