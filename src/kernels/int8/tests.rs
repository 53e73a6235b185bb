//! Products in 8 bits against the same roundings in plain loops, on every instruction set.

use super::*;
use crate::kernels::memory::filled;
use crate::kernels::tests::values;
use proptest::prelude::*;

/// `a · b + bias` of what rounding leaves of both, in f64. `b` is `[k, n]`.
fn plain(a: &[f32], b: &[f32], (m, k, n): (usize, usize, usize), bias: &[f32]) -> Vec<f64> {
    let scale = |x: &mut dyn Iterator<Item = f32>| x.fold(0f32, |m, x| m.max(x.abs())) / 127.0;
    let rounded =
        |x: f32, scale: f32| if scale > 0.0 { f64::from((x / scale).round()) } else { 0.0 };
    let columns: Vec<f32> = (0..n).map(|j| scale(&mut (0..k).map(|i| b[i * n + j]))).collect();
    let mut out = Vec::with_capacity(m * n);
    for row in a.chunks_exact(k) {
        let own = scale(&mut row.iter().copied());
        for (j, &column) in columns.iter().enumerate() {
            let products = row.iter().enumerate();
            let sum: f64 =
                products.map(|(i, &x)| rounded(x, own) * rounded(b[i * n + j], column)).sum();
            out.push(f64::from(bias[j]) + sum * f64::from(own) * f64::from(column));
        }
    }
    out
}

fn product(packed: &Int8Matrix, a: &[f32], m: usize, bias: Option<&[f32]>) -> Vec<f32> {
    // SAFETY: the product writes all of its output.
    unsafe { filled(m * packed.columns, |out| packed.multiply(a, m, bias, out)) }
}

fn transposed(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns * rows).map(|i| x[i % rows * columns + i / rows]).collect()
}

fn check(shape: (usize, usize, usize)) {
    let (m, k, n) = shape;
    let (a, b, bias) = (values(m * k, 1), values(k * n, 2), values(n, 3));
    let expected = plain(&a, &b, shape, &bias);
    let b_t = transposed(&b, k, n);
    for b in [Operand::Outer(&b), Operand::Inner(&b_t)] {
        let packed = Int8Matrix::pack(b, k, n);
        assert_eq!(packed.bytes(), Int8Matrix::size(k, n).unwrap());
        for (got, expected) in product(&packed, &a, m, Some(&bias)).iter().zip(&expected) {
            // Half a step of one activation may fall to either side.
            let error = (f64::from(*got) - expected).abs();
            assert!(error < 1e-3 * (k as f64).sqrt(), "{shape:?}: {got} for {expected}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn odd_shapes_agree_with_plain_loops(m in 1usize..20, k in 1usize..90, n in 1usize..200) {
        check((m, k, n));
    }
}

#[test]
fn large_shapes_agree_with_plain_loops() {
    for shape in [(1, 3072, 768), (200, 300, 70), (7, 768, 1000)] {
        check(shape);
    }
}

#[test]
fn every_instruction_set_gives_the_same_sums() {
    let (m, k, n) = (13, 259, 64);
    let packed = Int8Matrix::pack(Operand::Outer(&values(k * n, 5)), k, n);
    let a = values(m * k, 6);
    let outputs = Level::available().into_iter().map(|level| {
        let mut words = vec![0u32; m * 65];
        let scales: Vec<f32> = (words.chunks_exact_mut(65).zip(a.chunks_exact(k)))
            .map(|(words, line)| level.round(line, words))
            .collect();
        let mut out = vec![0f32; m * n];
        let strip = Strip {
            next: None,
            a: words.as_ptr(),
            lda: 65,
            row_scales: scales.as_ptr(),
            rows: m,
            b: packed.quads.as_ptr(),
            k: 65,
            width: n,
            scales: packed.scales.as_ptr(),
            offsets: packed.offsets.as_ptr(),
            bias: None,
            c: out.as_mut_ptr(),
            ldc: n,
            columns: n,
        };
        // SAFETY: the buffers are as large as the strip says.
        unsafe { strip.run(level) };
        out
    });
    let outputs: Vec<Vec<f32>> = outputs.collect();
    for other in &outputs[1..] {
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * a.abs().max(1.0);
        assert!(outputs[0].iter().zip(other).all(close));
    }
}

#[test]
fn a_row_is_the_same_whatever_its_neighbours() {
    let (k, n) = (517, 600);
    let packed = Int8Matrix::pack(Operand::Outer(&values(k * n, 5)), k, n);
    let a = values(400 * k, 4);
    let all = product(&packed, &a, 400, None);
    for range in [0..1, 3..5, 7..20, 100..149, 1..400] {
        let own = product(&packed, &a[range.start * k..range.end * k], range.len(), None);
        assert!(own == all[range.start * n..range.end * n]);
    }
}

#[test]
fn columns_come_back_as_they_were_rounded() {
    for (k, columns) in [(1, 1), (7, 70), (64, 130)] {
        let table = values(columns * k, 4);
        let packed = Int8Matrix::pack(Operand::Inner(&table), k, columns);
        for (column, line) in table.chunks_exact(k).enumerate() {
            let step = line.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
            let back: Vec<f32> = packed.column(column).collect();
            assert_eq!(back.len(), k);
            assert!(back.iter().zip(line).all(|(a, b)| (a - b).abs() <= step * 0.501));
        }
    }
}

#[test]
fn a_row_that_is_not_finite_stays_so_and_spoils_no_other() {
    let packed = Int8Matrix::pack(Operand::Outer(&values(8 * 20, 1)), 8, 20);
    let mut a = values(3 * 8, 2);
    a[9] = f32::INFINITY;
    a[17] = 0.0;
    let out = product(&packed, &a, 3, None);
    assert!(out[..20].iter().chain(&out[40..]).all(|x| x.is_finite()));
    assert!(out[20..40].iter().all(|x| x.is_nan()));
}
