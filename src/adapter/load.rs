//! From a folder to [`Deltas`], or to everything that is wrong with it.

use super::config::{self, Keys};
use super::files::{self, Tensors};
use super::lora::Lora;
use super::mta::Mta;
use super::{Deltas, Module, Shape};
use crate::error::Faults;
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;

/// How large an adapter may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Its largest rank; for a mixture, that of all its experts together.
    pub max_rank: usize,
    /// Its size in memory.
    pub max_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_rank: 256, max_bytes: 1 << 30 }
    }
}

/// What an adapter is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A PEFT LoRA.
    Lora,
    /// A mixture of task adapters.
    Mta,
}

impl Kind {
    /// Its name in lists.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Mta => "mta",
        }
    }
}

/// An adapter, ready to run.
#[derive(Debug)]
pub struct Loaded {
    /// What it is on disk.
    pub kind: Kind,
    /// Its largest rank, as it runs.
    pub rank: usize,
    /// Its size in memory.
    pub bytes: usize,
    /// The tasks that a mixture knows; empty for others.
    pub tasks: Vec<String>,
    /// `[tasks + 1, experts]`: how much each expert of a mixture counts, a mean over the layers that it
    /// changes; the last row is for every other task. Empty for other adapters.
    pub mixture: Vec<Vec<f64>>,
    /// One per task, and one for every other.
    deltas: Vec<Arc<Deltas>>,
}

impl Loaded {
    pub(super) fn lora(deltas: Deltas, rank: usize, bytes: usize) -> Self {
        let deltas = vec![Arc::new(deltas)];
        Self { kind: Kind::Lora, rank, bytes, tasks: Vec::new(), mixture: Vec::new(), deltas }
    }

    /// `folded` has, for each task and then for every other, what it adds and [`Loaded::mixture`].
    pub(super) fn mta(
        folded: Vec<(Deltas, Vec<f64>)>,
        tasks: Vec<String>,
        rank: usize,
        bytes: usize,
    ) -> Self {
        let (deltas, mixture): (Vec<Deltas>, _) = folded.into_iter().unzip();
        let deltas = deltas.into_iter().map(Arc::new).collect();
        Self { kind: Kind::Mta, rank, bytes, tasks, mixture, deltas }
    }

    /// What it adds for a task; a name that a mixture does not know is as none.
    pub fn deltas(&self, task: Option<&str>) -> Arc<Deltas> {
        let known = self.tasks.iter().position(|name| Some(name.as_str()) == task);
        self.deltas[known.unwrap_or(self.tasks.len())].clone()
    }

    /// The modules that it changes in some layer.
    pub fn modules(&self) -> Vec<Module> {
        let deltas = self.deltas(None);
        let layers = deltas.shape().layers;
        let changed =
            |module: &Module| (0..layers).any(|layer| deltas.get(layer, *module).is_some());
        Module::ALL.into_iter().filter(changed).collect()
    }
}

enum Plan {
    Lora(Lora),
    Mta(Mta),
}

/// Reads the adapter in `dir` for a base model of this shape.
///
/// `adapter_config.json` and `adapter_model.safetensors` must be regular files. Limits are checked before
/// any tensor is touched. The error lists all that is wrong; nothing is left out or made to fit.
pub fn load(dir: &Path, shape: &Shape, limits: &Limits) -> Result<Loaded, Faults> {
    let mut faults = Vec::new();
    let config = files::read_config(dir).map_err(|fault| faults.push(fault)).ok();
    let bytes = files::read_weights(dir, limits.max_bytes).map_err(|f| faults.push(f)).ok();
    let tensors = bytes.as_deref().map(Tensors::parse);
    let tensors = tensors.and_then(|parsed| parsed.map_err(|fault| faults.push(fault)).ok());
    let prefix = tensors.as_ref().map_or(files::TRANSFORMER, Tensors::prefix);
    let plan = config.as_ref().and_then(|config| plan(config, shape, limits, prefix, &mut faults));
    if let (Some(plan), Some(tensors)) = (&plan, &tensors) {
        let expected = match plan {
            Plan::Lora(lora) => lora.tensors(shape),
            Plan::Mta(mta) => mta.tensors(shape),
        };
        faults.extend(tensors.check(&expected));
    }
    let (Some(plan), Some(tensors), true) = (plan, tensors, faults.is_empty()) else {
        return Err(Faults(faults));
    };
    let (loaded, faults) = match plan {
        Plan::Lora(lora) => lora.load(&tensors, shape),
        Plan::Mta(mta) => mta.load(&tensors, shape),
    };
    if faults.is_empty() { Ok(loaded) } else { Err(Faults(faults)) }
}

/// What the configuration promises; `None` if that cannot be told, or is more than is allowed.
fn plan(
    config: &Map<String, Value>,
    shape: &Shape,
    limits: &Limits,
    prefix: &str,
    faults: &mut Vec<String>,
) -> Option<Plan> {
    let mut keys = Keys::new(config);
    let kind = keys.get("peft_type");
    let plan = match kind.and_then(Value::as_str) {
        Some("LORA") => Lora::read(&mut keys, shape, prefix).map(Plan::Lora),
        Some("MTA") => Mta::read(&mut keys, shape, prefix).map(Plan::Mta),
        _ => {
            keys.fault("peft_type", kind, "LORA, MTA");
            faults.append(&mut keys.faults);
            return None;
        }
    };
    faults.extend(keys.finish());
    let plan = plan?;
    let (rank, bytes) = match &plan {
        Plan::Lora(lora) => (lora.rank(), lora.bytes(shape)),
        Plan::Mta(mta) => (mta.rank(), mta.bytes(shape)),
    };
    let Limits { max_rank, max_bytes } = *limits;
    let file = config::FILE;
    if rank > max_rank {
        faults.push(format!("{file}: r makes a rank of {rank}; allowed: up to {max_rank}"));
        return None;
    }
    if bytes > max_bytes {
        faults.push(format!("{file}: r makes {bytes} bytes; allowed: up to {max_bytes}"));
        return None;
    }
    Some(plan)
}

#[cfg(test)]
mod tests;
