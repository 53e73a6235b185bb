//! AVX2, AVX2 with VNNI, AVX-512 with VNNI.

use super::{Lanes, Strip, round};
use std::arch::x86_64::*;

/// # Safety
/// The machine must have these features.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn round_avx2(line: &[f32], bytes: &mut [u8]) -> f32 {
    round(line, bytes)
}

/// # Safety
/// The machine must have these features.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
pub unsafe fn round_avx512(line: &[f32], bytes: &mut [u8]) -> f32 {
    round(line, bytes)
}

/// # Safety
/// The machine must have these features, and the strip be as it says.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn strip_avx2(strip: Strip) {
    // SAFETY: passed on from the caller.
    unsafe { strip.columns_of::<Avx2<false>, 2>() }
}

/// # Safety
/// The machine must have these features, and the strip be as it says.
#[target_feature(enable = "avx2,fma,avxvnni")]
pub unsafe fn strip_vnni(strip: Strip) {
    // SAFETY: passed on from the caller.
    unsafe { strip.columns_of::<Avx2<true>, 2>() }
}

/// # Safety
/// The machine must have these features, and the strip be as it says.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vnni")]
pub unsafe fn strip_avx512(strip: Strip) {
    // SAFETY: passed on from the caller.
    unsafe {
        match strip.width {
            64 => strip.columns_of::<Avx512, 4>(),
            48 => strip.columns_of::<Avx512, 3>(),
            32 => strip.columns_of::<Avx512, 2>(),
            _ => strip.columns_of::<Avx512, 1>(),
        }
    }
}

/// With VNNI or without.
#[derive(Clone, Copy)]
struct Avx2<const VNNI: bool>;

// SAFETY (all blocks): the trait's condition, that the caller's machine has the features and that
// pointers are good for the elements named, is the intrinsics' condition.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    const LANES: usize = 8;
    type V = __m256i;

    #[inline(always)]
    unsafe fn load(p: *const i32) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(word: u32) -> __m256i {
        unsafe { _mm256_set1_epi32(word as i32) }
    }
    #[inline(always)]
    unsafe fn dot(acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe {
            if VNNI {
                return _mm256_dpbusd_avx_epi32(acc, a, b);
            }
            // Products of bytes added in 16 bits could overflow: even and odd ones are widened first.
            let even = _mm256_and_si256(a, _mm256_set1_epi16(0xff));
            let odd = _mm256_srli_epi16::<8>(a);
            let (b_even, b_odd) = (_mm256_slli_epi16::<8>(b), _mm256_srai_epi16::<8>(b));
            let b_even = _mm256_srai_epi16::<8>(b_even);
            let sums =
                _mm256_add_epi32(_mm256_madd_epi16(even, b_even), _mm256_madd_epi16(odd, b_odd));
            _mm256_add_epi32(acc, sums)
        }
    }
    #[inline(always)]
    unsafe fn finish(
        sums: __m256i,
        row_scale: f32,
        scales: *const f32,
        bias: Option<*const f32>,
        out: *mut f32,
        n: usize,
    ) {
        const MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        unsafe {
            let mask = _mm256_loadu_si256(MASKS.as_ptr().add(8 - n).cast());
            let scale = _mm256_mul_ps(_mm256_set1_ps(row_scale), _mm256_loadu_ps(scales));
            let start = match bias {
                Some(bias) => _mm256_maskload_ps(bias, mask),
                None => _mm256_setzero_ps(),
            };
            let y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, start);
            _mm256_maskstore_ps(out, mask, y);
        }
    }
}

#[derive(Clone, Copy)]
struct Avx512;

// SAFETY (all blocks): as above.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx512 {
    const LANES: usize = 16;
    type V = __m512i;

    #[inline(always)]
    unsafe fn load(p: *const i32) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(word: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(word as i32) }
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, a, b) }
    }
    #[inline(always)]
    unsafe fn finish(
        sums: __m512i,
        row_scale: f32,
        scales: *const f32,
        bias: Option<*const f32>,
        out: *mut f32,
        n: usize,
    ) {
        unsafe {
            let mask = ((1u32 << n) - 1) as __mmask16;
            let scale = _mm512_mul_ps(_mm512_set1_ps(row_scale), _mm512_loadu_ps(scales));
            let start = match bias {
                Some(bias) => _mm512_maskz_loadu_ps(mask, bias),
                None => _mm512_setzero_ps(),
            };
            let y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, start);
            _mm512_mask_storeu_ps(out, mask, y);
        }
    }
}
