//! `model.safetensors` as memory, checked against the shape that `config.json` promises.
//!
//! Owns names: Hugging Face saves with and without the `transformer.` prefix, leaves causal-mask buffers
//! in old files and writes the tied head or not. Inside, every tensor has its prefixed name and the
//! head is the embedding table. Invariant: what opened holds every tensor of its [`Spec`], in its
//! shape, as f32, f16 or bf16.

use super::{Faults, Spec};
use crate::kernels::map_file;
use candle_core::{DType, Device, Result as CandleResult, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorInfo};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::BitAnd;
use std::path::Path;

const FILE: &str = "model.safetensors";
const PREFIX: &str = "transformer.";
const HEAD: &str = "lm_head.weight";
const TABLE: &str = "transformer.wte.weight";

/// A bundle's weights, mapped; tensors are copied out when asked for.
#[derive(Debug)]
pub struct Weights {
    spec: Spec,
    map: Mmap,
    data_start: usize,
    tensors: BTreeMap<String, TensorInfo>,
    dtype: DType,
}

impl Weights {
    /// Reads `config.json` and maps `model.safetensors` in `dir`; lists every fault of both at once.
    pub fn open(dir: &Path) -> Result<Self, Faults> {
        let mut faults = Vec::new();
        let spec = read_spec(dir).map_err(|f| faults.extend(f.0)).ok();
        let file = open_file(dir).map_err(|fault| faults.push(fault)).ok();
        let (Some((spec, tied)), Some((map, data_start, found))) = (spec, file) else {
            return Err(Faults(faults));
        };
        let tensors = canonical_names(found, &mut faults);
        let mut weights = Self { spec, map, data_start, tensors, dtype: DType::F32 };
        weights.check_head(tied, &mut faults);
        weights.check_tensors(&mut faults);
        if faults.is_empty() { Ok(weights) } else { Err(Faults(faults)) }
    }

    /// The model's shape.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// What the tensors are stored as; f32 if they differ.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size of the file.
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// The tensors under their prefixed names, as f32 unless asked otherwise.
    pub fn var_builder(&self, device: &Device) -> VarBuilder<'_> {
        VarBuilder::from_backend(Box::new(Lookup(self)), DType::F32, device.clone())
    }

    /// Names each tensor that holds NaN or infinity, which the kernels do not keep apart from numbers. Reads
    /// the whole file.
    pub fn check_values(&self) -> Result<(), Faults> {
        let mut faults = Vec::new();
        for (name, info) in &self.tensors {
            if !self.is_finite(info) {
                faults.push(format!("{FILE}: {name} holds NaN or infinity"));
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(Faults(faults)) }
    }

    fn data(&self, info: &TensorInfo) -> &[u8] {
        let (start, end) = info.data_offsets;
        &self.map[self.data_start + start..self.data_start + end]
    }

    /// Whether no exponent is all ones, which is what NaN and infinity have in common.
    fn is_finite(&self, info: &TensorInfo) -> bool {
        self.data(info).par_chunks(1 << 18).all(|bytes| match info.dtype {
            Dtype::F32 => no_exponent_is(0x7f80_0000, bytes, u32::from_le_bytes),
            Dtype::BF16 => no_exponent_is(0x7f80, bytes, u16::from_le_bytes),
            _ => no_exponent_is(0x7c00, bytes, u16::from_le_bytes),
        })
    }

    fn read(&self, name: &str, device: &Device) -> CandleResult<Tensor> {
        let Some(info) = self.tensors.get(name) else {
            return Err(candle_core::Error::CannotFindTensor { path: name.to_owned() });
        };
        Tensor::from_raw_buffer(self.data(info), info.dtype.try_into()?, &info.shape, device)
    }

    /// The head is not kept: it must be the embedding table, bit for bit.
    fn check_head(&mut self, tied: bool, faults: &mut Vec<String>) {
        let Some(head) = self.tensors.remove(HEAD) else {
            if !tied {
                faults.push(format!(
                    "{FILE}: {HEAD} is missing, and config.json has tie_word_embeddings false"
                ));
            }
            return;
        };
        let equal = self.tensors.get(TABLE).is_some_and(|table| {
            (table.dtype, &table.shape) == (head.dtype, &head.shape)
                && self.data(table) == self.data(&head)
        });
        if !equal {
            faults.push(format!(
                "{FILE}: {HEAD} differs from {TABLE}; allowed: absent or equal (tied embeddings)"
            ));
        }
    }

    fn check_tensors(&mut self, faults: &mut Vec<String>) {
        let expected: HashMap<_, _> = self.spec.tensors().into_iter().collect();
        for (name, shape) in &expected {
            match self.tensors.get(name) {
                None => faults.push(format!("{FILE}: {name} {shape:?} is missing")),
                Some(info) if &info.shape != shape => faults.push(format!(
                    "{FILE}: {name} has shape {:?}; config.json says {shape:?}",
                    info.shape
                )),
                Some(_) => {}
            }
        }
        let mut dtypes = Vec::new();
        for (name, info) in &self.tensors {
            if !expected.contains_key(name) {
                faults.push(format!("{FILE}: {name} is not part of this architecture"));
            }
            match DType::try_from(info.dtype) {
                Ok(dtype @ (DType::F32 | DType::F16 | DType::BF16)) => dtypes.push(dtype),
                _ => faults
                    .push(format!("{FILE}: {name} is {:?}; allowed: F32, F16, BF16", info.dtype)),
            }
        }
        dtypes.dedup();
        self.dtype = if let [dtype] = dtypes[..] { dtype } else { DType::F32 };
        faults.sort();
    }
}

/// Whether no number has all bits of `ones`. Looks at all of them without a branch, as fast as memory.
fn no_exponent_is<T, const N: usize>(ones: T, bytes: &[u8], number: impl Fn([u8; N]) -> T) -> bool
where
    T: Copy + PartialEq + BitAnd<Output = T>,
{
    let (numbers, _) = bytes.as_chunks();
    !numbers.iter().fold(false, |found, &bytes| found | (number(bytes) & ones == ones))
}

/// The shape, and whether the head is said to be the embedding table.
fn read_spec(dir: &Path) -> Result<(Spec, bool), Faults> {
    let text = fs::read_to_string(dir.join("config.json"))
        .map_err(|e| Faults(vec![format!("config.json: {e}")]))?;
    let spec = Spec::from_config(&text)?;
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    Ok((spec, config["tie_word_embeddings"] != Value::Bool(false)))
}

type Mapped = (Mmap, usize, HashMap<String, TensorInfo>);

fn open_file(dir: &Path) -> Result<Mapped, String> {
    let path = dir.join(FILE);
    if !path.exists() {
        let other = [
            ("model.safetensors.index.json", "weights in several files are not supported"),
            ("pytorch_model.bin", "pickled weights are not read; save as safetensors"),
        ];
        let hint = other.iter().find(|(name, _)| dir.join(name).exists());
        let hint = hint.map_or(String::new(), |(name, why)| format!(" ({name}: {why})"));
        return Err(format!("{FILE}: no such file{hint}"));
    }
    let map = map_file(&path).map_err(|e| format!("{FILE}: {e}"))?;
    let (header, metadata) =
        SafeTensors::read_metadata(&map).map_err(|e| format!("{FILE}: {e}"))?;
    let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
    // Eight bytes hold the header's length.
    Ok((map, 8 + header, tensors))
}

fn canonical_names(
    found: HashMap<String, TensorInfo>,
    faults: &mut Vec<String>,
) -> BTreeMap<String, TensorInfo> {
    let mut tensors = BTreeMap::new();
    for (name, info) in found {
        let bare = name.strip_prefix(PREFIX).unwrap_or(&name);
        if is_mask_buffer(bare) {
            continue;
        }
        let full = if bare == HEAD { name.clone() } else { format!("{PREFIX}{bare}") };
        if tensors.insert(full.clone(), info).is_some() {
            faults.push(format!("{FILE}: {full} is there twice, with and without its prefix"));
        }
    }
    tensors
}

/// `h.{i}.attn.bias` and `h.{i}.attn.masked_bias`: the causal mask, which old files carry along.
fn is_mask_buffer(bare: &str) -> bool {
    bare.strip_prefix("h.").and_then(|rest| rest.split_once('.')).is_some_and(|(layer, rest)| {
        layer.bytes().all(|b| b.is_ascii_digit())
            && matches!(rest, "attn.bias" | "attn.masked_bias")
    })
}

/// [`Weights`] as candle's variable builder asks for them.
struct Lookup<'a>(&'a Weights);

impl SimpleBackend for Lookup<'_> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> CandleResult<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            candle_core::bail!("{name} has shape {:?}, not {shape:?}", tensor.shape());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> CandleResult<Tensor> {
        self.0.read(name, device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.tensors.contains_key(name)
    }
}

/// Writes `config.json` and `model.safetensors` of a model to `dir`, stored as `dtype`.
///
/// `tensors` are those of [`Spec::tensors`], by name. The weights are replaced by renaming, so whoever
/// has the old file mapped keeps it.
pub fn save(
    dir: &Path,
    spec: &Spec,
    tensors: &BTreeMap<String, Tensor>,
    dtype: DType,
) -> CandleResult<()> {
    let mut stored = HashMap::new();
    for (name, shape) in spec.tensors() {
        let Some(tensor) = tensors.get(&name).filter(|t| t.dims() == shape) else {
            candle_core::bail!("{name} {shape:?} is not among the tensors to save");
        };
        stored.insert(name, tensor.to_dtype(dtype)?.to_device(&Device::Cpu)?);
    }
    fs::create_dir_all(dir)?;
    // Hugging Face refuses files that do not say which framework's layout they hold.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(&stored, Some(format), &dir.join(FILE))?;
    let mut config = spec.to_config();
    config["dtype"] = dtype_name(dtype).into();
    let config_file = dir.join("config.json");
    fs::write(&config_file, format!("{config:#}\n"))?;
    // A temporary file is its owner's alone; the bundle is for whoever may read what stands beside it.
    fs::set_permissions(dir.join(FILE), fs::metadata(config_file)?.permissions())?;
    Ok(())
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests;
