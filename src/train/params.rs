//! The trained variables with their optimiser state: initial values, the AdamW step, and their form
//! on disk.

use super::recipe;
use crate::kernels::{AdamW, adamw_step, l2_norm_squared};
use crate::model::{Spec, init};
use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use std::collections::BTreeMap;

/// One variable and its moments.
#[derive(Debug)]
struct Param {
    name: String,
    value: Var,
    m: Var,
    v: Var,
}

/// All variables of a model, in the order of [`Spec::tensors`], or of an adapter.
#[derive(Debug)]
pub struct Params {
    all: Vec<Param>,
    device: Device,
}

/// Sums of gradients over the batches of one step, in the order of the variables.
#[derive(Debug, Default)]
pub struct Gradients {
    sums: Vec<Tensor>,
    weight: f64,
}

impl Gradients {
    /// Each variable's name with its sum.
    pub fn by_name<'a>(&'a self, of: &'a Params) -> impl Iterator<Item = (&'a str, &'a Tensor)> {
        of.all.iter().map(|p| p.name.as_str()).zip(&self.sums)
    }
}

impl Params {
    /// Fresh variables, as GPT-2 begins.
    pub fn initial(spec: &Spec, seed: u64, device: &Device) -> Result<Self> {
        Self::from_tensors(&spec.tensors(), &init::fresh(spec, seed)?, device)
    }

    /// Variables of these names and shapes with the values of `tensors`, and fresh moments unless
    /// `tensors` holds them too.
    pub fn from_tensors(
        shapes: &[(String, Vec<usize>)],
        tensors: &BTreeMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let mut all = Vec::new();
        for (name, shape) in shapes {
            let value = tensors.get(name).with_context(|| format!("tensor {name} is missing"))?;
            ensure!(value.dims() == shape, "{name} has shape {:?}, not {shape:?}", value.dims());
            let moment = |kind: &str| {
                let stored = tensors.get(&format!("{kind}.{name}")).cloned();
                let moment = stored.map_or_else(|| value.zeros_like(), Ok)?;
                Var::from_tensor(&moment.to_device(device)?)
            };
            let (m, v) = (moment("m")?, moment("v")?);
            let value = Var::from_tensor(&value.to_dtype(DType::F32)?.to_device(device)?)?;
            all.push(Param { name: name.clone(), value, m, v });
        }
        Ok(Self { all, device: device.clone() })
    }

    /// The variables as a model takes them.
    pub fn var_builder(&self) -> Result<VarBuilder<'static>> {
        let map = VarMap::new();
        {
            let mut vars = map.data().lock().map_err(|_| anyhow::anyhow!("poisoned variables"))?;
            vars.extend(self.all.iter().map(|p| (p.name.clone(), p.value.clone())));
        }
        Ok(VarBuilder::from_varmap(&map, DType::F32, &self.device))
    }

    /// The variable of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.all.iter().find(|p| p.name == name).map(|p| p.value.as_tensor())
    }

    /// Values by name, without the moments.
    pub fn values(&self) -> BTreeMap<String, Tensor> {
        self.all.iter().map(|p| (p.name.clone(), p.value.as_tensor().clone())).collect()
    }

    /// Everything that a resumed run needs: values and moments (`m.NAME`, `v.NAME`).
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let one = |p: &Param| {
            [
                (p.name.clone(), p.value.as_tensor().clone()),
                (format!("m.{}", p.name), p.m.as_tensor().clone()),
                (format!("v.{}", p.name), p.v.as_tensor().clone()),
            ]
        };
        self.all.iter().flat_map(one).collect()
    }

    /// Number of trained values.
    pub fn count(&self) -> usize {
        self.all.iter().map(|p| p.value.elem_count()).sum()
    }

    /// Adds the gradients of a batch, whose loss is a mean over `weight` tokens.
    pub fn accumulate(&self, sums: &mut Gradients, grads: &GradStore, weight: f64) -> Result<()> {
        let mut next = Vec::with_capacity(self.all.len());
        for (i, p) in self.all.iter().enumerate() {
            let grad =
                grads.get(&p.value).with_context(|| format!("{} has no gradient", p.name))?;
            next.push(match sums.sums.get(i) {
                None => grad.affine(weight, 0.0)?,
                Some(sum) => sum.add(&grad.affine(weight, 0.0)?)?,
            });
        }
        sums.sums = next;
        sums.weight += weight;
        Ok(())
    }

    /// One AdamW step on the mean gradient, clipped to a global norm; gives the norm before clipping.
    pub fn step(
        &self,
        grads: &Gradients,
        constants: &recipe::Optimizer,
        lr: f64,
        step: usize,
    ) -> Result<f64> {
        ensure!(grads.weight > 0.0, "a step needs a batch");
        let mut squares = 0.0;
        for grad in &grads.sums {
            squares += l2_norm_squared(grad)?;
        }
        let norm = squares.sqrt() / grads.weight;
        ensure!(norm.is_finite(), "the gradient is not finite: the run diverged");
        let clip = (constants.clip / (norm + 1e-6)).min(1.0);
        for (p, grad) in self.all.iter().zip(&grads.sums) {
            let matrix = p.value.dims().len() > 1;
            let how = AdamW {
                lr,
                beta1: constants.beta1,
                beta2: constants.beta2,
                eps: constants.eps,
                weight_decay: if matrix { constants.weight_decay } else { 0.0 },
                step,
                grad_scale: clip / grads.weight,
            };
            adamw_step(&p.value, grad, &p.m, &p.v, &how)?;
        }
        Ok(norm)
    }
}

/// Learning rate of `step` (from 0): a linear warm-up, then a cosine down to `final_rate` of the peak.
pub fn learning_rate(stage: &recipe::Stage, step: u64) -> f64 {
    let warm = ((step + 1) as f64 / stage.warmup.max(1) as f64).min(1.0);
    let past = step.saturating_sub(stage.warmup) as f64;
    let length = stage.steps.saturating_sub(stage.warmup).max(1) as f64;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * (past / length).min(1.0)).cos());
    let share = stage.final_rate + (1.0 - stage.final_rate) * cosine;
    stage.learning_rate * warm * share
}
