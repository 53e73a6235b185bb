//! Fresh weights, as GPT-2 begins, and experts out of a dense model: what training starts from and what tests and benchmarks run on.

use super::{Spec, weights};
use candle_core::{DType, Device, Result, Tensor, bail};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::f32::consts::TAU;
use std::path::Path;

/// Standard deviation of fresh matrices.
const STD: f32 = 0.02;

/// GPT-2's initialisation of every tensor of `spec`, on the CPU, determined by `seed`: matrices and
/// embeddings normal with deviation 0.02, those that write to the residual stream scaled down by
/// `sqrt(2 * layers)`, biases 0, norms 1.
pub fn fresh(spec: &Spec, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let residual = STD / (2.0 * spec.layers as f32).sqrt();
    let mut tensors = BTreeMap::new();
    for (name, shape) in spec.tensors() {
        let tensor = if name.ends_with(".bias") {
            Tensor::zeros(shape, DType::F32, &Device::Cpu)?
        } else if shape.len() == 1 {
            Tensor::ones(shape, DType::F32, &Device::Cpu)?
        } else {
            let std = if name.ends_with("c_proj.weight") { residual } else { STD };
            normals(shape, std, &mut rng)?
        };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// The tensors of `spec`, which has experts, out of those of the same model without: each expert is a
/// copy of the feed-forward network whose place it takes, so this computes what `dense` does, whatever
/// its gates choose. Gates are normal with deviation `gate_std`, determined by `seed`.
pub fn upcycle(
    spec: &Spec,
    dense: &BTreeMap<String, Tensor>,
    gate_std: f32,
    seed: u64,
) -> Result<BTreeMap<String, Tensor>> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut tensors = BTreeMap::new();
    for (name, shape) in spec.tensors() {
        let tensor = match dense_name(&name) {
            None => normals(shape, gate_std, &mut rng)?,
            Some(source) => match dense.get(&source).filter(|t| t.dims() == shape) {
                Some(tensor) => tensor.clone(),
                None => {
                    bail!("{source} {shape:?}, which becomes {name}, is not in the dense model")
                }
            },
        };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// The tensor of a dense model that one of a model with experts begins as; a gate has none.
fn dense_name(name: &str) -> Option<String> {
    let Some((block, part)) = name.split_once(".moe.") else { return Some(name.to_owned()) };
    let (_, part) = part.strip_prefix("experts.")?.split_once('.')?;
    Some(format!("{block}.mlp.{part}"))
}

fn normals(shape: Vec<usize>, std: f32, rng: &mut SmallRng) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| std * normal(rng)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// One draw from the standard normal distribution, by Box and Muller.
fn normal(rng: &mut SmallRng) -> f32 {
    // In (0, 1], so that the logarithm is finite.
    let radius = (1.0 - rng.random::<f32>()).ln() * -2.0;
    radius.sqrt() * (TAU * rng.random::<f32>()).cos()
}

/// Writes a bundle's `config.json` and `model.safetensors` with fresh weights.
pub fn random_bundle(dir: &Path, spec: &Spec, seed: u64, dtype: DType) -> Result<()> {
    weights::save(dir, spec, &fresh(spec, seed)?, dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Weights;
    use crate::model::spec::{Gate, Moe};

    fn spec() -> Spec {
        Spec {
            layers: 2,
            heads: 2,
            width: 32,
            inner: 64,
            context: 16,
            vocab: 100,
            eps: 1e-5,
            eos: vec![3],
            tasks: vec!["image".into()],
            moe: None,
        }
    }

    #[test]
    fn deviations_are_gpt2s() {
        let tensors = fresh(&spec(), 1).unwrap();
        let deviation = |name: &str| {
            let x = &tensors[name];
            x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt()
        };
        assert!((deviation("transformer.wte.weight") - 0.02).abs() < 0.002);
        assert!((deviation("transformer.h.0.mlp.c_proj.weight") - 0.01).abs() < 0.001);
        assert_eq!(deviation("transformer.h.1.ln_1.weight"), 1.0);
        assert_eq!(deviation("transformer.h.1.mlp.c_fc.bias"), 0.0);
    }

    fn sparse(gate: Gate) -> Spec {
        let moe = Moe { layers: vec![1], experts: 3, top_k: 2, gate };
        Spec { moe: Some(moe), ..spec() }
    }

    #[test]
    fn experts_begin_as_copies() {
        let dense = fresh(&spec(), 1).unwrap();
        let tensors = upcycle(&sparse(Gate::TokenTask), &dense, 0.5, 7).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let copied = values(&dense["transformer.h.1.mlp.c_fc.weight"]);
        for expert in 0..3 {
            let name = format!("transformer.h.1.moe.experts.{expert}.c_fc.weight");
            assert_eq!(values(&tensors[&name]), copied);
        }
        assert!(tensors.contains_key("transformer.h.0.mlp.c_fc.weight"));
        assert!(!tensors.contains_key("transformer.h.1.mlp.c_fc.weight"));
        let gate = values(&tensors["transformer.h.1.moe.gate.weight"]);
        assert!(gate.iter().any(|x| x.abs() > 0.25));
        let error = upcycle(&sparse(Gate::Task), &tensors, 0.5, 7).unwrap_err().to_string();
        assert!(error.contains("transformer.h.1.mlp.c_fc.weight"), "{error}");
    }

    #[test]
    fn what_is_written_opens_again_in_every_dtype() {
        let all = [Gate::Token, Gate::TokenTask, Gate::PerTask, Gate::Task].map(sparse);
        for spec in all.into_iter().chain([spec()]) {
            opens_again_in_every_dtype(&spec);
        }
    }

    fn opens_again_in_every_dtype(spec: &Spec) {
        let dir = tempfile::tempdir().unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            random_bundle(dir.path(), spec, 1, dtype).unwrap();
            let weights = Weights::open(dir.path()).unwrap();
            assert_eq!((weights.spec(), weights.dtype()), (spec, dtype));
            weights.check_values().unwrap();
            let vb = weights.var_builder(&Device::Cpu);
            let read = vb.get((100, 32), "transformer.wte.weight").unwrap();
            let exact = &fresh(spec, 1).unwrap()["transformer.wte.weight"];
            let error = (read - exact).unwrap().abs().unwrap().max_all().unwrap();
            assert!(error.to_scalar::<f32>().unwrap() <= 5e-4);
        }
    }
}
