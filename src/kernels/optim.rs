//! The optimiser's arithmetic.
#![allow(unsafe_code)]

use super::autograd::elements;
use super::simd::{Isa, Kernel, Simd};
use super::threads::{collect, each_part};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, Var, bail};

/// Elements that a task takes; fixed, so that the order of additions in a norm is.
const TASK: usize = 1 << 15;

/// What one AdamW step needs besides its tensors.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: usize,
    /// Factor on the gradient: clipping and the mean over accumulated batches.
    pub grad_scale: f64,
}

impl AdamW {
    fn corrections(&self) -> (f64, f64) {
        let step = i32::try_from(self.step.max(1)).unwrap_or(i32::MAX);
        (1.0 - self.beta1.powi(step), 1.0 - self.beta2.powi(step))
    }
}

/// One AdamW step of one parameter, in place. `m` and `v` are its moments, zero before the first step.
/// All four have one shape and are different tensors.
pub fn adamw_step(param: &Var, grad: &Tensor, m: &Var, v: &Var, how: &AdamW) -> Result<()> {
    let all = [param.as_tensor(), m.as_tensor(), v.as_tensor(), grad];
    if all.iter().any(|t| t.shape() != grad.shape() || t.dtype() != DType::F32) {
        bail!("adamw: {:?} in f32 is the shape of all but some", grad.shape());
    }
    let distinct = param.id() != m.id() && param.id() != v.id() && m.id() != v.id();
    if !distinct {
        bail!("adamw: a parameter and its moments must be different tensors");
    }
    let dense = [m, v, param].iter().all(|t| t.is_contiguous());
    if !grad.device().is_cpu() || !dense {
        return plain_step(param, grad, m, v, how);
    }
    let grad = grad.contiguous()?;
    let grad = elements(&grad)?;
    // Each tensor lends its storage for as long as the innermost closure runs.
    in_place(m, |m| {
        in_place(v, |v| {
            in_place(param, |param| {
                let parts = param.chunks_mut(TASK).zip(m.chunks_mut(TASK));
                let parts = parts.zip(v.chunks_mut(TASK)).zip(grad.chunks(TASK));
                let mut parts: Vec<_> = parts.collect();
                each_part(&mut parts, 1, |_, part| {
                    for (((param, m), v), grad) in part {
                        Isa::best().run(Step { param, m, v, grad, how });
                    }
                });
                Ok(())
            })
        })
    })
}

/// The same as a composition of candle's operations.
pub fn plain_step(param: &Var, grad: &Tensor, m: &Var, v: &Var, how: &AdamW) -> Result<()> {
    let grad = (grad * how.grad_scale)?;
    let next_m = ((m.as_tensor() * how.beta1)? + (&grad * (1.0 - how.beta1))?)?;
    let next_v = ((v.as_tensor() * how.beta2)? + (grad.sqr()? * (1.0 - how.beta2))?)?;
    let (first, second) = how.corrections();
    let update = ((&next_m / first)? / ((&next_v / second)?.sqrt()? + how.eps)?)?;
    let next = ((param.as_tensor() * (1.0 - how.lr * how.weight_decay))? - (update * how.lr)?)?;
    m.set(&next_m)?;
    v.set(&next_v)?;
    param.set(&next)
}

/// Sum of the squares of all elements.
pub fn l2_norm_squared(x: &Tensor) -> Result<f64> {
    if !x.device().is_cpu() {
        return Ok(f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?));
    }
    let x = x.contiguous()?;
    let x = elements(&x)?;
    let parts = collect(x.len().div_ceil(TASK), |i| {
        let own = &x[i * TASK..((i + 1) * TASK).min(x.len())];
        f64::from(Isa::best().run(Squares(own)))
    });
    Ok(parts.iter().sum())
}

/// Lends a dense f32 tensor's elements to `f`.
fn in_place(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    struct Lend<F>(std::cell::Cell<Option<F>>);

    impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Lend<F> {
        fn name(&self) -> &'static str {
            "in_place"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            match (storage, layout.contiguous_offsets(), self.0.take()) {
                (CpuStorage::F32(all), Some((start, end)), Some(f)) => f(&mut all[start..end]),
                _ => bail!("only a dense f32 tensor is changed in place"),
            }
        }
    }
    tensor.inplace_op1(&Lend(std::cell::Cell::new(Some(f))))
}

struct Step<'a> {
    param: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    grad: &'a [f32],
    how: &'a AdamW,
}

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { param, m, v, grad, how } = self;
        let len = param.len().min(m.len()).min(v.len()).min(grad.len());
        let (param, m, v, grad) =
            (param.as_mut_ptr(), m.as_mut_ptr(), v.as_mut_ptr(), grad.as_ptr());
        let (first, second) = how.corrections();
        // SAFETY: `at + n` is within all four.
        unsafe {
            let scale = S::splat(how.grad_scale as f32);
            let [beta1, beta2] = [how.beta1, how.beta2].map(|b| S::splat(b as f32));
            let [rest1, rest2] = [how.beta1, how.beta2].map(|b| S::splat((1.0 - b) as f32));
            let rate = S::splat((-how.lr / first) as f32);
            let keep = S::splat((1.0 - how.lr * how.weight_decay) as f32);
            let correction = S::splat((1.0 / second) as f32);
            let eps = S::splat(how.eps as f32);
            for at in (0..len).step_by(S::LANES) {
                let n = (len - at).min(S::LANES);
                let g = S::mul(S::load_n(grad.add(at), n), scale);
                let next_m = S::fma(S::load_n(m.add(at), n), beta1, S::mul(g, rest1));
                let next_v = S::fma(S::load_n(v.add(at), n), beta2, S::mul(S::mul(g, g), rest2));
                let spread = S::add(S::sqrt(S::mul(next_v, correction)), eps);
                let step = S::mul(rate, S::div(next_m, spread));
                S::store_n(m.add(at), next_m, n);
                S::store_n(v.add(at), next_v, n);
                S::store_n(param.add(at), S::fma(S::load_n(param.add(at), n), keep, step), n);
            }
        }
    }
}

struct Squares<'a>(&'a [f32]);

impl Kernel for Squares<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let len = self.0.len();
        // SAFETY: `at + n` is within the slice.
        unsafe {
            let mut sum = S::splat(0.0);
            for at in (0..len).step_by(S::LANES) {
                let x = S::load_n(self.0.as_ptr().add(at), (len - at).min(S::LANES));
                sum = S::fma(x, x, sum);
            }
            S::sum(sum)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{error, tensor};

    #[test]
    fn the_fused_step_agrees_with_the_plain_one() {
        let start: Vec<Var> = [1, 2, 3]
            .map(|seed| Var::from_tensor(&tensor((7, 19), seed).abs().unwrap()).unwrap())
            .to_vec();
        let copy: Vec<Var> =
            start.iter().map(|v| Var::from_tensor(&v.copy().unwrap()).unwrap()).collect();
        for step in 1..4 {
            let how = AdamW {
                lr: 0.01,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                step,
                grad_scale: 0.5,
            };
            let grad = tensor((7, 19), 10 + step as u32);
            adamw_step(&start[0], &grad, &start[1], &start[2], &how).unwrap();
            plain_step(&copy[0], &grad, &copy[1], &copy[2], &how).unwrap();
        }
        for (a, b) in start.iter().zip(&copy) {
            assert!(error(a, b) < 1e-6, "off by {}", error(a, b));
        }
    }

    #[test]
    fn the_norm_is_the_sum_of_squares() {
        let x = tensor((300, 301), 4);
        let expected: f64 = x
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .map(|&x| f64::from(x).powi(2))
            .sum();
        assert!((l2_norm_squared(&x).unwrap() / expected - 1.0).abs() < 1e-6);
    }

    #[test]
    fn shapes_that_differ_are_refused() {
        let [a, b, c] = [1, 2, 3].map(|s| Var::from_tensor(&tensor((2, 2), s)).unwrap());
        let how = AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.9,
            eps: 1e-8,
            weight_decay: 0.0,
            step: 1,
            grad_scale: 1.0,
        };
        assert!(adamw_step(&a, &tensor((2, 3), 5), &b, &c, &how).is_err());
    }
}
