//! Experts over packed weights: rows are brought into the order of their experts once, each expert runs
//! once over its rows, and the results go back. Not differentiable.

use super::{Expert, Routes, gate_rows};
use crate::kernels::{Format, Group, Ops, PackedMatrix, Precision, grouped_matmul, mix_rows};
use crate::model::Spec;
use crate::model::spec::{Gate, Moe};
use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;
use std::ops::Range;

#[derive(Debug)]
pub struct Packed {
    gate: PackedGate,
    experts: Vec<Expert<PackedMatrix>>,
    top_k: usize,
}

/// A gate, with what can be computed before any row is known. Of several rows for tasks the last is
/// their mean, for rows without a task.
#[derive(Debug)]
enum PackedGate {
    Token(PackedMatrix),
    TokenTask {
        weight: PackedMatrix,
        biases: Vec<Vec<f32>>,
    },
    PerTask(Vec<PackedMatrix>),
    /// The choices themselves.
    Task(Routes),
}

impl Packed {
    pub fn load(spec: &Spec, moe: &Moe, vb: &VarBuilder<'_>, format: Format) -> Result<Self> {
        let pack = |w: Tensor| PackedMatrix::from_in_out(&w, format);
        let expert = |e| Expert::load(spec, &vb.pp("experts").pp(e), pack);
        Ok(Self {
            gate: PackedGate::load(spec, moe, &vb.pp("gate"))?,
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
        let routes = self.gate.routes(x, gates, self.top_k)?;
        let y = match routes.only_expert() {
            Some(expert) => self.experts[expert].forward(ops, x)?,
            None => self.grouped(ops, x, &routes)?,
        };
        Ok((y, routes))
    }

    fn grouped(&self, ops: &Ops, x: &Tensor, routes: &Routes) -> Result<Tensor> {
        let order = Order::by_expert(routes, self.experts.len());
        let places = order.sources.len();
        let sources = Tensor::from_vec(order.sources, places, &Device::Cpu)?;
        let matmul = |x: &Tensor, linear: fn(&Expert<PackedMatrix>) -> &(PackedMatrix, Tensor)| {
            let groups = self.experts.iter().map(linear).zip(&order.groups);
            let groups: Vec<Group<'_>> = groups
                .map(|((w, bias), rows)| Group { rows: rows.clone(), w, bias: Some(bias) })
                .collect();
            grouped_matmul(x, &groups, groups[0].w.shape().1)
        };
        let inner = matmul(&ops.embed(x, &sources)?, |expert| &expert.c_fc)?;
        let outer = matmul(&ops.gelu(&inner)?, |expert| &expert.c_proj)?;
        mix_rows(&outer, &order.places, &routes.weights, self.top_k)
    }
}

impl Expert<PackedMatrix> {
    fn forward(&self, ops: &Ops, x: &Tensor) -> Result<Tensor> {
        let inner = ops.gelu(&self.c_fc.0.matmul(x, Some(&self.c_fc.1))?)?;
        self.c_proj.0.matmul(&inner, Some(&self.c_proj.1))
    }
}

/// Copies of rows, sorted by expert, in their old order within one.
struct Order {
    /// The row that each is a copy of.
    sources: Vec<u32>,
    /// Where the copies of each row went: `[rows, top_k]`.
    places: Vec<u32>,
    /// The copies of each expert.
    groups: Vec<Range<usize>>,
}

impl Order {
    fn by_expert(routes: &Routes, experts: usize) -> Self {
        let mut ends = vec![0; experts];
        routes.experts.iter().for_each(|&e| ends[e as usize] += 1);
        let mut end = 0;
        let groups = ends.iter_mut().map(|count| {
            let start = end;
            end += *count;
            *count = start;
            start..end
        });
        let groups = groups.collect();
        // From here on `ends` says where the next copy of each expert goes.
        let mut sources = vec![0; routes.experts.len()];
        let place = |(i, &e): (usize, &u16)| {
            let place = ends[e as usize];
            ends[e as usize] += 1;
            sources[place] = (i / routes.top_k) as u32;
            place as u32
        };
        let places = routes.experts.iter().enumerate().map(place).collect();
        Self { sources, places, groups }
    }
}

impl PackedGate {
    fn load(spec: &Spec, moe: &Moe, vb: &VarBuilder<'_>) -> Result<Self> {
        let (tasks, d) = (spec.tasks.len(), spec.width);
        let weight = || vb.get((moe.experts, d), "weight");
        let pack = |w: &Tensor| PackedMatrix::from_out_in(w, Precision::F32);
        Ok(match moe.gate {
            Gate::Token => Self::Token(pack(&weight()?)?),
            Gate::TokenTask => {
                let biases = with_mean(&vb.get((tasks, moe.experts), "task_bias")?)?.to_vec2()?;
                Self::TokenTask { weight: pack(&weight()?)?, biases }
            }
            Gate::PerTask => {
                let weights = with_mean(&vb.get((tasks, moe.experts, d), "weight")?)?;
                let packed = (0..=tasks).map(|t| pack(&weights.get(t)?));
                Self::PerTask(packed.collect::<Result<_>>()?)
            }
            Gate::Task => {
                let biases = with_mean(&vb.get((tasks, moe.experts), "task_bias")?)?;
                Self::Task(Routes::of_logits(&biases, moe.top_k)?)
            }
        })
    }

    fn routes(&self, x: &Tensor, gates: &[Option<u32>], top_k: usize) -> Result<Routes> {
        let (rows, _) = x.dims2()?;
        match self {
            Self::Token(weight) => Routes::of_logits(&weight.matmul(x, None)?, top_k),
            Self::TokenTask { weight, biases } => {
                let mut logits = weight.matmul(x, None)?.flatten_all()?.to_vec1::<f32>()?;
                let mut routes = Routes::new(top_k);
                let tasks = gate_rows(gates, rows, biases.len() - 1);
                for (logits, task) in logits.chunks_exact_mut(biases[0].len()).zip(tasks) {
                    logits.iter_mut().zip(&biases[task]).for_each(|(z, b)| *z += b);
                    routes.choose(logits);
                }
                Ok(routes)
            }
            Self::PerTask(weights) => {
                let tasks: Vec<usize> = gate_rows(gates, rows, weights.len() - 1).collect();
                let mut start = 0;
                let runs = tasks.chunk_by(|a, b| a == b).map(|run| {
                    let rows = start..start + run.len();
                    start = rows.end;
                    Group { rows, w: &weights[run[0]], bias: None }
                });
                let runs: Vec<Group<'_>> = runs.collect();
                let experts = weights[0].shape().1;
                Routes::of_logits(&grouped_matmul(x, &runs, experts)?, top_k)
            }
            Self::Task(choices) => {
                let mut routes = Routes::new(top_k);
                let tasks = gate_rows(gates, rows, choices.entropy.len() - 1);
                tasks.for_each(|task| routes.repeat(choices, task));
                Ok(routes)
            }
        }
    }
}

/// The rows of `x`, of any shape, and their mean after them.
pub fn with_mean(x: &Tensor) -> Result<Tensor> {
    Tensor::cat(&[x, &x.mean_keepdim(0)?], 0)
}
