//! Passes over a row of logits or weights, one number for each token of the vocabulary.
#![allow(unsafe_code)]

use super::simd::{Isa, Kernel, Simd, exp};

/// Numbers that [`block_sums`] adds up together.
pub const BLOCK: usize = 1024;

/// The largest number of `row`; `None` if it is empty or one of them is NaN or infinite.
pub fn largest(row: &[f32]) -> Option<f32> {
    let (max, nothing) = Isa::best().without_bf16().run(Largest(row));
    (nothing == 0.0 && max.is_finite()).then_some(max)
}

/// `e^((x - max) / temperature)` of each of `row`, to about 1e-7 relative; less than e^-87 becomes that.
pub fn exponentials(row: &[f32], max: f32, temperature: f32) -> Vec<f32> {
    let mut out = vec![0.0; row.len()];
    Isa::best().without_bf16().run(Exponentials { row, max, temperature, out: &mut out });
    out
}

/// The sum of each [`BLOCK`] numbers of `row`.
pub fn block_sums(row: &[f32]) -> Vec<f32> {
    Isa::best().without_bf16().run(BlockSums(row))
}

/// Gives the largest, and 0 if all are finite, else NaN.
struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> (f32, f32) {
        let whole = self.0.len() / S::LANES * S::LANES;
        // SAFETY: whole vectors within the row.
        let (mut max, mut nothing) = unsafe {
            let (mut max, mut nothing) = (S::splat(f32::NEG_INFINITY), S::splat(0.0));
            for at in (0..whole).step_by(S::LANES) {
                let x = S::load(self.0.as_ptr().add(at));
                max = S::max(max, x);
                // The product of anything finite with 0 is 0; of NaN and infinities it is NaN.
                nothing = S::fma(x, S::splat(0.0), nothing);
            }
            (S::max_lane(max), S::sum(nothing))
        };
        for &x in &self.0[whole..] {
            max = max.max(x);
            nothing += x * 0.0;
        }
        (max, nothing)
    }
}

struct Exponentials<'a> {
    row: &'a [f32],
    max: f32,
    temperature: f32,
    out: &'a mut [f32],
}

impl Kernel for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.row.len().min(self.out.len());
        for at in (0..len).step_by(S::LANES) {
            let n = (len - at).min(S::LANES);
            // SAFETY: no more than the `n` elements that both have.
            unsafe {
                let x = S::load_n(self.row.as_ptr().add(at), n);
                let x = S::div(S::sub(x, S::splat(self.max)), S::splat(self.temperature));
                S::store_n(self.out.as_mut_ptr().add(at), exp::<S>(x), n);
            }
        }
    }
}

struct BlockSums<'a>(&'a [f32]);

impl Kernel for BlockSums<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Vec<f32> {
        let mut sums = Vec::with_capacity(self.0.len().div_ceil(BLOCK));
        for block in self.0.chunks(BLOCK) {
            // SAFETY: no more than the block's elements.
            unsafe {
                let mut sum = S::splat(0.0);
                for at in (0..block.len()).step_by(S::LANES) {
                    let n = (block.len() - at).min(S::LANES);
                    sum = S::add(sum, S::load_n(block.as_ptr().add(at), n));
                }
                sums.push(S::sum(sum));
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::values;

    #[test]
    fn passes_agree_with_plain_loops() {
        for len in [1, 7, 16, 1000, 1024, 2049, 50_257] {
            let row = values(len, 3);
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(largest(&row), Some(max));
            for (&x, got) in row.iter().zip(exponentials(&row, max, 0.7)) {
                let expected = f64::from((x - max) / 0.7).exp();
                assert!((f64::from(got) - expected).abs() < 1e-6 * expected);
            }
            let sums = block_sums(&row);
            assert_eq!(sums.len(), len.div_ceil(BLOCK));
            for (sum, block) in sums.iter().zip(row.chunks(BLOCK)) {
                let expected: f64 = block.iter().map(|&x| f64::from(x)).sum();
                assert!((f64::from(*sum) - expected).abs() < 1e-3);
            }
        }
    }

    #[test]
    fn what_is_not_finite_has_no_largest() {
        assert_eq!(largest(&[]), None);
        for (at, x) in [(0, f32::NAN), (20, f32::INFINITY), (39, f32::NEG_INFINITY)] {
            let mut row = values(40, 1);
            row[at] = x;
            assert_eq!(largest(&row), None);
        }
    }
}
