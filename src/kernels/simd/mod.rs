//! Vectors of f32 and the few things that the kernels do with them, for each instruction set.
//!
//! A kernel is a struct that implements [`Kernel`]: its body is written once over [`Simd`] and
//! compiled once per instruction set; [`Isa::run`] picks the copy. What runs on one machine is always
//! the same copy, so results are reproducible there.
#![allow(unsafe_code)]

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for and that this machine has: there is no way to
/// make one but [`best`](Self::best) and [`available`](Self::available).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
enum Set {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with BF16 dot products.
    Avx512Bf16,
}

impl Isa {
    /// The best that this machine has.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Self(Set::Portable)))
    }

    /// All that this machine has, the best last.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut found = vec![Self(Set::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
            let sets = [(avx2, Set::Avx2), (avx512, Set::Avx512), (bf16, Set::Avx512Bf16)];
            found.extend(sets.into_iter().filter(|(has, _)| *has).map(|(_, set)| Self(set)));
        }
        found
    }

    /// Runs `kernel` compiled for this instruction set.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: nothing beyond the target's own features is used.
            Set::Portable => unsafe { kernel.run::<portable::Portable>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this variant exists only where `available` found the features.
            Set::Avx2 => unsafe { x86::run_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Set::Avx512 => unsafe { x86::run_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Set::Avx512Bf16 => unsafe { x86::run_avx512_bf16(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            // SAFETY: nothing beyond the target's own features is used.
            _ => unsafe { kernel.run::<portable::Portable>() },
        }
    }

    /// The same without BF16 dot products, for kernels that have no use for them.
    pub fn without_bf16(self) -> Self {
        Self(self.0.min(Set::Avx512))
    }

    /// Lanes of this instruction set's vectors.
    pub fn lanes(self) -> usize {
        match self.0 {
            Set::Portable | Set::Avx2 => 8,
            Set::Avx512 | Set::Avx512Bf16 => 16,
        }
    }

    /// Columns of a full panel of packed columns: as many vectors as the innermost loops of products
    /// have registers for.
    pub fn panel_width(self) -> usize {
        match self.0 {
            Set::Portable | Set::Avx2 => 2 * 8,
            Set::Avx512 | Set::Avx512Bf16 => 4 * 16,
        }
    }
}

/// Work that is compiled once per instruction set.
pub trait Kernel {
    /// What it computes.
    type Output;

    /// The body. Implementations are `#[inline(always)]`, and so is all that they call with `S`, so
    /// that the body takes on the features of its caller. Closures that compute vectors are out: they
    /// cannot be `#[inline(always)]`, and each vector instruction in them would become a call.
    ///
    /// # Safety
    /// The machine must have the features of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// A vector of [`LANES`](Self::LANES) f32, or of as many 32-bit words: a word is one f32, or two bf16
/// with the earlier one in the low half.
///
/// # Safety
/// All functions need the machine to have the instruction set; those with pointers need as many
/// readable or writable elements there as they say. No alignment is needed.
#[allow(clippy::missing_safety_doc)]
pub trait Simd: Copy {
    /// Elements in a vector.
    const LANES: usize;
    /// The vector.
    type V: Copy;

    unsafe fn splat(x: f32) -> Self::V;
    /// All lanes the same bits.
    unsafe fn splat_word(x: u32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// The first `n <= LANES` elements, then zeros; reads no more than `n`.
    unsafe fn load_n(p: *const f32, n: usize) -> Self::V;
    /// Writes the first `n <= LANES` elements only.
    unsafe fn store_n(p: *mut f32, v: Self::V, n: usize);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sqrt(a: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the hardware can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// To the nearest integer.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a * 2^n` for integral `n` in -127..=127.
    unsafe fn scale2(a: Self::V, n: Self::V) -> Self::V;
    /// Sum of the lanes, in a fixed order.
    unsafe fn sum(a: Self::V) -> f32;
    /// Largest lane.
    unsafe fn max_lane(a: Self::V) -> f32;
    /// Words of bf16 pairs: `even` to the low halves, `odd` to the high ones, rounded to nearest even.
    unsafe fn pairs(even: Self::V, odd: Self::V) -> Self::V;
    /// Words of bf16 pairs from `2 * LANES` neighbours in memory.
    unsafe fn pairs_of(p: *const f32) -> Self::V;
    /// `acc + low(a) * low(b) + high(a) * high(b)` on words of bf16 pairs.
    unsafe fn dot_pairs(acc: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// Words of bf16 pairs whose high halves are zero.
    unsafe fn low_halves(a: Self::V) -> Self::V;
    /// Transposes a square of words: `LANES` rows from `src` (`stride` words apart) to `dst`.
    unsafe fn transpose(src: *const u32, stride: usize, dst: *mut u32, dst_stride: usize);
}

/// Words that memory hands over at once.
pub const LINE: usize = 16;

/// Asks for the line at this address, whatever it is, so that it is at hand soon (`NEAR`) or later.
#[inline(always)]
pub fn prefetch<const NEAR: bool>(at: *const u32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: nothing is read that a program could see, and no address is wrong.
        unsafe {
            match NEAR {
                true => _mm_prefetch::<_MM_HINT_T0>(at.cast()),
                false => _mm_prefetch::<_MM_HINT_T1>(at.cast()),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// `e^x` to about 1e-7 relative; x is clamped to -87..88.
///
/// # Safety
/// The machine must have the features of `S`.
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller vouches for the features; no memory is touched.
    unsafe {
        let x = S::max(S::min(x, S::splat(88.0)), S::splat(-87.0));
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, so that the remainder is exact.
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let e = S::add(S::fma(p, S::mul(r, r), r), S::splat(1.0));
        S::scale2(e, n)
    }
}

/// Turns `len` scores into `total * softmax(scale * scores)`, in place; gives the logarithm of the sum
/// of the exponentials of the scaled scores.
///
/// # Safety
/// `row` must be good for `len` elements, and the machine must have the features of `S`.
#[inline(always)]
pub unsafe fn softmax<S: Simd>(row: *mut f32, len: usize, scale: f32, total: f32) -> f32 {
    // SAFETY: whole vectors within the row, then what is left.
    unsafe {
        let (whole, rest) = (len / S::LANES * S::LANES, len % S::LANES);
        let mut max = S::splat(f32::NEG_INFINITY);
        for at in (0..whole).step_by(S::LANES) {
            max = S::max(max, S::load(row.add(at)));
        }
        let mut max = S::max_lane(max);
        for at in whole..len {
            max = max.max(*row.add(at));
        }
        let (factor, shift) = (S::splat(scale), S::splat(-max * scale));
        let mut sum = S::splat(0.0);
        for at in (0..whole).step_by(S::LANES) {
            let e = exp::<S>(S::fma(S::load(row.add(at)), factor, shift));
            sum = S::add(sum, e);
            S::store(row.add(at), e);
        }
        let mut sum = S::sum(sum);
        if rest > 0 {
            let e = exp::<S>(S::fma(S::load_n(row.add(whole), rest), factor, shift));
            S::store_n(row.add(whole), e, rest);
            sum += (whole..len).map(|at| *row.add(at)).sum::<f32>();
        }
        let factor = S::splat(total / sum);
        for at in (0..whole).step_by(S::LANES) {
            S::store(row.add(at), S::mul(S::load(row.add(at)), factor));
        }
        if rest > 0 {
            S::store_n(row.add(whole), S::mul(S::load_n(row.add(whole), rest), factor), rest);
        }
        max * scale + sum.ln()
    }
}

/// [`softmax`] of a row by itself.
#[derive(Clone, Copy, Debug)]
pub struct Softmax {
    pub row: *mut f32,
    pub len: usize,
    pub scale: f32,
    pub total: f32,
}

impl Softmax {
    /// Runs it.
    ///
    /// # Safety
    /// `row` must be good for `len` elements.
    pub unsafe fn run(self, isa: Isa) -> f32 {
        isa.without_bf16().run(self)
    }
}

impl Kernel for Softmax {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: passed on from the caller of `Softmax::run`.
        unsafe { softmax::<S>(self.row, self.len, self.scale, self.total) }
    }
}

#[cfg(test)]
mod tests;
