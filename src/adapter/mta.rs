//! `peft_type: "MTA"`, a mixture of task adapters: `y += alpha / r · Σ_e p_e · B_e · A_e · x` with
//! `p = softmax(gate[task] / tau)` over the experts.
//!
//! The gate sees the task alone, so each task folds at load into one low-rank product of rank `E · r`: all
//! `A_e` side by side, which the tasks share, and all `B_e` times what the task makes of them. A task
//! without a row in the gate, or none, has the mean over the rows, taken before the softmax.

use super::config::{FILE, Keys};
use super::deltas::{Deltas, LowRank};
use super::files::{PREFIX, Tensors};
use super::{Loaded, Module, Shape, targets};
use crate::ids::is_valid_name;
use crate::kernels::PackedMatrix;
use candle_core::{DType, Result as CandleResult, Tensor};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What a configuration promises.
#[derive(Debug)]
pub struct Mta {
    prefix: String,
    sites: Vec<(usize, Module)>,
    tasks: Vec<String>,
    experts: usize,
    /// Of one expert.
    rank: usize,
    scale: f64,
    tau: f64,
}

impl Mta {
    /// Reads the configuration; `None` if it is too faulty to say what it promises.
    pub fn read(keys: &mut Keys<'_>, shape: &Shape, prefix: &str) -> Option<Self> {
        let (rank, experts) = (keys.count("r"), keys.count("num_experts"));
        let alpha = keys.number("lora_alpha");
        let value = keys.get("tau");
        let tau = value.and_then(|tau| tau.as_f64()).filter(|&tau| tau > 0.0);
        if tau.is_none() {
            keys.fault("tau", value, "a number over 0");
        }
        let tasks = task_names(keys);
        let sites = targets::read(keys, shape, prefix);
        let (rank, prefix) = (rank?, prefix.to_owned());
        let scale = alpha? / rank as f64;
        let plan = Self { prefix, sites, tasks: tasks?, experts: experts?, rank, scale, tau: tau? };
        keys.faults.is_empty().then_some(plan)
    }

    /// Rank of the fold.
    pub fn rank(&self) -> usize {
        self.rank.saturating_mul(self.experts)
    }

    /// Memory that it takes once it is folded: for each task, and for none.
    pub fn bytes(&self, shape: &Shape) -> usize {
        let bytes = |&(_, module): &(usize, Module)| {
            let (inner, outer) = shape.sizes(module);
            let bytes_of = |inner, outer| PackedMatrix::bytes_of(inner, outer, shape.precision);
            let b = bytes_of(self.rank(), outer).saturating_mul(self.tasks.len() + 1);
            bytes_of(inner, self.rank()).saturating_add(b)
        };
        self.sites.iter().map(bytes).fold(0, usize::saturating_add)
    }

    /// Its tensors.
    pub fn tensors(&self, shape: &Shape) -> Vec<(String, [usize; 2])> {
        let mut tensors = Vec::new();
        for &site in &self.sites {
            let (inner, outer) = shape.sizes(site.1);
            tensors.push((self.gate(site), [self.tasks.len(), self.experts]));
            for expert in 0..self.experts {
                tensors.push((self.part(site, "mta_A", expert), [self.rank, inner]));
                tensors.push((self.part(site, "mta_B", expert), [outer, self.rank]));
            }
        }
        tensors
    }

    /// Reads and folds its tensors, which were found to be there.
    pub fn load(&self, tensors: &Tensors<'_>, shape: &Shape) -> (Loaded, Vec<String>) {
        let empty = || (Deltas::new(shape), vec![0.0; self.experts]);
        let mut all: Vec<(Deltas, Vec<f64>)> = (0..=self.tasks.len()).map(|_| empty()).collect();
        let mut faults = Vec::new();
        for &site in &self.sites {
            match self.fold(tensors, site, shape) {
                Ok(folded) => {
                    for ((deltas, means), (change, shares)) in all.iter_mut().zip(folded) {
                        faults.extend(deltas.set(site.0, site.1, change).err());
                        let parts = shares.iter().map(|share| share / self.sites.len() as f64);
                        means.iter_mut().zip(parts).for_each(|(mean, part)| *mean += part);
                    }
                }
                Err(found) => faults.extend(found),
            }
        }
        let (rank, bytes) = (self.rank(), self.bytes(shape));
        (Loaded::mta(all, self.tasks.clone(), rank, bytes), faults)
    }

    /// One layer for each task, and for none: the product, and the experts' shares in it.
    fn fold(
        &self,
        tensors: &Tensors<'_>,
        site: (usize, Module),
        shape: &Shape,
    ) -> Result<Vec<(LowRank, Vec<f64>)>, Vec<String>> {
        let mut faults = Vec::new();
        let mut read = |name: String, scale| {
            tensors.read(&name, scale).map_err(|fault| faults.push(fault)).ok()
        };
        let gate = read(self.gate(site), 1.0);
        let a: Option<Vec<Tensor>> =
            (0..self.experts).map(|e| read(self.part(site, "mta_A", e), 1.0)).collect();
        let b: Option<Vec<Tensor>> =
            (0..self.experts).map(|e| read(self.part(site, "mta_B", e), self.scale)).collect();
        let (Some(gate), Some(a), Some(b)) = (gate, a, b) else { return Err(faults) };
        let fold = || -> CandleResult<Vec<(LowRank, Vec<f64>)>> {
            let precision = shape.precision;
            let a = Arc::new(PackedMatrix::from_out_in(&Tensor::cat(&a, 0)?, precision)?);
            let gate = gate.to_dtype(DType::F64)?.to_vec2()?;
            let rows = gate.iter().cloned().chain([mean(&gate)]);
            rows.map(|row| {
                let shares = softmax(&row, self.tau);
                let b = b.iter().zip(&shares).map(|(b, &share)| b * share);
                let b = Tensor::cat(&b.collect::<CandleResult<Vec<_>>>()?, 1)?;
                let b = Arc::new(PackedMatrix::from_out_in(&b, precision)?);
                Ok((LowRank { a: a.clone(), b }, shares))
            })
            .collect()
        };
        fold().map_err(|e| vec![format!("{}: {e}", self.gate(site))])
    }

    fn name(&self, (layer, module): (usize, Module)) -> String {
        format!("{PREFIX}{}h.{layer}.{}", self.prefix, module.name())
    }

    fn gate(&self, site: (usize, Module)) -> String {
        format!("{}.mta_gate.weight", self.name(site))
    }

    fn part(&self, site: (usize, Module), factor: &str, expert: usize) -> String {
        format!("{}.{factor}.{expert}.weight", self.name(site))
    }
}

/// `tasks`: different names, at least one.
fn task_names(keys: &mut Keys<'_>) -> Option<Vec<String>> {
    const ALLOWED: &str = "a list of different names [A-Za-z0-9._-]{1,64}";
    let Some(names) = keys.strings("tasks") else {
        keys.fault("tasks", None, ALLOWED);
        return None;
    };
    let different: BTreeSet<&str> = names.iter().copied().collect();
    if names.is_empty() || different.len() < names.len() {
        keys.faults.push(format!("{FILE}: tasks has no names, or one twice; allowed: {ALLOWED}"));
        return None;
    }
    if let Some(name) = names.iter().find(|name| !is_valid_name(name)) {
        keys.faults.push(format!("{FILE}: tasks has {name:?}; allowed: {ALLOWED}"));
        return None;
    }
    Some(names.into_iter().map(str::to_owned).collect())
}

fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    let sum = |column: usize| rows.iter().map(|row| row[column]).sum::<f64>();
    let columns = rows.first().map_or(0, Vec::len);
    (0..columns).map(|column| sum(column) / rows.len() as f64).collect()
}

fn softmax(logits: &[f64], tau: f64) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|x| ((x - most) / tau).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}
