//! Gradients, losses, the optimiser and its schedule.

use super::{PAIRS, codec, example};
use crate::kernels::IGNORE;
use crate::model::{Spec, Weights};
use crate::train::batch::Batch;
use crate::train::draws::Draws;
use crate::train::learner::{Learn, Learner};
use crate::train::objective::{Sequence, controlled};
use crate::train::params::{Gradients, Params, learning_rate};
use crate::train::recipe::{Optimizer, Precision, Recipe};
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens");

fn spec() -> Spec {
    Spec {
        layers: 2,
        heads: 2,
        width: 32,
        inner: 128,
        context: 64,
        vocab: 400,
        eps: 1e-5,
        eos: vec![0],
        tasks: Vec::new(),
        moe: None,
    }
}

fn learner(precision: Precision) -> Learner {
    let params = Params::initial(&spec(), 5, &Device::Cpu).unwrap();
    Learner::new(&spec(), params, precision, &Device::Cpu).unwrap()
}

fn sequences() -> Vec<Sequence> {
    let codec = codec();
    let one = |&(task, input, output): &(&str, &str, &str)| {
        let example = example(task, input, output);
        controlled(&codec, &example, 64, 0.0, &mut Draws::at(&[0])).unwrap().unwrap()
    };
    PAIRS.iter().map(one).collect()
}

fn scalar(t: &Tensor) -> f64 {
    f64::from(t.to_scalar::<f32>().unwrap())
}

#[test]
fn every_variable_has_a_gradient() {
    for precision in [Precision::F32, Precision::Bf16] {
        let learner = learner(precision);
        let batch = Batch::pack(&sequences());
        let grads = learner.gradients(&learner.loss(&batch).unwrap()).unwrap();
        let mut sums = Gradients::default();
        learner.params.accumulate(&mut sums, &grads, 1.0).unwrap();
        assert_eq!(sums.by_name(&learner.params).count(), spec().tensors().len());
        for (name, grad) in sums.by_name(&learner.params) {
            let size = scalar(&grad.abs().unwrap().sum_all().unwrap());
            assert!(size > 0.0 && size.is_finite(), "{name}: {size}");
        }
    }
}

#[test]
fn loss_and_gradients_equal_pytorch() {
    let weights = Weights::open(&Path::new(GOLDENS).join("gpt2-tiny")).unwrap();
    let vb = weights.var_builder(&Device::Cpu);
    let load = |(name, shape): (String, Vec<usize>)| (name.clone(), vb.get(shape, &name).unwrap());
    let tensors: BTreeMap<_, _> = weights.spec().tensors().into_iter().map(load).collect();
    let params = Params::from_tensors(&weights.spec().tensors(), &tensors, &Device::Cpu).unwrap();
    let learner = Learner::new(weights.spec(), params, Precision::F32, &Device::Cpu).unwrap();

    let text = std::fs::read_to_string(format!("{GOLDENS}/reference.json")).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids: Vec<u32> = serde_json::from_value(reference["loss"]["ids"].clone()).unwrap();
    let loss = learner.loss(&Batch::pack(&[Sequence::plain(&ids, 128)])).unwrap();
    let wanted = reference["loss"]["value"].as_f64().unwrap();
    assert!((scalar(&loss) - wanted).abs() < 1e-5, "{} {wanted}", scalar(&loss));

    let bytes = std::fs::read(format!("{GOLDENS}/reference.safetensors")).unwrap();
    let goldens = SafeTensors::deserialize(&bytes).unwrap();
    let grads = learner.gradients(&loss).unwrap();
    let mut sums = Gradients::default();
    learner.params.accumulate(&mut sums, &grads, 1.0).unwrap();
    for (name, grad) in sums.by_name(&learner.params) {
        let view = goldens.tensor(&format!("grad.{name}")).unwrap();
        let floats = view.data().chunks_exact(4);
        let wanted = floats.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let got = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(grad.dims(), view.shape(), "{name}");
        for (got, wanted) in got.into_iter().zip(wanted) {
            assert!((got - wanted).abs() < 1e-5 + 1e-3 * wanted.abs(), "{name}: {got} {wanted}");
        }
    }
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    let learner = learner(Precision::F32);
    let sequences = sequences();
    let (mut total, mut learnt) = (0.0, 0.0);
    for sequence in &sequences {
        let batch = Batch::pack([sequence]);
        let weight = batch.learnt() as f64;
        total += weight * scalar(&learner.loss(&batch).unwrap());
        learnt += weight;
    }
    let together = scalar(&learner.loss(&Batch::pack(&sequences)).unwrap());
    assert!((together - total / learnt).abs() < 1e-5, "{together} {}", total / learnt);
    let in_parts = learner.evaluate(&sequences, 50).unwrap();
    assert!((together - in_parts).abs() < 1e-5, "{together} {in_parts}");
}

#[test]
fn only_the_reply_counts_in_the_loss() {
    let learner = learner(Precision::F32);
    let sequence = sequences().remove(0);
    let gen_at = sequence.targets.iter().position(|&t| t != IGNORE).unwrap();
    let loss = |s: &Sequence| scalar(&learner.loss(&Batch::pack([s])).unwrap());
    let mut all = sequence.clone();
    all.targets = [&sequence.tokens[1..], &[0]].concat();
    let reply = Sequence {
        tokens: sequence.tokens.clone(),
        targets: [vec![IGNORE; gen_at], all.targets[gen_at..].to_vec()].concat(),
    };
    assert_eq!(loss(&sequence), loss(&reply));
    assert_ne!(loss(&sequence), loss(&all));
}

/// Gradient accumulation is the same step as one large batch, up to rounding.
#[test]
fn a_step_in_parts_is_the_whole_step() {
    let sequences = sequences();
    let updated = |micro: usize| {
        let learner = learner(Precision::F32);
        let constants = Optimizer::default();
        // Two steps, because the first one of Adam hides the gradient's size.
        for number in 1..=2 {
            learner.step(&sequences, micro, &constants, 1e-2, number).unwrap();
        }
        learner.params.values()
    };
    let (whole, parts) = (updated(1000), updated(40));
    for (name, value) in &whole {
        let far = (value - &parts[name]).unwrap().abs().unwrap().max_all().unwrap();
        // Where a gradient is all rounding (the key's bias), Adam's step has any sign.
        let allowed = if name.ends_with("c_attn.bias") { 4e-2 } else { 2e-3 };
        assert!(scalar(&far) < allowed, "{name}: {}", scalar(&far));
    }
}

#[test]
fn clipping_bounds_the_step_and_reports_the_norm() {
    let learner = learner(Precision::F32);
    let batch = Batch::pack(&sequences());
    let grads = learner.gradients(&learner.loss(&batch).unwrap()).unwrap();
    let norm = |weight: f64| {
        let mut sums = Gradients::default();
        learner.params.accumulate(&mut sums, &grads, weight).unwrap();
        learner.params.step(&sums, &Optimizer::default(), 0.0, 1).unwrap()
    };
    assert!((norm(1.0) - norm(37.0)).abs() < 1e-4 * norm(1.0), "the mean, not the sum");
    assert!(learner.params.step(&Gradients::default(), &Optimizer::default(), 0.0, 1).is_err());
}

#[test]
fn the_rate_warms_up_and_decays() {
    let kitchen = super::Kitchen::new(105, 0.5);
    let recipe = Recipe::load(&kitchen.recipe()).unwrap();
    let rate = |step| learning_rate(&recipe.stages[1], step);
    assert!((rate(0) - 0.1).abs() < 1e-9 && (rate(4) - 0.5).abs() < 1e-9);
    assert!((rate(55) - 0.275).abs() < 1e-9, "half way: {}", rate(55));
    assert!((rate(104) - 0.05).abs() < 1e-3 && rate(1000) >= 0.05);
    assert!((5..104).all(|step| rate(step + 1) <= rate(step)));
}
