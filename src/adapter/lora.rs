//! `peft_type: "LORA"`, as PEFT writes it for GPT-2: `y += scale · B · A · x` with `lora_A [r, in]` and
//! `lora_B [out, r]`, where scale is `alpha / r`, or `alpha / √r` with `use_rslora`.

use super::config::{FILE, Keys, as_count};
use super::deltas::{Deltas, LowRank};
use super::files::{PREFIX, Tensors};
use super::targets::{self, Overrides};
use super::{Loaded, Module, Shape};
use crate::kernels::PackedMatrix;
use serde_json::Value;
use std::sync::Arc;

/// One changed layer.
#[derive(Debug)]
struct Site {
    layer: usize,
    module: Module,
    /// What its tensors' names begin with.
    name: String,
    rank: usize,
    scale: f64,
}

/// What a configuration promises.
#[derive(Debug)]
pub struct Lora {
    sites: Vec<Site>,
}

impl Lora {
    /// Reads the configuration; `None` if it is too faulty to say what it promises.
    pub fn read(keys: &mut Keys<'_>, shape: &Shape, prefix: &str) -> Option<Self> {
        let (rank, alpha) = (keys.count("r"), keys.number("lora_alpha"));
        let root = keys.flag("use_rslora");
        let ranks = Overrides::read(keys, "rank_pattern", as_count, "an integer of 1 or more");
        let alphas = Overrides::read(keys, "alpha_pattern", Value::as_f64, "a number");
        let mut sites = Vec::new();
        for (layer, module) in targets::read(keys, shape, prefix) {
            let name = format!("{prefix}h.{layer}.{}", module.name());
            let (Ok(own_rank), Ok(own_alpha)) = (ranks.get(&name), alphas.get(&name)) else {
                let why = "rank_pattern or alpha_pattern takes too long to match";
                keys.faults.push(format!("{FILE}: {why} {name}"));
                break;
            };
            let (rank, alpha) = (own_rank.or(rank)?, own_alpha.or(alpha)?);
            let divisor = if root { (rank as f64).sqrt() } else { rank as f64 };
            let name = format!("{PREFIX}{name}");
            sites.push(Site { layer, module, name, rank, scale: alpha / divisor });
        }
        keys.faults.is_empty().then_some(Self { sites })
    }

    /// The largest rank.
    pub fn rank(&self) -> usize {
        self.sites.iter().map(|site| site.rank).max().unwrap_or(0)
    }

    /// Memory that it takes once it is loaded.
    pub fn bytes(&self, shape: &Shape) -> usize {
        let bytes = |site: &Site| {
            let (inner, outer) = shape.sizes(site.module);
            let bytes_of = |inner, outer| PackedMatrix::bytes_of(inner, outer, shape.precision);
            bytes_of(inner, site.rank).saturating_add(bytes_of(site.rank, outer))
        };
        self.sites.iter().map(bytes).fold(0, usize::saturating_add)
    }

    /// Its tensors.
    pub fn tensors(&self, shape: &Shape) -> Vec<(String, [usize; 2])> {
        let both = |site: &Site| {
            let (inner, outer) = shape.sizes(site.module);
            [(site.a(), [site.rank, inner]), (site.b(), [outer, site.rank])]
        };
        self.sites.iter().flat_map(both).collect()
    }

    /// Reads its tensors, which were found to be there.
    pub fn load(&self, tensors: &Tensors<'_>, shape: &Shape) -> (Loaded, Vec<String>) {
        let mut deltas = Deltas::new(shape);
        let mut faults = Vec::new();
        for site in &self.sites {
            let pack = |name: &str, scale| {
                let tensor = tensors.read(name, scale)?;
                let packed = PackedMatrix::from_out_in(&tensor, shape.precision);
                packed.map(Arc::new).map_err(|e| format!("{name}: {e}"))
            };
            match (pack(&site.a(), 1.0), pack(&site.b(), site.scale)) {
                (Ok(a), Ok(b)) => {
                    faults.extend(deltas.set(site.layer, site.module, LowRank { a, b }).err());
                }
                (a, b) => faults.extend([a.err(), b.err()].into_iter().flatten()),
            }
        }
        (Loaded::lora(deltas, self.rank(), self.bytes(shape)), faults)
    }
}

impl Site {
    fn a(&self) -> String {
        format!("{}.lora_A.weight", self.name)
    }

    fn b(&self) -> String {
        format!("{}.lora_B.weight", self.name)
    }
}
