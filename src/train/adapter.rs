//! From examples of a task to an endpoint: a LoRA on a frozen base model, and the task file that serves
//! it.
//!
//! The base is any bundle. Its weights are constants here; only the adapter's matrices are learnt,
//! through the same decoder and the same operations as everything else. What it writes is PEFT's layout,
//! which every LoRA reader knows.

mod examples;
mod settings;
mod target;

pub use settings::{Recipe, Settings};

use super::batch::Batch;
use super::draws::Draws;
use super::learner::{Learn, Learner};
use super::params::{Params, learning_rate};
use super::recipe::{Optimizer, Stage};
use super::run::device;
use crate::adapter::{Change, Module};
use crate::kernels::{Ops, Precision};
use crate::model::{CausalPacked, Decoder, Pass, Site, Spec, Weights, adapter_shape};
use anyhow::{Result, ensure};
use candle_core::{Device, Result as CandleResult, Tensor};
use examples::Examples;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use target::Target;

/// What matrix products are rounded to.
const PRECISION: Precision = Precision::Bf16;

/// What a finished run says of itself.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The adapter's folder.
    pub adapter: PathBuf,
    /// The task's file.
    pub task: PathBuf,
    /// Mean loss on the held-out examples before training, in nats a token; `None` if there are none.
    pub before: Option<f64>,
    /// The same with the adapter that was kept.
    pub after: Option<f64>,
}

/// Trains an adapter and writes it, with its task file, below `out`. Once `stop` is set it ends with an
/// error and has written nothing.
pub fn run(recipe: &Recipe, out: &Path, stop: &AtomicBool) -> Result<Summary> {
    recipe.check()?;
    let target = Target::of(recipe, out)?;
    let weights = Weights::open(&recipe.base)?;
    let spec = weights.spec();
    let examples = Examples::read(recipe, spec)?;
    let apprentice = Apprentice::new(recipe, &weights, stop)?;
    eprintln!(
        "{}: rank {}, {} parameters over {} frozen ones; {} examples, {} held out",
        recipe.task,
        recipe.adapter.rank,
        apprentice.learner.params.count(),
        spec.parameters(),
        examples.training.len(),
        examples.held_out.len()
    );
    let before = apprentice.held_out(&examples)?;
    let (best, after) = apprentice.train(recipe, &examples, before)?;
    apprentice.go_on()?;
    target.write(recipe, spec.layers, &changes(&best, spec.layers), &examples.layout)?;
    Ok(Summary { adapter: target.adapter, task: target.task, before, after })
}

/// A frozen base, and an adapter that learns.
struct Apprentice<'a> {
    learner: Learner,
    batch_tokens: usize,
    /// The task as the base's gates count it, if they know it: it is served by the same.
    gate: Option<u32>,
    stop: &'a AtomicBool,
}

impl Learn for Apprentice<'_> {
    fn learner(&self) -> &Learner {
        &self.learner
    }

    fn loss(&self, batch: &Batch) -> Result<Tensor> {
        self.go_on()?;
        let (causal, params) = (self.learner.causal(batch), &self.learner.params);
        let gates = vec![self.gate; batch.tokens.len()];
        self.learner.loss_in(&mut Adapted { causal, params, gates }, batch)
    }
}

impl<'a> Apprentice<'a> {
    fn new(recipe: &Recipe, weights: &Weights, stop: &'a AtomicBool) -> Result<Self> {
        let (device, spec) = (device()?, weights.spec());
        let ops = Ops::new(&device, PRECISION);
        let decoder = Decoder::new(spec, weights.var_builder(&device), ops)?;
        let shapes = variables(spec, &recipe.adapter);
        ensure!(
            !shapes.is_empty(),
            "adapter.target_modules: the base has experts in place of all of them; allowed: {}, {}",
            Module::Qkv.name(),
            Module::AttnProj.name()
        );
        let params = Params::from_tensors(&shapes, &initial(&shapes, recipe.seed)?, &device)?;
        let gate = spec.tasks.iter().position(|task| *task == recipe.task).map(|i| i as u32);
        let learner = Learner::over(decoder, params, ops, &device);
        Ok(Self { learner, batch_tokens: recipe.adapter.batch_tokens, gate, stop })
    }

    /// An error once it is to stop.
    fn go_on(&self) -> Result<()> {
        ensure!(!self.stop.load(Ordering::Relaxed), "stopped: nothing was written");
        Ok(())
    }

    /// Mean loss in nats a token on the held-out examples; `None` if there are none.
    fn held_out(&self, examples: &Examples) -> Result<Option<f64>> {
        let held_out = &examples.held_out;
        let loss = || self.evaluate(held_out, self.batch_tokens);
        (!held_out.is_empty()).then(loss).transpose()
    }

    /// Trains through all epochs. Gives the variables of the epoch whose held-out loss was least (of the
    /// last one, if nothing is held out), and that loss.
    fn train(
        &self,
        recipe: &Recipe,
        examples: &Examples,
        before: Option<f64>,
    ) -> Result<(BTreeMap<String, Tensor>, Option<f64>)> {
        let schedule = schedule(&recipe.adapter, examples);
        // There is little to overfit that decay would help with, and zero is where B begins.
        let constants = Optimizer { weight_decay: 0.0, ..Optimizer::default() };
        let mut best = (self.copy()?, before);
        let mut number = 0;
        for epoch in 0..recipe.adapter.epochs {
            let mut draws = Draws::at(&[recipe.seed, u64::from(epoch)]);
            let (mut loss, mut steps) = (0.0, 0u32);
            for sequences in examples.epoch(self.batch_tokens, &mut draws)? {
                let lr = learning_rate(&schedule, number);
                number += 1;
                let step = number as usize;
                loss += self.step(&sequences, self.batch_tokens, &constants, lr, step)?.0;
                steps += 1;
            }
            let held_out = self.held_out(examples)?;
            let shown = held_out.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.3}"));
            eprintln!(
                "epoch {} of {}: loss {:.3}, held out {shown}",
                epoch + 1,
                recipe.adapter.epochs,
                loss / f64::from(steps.max(1))
            );
            if held_out.is_none_or(|new| best.1.is_none_or(|old| new < old)) {
                best = (self.copy()?, held_out);
            }
        }
        Ok(best)
    }

    fn copy(&self) -> Result<BTreeMap<String, Tensor>> {
        let values = self.learner.params.values().into_iter();
        values.map(|(name, value)| Ok((name, value.copy()?))).collect()
    }
}

/// The learning rate's way: up over a tenth of the steps, then down to nothing.
fn schedule(settings: &Settings, examples: &Examples) -> Stage {
    let tokens: usize = examples.training.iter().map(examples::Example::len).sum();
    let per_epoch = tokens.div_ceil(settings.batch_tokens).max(1) as u64;
    let steps = per_epoch * u64::from(settings.epochs);
    Stage {
        name: "adapter".into(),
        steps,
        batch_tokens: settings.batch_tokens,
        micro_tokens: settings.batch_tokens,
        learning_rate: settings.learning_rate,
        final_rate: 0.02,
        warmup: steps / 10,
        mix: Vec::new(),
    }
}

/// Attention over packed sequences, and the adapter in each linear layer that it has.
struct Adapted<'a> {
    causal: CausalPacked<'a>,
    params: &'a Params,
    gates: Vec<Option<u32>>,
}

impl Pass for Adapted<'_> {
    fn attend(&mut self, layer: usize, qkv: &Tensor) -> CandleResult<Tensor> {
        self.causal.attend(layer, qkv)
    }

    fn adapt(&mut self, site: Site, x: &Tensor, y: Tensor) -> CandleResult<Tensor> {
        let get = |part| self.params.get(&variable(site.layer, site.module, part));
        let (Some(a), Some(b)) = (get("A"), get("B")) else { return Ok(y) };
        let ops = &self.causal.ops;
        ops.add(&y, &ops.linear(&ops.linear(x, a, None)?, b, None)?)
    }

    // Nothing is kept apart here: all rows are wanted.
    fn gates(&self, _kept: bool) -> &[Option<u32>] {
        &self.gates
    }
}

/// The variable `A [in, r]` or `B [r, out]` of one linear layer, as PEFT calls the module.
fn variable(layer: usize, module: Module, part: &str) -> String {
    format!("transformer.h.{layer}.{}.lora_{part}.weight", module.name())
}

/// The variables as changes of linear layers. A layer may have none.
fn changes(values: &BTreeMap<String, Tensor>, layers: usize) -> BTreeMap<(usize, Module), Change> {
    let mut changes = BTreeMap::new();
    for layer in 0..layers {
        for module in Module::ALL {
            let get = |part| values.get(&variable(layer, module, part)).cloned();
            changes.extend(get("A").zip(get("B")).map(|change| ((layer, module), change)));
        }
    }
    changes
}

fn variables(spec: &Spec, settings: &Settings) -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    let shape = adapter_shape(spec, PRECISION);
    for layer in 0..spec.layers {
        for module in settings.modules().into_iter().filter(|&module| shape.has(layer, module)) {
            let (inputs, outputs) = shape.sizes(module);
            all.push((variable(layer, module, "A"), vec![inputs, settings.rank]));
            all.push((variable(layer, module, "B"), vec![settings.rank, outputs]));
        }
    }
    all
}

/// A as PEFT begins it (uniform, its bound the inverse root of the inputs), B zero: the base at first.
fn initial(shapes: &[(String, Vec<usize>)], seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut draws = Draws::at(&[seed]);
    let mut tensors = BTreeMap::new();
    for (name, shape) in shapes {
        let count = shape.iter().product();
        let bound = if name.contains("lora_A") { (shape[0] as f64).powf(-0.5) } else { 0.0 };
        let values = (0..count).map(|_| (bound * (2.0 * draws.unit() - 1.0)) as f32).collect();
        let tensor = Tensor::from_vec::<_, f32>(values, shape.as_slice(), &Device::Cpu)?;
        tensors.insert(name.clone(), tensor);
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests;
