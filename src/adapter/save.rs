//! An adapter on disk, as PEFT writes it.

use super::{CONFIG_FILE, Module, WEIGHTS_FILE};
use candle_core::{Device, Result, Tensor};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// A change of one linear layer: `A [in, r]` and `B [r, out]`, every scale in B.
pub type Change = (Tensor, Tensor);

/// Writes a LoRA of rank `rank` with these changes, by layer and module, for a base of that name and of
/// so many layers. A new adapter comes into being whole; of one that is replaced, first the weights and
/// then the configuration, each of them whole.
pub fn save(
    dir: &Path,
    base: &str,
    rank: usize,
    layers: usize,
    changes: &BTreeMap<(usize, Module), Change>,
) -> Result<()> {
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
    let weights = safetensors::serialize(&stored, Some(format))?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets(layers, changes),
        "fan_in_fan_out": true,
        "bias": "none",
        "inference_mode": true,
    });
    Ok(publish(
        dir,
        &[(WEIGHTS_FILE, &weights), (CONFIG_FILE, format!("{config:#}\n").as_bytes())],
    )?)
}

/// Writes files into a hidden folder beside `dir`, where nobody looks for adapters, and moves them to
/// their place once all of them are on disk.
fn publish(dir: &Path, files: &[(&str, &[u8])]) -> io::Result<()> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let beside = dir.with_file_name(format!(".{name}.partial"));
    fs::create_dir_all(&beside)?;
    for (file, bytes) in files {
        let mut file = File::create(beside.join(file))?;
        file.write_all(bytes)?;
        file.sync_all()?;
    }
    if !dir.exists() {
        return fs::rename(&beside, dir);
    }
    for (file, _) in files {
        fs::rename(beside.join(file), dir.join(file))?;
    }
    fs::remove_dir(&beside)
}

/// The changed layers as PEFT finds them: by module where all of the model's blocks have it, else one by
/// one.
fn targets(layers: usize, changes: &BTreeMap<(usize, Module), Change>) -> Vec<String> {
    let mut targets = Vec::new();
    for module in Module::ALL {
        let with = (0..layers).filter(|&layer| changes.contains_key(&(layer, module)));
        let with: Vec<usize> = with.collect();
        match with.len() {
            n if n == layers => targets.push(module.name().to_owned()),
            _ => targets.extend(with.iter().map(|layer| format!("h.{layer}.{}", module.name()))),
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Limits, Shape, load};
    use crate::kernels::Precision;
    use candle_core::DType;

    const SHAPE: Shape =
        Shape { layers: 3, width: 4, inner: 8, moe_layers: Vec::new(), precision: Precision::F32 };

    fn change(shape: &Shape, at: (usize, Module), rank: usize) -> ((usize, Module), Change) {
        let (inputs, outputs) = shape.sizes(at.1);
        let ones = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        (at, (ones((inputs, rank)), ones((rank, outputs))))
    }

    fn changes(
        shape: &Shape,
        rank: usize,
        at: &[(usize, Module)],
    ) -> BTreeMap<(usize, Module), Change> {
        at.iter().map(|&at| change(shape, at, rank)).collect()
    }

    #[test]
    fn a_bare_name_means_every_layer_of_the_model() {
        let shape = Shape { moe_layers: vec![0, 2], ..SHAPE };
        let dir = tempfile::tempdir().unwrap();
        let every = [(0, Module::Qkv), (1, Module::Qkv), (2, Module::Qkv)];
        let dense = [(1, Module::FcIn), (1, Module::FcOut)];
        for at in [&every[..], &every[1..], &dense[..], &[&every[..], &dense[..]].concat()[..]] {
            let all = changes(&shape, 2, at);
            save(dir.path(), "base", 2, shape.layers, &all).unwrap();
            let loaded = load(dir.path(), &shape, &Limits::default()).unwrap();
            let deltas = loaded.deltas(None);
            for layer in 0..shape.layers {
                for module in Module::ALL {
                    let want = at.contains(&(layer, module));
                    assert_eq!(deltas.get(layer, module).is_some(), want, "{at:?} {layer}");
                }
            }
        }
        assert_eq!(targets(3, &changes(&shape, 2, &every)), ["attn.c_attn"]);
        assert_eq!(targets(3, &changes(&shape, 2, &dense)), ["h.1.mlp.c_fc", "h.1.mlp.c_proj"]);
    }

    #[test]
    fn another_adapter_takes_its_place_and_what_was_left_half_written_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let (dir, partial) = (root.path().join("mine"), root.path().join(".mine.partial"));
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join(WEIGHTS_FILE), "half").unwrap();
        for rank in [2, 3] {
            let all = changes(&SHAPE, rank, &[(0, Module::AttnProj)]);
            save(&dir, "base", rank, SHAPE.layers, &all).unwrap();
            assert_eq!(load(&dir, &SHAPE, &Limits::default()).unwrap().rank, rank);
            fs::write(dir.join("README.md"), "mine").unwrap();
            assert!(!partial.exists());
        }
        assert!(dir.join("README.md").exists(), "what else is in the folder stays");
    }
}
