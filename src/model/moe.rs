//! A feed-forward network of experts: a gate sends each row to a few of them, and only those compute.
//!
//! Owns the choice ([`Routes`]) and both forms of the layer: packed weights for serving, where the rows
//! of an expert run together, and plain differentiable ones for training. Knows rows and the numbers
//! of their tasks; must not know sequences or adapters. Invariant: a row's result does not depend, not
//! even in its last bit, on the other rows.

mod serve;
mod train;

use super::Spec;
use super::spec::Moe;
use crate::kernels::{Format, Ops};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// Where the rows of a layer went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routes {
    /// Experts of a row.
    pub top_k: usize,
    /// `[rows, top_k]`, best first.
    pub experts: Vec<u16>,
    /// `[rows, top_k]`: how much each counts, together 1.
    pub weights: Vec<f32>,
    /// `[rows]`: entropy of the softmax over all experts, in nats.
    pub entropy: Vec<f32>,
}

impl Routes {
    fn new(top_k: usize) -> Self {
        Self { top_k, ..Self::default() }
    }

    /// Chooses for one more row by its `logits`, one per expert, which become probabilities. The
    /// chosen are the most probable, of equals the first; their probabilities are renormalised, so
    /// that a single one counts fully.
    fn choose(&mut self, logits: &mut [f32]) {
        self.entropy.push(softmax(logits));
        let first = self.experts.len();
        for _ in 0..self.top_k {
            let chosen = &self.experts[first..];
            let free = |e: &usize| !chosen.contains(&(*e as u16));
            let better = |a: usize, b: usize| if logits[b] > logits[a] { b } else { a };
            let best = (0..logits.len()).filter(free).reduce(better);
            self.experts.extend(best.map(|e| e as u16));
        }
        let chosen = &self.experts[first..];
        let sum: f32 = chosen.iter().map(|&e| logits[e as usize]).sum();
        self.weights.extend(chosen.iter().map(|&e| logits[e as usize] / sum));
    }

    /// The choices that `logits [rows, experts]` make.
    fn of_logits(logits: &Tensor, top_k: usize) -> Result<Self> {
        let (_, experts) = logits.dims2()?;
        let mut logits = logits.flatten_all()?.to_vec1::<f32>()?;
        let mut routes = Self::new(top_k);
        logits.chunks_exact_mut(experts).for_each(|row| routes.choose(row));
        Ok(routes)
    }

    /// Takes over the choice that was made for row `row` of `other`.
    fn repeat(&mut self, other: &Self, row: usize) {
        let own = row * self.top_k..(row + 1) * self.top_k;
        self.experts.extend(&other.experts[own.clone()]);
        self.weights.extend(&other.weights[own]);
        self.entropy.push(other.entropy[row]);
    }

    /// The one expert that does everything, if there is one.
    fn only_expert(&self) -> Option<usize> {
        let first = *self.experts.first()?;
        let only = self.top_k == 1 && self.experts.iter().all(|&e| e == first);
        only.then_some(first as usize)
    }
}

/// Turns logits into probabilities; gives their entropy.
fn softmax(logits: &mut [f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (mut sum, mut shifted) = (0.0, 0.0);
    for logit in &mut *logits {
        let z = *logit - max;
        *logit = z.exp();
        sum += *logit;
        shifted += *logit * z;
    }
    logits.iter_mut().for_each(|p| *p /= sum);
    // -Σ p ln p with ln p = z - ln Σ e^z.
    sum.ln() - shifted / sum
}

/// Which row of a gate's `tasks` rows and their mean, which comes last, a task takes.
fn gate_row(task: Option<u32>, tasks: usize) -> usize {
    task.map_or(tasks, |task| (task as usize).min(tasks))
}

/// The same for each of `rows` rows. `gates` may end early: what follows has no task.
fn gate_rows(gates: &[Option<u32>], rows: usize, tasks: usize) -> impl Iterator<Item = usize> {
    (0..rows).map(move |row| gate_row(gates.get(row).copied().flatten(), tasks))
}

/// Two linear layers, with weights `W` and biases.
#[derive(Debug)]
struct Expert<W> {
    c_fc: (W, Tensor),
    c_proj: (W, Tensor),
}

impl<W> Expert<W> {
    /// Takes it out of `vb`, making each matrix `[in, out]` ready by `weight`.
    fn load(
        spec: &Spec,
        vb: &VarBuilder<'_>,
        weight: impl Fn(Tensor) -> Result<W>,
    ) -> Result<Self> {
        let linear = |name: &str, inputs, outputs| {
            let vb = vb.pp(name);
            Ok::<_, candle_core::Error>((
                weight(vb.get((inputs, outputs), "weight")?)?,
                vb.get(outputs, "bias")?,
            ))
        };
        Ok(Self {
            c_fc: linear("c_fc", spec.width, spec.inner)?,
            c_proj: linear("c_proj", spec.inner, spec.width)?,
        })
    }
}

/// A feed-forward network of experts.
#[derive(Debug)]
pub struct MoeLayer(Form);

#[derive(Debug)]
enum Form {
    Plain(train::Plain),
    Packed(serve::Packed),
}

impl MoeLayer {
    /// Over weights as they are, so that gradients reach them. `vb` holds a layer's [`Moe::tensors`].
    pub fn new(spec: &Spec, moe: &Moe, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self(Form::Plain(train::Plain::load(spec, moe, vb)?)))
    }

    /// Over weights packed for serving; the gate's are not rounded, whatever the format.
    pub fn packed(
        spec: &Spec,
        moe: &Moe,
        vb: &VarBuilder<'_>,
        format: impl Into<Format>,
    ) -> Result<Self> {
        Ok(Self(Form::Packed(serve::Packed::load(spec, moe, vb, format.into())?)))
    }

    /// What the experts make of `x [rows, d]`, and which ones did. `gates` are the rows' tasks; rows
    /// beyond them have none.
    pub fn forward(
        &self,
        ops: &Ops,
        x: &Tensor,
        gates: &[Option<u32>],
    ) -> Result<(Tensor, Routes)> {
        match &self.0 {
            Form::Plain(layer) => layer.forward(ops, x, gates),
            Form::Packed(layer) => layer.forward(ops, x, gates),
        }
    }
}

#[cfg(test)]
mod tests;
