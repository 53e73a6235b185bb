//! Operations on each element by itself.
#![allow(unsafe_code)]

use super::autograd::{elements, record};
use super::linear::wanted;
use super::memory::{Shared, filled};
use super::simd::{Isa, Kernel, Simd, exp};
use super::threads::each;
use candle_core::{Device, Result, Tensor, bail};

/// Elements that a task takes.
const TASK: usize = 1 << 15;

#[derive(Clone, Copy)]
enum Function {
    /// `a + b`.
    Add,
    /// GELU of `a`, tanh form.
    Gelu,
    /// Its derivative at `a`, times `b`.
    GeluBackward,
}

struct Map<'a> {
    function: Function,
    a: &'a [f32],
    b: &'a [f32],
    out: Shared<f32>,
}

/// What is done to each element. (Not closures: those cannot be made to take on the features of the
/// function around them.)
trait Each {
    unsafe fn apply<S: Simd>(a: S::V, b: S::V) -> S::V;
}

struct Add;
struct Gelu;
struct GeluBackward;

impl Each for Add {
    #[inline(always)]
    unsafe fn apply<S: Simd>(a: S::V, b: S::V) -> S::V {
        // SAFETY: registers only.
        unsafe { S::add(a, b) }
    }
}

impl Each for Gelu {
    #[inline(always)]
    unsafe fn apply<S: Simd>(x: S::V, _: S::V) -> S::V {
        // SAFETY: registers only.
        unsafe { S::mul(x, gate::<S>(x)) }
    }
}

impl Each for GeluBackward {
    #[inline(always)]
    unsafe fn apply<S: Simd>(x: S::V, dy: S::V) -> S::V {
        // SAFETY: registers only.
        unsafe {
            // With s = sigmoid(2u): (x s)' = s + x s (1 - s) 2u'.
            let s = gate::<S>(x);
            let (constant, quadratic) = (S::splat(2.0 * ROOT), S::splat(6.0 * CUBIC * ROOT));
            let twice_u = S::fma(S::mul(x, x), quadratic, constant);
            let slope = S::mul(S::mul(x, s), S::sub(S::splat(1.0), s));
            S::mul(dy, S::fma(slope, twice_u, s))
        }
    }
}

impl Kernel for Map<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: passed on from the caller.
        unsafe {
            match self.function {
                Function::Add => self.each::<S, Add>(),
                Function::Gelu => self.each::<S, Gelu>(),
                Function::GeluBackward => self.each::<S, GeluBackward>(),
            }
        }
    }
}

const ROOT: f32 = 0.797_884_6; // sqrt(2 / pi)
const CUBIC: f32 = 0.044_715;

/// `(1 + tanh u) / 2 = sigmoid(2u)` for `u = sqrt(2 / pi) (x + 0.044715 x³)`.
#[inline(always)]
unsafe fn gate<S: Simd>(x: S::V) -> S::V {
    // SAFETY: registers only.
    unsafe {
        let u =
            S::mul(x, S::fma(S::mul(x, x), S::splat(-2.0 * CUBIC * ROOT), S::splat(-2.0 * ROOT)));
        S::div(S::splat(1.0), S::add(S::splat(1.0), exp::<S>(u)))
    }
}

impl Map<'_> {
    #[inline(always)]
    unsafe fn each<S: Simd, F: Each>(self) {
        let (a, b, out) = (self.a.as_ptr(), self.b.as_ptr(), self.out.get());
        let whole = self.a.len() / S::LANES * S::LANES;
        // SAFETY: a, b and out are equally long; whole vectors, then what is left.
        unsafe {
            for at in (0..whole).step_by(S::LANES) {
                S::store(out.add(at), F::apply::<S>(S::load(a.add(at)), S::load(b.add(at))));
            }
            let n = self.a.len() - whole;
            if n > 0 {
                let (a, b) = (S::load_n(a.add(whole), n), S::load_n(b.add(whole), n));
                S::store_n(out.add(whole), F::apply::<S>(a, b), n);
            }
        }
    }
}

fn map(function: Function, a: &[f32], b: &[f32], isa: Isa) -> Vec<f32> {
    assert_eq!(a.len(), b.len(), "a pointwise operation on different shapes");
    let run = |out: Shared<f32>| {
        let task = |i: usize| {
            let range = i * TASK..((i + 1) * TASK).min(a.len());
            // SAFETY: the output is as long as `a`; tasks have ranges of their own.
            let out = Shared::new(unsafe { out.get().add(range.start) });
            isa.run(Map { function, a: &a[range.clone()], b: &b[range], out });
        };
        each(a.len().div_ceil(TASK), task);
    };
    // SAFETY: the tasks' ranges cover the output.
    unsafe { filled(a.len(), run) }
}

/// GELU, tanh form.
pub fn gelu(x: &Tensor, isa: Isa) -> Result<Tensor> {
    let x = x.contiguous()?;
    let out = {
        let x = elements(&x)?;
        map(Function::Gelu, &x, &x, isa)
    };
    let saved = x.clone();
    record("gelu", &[&x], out, x.shape(), move |_, grad| {
        let grad = grad.contiguous()?;
        let dx = wanted(&saved, || {
            Ok(map(Function::GeluBackward, &elements(&saved)?, &elements(&grad)?, isa))
        })?;
        Ok(vec![dx])
    })
}

/// `a + b`.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.shape() != b.shape() {
        bail!("add: {:?} and {:?}", a.dims(), b.dims());
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let out = map(Function::Add, &elements(&a)?, &elements(&b)?, Isa::best());
    record("add", &[&a, &b], out, a.shape(), |_, grad| {
        Ok(vec![Some(grad.clone()), Some(grad.clone())])
    })
}

/// `a + b` outside of any graph.
pub fn add_values(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let out = map(Function::Add, &elements(&a)?, &elements(&b)?, Isa::best());
    Tensor::from_vec(out, a.shape(), &Device::Cpu)
}
