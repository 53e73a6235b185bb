//! The same experts over plain weights, in differentiable operations: what a mixture means, and how it
//! learns. Speed is a secondary matter here.
//!
//! The choice itself has no gradient; the gate learns through the chosen probabilities. Where one
//! expert is chosen it counts fully, `1 + p - stop(p)`: in value 1, with p's gradient.

use super::serve::with_mean;
use super::{Expert, Routes, gate_rows};
use crate::kernels::{Ops, Precision};
use crate::model::Spec;
use crate::model::spec::{Gate, Moe};
use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::ops::softmax;

#[derive(Debug)]
pub struct Plain {
    gate: PlainGate,
    experts: Vec<Expert<Tensor>>,
    top_k: usize,
}

/// A gate's tensors as they are stored.
#[derive(Debug)]
enum PlainGate {
    Token(Tensor),
    TokenTask { weight: Tensor, bias: Tensor },
    PerTask(Tensor),
    Task(Tensor),
}

impl Plain {
    pub fn load(spec: &Spec, moe: &Moe, vb: &VarBuilder<'_>) -> Result<Self> {
        let expert = |e| Expert::load(spec, &vb.pp("experts").pp(e), Ok);
        Ok(Self {
            gate: PlainGate::load(spec, moe, &vb.pp("gate"))?,
            experts: (0..moe.experts).map(expert).collect::<Result<_>>()?,
            top_k: moe.top_k,
        })
    }

    pub fn forward(
        &self,
        ops: &Ops,
        x: &Tensor,
        gates: &[Option<u32>],
    ) -> Result<(Tensor, Routes)> {
        let (rows, _) = x.dims2()?;
        let logits = self.gate.logits(ops, x, gates)?;
        let routes = Routes::of_logits(&logits, self.top_k)?;
        let weights = self.weights(&logits, &routes)?.flatten_all()?;
        let mut y = x.zeros_like()?;
        for (e, expert) in self.experts.iter().enumerate() {
            let is_mine = |i: &u32| routes.experts[*i as usize] as usize == e;
            let mine: Vec<u32> = (0..(rows * self.top_k) as u32).filter(is_mine).collect();
            if mine.is_empty() {
                continue;
            }
            let own: Vec<u32> = mine.iter().map(|i| i / self.top_k as u32).collect();
            let own = Tensor::from_vec(own, mine.len(), x.device())?;
            let mine = Tensor::new(mine, x.device())?;
            let output = expert.forward(ops, &ops.embed(x, &own)?)?;
            let weight = weights.index_select(&mine, 0)?.unsqueeze(1)?;
            y = y.index_add(&own, &output.broadcast_mul(&weight)?, 0)?;
        }
        Ok((y, routes))
    }

    /// How much each chosen expert counts, `[rows, top_k]`.
    fn weights(&self, logits: &Tensor, routes: &Routes) -> Result<Tensor> {
        let shape = (routes.entropy.len(), self.top_k);
        let chosen = routes.experts.iter().map(|&e| u32::from(e)).collect();
        let chosen = Tensor::from_vec(chosen, shape, logits.device())?;
        let p = softmax(logits, D::Minus1)?.gather(&chosen, 1)?;
        if self.top_k == 1 {
            return (&p - p.detach())? + 1.0;
        }
        p.broadcast_div(&p.sum_keepdim(1)?)
    }
}

impl Expert<Tensor> {
    fn forward(&self, ops: &Ops, x: &Tensor) -> Result<Tensor> {
        let linear = |(w, b): &(Tensor, Tensor), x: &Tensor| ops.linear(x, w, Some(b));
        linear(&self.c_proj, &ops.gelu(&linear(&self.c_fc, x)?)?)
    }
}

impl PlainGate {
    fn load(spec: &Spec, moe: &Moe, vb: &VarBuilder<'_>) -> Result<Self> {
        let (tasks, d) = (spec.tasks.len(), spec.width);
        let weight = || vb.get((moe.experts, d), "weight");
        let bias = || vb.get((tasks, moe.experts), "task_bias");
        Ok(match moe.gate {
            Gate::Token => Self::Token(weight()?),
            Gate::TokenTask => Self::TokenTask { weight: weight()?, bias: bias()? },
            Gate::PerTask => Self::PerTask(vb.get((tasks, moe.experts, d), "weight")?),
            Gate::Task => Self::Task(bias()?),
        })
    }

    /// `[rows, experts]`, not rounded whatever the precision of `ops`.
    fn logits(&self, ops: &Ops, x: &Tensor, gates: &[Option<u32>]) -> Result<Tensor> {
        let (rows, _) = x.dims2()?;
        let ops = Ops { precision: Precision::F32, ..*ops };
        let biases = |bias: &Tensor| {
            let task = gate_rows(gates, rows, bias.dim(0)?).map(|t| t as u32);
            with_mean(bias)?.index_select(&Tensor::from_iter(task, x.device())?, 0)
        };
        match self {
            Self::Token(weight) => ops.project(x, weight),
            Self::TokenTask { weight, bias } => ops.project(x, weight)?.add(&biases(bias)?),
            Self::PerTask(weights) => {
                let (tasks, experts, d) = weights.dims3()?;
                let weights = with_mean(weights)?.reshape(((tasks + 1) * experts, d))?;
                let all = ops.project(x, &weights)?.reshape((rows * (tasks + 1), experts))?;
                let own = gate_rows(gates, rows, tasks).enumerate();
                let own = own.map(|(row, task)| (row * (tasks + 1) + task) as u32);
                all.index_select(&Tensor::from_iter(own, x.device())?, 0)
            }
            Self::Task(bias) => biases(bias),
        }
    }
}
