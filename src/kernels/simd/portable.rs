//! Eight lanes in plain Rust, for the compiler to vectorise as the target allows.

use super::Simd;
use half::bf16;

#[derive(Clone, Copy)]
pub struct Portable;

const LANES: usize = 8;
type V = [f32; LANES];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

fn halves(word: f32) -> (f32, f32) {
    let bits = word.to_bits();
    (f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000))
}

fn pair(even: f32, odd: f32) -> f32 {
    let bits = |x| u32::from(bf16::from_f32(x).to_bits());
    f32::from_bits(bits(odd) << 16 | bits(even))
}

// The functions are unsafe only because the trait's are; those with pointers pass its condition on.
impl Simd for Portable {
    const LANES: usize = LANES;
    type V = V;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn splat_word(x: u32) -> V {
        [f32::from_bits(x); LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        // SAFETY: the caller has LANES elements there.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        // SAFETY: the caller has LANES elements there.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_n(p: *const f32, n: usize) -> V {
        let mut v = [0.0; LANES];
        // SAFETY: the caller has n elements there, and n is at most LANES.
        unsafe { std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), n) };
        v
    }
    #[inline(always)]
    unsafe fn store_n(p: *mut f32, v: V, n: usize) {
        // SAFETY: the caller has n elements there, and n is at most LANES.
        unsafe { std::ptr::copy_nonoverlapping(v.as_ptr(), p, n) };
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn sqrt(a: V) -> V {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        // Two roundings: without hardware for one, `mul_add` is a library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(a: V) -> V {
        // Adding and taking away 1.5 * 2^23 leaves no room for a fraction.
        a.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn scale2(a: V, n: V) -> V {
        map2(a, n, |a, n| a * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(a: V) -> f32 {
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    unsafe fn max_lane(a: V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn pairs(even: V, odd: V) -> V {
        map2(even, odd, pair)
    }
    #[inline(always)]
    unsafe fn pairs_of(p: *const f32) -> V {
        // SAFETY: the caller has 2 * LANES elements there.
        let x = unsafe { p.cast::<[f32; 2 * LANES]>().read_unaligned() };
        std::array::from_fn(|i| pair(x[2 * i], x[2 * i + 1]))
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: V, a: V, b: V) -> V {
        std::array::from_fn(|i| {
            let ((a0, a1), (b0, b1)) = (halves(a[i]), halves(b[i]));
            acc[i] + a0 * b0 + a1 * b1
        })
    }
    #[inline(always)]
    unsafe fn low_halves(a: V) -> V {
        a.map(|word| f32::from_bits(word.to_bits() & 0xffff))
    }
    #[inline(always)]
    unsafe fn transpose(src: *const u32, stride: usize, dst: *mut u32, dst_stride: usize) {
        for i in 0..LANES {
            for j in 0..LANES {
                // SAFETY: the caller has LANES rows of LANES words in both places.
                unsafe { *dst.add(j * dst_stride + i) = *src.add(i * stride + j) };
            }
        }
    }
}
