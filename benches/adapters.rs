//! What adapters and experts cost: a low-rank product and a grouped one beside the linear layer under
//! them, and whole decode steps over several adapters.
//!
//! `cargo bench --bench adapters`

use candle_core::{DType, Device, Error, Result, Tensor};
use candle_nn::VarBuilder;
use shoal::adapter::{Deltas, LowRank, Mix, Module, Part, Shape};
use shoal::kernels::{
    Group, LowRankGroup, Ops, PackedMatrix, Precision, grouped_matmul, low_rank_add,
};
use shoal::model::init::fresh;
use shoal::model::step::{AdapterRows, Runner, SampleRow, Slice, StepInput};
use shoal::model::{CandleRunner, Decoder, Spec, adapter_shape};
use shoal::request::Params;
use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

const RANK: usize = 16;
const CALLS: usize = 200;

fn random(rows: usize, columns: usize) -> Result<Tensor> {
    Tensor::randn(0f32, 0.02, (rows, columns), &Device::Cpu)
}

fn packed(inner: usize, outer: usize, precision: Precision) -> Result<PackedMatrix> {
    PackedMatrix::from_in_out(&random(inner, outer)?, precision)
}

/// The rows in as many groups as there are, as equal as they can be.
fn split(rows: usize, groups: usize) -> Vec<Range<usize>> {
    (0..groups).map(|i| i * rows / groups..(i + 1) * rows / groups).collect()
}

/// Microseconds of one call: the best of many, which others on the machine disturb least.
fn time(mut call: impl FnMut() -> Result<Tensor>) -> Result<f64> {
    let mut best = f64::MAX;
    for _ in 0..CALLS {
        let start = shoal::telemetry::now();
        black_box(call()?);
        best = best.min(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(best)
}

/// One low-rank product, and one product per group, beside a linear layer.
fn kernels() -> Result<()> {
    for (width, precision) in [(256, Precision::F32), (256, Precision::Bf16), (768, Precision::F32)]
    {
        let outer = 3 * width;
        let layers: Vec<PackedMatrix> =
            (0..4).map(|_| packed(width, outer, precision)).collect::<Result<_>>()?;
        let factors = (0..4)
            .map(|_| Ok((packed(width, RANK, precision)?, packed(RANK, outer, precision)?)))
            .collect::<Result<Vec<_>>>()?;
        for rows in [1, 4, 16] {
            let (x, y) = (random(rows, width)?, random(rows, outer)?);
            let linear = time(|| layers[0].matmul(&x, None))?;
            for groups in [1, 4] {
                let ranges = split(rows, groups);
                let group = |(i, rows): (usize, &Range<usize>)| Group {
                    rows: rows.clone(),
                    w: &layers[i],
                    bias: None,
                };
                let experts: Vec<_> = ranges.iter().enumerate().map(group).collect();
                let experts = time(|| grouped_matmul(&x, &experts, outer))?;
                let added = ranges.iter().zip(&factors);
                let low_rank: Vec<_> = added
                    .map(|(rows, (a, b))| LowRankGroup { rows: rows.clone(), a, b, weight: 1.0 })
                    .collect();
                let low_rank = time(|| low_rank_add(y.clone(), &x, &low_rank))?;
                println!(
                    "{width} to {outer} {precision:?}, {rows:2} rows in {groups} groups: linear {linear:.1} us, \
                     grouped {experts:.1} us, rank {RANK} added {low_rank:.1} us",
                );
            }
        }
    }
    Ok(())
}

const SEQUENCES: usize = 16;
const BLOCKS: usize = 8;

/// A small GPT-2 of random weights.
fn runner(precision: Precision) -> Result<CandleRunner> {
    let spec = Spec {
        layers: 6,
        heads: 8,
        width: 256,
        inner: 1024,
        context: 128,
        vocab: 8192,
        eps: 1e-5,
        eos: Vec::new(),
        tasks: Vec::new(),
        moe: None,
    };
    let tensors = fresh(&spec, 1)?.into_iter().collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let decoder = Decoder::packed(&spec, vb, Ops::new(&Device::Cpu, precision), precision)?;
    CandleRunner::new(decoder, SEQUENCES * BLOCKS, 16)
}

/// An adapter on all linear layers.
fn adapter(shape: &Shape, key: u64) -> Result<Arc<Mix>> {
    let mut deltas = Deltas::new(shape);
    for (layer, module) in (0..shape.layers).flat_map(|l| Module::ALL.map(|module| (l, module))) {
        let (inner, outer) = shape.sizes(module);
        let a = Arc::new(packed(inner, RANK, shape.precision)?);
        let b = Arc::new(packed(RANK, outer, shape.precision)?);
        deltas.set(layer, module, LowRank { a, b }).map_err(Error::msg)?;
    }
    let parts = vec![Part { deltas: Arc::new(deltas), weight: 1.0 }];
    Ok(Arc::new(Mix { key, parts }))
}

/// A decode step of all sequences over so many adapters, as neighbours; 0 is the base alone.
fn decode(adapters: &[Arc<Mix>]) -> StepInput {
    let sampling = Arc::new(Params { temperature: Some(0.0), ..Params::default() }.sampling());
    let sample = |row| SampleRow {
        row,
        sampling: sampling.clone(),
        seed: 1,
        index: 0,
        history: Vec::new(),
        prompt_len: 0,
        banned: Vec::new(),
        allowed: None,
    };
    let table = |i| i * BLOCKS..(i + 1) * BLOCKS;
    let slice = |i| Slice { rows: i..i + 1, table: table(i), gate: None };
    let ranges = split(SEQUENCES, adapters.len().max(1)).into_iter();
    StepInput {
        tokens: vec![7; SEQUENCES],
        positions: vec![96; SEQUENCES],
        slices: (0..SEQUENCES).map(slice).collect(),
        block_tables: (0..(SEQUENCES * BLOCKS) as u32).collect(),
        adapters: ranges
            .zip(adapters)
            .map(|(rows, mix)| AdapterRows { rows, mix: mix.clone() })
            .collect(),
        samples: (0..SEQUENCES).map(sample).collect(),
        scores: Vec::new(),
    }
}

/// Whole decode steps over more and more adapters.
fn steps() -> Result<()> {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut runner = runner(precision)?;
        let shape = adapter_shape(runner.decoder().spec(), precision);
        let adapters: Vec<_> =
            (1..=SEQUENCES as u64).map(|key| adapter(&shape, key)).collect::<Result<_>>()?;
        let inputs = [0, 1, 4, 16].map(|count| (count, decode(&adapters[..count])));
        // In turns, so that what else the machine does is shared by all.
        let mut best = [f64::MAX; 4];
        for _ in 0..CALLS {
            for (best, (_, input)) in best.iter_mut().zip(&inputs) {
                let start = shoal::telemetry::now();
                runner.step(input).map_err(Error::wrap)?;
                *best = best.min(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        for (time, (count, _)) in best.iter().zip(&inputs) {
            let share = 100.0 * best[0] / time;
            println!(
                "{precision:?}, {SEQUENCES} rows of a 7M model over {count:2} adapters: {time:.3} ms a step, \
                 {share:.0}% of the base's rate",
            );
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    kernels()?;
    steps()
}
