//! An adapter's two files, read whole and within limits.
//!
//! They are copied into memory rather than mapped: a file that is rewritten while it is read then gives a
//! fault, not a signal that ends the process.

use super::config;
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// The file that holds the weights.
pub const FILE: &str = "adapter_model.safetensors";
/// What tensors' names begin with.
pub const PREFIX: &str = "base_model.model.";
/// What follows it in files for a model with a head.
pub const TRANSFORMER: &str = "transformer.";

const MAX_CONFIG_BYTES: usize = 1 << 18;
/// For the names of tensors, beside their values.
const MAX_HEADER_BYTES: usize = 1 << 24;

/// Reads a regular file that must not be larger.
fn read(dir: &Path, name: &str, limit: usize) -> Result<Vec<u8>, String> {
    let fault = |e: std::io::Error| format!("{name}: {e}");
    let path = dir.join(name);
    // A pipe would keep whoever opens it waiting.
    if !fs::metadata(&path).map_err(fault)?.is_file() {
        return Err(format!("{name}: not a regular file"));
    }
    let mut bytes = Vec::new();
    let mut file = File::open(path).map_err(fault)?.take((limit as u64).saturating_add(1));
    file.read_to_end(&mut bytes).map_err(fault)?;
    if bytes.len() > limit {
        return Err(format!("{name}: larger than {limit} bytes"));
    }
    Ok(bytes)
}

/// The configuration as it stands.
pub fn read_config(dir: &Path) -> Result<Map<String, Value>, String> {
    let name = config::FILE;
    let text = read(dir, name, MAX_CONFIG_BYTES)?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(config)) => Ok(config),
        Ok(_) => Err(format!("{name}: not a JSON object")),
        Err(e) => Err(format!("{name}: not JSON: {e}")),
    }
}

/// The bytes of the weights' file, for weights that take at most `max_bytes` once they are loaded.
pub fn read_weights(dir: &Path, max_bytes: usize) -> Result<Vec<u8>, String> {
    if !dir.join(FILE).exists() {
        let pickle = dir.join("adapter_model.bin").exists();
        let hint = " (adapter_model.bin: pickled weights are not read; save as safetensors)";
        return Err(format!("{FILE}: no such file{}", if pickle { hint } else { "" }));
    }
    // Stored as f32, loaded as bf16: twice as many.
    read(dir, FILE, max_bytes.saturating_mul(2).saturating_add(MAX_HEADER_BYTES))
}

/// The tensors of a weights' file.
#[derive(Debug)]
pub struct Tensors<'a>(SafeTensors<'a>);

impl<'a> Tensors<'a> {
    /// Reads the header.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        SafeTensors::deserialize(bytes).map(Self).map_err(|e| format!("{FILE}: {e}"))
    }

    /// What the names of the base model's modules begin with.
    pub fn prefix(&self) -> &'static str {
        let full = format!("{PREFIX}{TRANSFORMER}");
        match self.0.names().iter().any(|name| name.starts_with(&full)) {
            true => TRANSFORMER,
            false => "",
        }
    }

    /// Where the tensors are not those expected, in name, shape or type.
    pub fn check(&self, expected: &[(String, [usize; 2])]) -> Vec<String> {
        let mut faults = Vec::new();
        for (name, shape) in expected {
            match self.0.tensor(name) {
                Err(_) => faults.push(format!("{FILE}: {name} {shape:?} is missing")),
                Ok(found) if found.shape() != shape => faults.push(format!(
                    "{FILE}: {name} has shape {:?}; {} and the base model say {shape:?}",
                    found.shape(),
                    config::FILE,
                )),
                Ok(_) => {}
            }
        }
        let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        for (name, found) in self.0.iter() {
            if !known.contains(name) {
                faults.push(format!("{FILE}: {name} is no part of what {} says", config::FILE));
            }
            if !matches!(found.dtype().try_into(), Ok(DType::F32 | DType::F16 | DType::BF16)) {
                let dtype = found.dtype();
                faults.push(format!("{FILE}: {name} is {dtype:?}; allowed: F32, F16, BF16"));
            }
        }
        faults.sort();
        faults
    }

    /// A tensor as f32, times `scale`.
    pub fn read(&self, name: &str, scale: f64) -> Result<Tensor, String> {
        let read = || {
            let found = self.0.tensor(name).map_err(candle_core::Error::wrap)?;
            let (dtype, shape) = (found.dtype().try_into()?, found.shape());
            let tensor = Tensor::from_raw_buffer(found.data(), dtype, shape, &Device::Cpu)?;
            (tensor.to_dtype(DType::F32)? * scale)?.flatten_all()?.to_vec1::<f32>()
        };
        let values = read().map_err(|e| format!("{FILE}: {name}: {e}"))?;
        if !values.iter().all(|x| x.is_finite()) {
            return Err(match scale == 1.0 {
                true => format!("{FILE}: {name} holds NaN or infinity"),
                false => format!("{FILE}: {name} times {scale} holds NaN or infinity"),
            });
        }
        let shape = self.0.tensor(name).map(|t| t.shape().to_vec()).unwrap_or_default();
        Tensor::from_vec(values, shape, &Device::Cpu).map_err(|e| format!("{FILE}: {name}: {e}"))
    }
}
