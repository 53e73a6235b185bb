//! A pretend model at seam 2, for tests of sockets and scheduling without weights. It ignores seeds,
//! temperatures and penalties.
//!
//! Its "KV cache" holds the tokens themselves, after which others they came and what adapters and gate
//! wrote them, in the blocks that the step names, and its next token is a pure function of what it reads
//! back from there. So a wrong block, a skipped row or a stale position changes the text, just as it would
//! with a real model, and [`FakeRunner::alone`] says what it should be. What other adapters or another text
//! left behind, what no step has written and what a failed one was to write fails the row.

use super::Job;
use super::plan::allowed;
use super::prefix::Variant;
use super::seq::Body;
use crate::ids::TaskId;
use crate::model::step::{
    Capacity, RowError, Runner, SampleRow, Sampled, ScoreRow, Slice, StepError, StepInput,
    StepOutput,
};
use crate::request::{Finish, Params, TokenLogprob};
use crate::telemetry::now;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Called before each step with its number, from 0, and its input. It may wait, panic or fail the step.
pub type Hook = Box<dyn FnMut(usize, &StepInput) -> Result<(), StepError> + Send>;
/// The model: a sequence's tokens so far to its next one.
pub type Model = Box<dyn Fn(&[u32]) -> u32 + Send>;

/// Which rows fail, by their sequence's tokens so far.
pub type Faulty = Box<dyn Fn(&[u32]) -> bool + Send>;

/// A deterministic pretend model.
pub struct FakeRunner {
    capacity: Capacity,
    /// What is in each slot of each block.
    cache: Vec<Option<Entry>>,
    model: Model,
    hooks: Vec<Hook>,
    faulty: Faulty,
    steps: usize,
}

/// What stands for the key and the value of one position.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Entry {
    token: u32,
    position: u32,
    writer: Variant,
    /// Of this token and all before it.
    text: u64,
}

impl FakeRunner {
    /// A pretend model whose next token is a hash of all tokens so far.
    pub fn new(capacity: Capacity) -> Self {
        let cache = vec![None; capacity.blocks * capacity.block_size];
        let vocab = capacity.vocab as u64;
        let model: Model = Box::new(move |tokens| (hash(tokens) % vocab) as u32);
        let faulty = Box::new(|_: &[u32]| false);
        Self { capacity, cache, model, hooks: Vec::new(), faulty, steps: 0 }
    }

    /// Room for 16 sequences of 128 tokens, over a vocabulary of 256.
    pub fn small() -> Self {
        Self::new(Capacity { blocks: 128, block_size: 16, context: 128, vocab: 256 })
    }

    /// Chooses next tokens by `model` instead; they must be below the vocabulary's size.
    pub fn with_model(mut self, model: impl Fn(&[u32]) -> u32 + Send + 'static) -> Self {
        self.model = Box::new(model);
        self
    }

    /// Calls `hook` before each step.
    pub fn before_step(
        mut self,
        hook: impl FnMut(usize, &StepInput) -> Result<(), StepError> + Send + 'static,
    ) -> Self {
        self.hooks.push(Box::new(hook));
        self
    }

    /// Makes the steps of these numbers fail.
    pub fn failing_at(self, steps: impl Into<Vec<usize>>) -> Self {
        let steps = steps.into();
        self.before_step(
            move |step, _| {
                if steps.contains(&step) { Err("made to fail".into()) } else { Ok(()) }
            },
        )
    }

    /// Makes the steps of these numbers panic.
    pub fn panicking_at(self, steps: impl Into<Vec<usize>>) -> Self {
        let steps = steps.into();
        self.before_step(move |step, _| {
            assert!(!steps.contains(&step), "made to panic");
            Ok(())
        })
    }

    /// Makes rows fail, alone in their steps, by the tokens up to them.
    pub fn failing_rows(mut self, faulty: impl Fn(&[u32]) -> bool + Send + 'static) -> Self {
        self.faulty = Box::new(faulty);
        self
    }

    /// Makes each step wait until the test lets it pass.
    pub fn gated(self) -> (Self, StepGate) {
        let (arrive, arrivals) = channel();
        let (pass, passes) = channel::<()>();
        let runner = self.before_step(move |_, input| {
            // Without a gate on the other side the way is open.
            if arrive.send(input.clone()).is_ok() {
                let _ = passes.recv();
            }
            Ok(())
        });
        (runner, StepGate { arrivals, pass })
    }

    /// What a sequence with this prompt, alone, would be given: up to `max_new` tokens, ending before
    /// the first of `stop_ids` (impossible among the first `min_new` tokens).
    pub fn alone(
        &self,
        prompt: &[u32],
        max_new: usize,
        min_new: usize,
        stop_ids: &[u32],
    ) -> Vec<u32> {
        let sampling = Arc::new(Params::default().sampling());
        let job = Job::new(TaskId(0), prompt.to_vec(), sampling, max_new as u32, now());
        let (min_new, stop_ids) = (min_new as u32, stop_ids.into());
        self.alone_as(&Job { min_new, stop_ids, ..job }).0
    }

    /// What this job, alone, would be given, and how it would end.
    pub fn alone_as(&self, job: &Job) -> (Vec<u32>, Finish) {
        let variant = Body::variant_of(job);
        let mut guide = job.guide.clone();
        let mut tokens = job.tokens.clone();
        let end = loop {
            let index = tokens.len() - job.tokens.len();
            if index == job.max_new as usize {
                break Finish::Length;
            }
            let banned = if index < job.min_new as usize { &*job.stop_ids } else { &[] };
            let allowed = guide.as_ref().map(|guide| allowed(guide.allowed(), &job.stop_ids));
            let next = self.next(variant, &tokens, banned, allowed.as_deref());
            match next {
                Some(next) if !job.stop_ids.contains(&next) => tokens.push(next),
                _ => break Finish::EndToken,
            }
            if let Some(guide) = &mut guide
                && !matches!(next.map(|next| guide.accept(next)), Some(Ok(true)))
            {
                break Finish::Grammar;
            }
        };
        (tokens.split_off(job.tokens.len()), end)
    }

    /// The log-probability that it pretends for `target` after `tokens`.
    pub fn score(&self, variant: Variant, tokens: &[u32], target: u32, top: u32) -> TokenLogprob {
        let context = hash(tokens) ^ accent(variant);
        let likely = |token| -0.01 * (1 + (context ^ u64::from(token)) % 1000) as f32;
        let vocab = self.capacity.vocab as u32;
        let mut best: Vec<_> = (0..vocab.min(64)).map(|token| (token, likely(token))).collect();
        best.sort_by(|a, b| b.1.total_cmp(&a.1));
        best.truncate(top as usize);
        TokenLogprob { token: target, logprob: likely(target), top: best }
    }

    /// The model's choice, or the first behind it that is possible.
    fn next(
        &self,
        variant: Variant,
        tokens: &[u32],
        banned: &[u32],
        allowed: Option<&[u32]>,
    ) -> Option<u32> {
        let vocab = self.capacity.vocab as u64;
        let wanted = u64::from((self.model)(tokens)) + accent(variant) % vocab;
        let bit = |allowed: &[u32], id: u32| {
            allowed.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
        };
        let behind = (0..vocab).map(|step| ((wanted + step) % vocab) as u32);
        let mut possible = behind.filter(|id| !banned.contains(id));
        possible.find(|&id| allowed.is_none_or(|allowed| bit(allowed, id)))
    }

    fn place(&self, input: &StepInput, slice: &Slice, position: u32) -> Result<usize, RowError> {
        let size = self.capacity.block_size;
        let table = &input.block_tables[slice.table.clone()];
        let block = table.get(position as usize / size).ok_or("position beyond the block table")?;
        Ok(*block as usize * size + position as usize % size)
    }

    /// Rows by position, each with its slice and its place in the cache: as in a layer of a model, where a
    /// sequence comes in the step does not matter.
    fn places<'a>(&self, input: &'a StepInput) -> Result<Vec<(usize, &'a Slice, usize)>, RowError> {
        let mut places = Vec::new();
        for slice in &input.slices {
            for row in slice.rows.clone() {
                let place = self.place(input, slice, input.positions[row])?;
                self.cache.get(place).ok_or("block beyond the pool")?;
                places.push((row, slice, place));
            }
        }
        places.sort_by_key(|(row, ..)| input.positions[*row]);
        Ok(places)
    }

    fn write(&mut self, input: &StepInput) -> Result<(), StepError> {
        for (row, slice, place) in self.places(input)? {
            let (token, position) = (input.tokens[row], input.positions[row]);
            let writer = variant_of(input, slice);
            let before = match position.checked_sub(1) {
                Some(before) => self.cache[self.place(input, slice, before)?],
                None => None,
            };
            let text = hash(&[before.map_or(0, |before| before.text as u32), token]);
            self.cache[place] = Some(Entry { token, position, writer, text });
        }
        Ok(())
    }

    /// The tokens that `row` attends to, read back through its block table, and who reads.
    fn read(&self, input: &StepInput, row: usize) -> Result<(Variant, Vec<u32>), RowError> {
        let slice = input.slices.iter().find(|slice| slice.rows.contains(&row));
        let slice = slice.ok_or("row without a slice")?;
        let variant = variant_of(input, slice);
        let mut before = 0;
        let mut recall = |position: u32| match self.cache[self.place(input, slice, position)?] {
            Some(Entry { token, position: at, writer, text })
                if (at, writer, text) == (position, variant, hash(&[before, token])) =>
            {
                before = text as u32;
                Ok(token)
            }
            other => Err(format!("row {row} finds {other:?} at position {position}")),
        };
        let tokens: Vec<u32> =
            (0..=input.positions[row]).map(&mut recall).collect::<Result<_, _>>()?;
        if (self.faulty)(&tokens) { Err("made to fail".into()) } else { Ok((variant, tokens)) }
    }

    fn sample(&self, input: &StepInput, sample: &SampleRow) -> Result<Sampled, RowError> {
        let (variant, tokens) = self.read(input, sample.row)?;
        let history = if sample.sampling.needs_history() { tokens.as_slice() } else { &[] };
        if history != sample.history {
            return Err("the history is not what the cache holds".into());
        }
        if tokens.len() != sample.prompt_len + sample.index as usize {
            return Err("prompt and index do not add up to the position".into());
        }
        let token = self.next(variant, &tokens, &sample.banned, sample.allowed.as_deref());
        let token = token.ok_or("no token is left to choose from")?;
        let logprobs = sample.sampling.logprobs;
        let logprob = logprobs.map(|top| self.score(variant, &tokens, token, top));
        Ok(Sampled { token, logprob })
    }

    fn score_row(&self, input: &StepInput, row: &ScoreRow) -> Result<TokenLogprob, RowError> {
        let (variant, tokens) = self.read(input, row.row)?;
        Ok(self.score(variant, &tokens, row.target, row.top))
    }
}

impl Runner for FakeRunner {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn step(&mut self, input: &StepInput) -> Result<StepOutput, StepError> {
        let number = self.steps;
        self.steps += 1;
        for (.., place) in self.places(input)? {
            // What there was is lost, even if the step fails.
            self.cache[place] = None;
        }
        self.hooks.iter_mut().try_for_each(|hook| hook(number, input))?;
        self.write(input)?;
        let sampled = input.samples.iter().map(|sample| self.sample(input, sample));
        let scored = input.scores.iter().map(|row| self.score_row(input, row));
        Ok(StepOutput {
            sampled: sampled.collect(),
            scored: scored.collect(),
            ..StepOutput::default()
        })
    }
}

/// The test's side of a gated runner. Dropping it opens the way for good.
pub struct StepGate {
    arrivals: Receiver<StepInput>,
    pass: Sender<()>,
}

impl StepGate {
    /// Waits until the next step has come to the gate, and shows it. `None` if the engine has ended.
    pub fn arrival(&self) -> Option<StepInput> {
        self.arrivals.recv().ok()
    }

    /// Lets `steps` steps pass, now or when they come.
    pub fn pass(&self, steps: usize) {
        for _ in 0..steps {
            // It fails only if the engine has ended, and then nothing waits.
            let _ = self.pass.send(());
        }
    }
}

fn variant_of(input: &StepInput, slice: &Slice) -> Variant {
    let adapters = input.adapters.iter().find(|a| a.rows.contains(&slice.rows.start));
    Variant { mix: adapters.map_or(0, |a| a.mix.key), gate: slice.gate }
}

/// What a variant adds to every token; nothing for the base.
fn accent(variant: Variant) -> u64 {
    variant.mix.wrapping_mul(7) + variant.gate.map_or(0, |gate| 3 + u64::from(gate))
}

/// FNV-1a over the tokens, stirred so that the low bits are as good as the high ones.
fn hash(tokens: &[u32]) -> u64 {
    let step = |h: u64, token: &u32| (h ^ u64::from(*token)).wrapping_mul(0x0000_0100_0000_01b3);
    let h = tokens.iter().fold(0xcbf2_9ce4_8422_2325, step);
    let h = (h ^ (h >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h ^ (h >> 29)
}
