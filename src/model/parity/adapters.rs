//! Rows with adapters: equality with PEFT on the golden adapters, with merged weights on random ones, and
//! with the same sequence alone whatever runs beside it.

use super::*;
use crate::adapter::{Deltas, Limits, LowRank, Module, Part};
use crate::kernels::PackedMatrix;
use std::collections::BTreeMap;

const NAMES: [&str; 2] = ["lora-attn", "lora-all"];

fn golden_adapter(name: &str) -> Arc<Deltas> {
    let shape = adapter_shape(weights().spec(), Precision::F32);
    let dir = goldens().join("adapters").join(name);
    adapter::load(&dir, &shape, &Limits::default()).unwrap().deltas(None)
}

fn mix(key: u64, parts: &[(&Arc<Deltas>, f32)]) -> Arc<Mix> {
    let part = |&(deltas, weight): &(&Arc<Deltas>, f32)| Part { deltas: deltas.clone(), weight };
    Arc::new(Mix { key, parts: parts.iter().map(part).collect() })
}

#[test]
fn golden_adapters_equal_peft() {
    for name in NAMES {
        let (golden, deltas) = (Golden::of(name), golden_adapter(name));
        for (i, (prompt, greedy)) in golden.prompts.iter().enumerate() {
            let seq = Seq::new(prompt, greedy.len(), 0.0, 0);
            let mix = Some(mix(1, &[(&deltas, 1.0)]));
            assert_golden(&golden, i, &alone(Seq { mix, ..seq }));
        }
    }
}

/// One low-rank change, unpacked: layer, module, `a [in, r]`, `b [r, out]`.
type Change = (usize, Module, Tensor, Tensor);

fn tensor(rows: usize, columns: usize, seed: u64) -> Tensor {
    let draw = |i: usize| {
        let bits = crate::ids::mix(seed.wrapping_mul(1 << 20).wrapping_add(i as u64)) >> 40;
        bits as f32 / (1 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..rows * columns).map(draw).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

/// Changes of the linear layers for which `ranks` has a rank over 0.
fn changes(ranks: &[usize], seed: u64) -> Vec<Change> {
    let shape = adapter_shape(weights().spec(), Precision::F32);
    let sites = (0..shape.layers).flat_map(|layer| Module::ALL.map(|module| (layer, module)));
    let sites = sites.zip(ranks).enumerate().filter(|(_, (_, rank))| **rank > 0);
    sites
        .map(|(i, ((layer, module), &rank))| {
            let ((inner, outer), seed) = (shape.sizes(module), 100 * seed + 2 * i as u64);
            let a = (tensor(inner, rank, seed) * 0.2).unwrap();
            (layer, module, a, tensor(rank, outer, seed + 1))
        })
        .collect()
}

fn deltas(changes: &[Change]) -> Arc<Deltas> {
    let mut deltas = Deltas::new(&adapter_shape(weights().spec(), Precision::F32));
    for (layer, module, a, b) in changes {
        let pack = |w| Arc::new(PackedMatrix::from_in_out(w, Precision::F32).unwrap());
        deltas.set(*layer, *module, LowRank { a: pack(a), b: pack(b) }).unwrap();
    }
    Arc::new(deltas)
}

/// The golden model with `Σ weight · a · b` added to its weights.
fn merged(parts: &[(Vec<Change>, f32)]) -> CandleRunner {
    let weights = weights();
    let vb = weights.var_builder(&Device::Cpu);
    let all = weights.spec().tensors().into_iter();
    let mut tensors: BTreeMap<String, Tensor> =
        all.map(|(name, shape)| (name.clone(), vb.get(shape, &name).unwrap())).collect();
    for (changes, weight) in parts {
        for (layer, module, a, b) in changes {
            let name = format!("transformer.h.{layer}.{}.weight", module.name());
            let change = (a.matmul(b).unwrap() * f64::from(*weight)).unwrap();
            let sum = (&tensors[&name] + change).unwrap();
            tensors.insert(name, sum);
        }
    }
    let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let ops = Ops::new(&Device::Cpu, Precision::F32);
    let decoder = Decoder::packed(weights.spec(), vb, ops, ops.precision).unwrap();
    CandleRunner::new(decoder, BLOCKS, BLOCK_SIZE).unwrap()
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let other = Spec { layers: 2, ..weights().spec().clone() };
    let other = Arc::new(Deltas::new(&adapter_shape(&other, Precision::F32)));
    let input = StepInput {
        tokens: vec![1],
        positions: vec![0],
        slices: vec![Slice { rows: 0..1, table: 0..1, gate: None }],
        block_tables: vec![0],
        adapters: vec![AdapterRows { rows: 0..1, mix: mix(1, &[(&other, 1.0)]) }],
        ..StepInput::default()
    };
    let error = runner().step(&input).unwrap_err().to_string();
    assert!(error.contains("layers: 2") && error.contains("layers: 3"), "{error}");
}

#[test]
fn an_adapter_that_overflows_fails_its_own_rows_only() {
    let huge = changes(&[4; 12], 1).into_iter();
    let huge: Vec<Change> = huge
        .map(|(layer, module, a, b)| (layer, module, (a * 1e30).unwrap(), (b * 1e30).unwrap()))
        .collect();
    let huge = mix(1, &[(&deltas(&huge), 1.0)]);
    let golden = Golden::read();
    let base =
        |i: usize, scored| Seq { scored, ..Seq::new(&golden.prompts[i].0, 8, 1.0, i as u64) };
    let poisoned = |i, scored| Seq { mix: Some(huge.clone()), ..base(i, scored) };
    let (mut runner, mut free) = (runner(), (0..BLOCKS as u32).collect::<Vec<_>>());
    // The second time, the base's keys and values stand where the adapter's were.
    for _ in 0..2 {
        let mut seqs = vec![base(0, true), base(1, false), poisoned(2, true), poisoned(3, false)];
        let expected = [0, 1].map(|i: usize| alone(seqs[i].clone()));
        while seqs.iter().any(|seq| !seq.done()) {
            advance(&mut runner, &mut free, &mut seqs, &[5; 4]);
        }
        for (seq, expected) in seqs.iter().zip(&expected) {
            assert_eq!((&seq.error, &seq.tokens), (&None, &expected.tokens));
            assert!(seq.logprobs == expected.logprobs);
        }
        for seq in &seqs[2..] {
            assert!(seq.error.as_ref().unwrap().contains("not finite"));
        }
        free.extend(seqs.iter().flat_map(|seq| &seq.table));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn adapters_and_mixtures_equal_merged_weights(
        parts in prop::collection::vec(
            (prop::collection::vec(0usize..20, 12), -1.5f32..1.5), 1..4),
        prompt in prop::collection::vec(0u32..512, 1..40),
    ) {
        let parts: Vec<(Vec<Change>, f32)> = parts
            .iter()
            .enumerate()
            .map(|(i, (ranks, weight))| (changes(ranks, i as u64), *weight))
            .collect();
        let held: Vec<_> = parts.iter().map(|(changes, weight)| (deltas(changes), *weight)).collect();
        let held: Vec<_> = held.iter().map(|(deltas, weight)| (deltas, *weight)).collect();
        let seq = Seq::new(&prompt, 1, 0.0, 0);
        let expected = alone_on(&mut merged(&parts), seq.clone());
        let got = alone(Seq { mix: Some(mix(1, &held)), ..seq });
        for (got, expected) in got.logprobs.concat().iter().zip(expected.logprobs.concat()) {
            prop_assert!((got - expected).abs() < TOLERANCE, "{got}, not {expected}");
        }
    }

    /// Base, both adapters and a mixture in one batch, in any order and pieces, some scored row by row
    /// and some not: each as alone, to the last bit.
    #[test]
    fn a_mixed_batch_equals_each_alone(
        order in Just(vec![0usize, 1, 1, 2, 3, 3]).prop_shuffle(),
        scored in prop::collection::vec(any::<bool>(), 6),
        prompts in prop::collection::vec(prop::collection::vec(0u32..512, 1..24), 6),
        steps in prop::collection::vec(prop::collection::vec(0usize..9, 6), 40),
        unequal in 0.1f32..2.0,
    ) {
        let [attn, all] = NAMES.map(golden_adapter);
        let mixes = [
            None,
            Some(mix(1, &[(&attn, 1.0)])),
            Some(mix(2, &[(&all, 1.0)])),
            Some(mix(3, &[(&all, unequal), (&attn, -0.5)])),
        ];
        let seqs = order.iter().zip(&prompts).zip(&scored).enumerate();
        let mut seqs: Vec<Seq> = seqs
            .map(|(i, ((&which, prompt), &scored))| {
                Seq { mix: mixes[which].clone(), scored, ..Seq::new(prompt, 5, 1.0, i as u64) }
            })
            .collect();
        let expected: Vec<Seq> = seqs.iter().cloned().map(alone).collect();
        let (mut runner, mut free) = (runner(), (0..BLOCKS as u32).collect());
        for rows in &steps {
            advance(&mut runner, &mut free, &mut seqs, rows);
        }
        while seqs.iter().any(|seq| !seq.done()) {
            advance(&mut runner, &mut free, &mut seqs, &[3; 6]);
        }
        for (seq, expected) in seqs.iter().zip(&expected) {
            prop_assert_eq!(&seq.tokens, &expected.tokens);
            prop_assert!(seq.logprobs == expected.logprobs);
        }
    }
}
