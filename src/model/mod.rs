//! Compute: what a model is and what a step of it computes.
//!
//! [`spec`] reads `config.json`, [`weights`] maps `model.safetensors`, [`decoder`] is the one GPT-2 that
//! both training and serving run, with [`moe`] for feed-forward networks of experts; [`runner`] drives
//! it a [`step`] at a time over a paged KV cache, and [`sample`] turns logits into tokens. [`init`] makes
//! fresh weights, and experts out of dense ones.
//!
//! Knows tensors and rows. Must not know requests, tasks, text or time. Nothing in a bundle, however
//! broken, makes it panic: what is wrong comes back as [`Faults`], all at once.

pub mod decoder;
pub mod init;
pub mod moe;
pub mod runner;
pub mod sample;
pub mod spec;
pub mod step;
pub mod weights;

pub use decoder::{CausalPacked, Decoder, Pass, Site};
pub use moe::{MoeLayer, Routes};
pub use runner::CandleRunner;
pub use spec::{Moe, Spec, end_ids};
pub use weights::Weights;

pub use crate::error::Faults;

use crate::adapter;
use crate::config::Dtype;
use crate::kernels::{Format, KvShape, Ops, Precision};
use candle_core::{DType, Device};
use std::path::Path;

impl From<candle_core::Error> for Faults {
    fn from(error: candle_core::Error) -> Self {
        Self(vec![error.to_string()])
    }
}

/// What weights are held in, for a file of this type.
pub fn format(dtype: Dtype, file: DType) -> Format {
    match dtype {
        Dtype::Int8 => Format::Int8,
        _ => Format::Float(precision(dtype, file)),
    }
}

/// What keys, values, adapters and, unless they have a format of their own, weights are held in, for a
/// file of this type. By itself an f16 file is widened to f32: every f16 is an f32, but most are not bf16.
pub fn precision(dtype: Dtype, file: DType) -> Precision {
    match (dtype, file) {
        (Dtype::Bf16 | Dtype::Int8, _) | (Dtype::Auto, DType::BF16) => Precision::Bf16,
        (Dtype::F32, _) | (Dtype::Auto, _) => Precision::F32,
    }
}

/// What the model keeps for each position.
pub fn kv_shape(spec: &Spec, block_size: usize, precision: Precision) -> KvShape {
    let (layers, heads, head_dim) = (spec.layers, spec.heads, spec.head_dim());
    KvShape { layers, block_size, heads, head_dim, precision }
}

/// What adapters must know of the model.
pub fn adapter_shape(spec: &Spec, precision: Precision) -> adapter::Shape {
    let &Spec { layers, width, inner, .. } = spec;
    let moe_layers = spec.moe.as_ref().map_or_else(Vec::new, |moe| moe.layers.clone());
    adapter::Shape { layers, width, inner, moe_layers, precision }
}

/// How a bundle is to be served.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// What weights are held in; keys and values too.
    pub dtype: Dtype,
    /// Positions that the KV cache holds, over all sequences; rounded up to whole blocks.
    pub kv_tokens: usize,
    /// Positions per KV block.
    pub block_size: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { dtype: Dtype::Auto, kv_tokens: 1 << 14, block_size: 16 }
    }
}

/// Reads the weights of the bundle in `dir` and makes them ready to run on the CPU.
pub fn load(dir: &Path, options: &LoadOptions) -> Result<CandleRunner, Faults> {
    let weights = Weights::open(dir)?;
    if options.block_size == 0 {
        return Err(Faults(vec!["block_size is 0; allowed: 1 or more".into()]));
    }
    weights.check_values()?;
    let ops = Ops::new(&Device::Cpu, precision(options.dtype, weights.dtype()));
    let format = format(options.dtype, weights.dtype());
    let decoder = Decoder::packed(weights.spec(), weights.var_builder(&Device::Cpu), ops, format)?;
    let blocks = options.kv_tokens.div_ceil(options.block_size);
    Ok(CandleRunner::new(decoder, blocks, options.block_size)?)
}

#[cfg(test)]
mod parity;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::step::Runner;

    #[test]
    fn auto_follows_the_file_and_never_rounds() {
        assert_eq!(precision(Dtype::Auto, DType::BF16), Precision::Bf16);
        assert_eq!(precision(Dtype::Auto, DType::F16), Precision::F32);
        assert_eq!(precision(Dtype::Auto, DType::F32), Precision::F32);
        assert_eq!(precision(Dtype::F32, DType::BF16), Precision::F32);
        assert_eq!(precision(Dtype::Bf16, DType::F32), Precision::Bf16);
        assert_eq!(format(Dtype::Auto, DType::BF16), Format::Float(Precision::Bf16));
        assert_eq!(format(Dtype::Int8, DType::F32), Format::Int8);
    }

    #[test]
    fn a_small_cache_shortens_the_context() {
        let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gpt2-tiny");
        for (kv_tokens, context) in [(40, 48), (128, 128), (4000, 128)] {
            let options = LoadOptions { dtype: Dtype::F32, kv_tokens, block_size: 16 };
            assert_eq!(load(&bundle, &options).unwrap().capacity().context, context);
        }
    }

    #[test]
    fn a_cache_of_nothing_is_refused() {
        let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gpt2-tiny");
        for (kv_tokens, block_size) in [(64, 0), (0, 16), (usize::MAX, 1)] {
            let options = LoadOptions { dtype: Dtype::F32, kv_tokens, block_size };
            assert!(load(&bundle, &options).is_err());
        }
    }
}
