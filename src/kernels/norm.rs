//! Layer normalisation.
#![allow(unsafe_code)]

use super::autograd::{elements, record};
use super::linear::wanted;
use super::memory::{Shared, filled};
use super::reduce::{ROWS, merge};
use super::simd::{Isa, Kernel, Simd};
use super::threads::{collect, each};
use candle_core::{Result, Tensor, bail};

/// Normalises the rows of `x [rows, d]`, then scales by `w [d]` and shifts by `b [d]`.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64, isa: Isa) -> Result<Tensor> {
    let d = w.dims1()?;
    if d == 0 || x.dims().last() != Some(&d) || b.dims1()? != d {
        bail!("layer norm: {:?} by {:?} and {:?}", x.dims(), w.dims(), b.dims());
    }
    let (x, w, b) = (x.contiguous()?, w.contiguous()?, b.contiguous()?);
    let eps = eps as f32;
    let out = forward(&elements(&x)?, &elements(&w)?, &elements(&b)?, eps, isa);
    let saved = (x.clone(), w.clone(), b.clone());
    record("layer_norm", &[&x, &w, &b], out, x.shape(), move |_, grad| {
        let (x, w, b) = &saved;
        let grad = grad.contiguous()?;
        let (dx, dw, db) = backward(&elements(x)?, &elements(w)?, &elements(&grad)?, eps, isa);
        Ok(vec![wanted(x, || Ok(dx))?, wanted(w, || Ok(dw))?, wanted(b, || Ok(db))?])
    })
}

fn forward(x: &[f32], w: &[f32], b: &[f32], eps: f32, isa: Isa) -> Vec<f32> {
    let task = ROWS * w.len();
    let run = |out: Shared<f32>| {
        each(x.len().div_ceil(task), |i| {
            let own = i * task..((i + 1) * task).min(x.len());
            // SAFETY: the output is as long as x; this task's rows begin here.
            let out = Shared::new(unsafe { out.get().add(own.start) });
            isa.run(Forward { x: &x[own], w, b, eps, out });
        });
    };
    // SAFETY: the tasks cover all rows.
    unsafe { filled(x.len(), run) }
}

/// Gradients of x, w and b.
fn backward(
    x: &[f32],
    w: &[f32],
    dy: &[f32],
    eps: f32,
    isa: Isa,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (d, task) = (w.len(), ROWS * w.len());
    let mut parts = Vec::new();
    let run = |dx: Shared<f32>| {
        parts = collect(x.len().div_ceil(task), |i| {
            let own = i * task..((i + 1) * task).min(x.len());
            // SAFETY: dx is as long as x; this task's rows begin here.
            let dx = Shared::new(unsafe { dx.get().add(own.start) });
            let mut sums = vec![0.0; 2 * d];
            let (x, dy) = (&x[own.clone()], &dy[own]);
            isa.run(Backward { x, w, dy, eps, dx, sums: &mut sums });
            sums
        });
    };
    assert_eq!(x.len(), dy.len(), "a gradient of another shape");
    // SAFETY: the tasks cover all rows.
    let dx = unsafe { filled(x.len(), run) };
    let mut dw = merge(parts, 2 * d, isa);
    let db = dw.split_off(d);
    (dx, dw, db)
}

struct Forward<'a> {
    x: &'a [f32],
    w: &'a [f32],
    b: &'a [f32],
    eps: f32,
    out: Shared<f32>,
}

/// Vectors of a row of `d`, as (offset, elements).
#[inline(always)]
fn vectors<S: Simd>(d: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..d).step_by(S::LANES).map(move |at| (at, (d - at).min(S::LANES)))
}

const ONES: [f32; 16] = [1.0; 16];

/// Mean of a row, and one over its standard deviation.
#[inline(always)]
unsafe fn moments<S: Simd>(row: &[f32], eps: f32) -> (f32, f32) {
    let d = row.len();
    // SAFETY: loads stay inside the row.
    unsafe {
        let mut sum = S::splat(0.0);
        for (at, n) in vectors::<S>(d) {
            sum = S::add(sum, S::load_n(row.as_ptr().add(at), n));
        }
        let mean = S::sum(sum) / d as f32;
        let mut squares = S::splat(0.0);
        for (at, n) in vectors::<S>(d) {
            let x = S::sub(S::load_n(row.as_ptr().add(at), n), S::splat(mean));
            // Beyond the end there is nothing, not a zero that differs from the mean.
            let x = if n < S::LANES { S::mul(x, S::load_n(ONES.as_ptr(), n)) } else { x };
            squares = S::fma(x, x, squares);
        }
        let variance = S::sum(squares) / d as f32;
        (mean, 1.0 / (variance + eps).sqrt())
    }
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let d = self.w.len();
        for (i, row) in self.x.chunks_exact(d).enumerate() {
            // SAFETY: offsets stay inside rows of d; the output has as many rows as x.
            unsafe {
                let (mean, scale) = moments::<S>(row, self.eps);
                for (at, n) in vectors::<S>(d) {
                    let x = S::sub(S::load_n(row.as_ptr().add(at), n), S::splat(mean));
                    let w = S::load_n(self.w.as_ptr().add(at), n);
                    let b = S::load_n(self.b.as_ptr().add(at), n);
                    let y = S::fma(S::mul(x, S::splat(scale)), w, b);
                    S::store_n(self.out.get().add(i * d + at), y, n);
                }
            }
        }
    }
}

struct Backward<'a> {
    x: &'a [f32],
    w: &'a [f32],
    dy: &'a [f32],
    eps: f32,
    dx: Shared<f32>,
    /// Gradient of w, then of b.
    sums: &'a mut [f32],
}

/// Part of a row, normalised. (What it gives beyond the row's end is not zero.)
#[inline(always)]
unsafe fn normalised<S: Simd>(
    x: &[f32],
    (at, n): (usize, usize),
    (mean, scale): (S::V, S::V),
) -> S::V {
    // SAFETY: the caller's part is inside the row.
    unsafe { S::mul(S::sub(S::load_n(x.as_ptr().add(at), n), mean), scale) }
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let d = self.w.len();
        let (dw, db) = self.sums.split_at_mut(d);
        let rows = self.x.chunks_exact(d).zip(self.dy.chunks_exact(d));
        for (i, (x, dy)) in rows.enumerate() {
            // SAFETY: offsets stay inside rows of d; dx has as many rows as x.
            unsafe {
                let (mean, scale) = moments::<S>(x, self.eps);
                let shape = (S::splat(mean), S::splat(scale));
                let (mut sum, mut dot) = (S::splat(0.0), S::splat(0.0));
                // Beyond the end w and dy are zero, so nothing is counted there.
                for (at, n) in vectors::<S>(d) {
                    let dy = S::load_n(dy.as_ptr().add(at), n);
                    let normal = normalised::<S>(x, (at, n), shape);
                    let g = S::mul(dy, S::load_n(self.w.as_ptr().add(at), n));
                    sum = S::add(sum, g);
                    dot = S::fma(g, normal, dot);
                    let (dw, db) = (dw.as_mut_ptr().add(at), db.as_mut_ptr().add(at));
                    S::store_n(dw, S::fma(dy, normal, S::load_n(dw, n)), n);
                    S::store_n(db, S::add(dy, S::load_n(db, n)), n);
                }
                let sum = S::splat(S::sum(sum) / d as f32);
                let dot = S::splat(-S::sum(dot) / d as f32);
                for (at, n) in vectors::<S>(d) {
                    let dy = S::load_n(dy.as_ptr().add(at), n);
                    let g = S::mul(dy, S::load_n(self.w.as_ptr().add(at), n));
                    let normal = normalised::<S>(x, (at, n), shape);
                    let dx = S::mul(shape.1, S::fma(normal, dot, S::sub(g, sum)));
                    S::store_n(self.dx.get().add(i * d + at), dx, n);
                }
            }
        }
    }
}
