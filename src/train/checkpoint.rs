//! Checkpoints: one safetensors file with all variables, their moments and the position in the
//! recipe. It is written beside its place and renamed, so a file that exists is whole.

use super::sources::Cursor;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// File name of the checkpoint in the output folder.
pub const FILE: &str = "checkpoint.safetensors";

/// Where a run stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// [`Recipe::fingerprint`](super::recipe::Recipe::fingerprint) of what it was trained by; old
    /// checkpoints have none.
    #[serde(default)]
    pub recipe: Option<String>,
    /// Index of the stage.
    pub stage: usize,
    /// Steps done in it.
    pub step: u64,
    /// Steps done in all stages.
    pub total_steps: u64,
    /// Tokens seen in all stages.
    pub total_tokens: u64,
    /// Seconds of training, over all runs.
    pub seconds: f64,
    /// How far each part of the stage's mix was read; empty at its start.
    pub cursors: Vec<Cursor>,
}

/// What a checkpoint holds: variables and moments by name, and where the run stands.
pub type Checkpoint = (BTreeMap<String, Tensor>, Position);

/// Replaces a file at once or not at all, even if the machine fails.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_extension("partial");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a checkpoint into `dir`.
pub fn save(dir: &Path, tensors: &[(String, Tensor)], position: &Position) -> Result<()> {
    let mut stored = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let values = tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        stored.push((name.as_str(), tensor.dims().to_vec(), bytes));
    }
    let mut views = Vec::with_capacity(stored.len());
    for (name, shape, bytes) in &stored {
        views.push((*name, TensorView::new(Dtype::F32, shape.clone(), bytes)?));
    }
    let metadata = HashMap::from([("position".to_owned(), serde_json::to_string(position)?)]);
    replace(&dir.join(FILE), &serialize(views, Some(metadata))?)
}

/// Reads the checkpoint in `dir`; `None` if there is none.
pub fn load(dir: &Path) -> Result<Option<Checkpoint>> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let read = || -> Result<_> {
        let bytes = fs::read(&path)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let state = header.metadata().as_ref().and_then(|m| m.get("position"));
        let position = serde_json::from_str(state.context("it holds no position")?)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(&bytes)?.iter() {
            let tensor =
                Tensor::from_raw_buffer(view.data(), DType::F32, view.shape(), &Device::Cpu)?;
            tensors.insert(name.to_owned(), tensor);
        }
        Ok((tensors, position))
    };
    read().map(Some).with_context(|| format!("cannot resume from {}", path.display()))
}
