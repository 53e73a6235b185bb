//! Equality with PyTorch on the golden model: logits, loss and gradients of the decoder, and greedy
//! text through the runner, alone, in company, in pieces and after losing its cache.

use super::step::{AdapterRows, Mix, Runner, SampleRow, ScoreRow, Slice, StepInput, StepOutput};
use super::*;
use crate::kernels::Mode;
use crate::request::{Params, Sampling};
use candle_core::{Tensor, Var};
use candle_nn::VarBuilder;
use proptest::prelude::*;
use serde_json::Value;
use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

mod adapters;

/// Of logits and log-probabilities, in f32.
const TOLERANCE: f32 = 1e-4;
const BLOCKS: usize = 64;
const BLOCK_SIZE: usize = 4;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// The reference for the model by itself or with one adapter: prompts with their continuations, and
/// tensors.
struct Golden {
    tag: &'static str,
    prompts: Vec<(Vec<u32>, Vec<u32>)>,
    loss_ids: Vec<u32>,
    loss: f32,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    fn read() -> Self {
        Self::of("base")
    }

    fn of(tag: &'static str) -> Self {
        let text = std::fs::read_to_string(goldens().join("reference.json")).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let ids = |v: &Value| serde_json::from_value::<Vec<u32>>(v.clone()).unwrap();
        let prompts = json["prompts"].as_array().unwrap();
        let prompts = prompts.iter().filter(|prompt| prompt["tag"] == tag);
        Self {
            tag,
            prompts: prompts.map(|p| (ids(&p["ids"]), ids(&p["greedy"]))).collect(),
            loss_ids: ids(&json["loss"]["ids"]),
            loss: json["loss"]["value"].as_f64().unwrap() as f32,
            tensors: candle_core::safetensors::load(
                goldens().join("reference.safetensors"),
                &Device::Cpu,
            )
            .unwrap(),
        }
    }

    /// Log-probabilities of every token after each position of prompt `i`.
    fn logprobs(&self, i: usize) -> Vec<Vec<f32>> {
        let logits = &self.tensors[&format!("{}.{i}.logits", self.tag)];
        candle_nn::ops::log_softmax(logits, 1).unwrap().to_vec2().unwrap()
    }
}

fn weights() -> Weights {
    Weights::open(&goldens().join("gpt2-tiny")).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Hidden states of whole packed sequences, which is how training sees them.
fn hidden(decoder: &Decoder, ops: Ops, sequences: &[&[u32]]) -> Tensor {
    let mut seq_starts = vec![0];
    seq_starts.extend(sequences.iter().scan(0, |end, s| {
        *end += s.len();
        Some(*end)
    }));
    let tokens: Vec<u32> = sequences.concat();
    let positions: Vec<u32> = sequences.iter().flat_map(|s| 0..s.len() as u32).collect();
    let rows = tokens.len();
    let tokens = Tensor::from_vec(tokens, rows, &Device::Cpu).unwrap();
    let positions = Tensor::from_vec(positions, rows, &Device::Cpu).unwrap();
    let heads = decoder.spec().heads;
    let mut attend = CausalPacked { ops, seq_starts: &seq_starts, heads };
    decoder.hidden(&tokens, &positions, &mut attend).unwrap()
}

#[test]
fn packed_sequences_have_pytorchs_logits() {
    let (golden, weights) = (Golden::read(), weights());
    let sequences: Vec<&[u32]> = golden.prompts.iter().map(|(ids, _)| &ids[..]).collect();
    let expected: Vec<&Tensor> =
        (0..sequences.len()).map(|i| &golden.tensors[&format!("base.{i}.logits")]).collect();
    let expected = Tensor::cat(&expected, 0).unwrap();
    for mode in [Mode::Fast, Mode::Reference] {
        let ops = Ops { mode, precision: Precision::F32 };
        let vb = || weights.var_builder(&Device::Cpu);
        for decoder in [
            Decoder::new(weights.spec(), vb(), ops).unwrap(),
            Decoder::packed(weights.spec(), vb(), ops, ops.precision).unwrap(),
        ] {
            let logits = decoder.logits(&hidden(&decoder, ops, &sequences)).unwrap();
            let error = distance(&logits, &expected);
            assert!(error < TOLERANCE, "{mode:?}: {error}");
        }
    }
}

#[test]
fn loss_and_gradients_are_pytorchs() {
    let (golden, weights) = (Golden::read(), weights());
    let from_file = weights.var_builder(&Device::Cpu);
    let vars: HashMap<String, Var> = weights
        .spec()
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let value = from_file.get(shape, &name).unwrap();
            (name, Var::from_tensor(&value).unwrap())
        })
        .collect();
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    for mode in [Mode::Fast, Mode::Reference] {
        let ops = Ops { mode, precision: Precision::F32 };
        let decoder = Decoder::new(weights.spec(), vb.clone(), ops).unwrap();
        let (inputs, targets) =
            (&golden.loss_ids[..golden.loss_ids.len() - 1], &golden.loss_ids[1..]);
        let hidden = hidden(&decoder, ops, &[inputs]);
        let loss = ops.cross_entropy(&hidden, decoder.head().unwrap(), targets).unwrap();
        let grads = ops.backward(&loss).unwrap();
        let loss = loss.to_scalar::<f32>().unwrap();
        assert!((loss - golden.loss).abs() < 1e-5, "{mode:?}: loss {loss}, not {}", golden.loss);
        for (name, var) in &vars {
            let grad = grads.get(var).unwrap_or_else(|| panic!("{mode:?}: {name} has none"));
            let error = distance(grad, &golden.tensors[&format!("grad.{name}")]);
            assert!(error < 1e-5, "{mode:?}: gradient of {name} is off by {error}");
        }
    }
}

/// One sequence as an engine would hold it.
#[derive(Clone, Debug)]
struct Seq {
    tokens: Vec<u32>,
    prompt: usize,
    wanted: usize,
    computed: usize,
    table: Vec<u32>,
    sampling: Arc<Sampling>,
    seed: u64,
    mix: Option<Arc<Mix>>,
    /// Whether every row's log-probabilities are asked for, or only new tokens.
    scored: bool,
    /// After each position: log-probability of every token, by id.
    logprobs: Vec<Vec<f32>>,
    /// Why one of its rows had no answer.
    error: Option<String>,
}

impl Seq {
    fn new(prompt: &[u32], wanted: usize, temperature: f32, seed: u64) -> Self {
        let params = Params { temperature: Some(temperature), ..Params::default() };
        Self {
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            wanted,
            computed: 0,
            table: Vec::new(),
            sampling: Arc::new(params.sampling()),
            seed,
            mix: None,
            scored: true,
            logprobs: Vec::new(),
            error: None,
        }
    }

    fn done(&self) -> bool {
        self.error.is_some() || self.tokens.len() == self.prompt + self.wanted
    }

    fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }
}

/// Runs one step over up to `rows` rows of each sequence.
fn advance(runner: &mut CandleRunner, free: &mut Vec<u32>, seqs: &mut [Seq], rows: &[usize]) {
    let mut input = StepInput::default();
    for (seq, &rows) in seqs.iter_mut().zip(rows) {
        let end = seq.tokens.len().min(seq.computed + rows);
        if seq.done() || end == seq.computed {
            continue;
        }
        while seq.table.len() * BLOCK_SIZE < end {
            seq.table.push(free.pop().expect("the tests' sequences fit"));
        }
        let (start, first_block) = (input.tokens.len(), input.block_tables.len());
        input.tokens.extend(&seq.tokens[seq.computed..end]);
        input.positions.extend(seq.computed as u32..end as u32);
        input.block_tables.extend(&seq.table);
        let rows = start..input.tokens.len();
        if let Some(mix) = &seq.mix {
            adapt(&mut input.adapters, rows.clone(), mix);
        }
        let top = runner.capacity().vocab as u32;
        let scores = rows.clone().filter(|_| seq.scored);
        input.scores.extend(scores.map(|row| ScoreRow { row, target: 0, top }));
        if end == seq.tokens.len() {
            input.samples.push(SampleRow {
                row: rows.end - 1,
                sampling: seq.sampling.clone(),
                seed: seq.seed,
                index: seq.generated().len() as u32,
                history: Vec::new(),
                prompt_len: 0,
                banned: Vec::new(),
                allowed: None,
            });
        }
        let table = first_block..input.block_tables.len();
        input.slices.push(Slice { rows, table, gate: None });
    }
    let output = runner.step(&input).unwrap();
    apply(seqs, &input, output);
}

/// Notes rows with a mix, neighbours of one mix as one entry.
fn adapt(adapters: &mut Vec<AdapterRows>, rows: Range<usize>, mix: &Arc<Mix>) {
    match adapters.last_mut() {
        Some(last) if last.rows.end == rows.start && last.mix.key == mix.key => {
            last.rows.end = rows.end;
        }
        _ => adapters.push(AdapterRows { rows, mix: mix.clone() }),
    }
}

/// Gives each sequence of a step its new token and log-probabilities.
fn apply(seqs: &mut [Seq], input: &StepInput, output: StepOutput) {
    let (mut sampled, mut scored) = (output.sampled.iter(), output.scored.iter());
    for slice in &input.slices {
        let blocks = &input.block_tables[slice.table.clone()];
        let seq = seqs.iter_mut().find(|s| s.table == blocks).unwrap();
        seq.logprobs.truncate(seq.computed);
        seq.computed += slice.rows.len();
        for row in scored.by_ref().take(if seq.scored { slice.rows.len() } else { 0 }) {
            let top = row.as_ref().map_or_else(|_| &[][..], |row| &row.top[..]);
            let mut by_id = vec![0.0; top.len()];
            top.iter().for_each(|&(id, logprob)| by_id[id as usize] = logprob);
            seq.logprobs.push(by_id);
            seq.error = seq.error.take().or(row.clone().err());
        }
        if seq.computed == seq.tokens.len() {
            match sampled.next().unwrap() {
                Ok(sampled) => seq.tokens.push(sampled.token),
                Err(error) => seq.error = Some(error.clone()),
            }
        }
    }
}

/// Holds a sequence to the reference's text and log-probabilities for a prompt.
fn assert_golden(golden: &Golden, i: usize, seq: &Seq) {
    assert_eq!(seq.generated(), golden.prompts[i].1, "{} {i}", golden.tag);
    for (position, expected) in golden.logprobs(i).iter().enumerate() {
        for (token, (a, b)) in seq.logprobs[position].iter().zip(expected).enumerate() {
            assert!((a - b).abs() < TOLERANCE, "{i}, {position}, {token}: {a} is not {b}");
        }
    }
}

fn runner() -> CandleRunner {
    let kv_tokens = BLOCKS * BLOCK_SIZE;
    let options = LoadOptions { dtype: Dtype::F32, kv_tokens, block_size: BLOCK_SIZE };
    load(&goldens().join("gpt2-tiny"), &options).unwrap()
}

/// A sequence run alone, its prompt in one piece.
fn alone(seq: Seq) -> Seq {
    alone_on(&mut runner(), seq)
}

fn alone_on(runner: &mut CandleRunner, mut seq: Seq) -> Seq {
    let mut free: Vec<u32> = (0..BLOCKS as u32).collect();
    while !seq.done() {
        let rows = seq.tokens.len();
        advance(runner, &mut free, std::slice::from_mut(&mut seq), &[rows]);
    }
    seq
}

#[test]
fn alone_equals_pytorch() {
    let golden = Golden::read();
    for (i, (prompt, greedy)) in golden.prompts.iter().enumerate() {
        assert_golden(&golden, i, &alone(Seq::new(prompt, greedy.len(), 0.0, 0)));
    }
}

#[test]
fn every_file_type_serves_in_every_precision() {
    let golden = Golden::read();
    let prompt = &golden.prompts[0].0;
    let last = prompt.len() - 1;
    let input = StepInput {
        tokens: prompt.clone(),
        positions: (0..prompt.len() as u32).collect(),
        slices: vec![Slice { rows: 0..prompt.len(), table: 0..1, gate: None }],
        block_tables: vec![2],
        adapters: Vec::new(),
        samples: Vec::new(),
        scores: vec![ScoreRow { row: last, target: 7, top: 0 }],
    };
    let weights = weights();
    let vb = weights.var_builder(&Device::Cpu);
    let tensors = weights.spec().tensors().into_iter().map(|(name, shape)| {
        let tensor = vb.get(shape, &name).unwrap();
        (name, tensor)
    });
    let tensors = tensors.collect();
    // bf16 has 8 bits of mantissa, f16 has 11.
    for (file, dtype, tolerance) in [
        (DType::F32, Dtype::Auto, TOLERANCE),
        (DType::F32, Dtype::Bf16, 0.05),
        (DType::F16, Dtype::Auto, 0.005),
        (DType::F16, Dtype::Bf16, 0.05),
        (DType::BF16, Dtype::Auto, 0.05),
        (DType::BF16, Dtype::F32, 0.05),
        (DType::F32, Dtype::Int8, 0.1),
    ] {
        let dir = tempfile::tempdir().unwrap();
        weights::save(dir.path(), weights.spec(), &tensors, file).unwrap();
        let options = LoadOptions { dtype, kv_tokens: 64, block_size: 16 };
        let scored = load(dir.path(), &options).unwrap().step(&input).unwrap().scored;
        let error = (scored[0].as_ref().unwrap().logprob - golden.logprobs(0)[last][7]).abs();
        assert!(error < tolerance, "{file:?} as {dtype:?}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Neighbours, chunks and lost caches change nothing, not even the last bit.
    #[test]
    fn company_chunks_and_preemption_change_nothing(
        which in 0usize..4,
        temperature in prop_oneof![Just(0.0f32), Just(1.0f32)],
        neighbours in prop::collection::vec(
            (prop::collection::vec(0u32..512, 1..30), 1usize..12), 0..4),
        steps in prop::collection::vec(
            (prop::collection::vec(0usize..12, 5), 0usize..10), 200),
        blocks in Just((0..BLOCKS as u32).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let prompt = &Golden::read().prompts[which].0;
        let seq = Seq::new(prompt, 16, temperature, 42);
        let expected = alone(seq.clone());
        let mut seqs = vec![seq];
        let neighbour = |prompt: &[u32], n| Seq { scored: false, ..Seq::new(prompt, n, 1.0, 7) };
        seqs.extend(neighbours.iter().map(|(prompt, n)| neighbour(prompt, *n)));
        let (mut runner, mut free) = (runner(), blocks);
        for (rows, event) in &steps {
            advance(&mut runner, &mut free, &mut seqs, rows);
            if *event == 0 {
                // Preemption: the blocks go, what was in them stays behind as rubbish, and the
                // sequence comes back elsewhere.
                free.append(&mut seqs[0].table);
                free.rotate_left(7);
                seqs[0].computed = 0;
            }
        }
        while !seqs[0].done() {
            advance(&mut runner, &mut free, &mut seqs, &[3]);
        }
        prop_assert_eq!(&seqs[0].tokens, &expected.tokens);
        let differs = seqs[0].logprobs.iter().zip(&expected.logprobs).position(|(a, b)| a != b);
        prop_assert_eq!(differs, None, "position whose log-probabilities differ");
    }
}
