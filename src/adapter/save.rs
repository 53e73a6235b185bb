//! An adapter on disk, as PEFT writes it.

use super::{CONFIG_FILE, Module, WEIGHTS_FILE};
use candle_core::{Device, Result, Tensor};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

/// A change of one linear layer: `A [in, r]` and `B [r, out]`, every scale in B.
pub type Change = (Tensor, Tensor);

/// Writes a LoRA of rank `rank` with these changes, by layer and module, for a base of that name.
pub fn save(
    dir: &Path,
    base: &str,
    rank: usize,
    changes: &BTreeMap<(usize, Module), Change>,
) -> Result<()> {
    fs::create_dir_all(dir)?;
    let mut stored = HashMap::new();
    for ((layer, module), (a, b)) in changes {
        for (part, value) in [("A", a), ("B", b)] {
            let name = format!("transformer.h.{layer}.{}.lora_{part}.weight", module.name());
            // PyTorch's linear layers keep outputs first.
            let value = value.to_device(&Device::Cpu)?.t()?.contiguous()?;
            stored.insert(format!("base_model.model.{name}"), value);
        }
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(&stored, Some(format), &dir.join(WEIGHTS_FILE))?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets(changes),
        "fan_in_fan_out": true,
        "bias": "none",
        "inference_mode": true,
    });
    fs::write(dir.join(CONFIG_FILE), format!("{config:#}\n"))?;
    // A temporary file is its owner's alone; an adapter is for whoever may read its configuration.
    let permissions = fs::metadata(dir.join(CONFIG_FILE))?.permissions();
    fs::set_permissions(dir.join(WEIGHTS_FILE), permissions)?;
    Ok(())
}

/// The changed layers as PEFT finds them: by module where all blocks have it, else one by one.
fn targets(changes: &BTreeMap<(usize, Module), Change>) -> Vec<String> {
    let blocks: BTreeSet<usize> = changes.keys().map(|(layer, _)| *layer).collect();
    let mut targets = Vec::new();
    for module in Module::ALL {
        let with = blocks.iter().filter(|&&layer| changes.contains_key(&(layer, module)));
        let with: Vec<&usize> = with.collect();
        match with.len() {
            n if n == blocks.len() => targets.push(module.name().to_owned()),
            _ => targets.extend(with.iter().map(|layer| format!("h.{layer}.{}", module.name()))),
        }
    }
    targets
}
