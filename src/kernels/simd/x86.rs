//! AVX2 with FMA: eight lanes. AVX-512: sixteen.

use super::{Kernel, Simd};
use std::arch::x86_64::*;

/// # Safety
/// The machine must have these features.
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
pub unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the features are enabled here, and the caller says that the machine has them.
    unsafe { kernel.run::<Avx2>() }
}

/// # Safety
/// The machine must have these features.
#[inline(never)]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: as above.
    unsafe { kernel.run::<Avx512<false>>() }
}

/// # Safety
/// The machine must have these features.
#[inline(never)]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub unsafe fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: as above.
    unsafe { kernel.run::<Avx512<true>>() }
}

#[derive(Clone, Copy)]
pub struct Avx2;

/// Bits of bf16, rounded to nearest even, in the high halves of the lanes (low halves are rubbish).
#[inline(always)]
unsafe fn round_bf16_avx2(x: __m256) -> __m256i {
    // SAFETY: registers only; the callers are compiled with the features.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        // Rounding could carry a NaN over to infinity: NaN stays as it is, made quiet.
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        _mm256_blendv_epi8(rounded, quiet, nan)
    }
}

#[inline(always)]
unsafe fn lane_mask_avx2(n: usize) -> __m256i {
    const MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: n is at most 8, so eight entries from 8 - n on are inside.
    unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(8 - n).cast()) }
}

// SAFETY (all blocks): the trait's condition, that the caller's machine has the features and that
// pointers are good for the elements named, is the intrinsics' condition.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    const LANES: usize = 8;
    type V = __m256;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn splat_word(x: u32) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_set1_epi32(x as i32)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_n(p: *const f32, n: usize) -> __m256 {
        unsafe { _mm256_maskload_ps(p, lane_mask_avx2(n)) }
    }
    #[inline(always)]
    unsafe fn store_n(p: *mut f32, v: __m256, n: usize) {
        unsafe { _mm256_maskstore_ps(p, lane_mask_avx2(n), v) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sqrt(a: __m256) -> __m256 {
        unsafe { _mm256_sqrt_ps(a) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn scale2(a: __m256, n: __m256) -> __m256 {
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
    #[inline(always)]
    unsafe fn sum(a: __m256) -> f32 {
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn max_lane(a: __m256) -> f32 {
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn pairs(even: __m256, odd: __m256) -> __m256 {
        unsafe {
            let low = _mm256_srli_epi32::<16>(round_bf16_avx2(even));
            let words = _mm256_blend_epi16::<0b1010_1010>(low, round_bf16_avx2(odd));
            _mm256_castsi256_ps(words)
        }
    }
    #[inline(always)]
    unsafe fn pairs_of(p: *const f32) -> __m256 {
        unsafe {
            let (a, b) = (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)));
            let even = _mm256_shuffle_ps::<0b10_00_10_00>(a, b);
            let odd = _mm256_shuffle_ps::<0b11_01_11_01>(a, b);
            let words = _mm256_castps_pd(Self::pairs(even, odd));
            _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(words))
        }
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: __m256, a: __m256, b: __m256) -> __m256 {
        unsafe {
            let high = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000u32 as i32));
            let low =
                |x: __m256| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(x)));
            let acc = _mm256_fmadd_ps(low(a), low(b), acc);
            _mm256_fmadd_ps(_mm256_and_ps(a, high), _mm256_and_ps(b, high), acc)
        }
    }
    #[inline(always)]
    unsafe fn low_halves(a: __m256) -> __m256 {
        unsafe { _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff))) }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const u32, stride: usize, dst: *mut u32, dst_stride: usize) {
        for i in 0..8 {
            for j in 0..8 {
                unsafe { *dst.add(j * dst_stride + i) = *src.add(i * stride + j) };
            }
        }
    }
}

/// With BF16 dot products or without.
#[derive(Clone, Copy)]
pub struct Avx512<const BF16: bool>;

#[inline(always)]
fn lane_mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

#[inline(always)]
unsafe fn round_bf16(x: __m512) -> __m512i {
    // SAFETY: registers only; the callers are compiled with the features.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
    }
}

// SAFETY (all blocks): as for AVX2 above.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const BF16: bool> Simd for Avx512<BF16> {
    const LANES: usize = 16;
    type V = __m512;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn splat_word(x: u32) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_set1_epi32(x as i32)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_n(p: *const f32, n: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(lane_mask(n), p) }
    }
    #[inline(always)]
    unsafe fn store_n(p: *mut f32, v: __m512, n: usize) {
        unsafe { _mm512_mask_storeu_ps(p, lane_mask(n), v) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sqrt(a: __m512) -> __m512 {
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn scale2(a: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        unsafe { Avx2::sum(_mm256_add_ps(low_half(a), high_half(a))) }
    }
    #[inline(always)]
    unsafe fn max_lane(a: __m512) -> f32 {
        unsafe { Avx2::max_lane(_mm256_max_ps(low_half(a), high_half(a))) }
    }
    #[inline(always)]
    unsafe fn pairs(even: __m512, odd: __m512) -> __m512 {
        unsafe {
            if BF16 {
                let halves = bits(_mm512_cvtne2ps_pbh(odd, even));
                return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave(), halves));
            }
            let low = _mm512_srli_epi32::<16>(round_bf16(even));
            let words = _mm512_mask_blend_epi16(0xaaaa_aaaa, low, round_bf16(odd));
            _mm512_castsi512_ps(words)
        }
    }
    #[inline(always)]
    unsafe fn pairs_of(p: *const f32) -> __m512 {
        unsafe {
            let (a, b) = (_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(16)));
            if BF16 {
                return _mm512_castsi512_ps(bits(_mm512_cvtne2ps_pbh(b, a)));
            }
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            Self::pairs(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b))
        }
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: __m512, a: __m512, b: __m512) -> __m512 {
        unsafe {
            if BF16 {
                let words = |x| std::mem::transmute::<__m512, __m512bh>(x);
                return _mm512_dpbf16_ps(acc, words(a), words(b));
            }
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            let low = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(x)));
            let top = |x| _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), high));
            _mm512_fmadd_ps(top(a), top(b), _mm512_fmadd_ps(low(a), low(b), acc))
        }
    }
    #[inline(always)]
    unsafe fn low_halves(a: __m512) -> __m512 {
        unsafe {
            let low = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0xffff));
            _mm512_castsi512_ps(low)
        }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const u32, stride: usize, dst: *mut u32, dst_stride: usize) {
        unsafe {
            let row = |i: usize| _mm512_loadu_ps(src.add(i * stride).cast());
            // Pairs of rows, then fours, interleave within the 128-bit quarters ...
            let mut quarters = [_mm512_setzero_ps(); 16];
            for i in 0..4 {
                let (a, b, c, d) = (row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3));
                let (ab0, ab1) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (cd0, cd1) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                quarters[4 * i] = _mm512_shuffle_ps::<0b01_00_01_00>(ab0, cd0);
                quarters[4 * i + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(ab0, cd0);
                quarters[4 * i + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(ab1, cd1);
                quarters[4 * i + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(ab1, cd1);
            }
            // ... then the quarters themselves are transposed.
            for j in 0..4 {
                let [a, b, c, d] =
                    [quarters[j], quarters[4 + j], quarters[8 + j], quarters[12 + j]];
                let ab0 = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
                let ab1 = _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b);
                let cd0 = _mm512_shuffle_f32x4::<0b01_00_01_00>(c, d);
                let cd1 = _mm512_shuffle_f32x4::<0b11_10_11_10>(c, d);
                let columns = [
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(ab0, cd0),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(ab0, cd0),
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(ab1, cd1),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(ab1, cd1),
                ];
                for (quarter, column) in columns.into_iter().enumerate() {
                    _mm512_storeu_ps(dst.add((4 * quarter + j) * dst_stride).cast(), column);
                }
            }
        }
    }
}

#[inline(always)]
fn bits(x: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes without further meaning.
    unsafe { std::mem::transmute(x) }
}

/// The order of 16-bit elements that turns `low half, high half` into pairs.
#[inline(always)]
unsafe fn interleave() -> __m512i {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: the table is 64 bytes long.
    unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) }
}

#[inline(always)]
unsafe fn low_half(a: __m512) -> __m256 {
    // SAFETY: registers only; the callers are compiled with the features.
    unsafe { _mm512_castps512_ps256(a) }
}

#[inline(always)]
unsafe fn high_half(a: __m512) -> __m256 {
    // SAFETY: as above.
    unsafe { _mm512_extractf32x8_ps::<1>(a) }
}
