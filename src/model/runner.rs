//! Runs steps on the CPU: the decoder over a paged KV cache, then a token for each row that asks.
//!
//! Knows rows, slices and blocks; must not know requests. Whatever does not fit together in a
//! [`StepInput`] is an error before anything is written; what a row's own numbers or wishes make
//! impossible is that row's error.

mod routed;

use super::decoder::{Decoder, Pass, Site};
use super::step::{
    AdapterRows, Capacity, Experts, Mix, Routing, Runner, StepError, StepInput, StepOutput,
};
use super::{Routes, Spec, adapter_shape, kv_shape, sample};
use crate::adapter;
use crate::kernels::{
    KvPool, LowRankGroup, PagedRows, collect, elements, keep_freed_memory, low_rank_add,
};
use candle_core::{Device, Result as CandleResult, Tensor};
use routed::Routed;
use std::collections::BTreeSet;
use std::ops::Range;

/// Rows whose logits are held at once: a vocabulary of 50k makes 13 MB of them.
const LOGIT_ROWS: usize = 64;

/// The model at work.
#[derive(Debug)]
pub struct CandleRunner {
    decoder: Decoder,
    pool: KvPool,
    capacity: Capacity,
    /// What adapters must be made for.
    shape: adapter::Shape,
}

impl CandleRunner {
    /// A runner with an empty cache of `blocks` blocks of `block_size` positions. Where these are fewer
    /// than the model's context, they are the longest sequence.
    pub fn new(decoder: Decoder, blocks: usize, block_size: usize) -> CandleResult<Self> {
        // Every step takes and frees the same buffers.
        keep_freed_memory();
        let spec = decoder.spec();
        let pool = KvPool::new(kv_shape(spec, block_size, decoder.precision()), blocks)?;
        let context = spec.context.min(blocks * block_size);
        let capacity = Capacity { blocks, block_size, context, vocab: spec.vocab };
        let shape = adapter_shape(spec, decoder.precision());
        Ok(Self { decoder, pool, capacity, shape })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Runs all rows; gives the hidden states of `wanted`, which are sorted, and where rows went.
    fn hidden(&mut self, input: &StepInput, wanted: &[u32]) -> CandleResult<(Tensor, Routing)> {
        let rows = input.tokens.len();
        let tokens = Tensor::from_slice(&input.tokens, rows, &Device::Cpu)?;
        let positions = Tensor::from_slice(&input.positions, rows, &Device::Cpu)?;
        let slices: Vec<_> =
            input.slices.iter().map(|s| (s.rows.clone(), s.table.clone())).collect();
        let paged =
            PagedRows { positions: &input.positions, slices: &slices, tables: &input.block_tables };
        let kept = (wanted.len() < rows)
            .then(|| Tensor::from_slice(wanted, wanted.len(), &Device::Cpu))
            .transpose()?;
        let adapters = Adapters::new(&input.adapters, wanted);
        let routed = Routed::new(input, wanted);
        let mut pass = Paged { pool: &mut self.pool, rows: paged, kept, adapters, routed };
        let hidden = self.decoder.hidden(&tokens, &positions, &mut pass)?;
        Ok((hidden, pass.routed.into_routing()))
    }

    /// Applies `f` to the logits of each of `asked`, given which row of `hidden` it is about.
    fn with_logits<A: Sync, O: Send>(
        &self,
        hidden: &Tensor,
        asked: &[A],
        row: impl Fn(&A) -> u32,
        f: impl Fn(&[f32], &A) -> O + Sync,
    ) -> CandleResult<Vec<O>> {
        let mut outputs = Vec::with_capacity(asked.len());
        for part in asked.chunks(LOGIT_ROWS) {
            let rows: Vec<u32> = part.iter().map(&row).collect();
            let rows = Tensor::from_vec(rows, part.len(), hidden.device())?;
            let logits = self.decoder.logits(&hidden.index_select(&rows, 0)?)?;
            let logits = elements(&logits)?;
            let vocab = self.capacity.vocab;
            outputs.extend(collect(part.len(), |i| f(&logits[i * vocab..][..vocab], &part[i])));
        }
        Ok(outputs)
    }

    fn compute(&mut self, input: &StepInput) -> CandleResult<StepOutput> {
        let wanted = wanted_rows(input);
        let (hidden, routing) = self.hidden(input, &wanted)?;
        let find = |row: usize| wanted.partition_point(|&w| (w as usize) < row) as u32;
        let sampled = self.with_logits(&hidden, &input.samples, |s| find(s.row), sample::choose)?;
        let scored = self.with_logits(&hidden, &input.scores, |s| find(s.row), sample::score)?;
        Ok(StepOutput { sampled, scored, routing })
    }
}

impl Runner for CandleRunner {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn experts(&self) -> Option<Experts> {
        let spec = self.decoder.spec();
        let moe = spec.moe.as_ref()?;
        let tasks = if moe.gate.knows_tasks() { spec.tasks.clone() } else { Vec::new() };
        Some(Experts { layers: moe.layers.clone(), count: moe.experts, top_k: moe.top_k, tasks })
    }

    fn step(&mut self, input: &StepInput) -> Result<StepOutput, StepError> {
        check(input, &self.capacity)?;
        check_adapters(input, &self.shape)?;
        check_gates(input, self.decoder.spec())?;
        if input.tokens.is_empty() {
            return Ok(StepOutput::default());
        }
        Ok(self.compute(input)?)
    }
}

/// The rows whose logits somebody asks for, sorted. Never none: a step that only fills the cache
/// computes one row for nothing rather than making every kernel think about empty inputs.
fn wanted_rows(input: &StepInput) -> Vec<u32> {
    let samples = input.samples.iter().map(|s| s.row);
    let rows: BTreeSet<usize> = samples.chain(input.scores.iter().map(|s| s.row)).collect();
    if rows.is_empty() { vec![0] } else { rows.into_iter().map(|row| row as u32).collect() }
}

/// The rows of one step, over the cache.
struct Paged<'a> {
    pool: &'a mut KvPool,
    rows: PagedRows<'a>,
    kept: Option<Tensor>,
    adapters: Adapters<'a>,
    routed: Routed<'a>,
}

impl Pass for Paged<'_> {
    fn kept(&self) -> Option<&Tensor> {
        self.kept.as_ref()
    }

    fn attend(&mut self, layer: usize, qkv: &Tensor) -> CandleResult<Tensor> {
        self.pool.attend(layer, qkv, &self.rows)
    }

    fn gates(&self, kept: bool) -> &[Option<u32>] {
        self.routed.gates(kept)
    }

    fn routed(&mut self, _layer: usize, kept: bool, routes: &Routes) {
        self.routed.add(kept, routes);
    }

    fn adapt(&mut self, site: Site, x: &Tensor, y: Tensor) -> CandleResult<Tensor> {
        low_rank_add(y, x, self.adapters.groups(site))
    }
}

/// The rows of one step that run with adapters.
struct Adapters<'a> {
    /// The rows of a mix among all, and among the kept ones.
    runs: Vec<([Range<usize>; 2], &'a Mix)>,
    /// Those of the linear layer at work; kept for its memory.
    groups: Vec<LowRankGroup<'a>>,
}

impl<'a> Adapters<'a> {
    /// `kept` are the sorted rows that are left behind the last layer's attention.
    fn new(rows: &'a [AdapterRows], kept: &[u32]) -> Self {
        let place = |row: usize| kept.partition_point(|&kept| (kept as usize) < row);
        let both = |rows: &Range<usize>| [rows.clone(), place(rows.start)..place(rows.end)];
        let runs = rows.iter().map(|run| (both(&run.rows), &*run.mix)).collect();
        Self { runs, groups: Vec::new() }
    }

    /// What is added at one linear layer.
    fn groups(&mut self, site: Site) -> &[LowRankGroup<'a>] {
        self.groups.clear();
        for (rows, mix) in &self.runs {
            let rows = &rows[usize::from(site.kept)];
            for part in mix.parts.iter().filter(|_| !rows.is_empty()) {
                self.groups.extend(part.deltas.get(site.layer, site.module).map(|change| {
                    let (a, b) = (&*change.a, &*change.b);
                    LowRankGroup { rows: rows.clone(), a, b, weight: part.weight }
                }));
            }
        }
        &self.groups
    }
}

/// Refuses a step whose parts contradict each other or the runner's capacity.
fn check(input: &StepInput, capacity: &Capacity) -> Result<(), StepError> {
    let rows = input.tokens.len();
    if input.positions.len() != rows {
        return Err(format!("{} positions for {rows} rows", input.positions.len()).into());
    }
    if let Some(token) = input.tokens.iter().find(|&&t| t as usize >= capacity.vocab) {
        return Err(format!("token {token} is outside a vocabulary of {}", capacity.vocab).into());
    }
    let mut covered = 0;
    for slice in &input.slices {
        if slice.rows.start != covered || slice.rows.is_empty() || slice.rows.end > rows {
            return Err(format!("rows {:?} do not follow row {covered}", slice.rows).into());
        }
        covered = slice.rows.end;
        let table = input
            .block_tables
            .get(slice.table.clone())
            .ok_or_else(|| format!("block table {:?} is out of range", slice.table))?;
        check_positions(&input.positions[slice.rows.clone()], table, capacity)?;
    }
    if covered != rows {
        return Err(format!("slices cover {covered} of {rows} rows").into());
    }
    // Slices are in order, so these are sorted.
    let last_rows: Vec<usize> = input.slices.iter().map(|s| s.rows.end - 1).collect();
    for sample in &input.samples {
        if last_rows.binary_search(&sample.row).is_err() {
            return Err(format!("row {} is sampled but ends no slice", sample.row).into());
        }
        if sample.sampling.needs_history() && sample.history.is_empty() {
            return Err(format!("row {} has penalties but no history", sample.row).into());
        }
    }
    if let Some(score) = input.scores.iter().find(|s| s.row >= rows) {
        return Err(format!("row {} is scored, of {rows} rows", score.row).into());
    }
    Ok(())
}

/// Rows with adapters are rows of the step, in order, and their adapters are made for this model.
fn check_adapters(input: &StepInput, shape: &adapter::Shape) -> Result<(), StepError> {
    let mut end = 0;
    for AdapterRows { rows, mix } in &input.adapters {
        if rows.start < end || rows.is_empty() || rows.end > input.tokens.len() {
            return Err(format!("rows {rows:?} with adapters do not follow row {end}").into());
        }
        end = rows.end;
        if let Some(part) = mix.parts.iter().find(|part| part.deltas.shape() != shape) {
            let other = part.deltas.shape();
            return Err(format!("an adapter for {other:?} on a model of {shape:?}").into());
        }
    }
    Ok(())
}

/// A gate's task is one that the model's gates know.
fn check_gates(input: &StepInput, spec: &Spec) -> Result<(), StepError> {
    let known = spec.moe.as_ref().is_some_and(|moe| moe.gate.knows_tasks());
    let tasks = if known { spec.tasks.len() } else { 0 };
    match input.slices.iter().filter_map(|s| s.gate).find(|&task| task as usize >= tasks) {
        Some(task) => Err(format!("gate task {task} of a model whose gates know {tasks}").into()),
        None => Ok(()),
    }
}

/// Positions of a slice are consecutive, within the context, and have blocks.
fn check_positions(positions: &[u32], table: &[u32], capacity: &Capacity) -> Result<(), StepError> {
    let first = positions[0] as usize;
    if !positions.iter().enumerate().all(|(i, &p)| p as usize == first + i) {
        return Err(format!("positions {positions:?} are not consecutive").into());
    }
    let end = first + positions.len();
    if end > capacity.context {
        return Err(
            format!("position {} is outside a context of {}", end - 1, capacity.context).into()
        );
    }
    let blocks = end.div_ceil(capacity.block_size);
    let known = table.get(..blocks);
    if !known.is_some_and(|t| t.iter().all(|&b| (b as usize) < capacity.blocks)) {
        return Err(format!("position {} has no block in {table:?}", end - 1).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
