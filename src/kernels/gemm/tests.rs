//! Products of odd shapes against plain loops, on every instruction set.

use super::*;
use crate::kernels::memory::filled;
use crate::kernels::tests::values;
use half::bf16;
use proptest::prelude::*;

fn rounded(x: &[f32], precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => x.to_vec(),
        Precision::Bf16 => x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
    }
}

/// `a [m, k] · b [k, n] + bias`, in f64.
fn plain(a: &[f32], b: &[f32], (m, k, n): (usize, usize, usize), bias: &[f32]) -> Vec<f64> {
    let mut out = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            let dot: f64 = (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(b[x * n + j])).sum();
            out.push(dot + f64::from(bias[j]));
        }
    }
    out
}

fn transposed(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns * rows).map(|i| x[i % rows * columns + i / rows]).collect()
}

fn run(
    ab: (Operand<'_>, Operand<'_>),
    shape: (usize, usize, usize),
    bias: Option<&[f32]>,
    how: (Isa, Precision),
) -> Vec<f32> {
    // SAFETY: the product writes all of its output.
    unsafe { filled(shape.0 * shape.2, |out| product(ab, shape, bias, how, out)) }
}

fn check(shape: (usize, usize, usize), precision: Precision) -> Result<(), TestCaseError> {
    let (m, k, n) = shape;
    let (a, b, bias) = (values(m * k, 1), values(k * n, 2), values(n, 3));
    let expected = plain(&rounded(&a, precision), &rounded(&b, precision), shape, &bias);
    let (a_t, b_t) = (transposed(&a, m, k), transposed(&b, k, n));
    for isa in Isa::available() {
        for a in [Operand::Inner(&a), Operand::Outer(&a_t)] {
            for b in [Operand::Inner(&b_t), Operand::Outer(&b)] {
                let got = run((a, b), shape, Some(&bias), (isa, precision));
                for (got, expected) in got.iter().zip(&expected) {
                    let error = (f64::from(*got) - expected).abs();
                    prop_assert!(error < 2e-6 * (k as f64 + 1.0), "{isa:?} {shape:?} {error}");
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn odd_shapes_agree_with_plain_loops(m in 1usize..70, k in 1usize..90, n in 1usize..140) {
        check((m, k, n), Precision::F32)?;
        check((m, k, n), Precision::Bf16)?;
    }
}

#[test]
fn shapes_beyond_one_block_agree_with_plain_loops() {
    for shape in [(193, 300, 70), (50, 261, 257), (100, 520, 700), (800, 5, 16)] {
        check(shape, Precision::F32).unwrap();
        check(shape, Precision::Bf16).unwrap();
    }
}

#[test]
fn a_row_is_the_same_whatever_its_neighbours() {
    let (k, n) = (517, 600);
    let (a, b) = (values(200 * k, 4), values(k * n, 5));
    for isa in Isa::available() {
        for precision in [Precision::F32, Precision::Bf16] {
            let panels = Panels::pack(Operand::Outer(&b), k, n, isa, precision);
            let rows = |range: Range<usize>| {
                let a = Operand::Inner(&a[range.start * k..range.end * k]);
                // SAFETY: the product writes all of its output.
                unsafe { filled(range.len() * n, |out| panels.multiply(a, range.len(), None, out)) }
            };
            let all = rows(0..200);
            for range in [0..1, 3..5, 7..20, 100..149, 1..200] {
                assert!(rows(range.clone()) == all[range.start * n..range.end * n], "{isa:?}");
            }
        }
    }
}

#[test]
fn columns_come_back_as_they_were_packed() {
    for (k, columns) in [(1, 1), (7, 70), (64, 130), (33, 16)] {
        let table = values(columns * k, 4);
        for isa in Isa::available() {
            for precision in [Precision::F32, Precision::Bf16] {
                let panels = Panels::pack(Operand::Inner(&table), k, columns, isa, precision);
                for (column, row) in table.chunks_exact(k).enumerate() {
                    let column: Vec<f32> = panels.column(column).collect();
                    assert_eq!(column, rounded(row, precision), "{k} by {columns}, {isa:?}");
                }
            }
        }
    }
}
