//! Each instruction set against plain arithmetic.

use super::*;
use half::bf16;

/// Applies a function of vectors to the 16 numbers of each input.
struct Apply<'a, const N: usize> {
    op: Op,
    inputs: [&'a [f32]; N],
}

#[derive(Clone, Copy)]
enum Op {
    Exp,
    Round,
    Sum,
    MaxLane,
    Pairs,
    PairsOf,
    Dot,
    Transpose,
}

impl<const N: usize> Kernel for Apply<'_, N> {
    type Output = Vec<f32>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Vec<f32> {
        let mut out = vec![0.0; S::LANES * S::LANES];
        // SAFETY: inputs and output hold at least two vectors.
        unsafe {
            let [a, b, c] = std::array::from_fn(|i| S::load(self.inputs[i % N].as_ptr()));
            let result = match self.op {
                Op::Exp => exp::<S>(a),
                Op::Round => S::round(a),
                Op::Sum => S::splat(S::sum(a)),
                Op::MaxLane => S::splat(S::max_lane(a)),
                Op::Pairs => S::pairs(a, b),
                Op::PairsOf => S::pairs_of(self.inputs[0].as_ptr()),
                Op::Dot => S::dot_pairs(a, b, c),
                Op::Transpose => {
                    let (src, dst) = (self.inputs[0].as_ptr(), out.as_mut_ptr());
                    S::transpose(src.cast(), S::LANES, dst.cast(), S::LANES);
                    return out;
                }
            };
            S::store(out.as_mut_ptr(), result);
        }
        out.truncate(S::LANES);
        out
    }
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect()
}

fn pair(even: f32, odd: f32) -> u32 {
    let bits = |x| u32::from(bf16::from_f32(x).to_bits());
    bits(odd) << 16 | bits(even)
}

#[test]
fn arithmetic_agrees_on_every_instruction_set() {
    let x = numbers(32);
    for isa in Isa::available() {
        let n = isa.lanes();
        for (got, x) in isa.run(Apply { op: Op::Exp, inputs: [&x] }).iter().zip(&x) {
            assert!((f64::from(*got) / f64::from(*x).exp() - 1.0).abs() < 3e-7, "{isa:?} {x}");
        }
        for (got, x) in isa.run(Apply { op: Op::Round, inputs: [&x] }).iter().zip(&x) {
            assert_eq!(*got, x.round_ties_even(), "{isa:?}");
        }
        let sum: f32 = x[..n].iter().sum();
        assert!((isa.run(Apply { op: Op::Sum, inputs: [&x] })[0] - sum).abs() < 1e-4, "{isa:?}");
        let max = x[..n].iter().fold(f32::MIN, |m, x| m.max(*x));
        assert_eq!(isa.run(Apply { op: Op::MaxLane, inputs: [&x] })[0], max, "{isa:?}");
    }
}

#[test]
fn bf16_pairs_agree_on_every_instruction_set() {
    let mut x = numbers(32);
    // Ties, overflow to infinity, NaN with a low payload only.
    x[..4].copy_from_slice(&[1.003_906_3, 1.011_718_8, f32::MAX, f32::from_bits(0x7f80_0001)]);
    let y: Vec<f32> = x.iter().rev().copied().collect();
    for isa in Isa::available() {
        let words = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let n = isa.lanes();
        let expected: Vec<u32> = (0..n).map(|i| pair(x[i], y[i])).collect();
        assert_eq!(words(isa.run(Apply { op: Op::Pairs, inputs: [&x, &y] })), expected, "{isa:?}");
        let expected: Vec<u32> = (0..n).map(|i| pair(x[2 * i], x[2 * i + 1])).collect();
        assert_eq!(words(isa.run(Apply { op: Op::PairsOf, inputs: [&x] })), expected, "{isa:?}");
    }
}

#[test]
fn dot_products_and_transposition_agree_on_every_instruction_set() {
    let acc = numbers(32);
    let a: Vec<f32> = (0..32).map(|i| f32::from_bits(pair(i as f32, -0.5))).collect();
    let b: Vec<f32> = (0..32).map(|i| f32::from_bits(pair(0.25, i as f32))).collect();
    let square = numbers(256);
    for isa in Isa::available() {
        for (i, got) in isa.run(Apply { op: Op::Dot, inputs: [&acc, &a, &b] }).iter().enumerate() {
            let expected = acc[i] + i as f32 * 0.25 - 0.5 * i as f32;
            assert!((got - expected).abs() < 1e-5, "{isa:?}");
        }
        let n = isa.lanes();
        let got = isa.run(Apply { op: Op::Transpose, inputs: [&square] });
        for (at, value) in got.iter().enumerate() {
            assert_eq!(*value, square[at % n * n + at / n], "{isa:?}");
        }
    }
}
