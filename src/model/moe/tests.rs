//! Equality with PyTorch, with the dense model and with oneself in other company.

use super::*;
use crate::kernels::Mode;
use crate::kernels::Precision;
use crate::model::decoder::{CausalPacked, Decoder, Pass};
use crate::model::init::upcycle;
use crate::model::spec::Gate;
use crate::model::step::{Routing, Runner, ScoreRow, Slice, StepInput};
use crate::model::{CandleRunner, Weights};
use candle_core::{DType, Device, Var};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

const GATES: [Gate; 4] = [Gate::Token, Gate::TokenTask, Gate::PerTask, Gate::Task];
const BLOCK_SIZE: usize = 4;
const F32: Ops = Ops { mode: Mode::Fast, precision: Precision::F32 };

type Tensors = BTreeMap<String, Tensor>;
/// Token ids and the task.
type Sequence = (Vec<u32>, Option<u32>);

fn goldens() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// The reference of `tests/goldens/moe.py`.
struct Golden {
    config: Value,
    sequences: Vec<Sequence>,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    fn read() -> Self {
        let text = std::fs::read_to_string(goldens().join("moe.json")).unwrap();
        let mut json: Value = serde_json::from_str(&text).unwrap();
        let sequence = |s: &Value| {
            let ids = serde_json::from_value(s["ids"].clone()).unwrap();
            (ids, s["task"].as_u64().map(|task| task as u32))
        };
        let sequences = json["sequences"].as_array().unwrap().iter().map(sequence).collect();
        let file = goldens().join("moe.safetensors");
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        Self { config: json["config"].take(), sequences, tensors }
    }

    fn model(&self, gate: Gate, top_k: usize) -> (Spec, Tensors) {
        let mut config = self.config.clone();
        config["shoal"]["moe"]["gate"] = gate.name().into();
        config["shoal"]["moe"]["top_k"] = top_k.into();
        let spec = Spec::from_config(&config.to_string()).unwrap();
        let find = |name: &String| {
            let own = self.tensors.get(&format!("{}.{name}", gate.name()));
            own.unwrap_or_else(|| &self.tensors[name]).clone()
        };
        let tensors = spec.tensors().into_iter().map(|(name, _)| (name.clone(), find(&name)));
        let tensors = tensors.collect();
        (spec, tensors)
    }

    /// A tensor that was recorded of one of the models.
    fn recorded(&self, gate: Gate, top_k: usize, what: &str) -> &Tensor {
        &self.tensors[&format!("{}.{top_k}.{what}", gate.name())]
    }
}

/// Every gate with top-1 and top-2.
fn kinds() -> impl Iterator<Item = (Gate, usize)> {
    GATES.into_iter().flat_map(|gate| [(gate, 1), (gate, 2)])
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn var_builder(tensors: &Tensors) -> VarBuilder<'static> {
    let tensors = tensors.iter().map(|(name, t)| (name.clone(), t.clone())).collect();
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

/// Whole sequences, as training sees them.
struct Whole<'a> {
    causal: CausalPacked<'a>,
    gates: Vec<Option<u32>>,
    routes: Vec<Routes>,
}

impl Pass for Whole<'_> {
    fn attend(&mut self, layer: usize, qkv: &Tensor) -> Result<Tensor> {
        self.causal.attend(layer, qkv)
    }

    fn gates(&self, _kept: bool) -> &[Option<u32>] {
        &self.gates
    }

    fn routed(&mut self, _layer: usize, _kept: bool, routes: &Routes) {
        self.routes.push(routes.clone());
    }
}

/// Final hidden states of all rows of the sequences, and where the rows went.
fn hidden(decoder: &Decoder, ops: Ops, sequences: &[Sequence]) -> (Tensor, Vec<Routes>) {
    let mut seq_starts = vec![0];
    let (mut tokens, mut positions, mut gates) = (Vec::new(), Vec::new(), Vec::new());
    for (ids, task) in sequences {
        tokens.extend(ids);
        positions.extend(0..ids.len() as u32);
        gates.extend(vec![*task; ids.len()]);
        seq_starts.push(tokens.len());
    }
    // What is left out has no task.
    while gates.last() == Some(&None) {
        gates.pop();
    }
    let ids = |ids: Vec<u32>| Tensor::new(ids, &Device::Cpu).unwrap();
    let causal = CausalPacked { ops, seq_starts: &seq_starts, heads: decoder.spec().heads };
    let mut pass = Whole { causal, gates, routes: Vec::new() };
    let hidden = decoder.hidden(&ids(tokens), &ids(positions), &mut pass).unwrap();
    (hidden, pass.routes)
}

fn packed(spec: &Spec, tensors: &Tensors, ops: Ops) -> Decoder {
    Decoder::packed(spec, var_builder(tensors), ops, ops.precision).unwrap()
}

#[test]
fn both_forms_are_pytorchs() {
    let golden = Golden::read();
    for (gate, top_k) in kinds() {
        let (spec, tensors) = golden.model(gate, top_k);
        let reference = Ops { mode: Mode::Reference, ..F32 };
        let plain = |ops| Decoder::new(&spec, var_builder(&tensors), ops).unwrap();
        let decoders =
            [(plain(F32), F32), (plain(reference), reference), (packed(&spec, &tensors, F32), F32)];
        for (decoder, ops) in decoders {
            let (hidden, routes) = hidden(&decoder, ops, &golden.sequences);
            let logits = decoder.logits(&hidden).unwrap();
            let error = distance(&logits, golden.recorded(gate, top_k, "logits"));
            assert!(error < 1e-4, "{gate:?} top-{top_k}, {ops:?}: {error}");
            let experts: Vec<u8> =
                routes.iter().flat_map(|r| &r.experts).map(|&e| e as u8).collect();
            let expected = golden.recorded(gate, top_k, "experts").flatten_all().unwrap();
            assert_eq!(experts, expected.to_vec1::<u8>().unwrap(), "{gate:?} top-{top_k}");
            let entropy: Vec<f32> = routes.iter().flat_map(|r| r.entropy.clone()).collect();
            let expected = values(golden.recorded(gate, top_k, "entropy"));
            assert!(entropy.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }
}

#[test]
fn gradients_are_pytorchs_and_reach_everything() {
    let golden = Golden::read();
    let targets = golden
        .sequences
        .iter()
        .flat_map(|(ids, _)| ids[1..].iter().copied().chain([crate::kernels::IGNORE]));
    let targets: Vec<u32> = targets.collect();
    let mut all_used = false;
    for (gate, top_k) in kinds() {
        let (spec, tensors) = golden.model(gate, top_k);
        let vars: BTreeMap<String, Var> = tensors
            .into_iter()
            .map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap()))
            .collect();
        let tensors = vars.iter().map(|(name, v)| (name.clone(), v.as_tensor().clone())).collect();
        for mode in [Mode::Fast, Mode::Reference] {
            let ops = Ops { mode, ..F32 };
            let decoder = Decoder::new(&spec, var_builder(&tensors), ops).unwrap();
            let (hidden, routes) = hidden(&decoder, ops, &golden.sequences);
            let loss = ops.cross_entropy(&hidden, decoder.head().unwrap(), &targets).unwrap();
            let grads = ops.backward(&loss).unwrap();
            let moe = spec.moe.as_ref().unwrap();
            let is_used = |name: &str| {
                let expert = |i: usize| format!("h.{}.moe.experts.", moe.layers[i]);
                let rest = |i| name.split_once(&expert(i)).map(|(_, rest)| (i, rest));
                let Some((i, rest)) = rest(0).or_else(|| rest(1)) else { return true };
                let expert: u16 = rest.split('.').next().unwrap().parse().unwrap();
                routes[i].experts.contains(&expert)
            };
            all_used |= vars.keys().all(|name| is_used(name));
            for (name, var) in &vars {
                let norm = grads.get(var).map_or(0.0, |g| values(g).iter().map(|g| g * g).sum());
                assert_eq!(norm > 1e-12, is_used(name), "{gate:?} top-{top_k}: {name}: {norm}");
                let recorded = format!("{}.{top_k}.grad.{name}", gate.name());
                let Some(expected) = golden.tensors.get(&recorded) else { continue };
                let zeros = expected.zeros_like().unwrap();
                let error = distance(grads.get(var).unwrap_or(&zeros), expected);
                assert!(error < 1e-5, "{gate:?} top-{top_k}, {mode:?}: {name} is off by {error}");
            }
        }
    }
    assert!(all_used, "no model of the reference uses all of its experts");
}

fn runner(spec: &Spec, tensors: &Tensors, precision: Precision) -> CandleRunner {
    let decoder = packed(spec, tensors, Ops { precision, ..F32 });
    CandleRunner::new(decoder, 64, BLOCK_SIZE).unwrap()
}

/// What the rows of a sequence came to.
#[derive(Clone, Debug, Default, PartialEq)]
struct Rows {
    /// Of every token, by row.
    logprobs: Vec<Vec<f32>>,
    /// Of each layer, by row.
    experts: Vec<Vec<u16>>,
    /// Of each layer, by row.
    entropy: Vec<Vec<f32>>,
}

/// Runs the sequences together, up to `chunk` rows of each in a step.
fn run(runner: &mut CandleRunner, sequences: &[Sequence], chunk: usize) -> Vec<Rows> {
    let blocks = runner.capacity().context.div_ceil(BLOCK_SIZE);
    let knows_tasks = runner.experts().is_some_and(|e| !e.tasks.is_empty());
    let mut all = vec![Rows::default(); sequences.len()];
    let longest = sequences.iter().map(|(ids, _)| ids.len()).max().unwrap();
    for start in (0..longest).step_by(chunk) {
        let mut input = StepInput::default();
        let mut owners = Vec::new();
        for (i, (ids, gate)) in sequences.iter().enumerate() {
            let part = start.min(ids.len())..start.saturating_add(chunk).min(ids.len());
            if part.is_empty() {
                continue;
            }
            owners.extend(vec![i; part.len()]);
            let (rows, table) = (input.tokens.len(), input.block_tables.len());
            input.tokens.extend(&ids[part.clone()]);
            input.positions.extend(part.start as u32..part.end as u32);
            input.block_tables.extend((i * blocks) as u32..((i + 1) * blocks) as u32);
            let (rows, table) = (rows..input.tokens.len(), table..input.block_tables.len());
            let gate = gate.filter(|_| knows_tasks);
            input.slices.push(Slice { rows, table, gate });
        }
        let top = runner.capacity().vocab as u32;
        input.scores = (0..owners.len()).map(|row| ScoreRow { row, target: 0, top }).collect();
        let output = runner.step(&input).unwrap();
        let Routing { experts, entropy } = output.routing;
        let (layers, top_k) = runner.experts().map_or((0, 1), |e| (e.layers.len(), e.top_k));
        assert_eq!(entropy.len(), layers * owners.len());
        for (row, (&owner, scored)) in owners.iter().zip(&output.scored).enumerate() {
            let scored = scored.as_ref().unwrap();
            let mut by_id = vec![0.0; top as usize];
            scored.top.iter().for_each(|&(id, logprob)| by_id[id as usize] = logprob);
            let places = (0..layers).map(|layer| layer * owners.len() + row);
            let own = places.clone().flat_map(|p| experts[p * top_k..(p + 1) * top_k].to_vec());
            let rows = &mut all[owner];
            rows.logprobs.push(by_id);
            rows.experts.push(own.collect());
            rows.entropy.push(places.map(|p| entropy[p]).collect());
        }
    }
    all
}

#[test]
fn company_chunks_and_the_cache_change_nothing() {
    let golden = Golden::read();
    for (gate, top_k) in kinds() {
        let (spec, tensors) = golden.model(gate, top_k);
        for precision in [Precision::F32, Precision::Bf16] {
            let mut runner = runner(&spec, &tensors, precision);
            let mut alone = Vec::new();
            for sequence in &golden.sequences {
                alone.extend(run(&mut runner, std::slice::from_ref(sequence), 16));
            }
            // All rows at once, ragged chunks, and decode steps of one row each.
            for chunk in [16, 3, 1] {
                let together = run(&mut runner, &golden.sequences, chunk);
                assert!(together == alone, "{gate:?} top-{top_k} {precision:?} chunks of {chunk}");
            }
            if precision == Precision::F32 {
                let logits = golden.recorded(gate, top_k, "logits");
                let expected = values(&candle_nn::ops::log_softmax(logits, 1).unwrap());
                let served = alone.iter().flat_map(|rows| rows.logprobs.concat());
                let off = served.zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < 1e-4, "{gate:?} top-{top_k}: {off}");
            }
        }
    }
}

/// The golden dense model.
fn dense() -> (Spec, Tensors) {
    let weights = Weights::open(&goldens().join("gpt2-tiny")).unwrap();
    let vb = weights.var_builder(&Device::Cpu);
    let spec = weights.spec().clone();
    let read = |(name, shape): (String, Vec<usize>)| (name.clone(), vb.get(shape, &name).unwrap());
    let tensors = spec.tensors().into_iter().map(read).collect();
    (spec, tensors)
}

#[test]
fn upcycled_is_the_dense_model() {
    let (spec, tensors) = dense();
    let sequences: Vec<Sequence> = vec![
        ((0..90).map(|i| i * 37 % 512).collect(), Some(1)),
        ((0..25).map(|i| i * 11 % 512).collect(), None),
        (vec![7], Some(0)),
    ];
    let decoder = packed(&spec, &tensors, F32);
    let expected = decoder.logits(&hidden(&decoder, F32, &sequences).0).unwrap();
    let largest = distance(&expected, &expected.zeros_like().unwrap());
    for gate in GATES {
        for (experts, top_k) in [(1, 1), (4, 1), (4, 2), (5, 5)] {
            let moe = Moe { layers: vec![0, 2], experts, top_k, gate };
            let tasks = vec!["image".into(), "video".into()];
            let spec = Spec { moe: Some(moe), tasks, ..spec.clone() };
            let tensors = upcycle(&spec, &tensors, 1.0, 3).unwrap();
            let off = |decoder: &Decoder| {
                let (hidden, routes) = hidden(decoder, F32, &sequences);
                (distance(&decoder.logits(&hidden).unwrap(), &expected), routes)
            };
            let (error, routes) = off(&packed(&spec, &tensors, F32));
            assert_eq!(error, 0.0, "{gate:?}, {experts} experts, top-{top_k}");
            let (error, _) = off(&Decoder::new(&spec, var_builder(&tensors), F32).unwrap());
            let allowed = if top_k == 1 { 0.0 } else { 1e-6 * largest };
            assert!(error <= allowed, "{gate:?}, {experts} experts, top-{top_k}: {error}");
            assert!(experts == 1 || gate == Gate::Task || routes[0].only_expert().is_none());
        }
    }
}

#[test]
fn rows_without_a_task_take_the_mean_of_the_tasks() {
    let golden = Golden::read();
    let with = |task: Option<u32>| -> Vec<Sequence> {
        golden.sequences.iter().map(|(ids, _)| (ids.clone(), task)).collect()
    };
    for (gate, top_k) in kinds().filter(|(gate, _)| gate.knows_tasks()) {
        let (spec, mut tensors) = golden.model(gate, top_k);
        let decoder = packed(&spec, &tensors, F32);
        let (without, routes) = hidden(&decoder, F32, &with(None));
        let (unknown, _) = hidden(&decoder, F32, &with(Some(3)));
        assert_eq!(values(&without), values(&unknown));
        let (other, _) = hidden(&decoder, F32, &with(Some(0)));
        assert!(distance(&without, &other) > 0.1, "{gate:?}: the task changes nothing");
        // The model whose tasks all have the mean as their row.
        let bias = if gate == Gate::PerTask { "gate.weight" } else { "gate.task_bias" };
        for (_, rows) in tensors.iter_mut().filter(|(name, _)| name.ends_with(bias)) {
            let mean = rows.mean_keepdim(0).unwrap();
            *rows = mean.broadcast_as(rows.shape()).unwrap().contiguous().unwrap();
        }
        let decoder = packed(&spec, &tensors, F32);
        let (mean, mean_routes) = hidden(&decoder, F32, &with(Some(2)));
        assert!(distance(&without, &mean) < 1e-5, "{gate:?} top-{top_k}");
        assert_eq!(routes[0].experts, mean_routes[0].experts);
    }
}

#[test]
fn only_computed_rows_have_routes() {
    let golden = Golden::read();
    let (spec, tensors) = golden.model(Gate::TokenTask, 2);
    let mut runner = runner(&spec, &tensors, Precision::F32);
    let experts = runner.experts().unwrap();
    assert_eq!((experts.layers, experts.count, experts.top_k), (vec![0, 2], 4, 2));
    assert_eq!(experts.tasks, ["image", "video", "music"]);
    let input = |gate| StepInput {
        tokens: vec![1, 2, 3],
        positions: vec![0, 1, 2],
        slices: vec![Slice { rows: 0..3, table: 0..1, gate }],
        block_tables: vec![0],
        scores: vec![ScoreRow { row: 1, target: 0, top: 0 }],
        ..StepInput::default()
    };
    let Routing { experts, entropy } = runner.step(&input(Some(2))).unwrap().routing;
    let computed = [true, true, true, false, true, false];
    assert_eq!(entropy.iter().map(|e| !e.is_nan()).collect::<Vec<_>>(), computed);
    for (row, is_computed) in computed.into_iter().enumerate() {
        assert!(experts[2 * row..2 * row + 2].iter().all(|&e| (e < 4) == is_computed));
    }
    let error = runner.step(&input(Some(3))).unwrap_err().to_string();
    assert!(error.contains("gate task 3"), "{error}");
}

#[test]
fn gates_that_know_no_tasks_refuse_them() {
    let (spec, tensors) = Golden::read().model(Gate::Token, 1);
    let mut runner = runner(&spec, &tensors, Precision::F32);
    assert!(runner.experts().unwrap().tasks.is_empty());
    let input = StepInput {
        tokens: vec![1],
        positions: vec![0],
        slices: vec![Slice { rows: 0..1, table: 0..1, gate: Some(0) }],
        block_tables: vec![0],
        ..StepInput::default()
    };
    assert!(runner.step(&input).unwrap_err().to_string().contains("gate task 0"));
}

fn chosen(logits: &[f32], top_k: usize) -> Routes {
    let mut routes = Routes::new(top_k);
    routes.choose(&mut logits.to_vec());
    routes
}

#[test]
fn the_best_are_chosen_and_ties_go_to_the_first() {
    assert_eq!(chosen(&[1.0, 3.0, 3.0, 2.0], 3).experts, [1, 2, 3]);
    let tie = chosen(&[0.0; 3], 2);
    assert_eq!((tie.experts, tie.weights), (vec![0, 1], vec![0.5, 0.5]));
    assert!((tie.entropy[0] - 3f32.ln()).abs() < 1e-6);
    // Both underflow to the same probability.
    assert_eq!(chosen(&[0.0, -200.0, -150.0], 2).experts, [0, 1]);
    let extreme = chosen(&[-1e30, 1e30, 0.0], 1);
    assert_eq!(
        (extreme.experts, extreme.weights, extreme.entropy),
        (vec![1], vec![1.0], vec![0.0])
    );
    let (third, two) = (chosen(&[0.1, 0.7, -0.3], 1).weights, chosen(&[2f32.ln(), 0.0], 2).weights);
    assert_eq!(third, [1.0]);
    assert!((two[0] - 2.0 / 3.0).abs() < 1e-6 && (two[1] - 1.0 / 3.0).abs() < 1e-6);
    // What is not a number still goes to different experts; the step then fails on its logits.
    let mut broken = chosen(&[f32::NAN; 4], 4).experts;
    broken.sort_unstable();
    assert_eq!(broken, [0, 1, 2, 3]);
}

#[test]
fn one_task_under_a_task_gate_has_one_expert() {
    let (spec, tensors) = Golden::read().model(Gate::Task, 1);
    let decoder = packed(&spec, &tensors, F32);
    let ids: Vec<u32> = (1..12).collect();
    let (_, routes) = hidden(&decoder, F32, &[(ids.clone(), Some(1)), (ids.clone(), Some(1))]);
    assert!(routes.iter().all(|r| r.only_expert().is_some()));
    let (_, routes) = hidden(&decoder, F32, &[(ids.clone(), Some(1)), (ids, Some(2))]);
    assert!(routes.iter().any(|r| r.only_expert().is_none()));
}
