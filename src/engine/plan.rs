//! From a [`Plan`] (which sequence runs how many rows) to the [`StepInput`] that compute takes.
//!
//! Chunks are sorted by adapters, then by task, so that the rows of both are contiguous. The order of samples and scores
//! is the order of the chunks; the core reads the step's output by walking the plan again.

use super::scheduler::{Scheduler, Slot};
use super::seq::{Body, Seq};
use crate::ids::{SeqId, TaskId};
use crate::model::step::{AdapterRows, SampleRow, ScoreRow, Slice, StepInput};
use crate::request::Allowed;

/// One step's work. It is filled anew each step and keeps its memory.
#[derive(Debug, Default)]
pub struct Plan {
    /// At most one chunk per sequence, sorted by adapters and task.
    pub chunks: Vec<Chunk>,
    /// How many sequences lost their blocks to make room.
    pub preempted: usize,
    /// Tokens of starting sequences that were looked for in the cache.
    pub prefix_queried: usize,
    /// How many of them were there.
    pub prefix_hit: usize,
}

/// The rows of one sequence in a step: positions `start..start + rows`. A decode is a chunk of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The sequence.
    pub slot: Slot,
    /// The key of its adapters; 0 is the base alone.
    pub mix: u64,
    /// Its task.
    pub task: TaskId,
    /// Its identity.
    pub id: SeqId,
    /// Its first position.
    pub start: usize,
    /// How many rows.
    pub rows: usize,
}

impl Chunk {
    /// Whether the chunk ends with the row that gives `seq` its next token.
    pub(super) fn samples(&self, seq: &Seq<Body>) -> bool {
        self.start + self.rows == seq.len && seq.body.job.max_new > 0
    }
}

impl Plan {
    /// Forgets the step before.
    pub fn clear(&mut self) {
        let mut chunks = std::mem::take(&mut self.chunks);
        chunks.clear();
        *self = Self { chunks, ..Self::default() };
    }

    /// Rows of all chunks.
    pub fn rows(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.rows).sum()
    }

    /// Writes the step's input over `input`, whose memory is used again.
    pub(super) fn write(&self, sequences: &Scheduler<Body>, input: &mut StepInput) {
        input.tokens.clear();
        input.positions.clear();
        input.slices.clear();
        input.block_tables.clear();
        input.adapters.clear();
        input.samples.clear();
        input.scores.clear();
        for chunk in &self.chunks {
            write_chunk(chunk, sequences.seq(chunk.slot), input);
        }
    }
}

fn write_chunk(chunk: &Chunk, seq: &Seq<Body>, input: &mut StepInput) {
    let body = &seq.body;
    let tokens = &body.job.tokens;
    let end = chunk.start + chunk.rows;
    let first_row = input.tokens.len();
    let first_block = input.block_tables.len();
    input.tokens.extend_from_slice(&tokens[chunk.start..end]);
    input.positions.extend(chunk.start as u32..end as u32);
    input.block_tables.extend(seq.blocks.iter().map(|block| block.0));
    input.slices.push(Slice {
        rows: first_row..input.tokens.len(),
        table: first_block..input.block_tables.len(),
        gate: body.job.gate,
    });
    if let Some(mix) = &body.job.adapters {
        let rows = first_row..input.tokens.len();
        match input.adapters.last_mut() {
            Some(last) if last.mix.key == mix.key && last.rows.end == first_row => {
                last.rows.end = rows.end;
            }
            _ => input.adapters.push(AdapterRows { rows, mix: mix.clone() }),
        }
    }
    let top = body.job.score_prompt.unwrap_or(0);
    input.scores.extend(body.positions_to_score(chunk.start, chunk.rows).map(|position| {
        ScoreRow { row: first_row + position - chunk.start, target: tokens[position + 1], top }
    }));
    if chunk.samples(seq) {
        input.samples.push(sample_row(body, input.tokens.len() - 1));
    }
}

/// What a guide lets follow. It knows no stop tokens: they are what ends a text where it may end.
pub(super) fn allowed(guide: &Allowed, stop_ids: &[u32]) -> Vec<u32> {
    let mut tokens = guide.tokens.clone();
    for id in stop_ids.iter().filter(|_| guide.end) {
        let word = *id as usize / 32;
        tokens.resize(tokens.len().max(word + 1), 0);
        tokens[word] |= 1 << (id % 32);
    }
    tokens
}

fn sample_row(body: &Body, row: usize) -> SampleRow {
    let job = &body.job;
    let generated = body.generated();
    let history = if job.sampling.needs_history() { job.tokens.clone() } else { Vec::new() };
    let too_early = generated < job.min_new as usize;
    SampleRow {
        row,
        sampling: job.sampling.clone(),
        seed: job.seed,
        index: generated as u32,
        history,
        prompt_len: body.prompt_len,
        banned: if too_early { job.stop_ids.to_vec() } else { Vec::new() },
        allowed: job.guide.as_ref().map(|guide| allowed(guide.allowed(), &job.stop_ids)),
    }
}
