//! Every fast kernel against its reference.

use super::*;
use candle_core::{Device, Tensor, Var};
use proptest::prelude::*;

/// Deterministic values in about -1..1.
pub fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 * 2.0 - 1.0
        })
        .collect()
}

pub fn tensor(dims: (usize, usize), seed: u32) -> Tensor {
    Tensor::from_vec(values(dims.0 * dims.1, seed), dims, &Device::Cpu).unwrap()
}

/// Largest difference relative to the largest value.
pub fn error(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (a, b) = (flat(a), flat(b));
    let scale = b.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    a.iter().zip(&b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / scale
}

fn reference() -> Ops {
    Ops { mode: Mode::Reference, precision: Precision::F32 }
}

fn fast(precision: Precision) -> Ops {
    Ops { mode: Mode::Fast, precision }
}

/// Compares an operation's value and the gradients of all its inputs with the reference's.
fn compare(
    inputs: &[Tensor],
    ops: Ops,
    tolerance: f32,
    f: impl Fn(&Ops, &[Tensor]) -> candle_core::Result<Tensor>,
) {
    let run = |ops: Ops| {
        let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&ops, &tensors).unwrap();
        // A gradient that differs from element to element.
        let weights = values(y.elem_count(), 77);
        let weights = Tensor::from_vec(weights, y.shape(), &Device::Cpu).unwrap();
        let grads = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
        let grads: Vec<Tensor> = vars.iter().map(|v| grads.get(v).unwrap().clone()).collect();
        (y, grads)
    };
    let (expected, expected_grads) = run(reference());
    let (got, grads) = run(ops);
    assert!(error(&got, &expected) < tolerance, "value off by {}", error(&got, &expected));
    for (i, (got, expected)) in grads.iter().zip(&expected_grads).enumerate() {
        let off = error(got, expected);
        assert!(off < tolerance, "gradient {i} of shape {:?} off by {off}", got.dims());
    }
}

const BOTH: [(Precision, f32); 2] = [(Precision::F32, 1e-4), (Precision::Bf16, 2e-2)];

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..Default::default() })]

    #[test]
    fn linear_agrees(rows in 1usize..70, inner in 1usize..70, outer in 1usize..70) {
        let inputs = [tensor((rows, inner), 1), tensor((inner, outer), 2), tensor((1, outer), 3)];
        for (precision, tolerance) in BOTH {
            compare(&inputs, fast(precision), tolerance, |ops, t| {
                ops.linear(&t[0], &t[1], Some(&t[2].squeeze(0)?))
            });
            compare(&inputs[..2], fast(precision), tolerance, |ops, t| {
                ops.linear(&t[0], &t[1], None)
            });
        }
    }

    #[test]
    fn project_agrees(rows in 1usize..70, d in 1usize..70, vocab in 1usize..70) {
        let inputs = [tensor((rows, d), 4), tensor((vocab, d), 5)];
        for (precision, tolerance) in BOTH {
            compare(&inputs, fast(precision), tolerance, |ops, t| ops.project(&t[0], &t[1]));
        }
    }

    #[test]
    fn layer_norm_agrees(rows in 1usize..140, d in 2usize..70) {
        let shifted = (tensor((rows, d), 6) * 3.0).unwrap() + 1.5;
        let inputs = [shifted.unwrap(), tensor((1, d), 7), tensor((1, d), 8)];
        compare(&inputs, fast(Precision::F32), 1e-4, |ops, t| {
            ops.layer_norm(&t[0], &t[1].squeeze(0)?, &t[2].squeeze(0)?, 1e-2)
        });
    }

    #[test]
    fn pointwise_operations_agree(rows in 1usize..300, d in 1usize..70) {
        let inputs = [(tensor((rows, d), 9) * 6.0).unwrap(), tensor((rows, d), 10)];
        compare(&inputs[..1], fast(Precision::F32), 1e-5, |ops, t| ops.gelu(&t[0]));
        compare(&inputs, fast(Precision::F32), 1e-6, |ops, t| ops.add(&t[0], &t[1]));
        compare(&inputs[..1], fast(Precision::F32), 1e-6, |ops, t| ops.add(&t[0], &t[0]));
    }

    #[test]
    fn embed_agrees(rows in 1usize..70, vocab in 1usize..20, d in 1usize..40) {
        let ids: Vec<u32> = (0..rows).map(|i| (i * 7 % vocab) as u32).collect();
        let ids = Tensor::from_vec(ids, rows, &Device::Cpu).unwrap();
        compare(&[tensor((vocab, d), 11)], fast(Precision::F32), 1e-5, |ops, t| {
            ops.embed(&t[0], &ids)
        });
    }

    #[test]
    fn causal_attention_agrees(
        lengths in prop::collection::vec(0usize..75, 1..4), heads in 1usize..4, size in 1usize..36,
    ) {
        let mut starts = vec![0];
        lengths.iter().for_each(|len| starts.push(starts[starts.len() - 1] + len));
        let rows = starts[starts.len() - 1].max(1);
        *starts.last_mut().unwrap() = rows;
        let qkv = (tensor((rows, 3 * heads * size), 12) * 2.0).unwrap();
        for (precision, tolerance) in BOTH {
            compare(std::slice::from_ref(&qkv), fast(precision), tolerance, |ops, t| {
                ops.causal_attention(&t[0], &starts, heads)
            });
        }
    }

    #[test]
    fn cross_entropy_agrees(rows in 1usize..110, d in 1usize..40, vocab in 2usize..90) {
        let targets: Vec<u32> = (0..rows)
            .map(|i| if i % 3 == 1 { IGNORE } else { (i * 11 % vocab) as u32 })
            .collect();
        let dense: Vec<u32> = (0..rows).map(|i| (i * 5 % vocab) as u32).collect();
        let inputs = [tensor((rows, d), 13), (tensor((vocab, d), 14) * 3.0).unwrap()];
        for targets in [targets, dense] {
            for (precision, tolerance) in BOTH {
                compare(&inputs, fast(precision), tolerance, |ops, t| {
                    ops.cross_entropy(&t[0], &t[1], &targets)
                });
            }
        }
    }
}

#[test]
fn cross_entropy_of_more_rows_than_a_chunk_agrees() {
    let (rows, d, vocab) = (1300, 8, 40);
    let targets: Vec<u32> = (0..rows).map(|i| (i * 5 % vocab) as u32).collect();
    let inputs = [tensor((rows, d), 13), tensor((vocab, d), 14)];
    compare(&inputs, fast(Precision::F32), 1e-4, |ops, t| {
        ops.cross_entropy(&t[0], &t[1], &targets)
    });
}

#[test]
fn long_attention_agrees() {
    let qkv = tensor((300, 3 * 2 * 32), 15);
    for (precision, tolerance) in BOTH {
        compare(std::slice::from_ref(&qkv), fast(precision), tolerance, |ops, t| {
            ops.causal_attention(&t[0], &[0, 257, 300], 2)
        });
    }
}

/// A block with a residual connection, whose backward pass adds up several gradients.
#[test]
fn our_backward_pass_agrees_with_candles_on_a_whole_graph() {
    let (rows, d, vocab) = (21, 12, 30);
    let ids: Vec<u32> = (0..rows).map(|i| (i * 7 % vocab) as u32).collect();
    let ids = Tensor::from_vec(ids, rows as usize, &Device::Cpu).unwrap();
    let targets: Vec<u32> = (0..rows).map(|i| (i * 5 % vocab) as u32).collect();
    let inputs = [
        tensor((vocab as usize, d), 1),
        tensor((1, d), 2),
        tensor((1, d), 3),
        tensor((d, 3 * d), 4),
        tensor((d, d), 5),
    ];
    let run = |ops: Ops, ours: bool| {
        let vars: Vec<Var> = inputs
            .iter()
            .map(|t| {
                Var::from_tensor(&if t.dim(0).unwrap() == 1 {
                    t.squeeze(0).unwrap()
                } else {
                    t.clone()
                })
            })
            .collect::<candle_core::Result<_>>()
            .unwrap();
        let x = ops.embed(&vars[0], &ids).unwrap();
        let h = ops.layer_norm(&x, &vars[1], &vars[2], 1e-5).unwrap();
        let h = ops.linear(&h, &vars[3], None).unwrap();
        let h = ops.causal_attention(&h, &[0, 9, 21], 3).unwrap();
        let x = ops.add(&x, &ops.gelu(&ops.linear(&h, &vars[4], None).unwrap()).unwrap()).unwrap();
        let loss = ops.cross_entropy(&x, &vars[0], &targets).unwrap();
        assert_eq!(autograd::is_ours(&loss), ops.mode == Mode::Fast);
        let grads = if ours { ops.backward(&loss).unwrap() } else { loss.backward().unwrap() };
        vars.iter().map(|v| grads.get(v).unwrap().clone()).collect::<Vec<_>>()
    };
    let expected = run(reference(), false);
    for ours in [false, true] {
        for (got, expected) in run(fast(Precision::F32), ours).iter().zip(&expected) {
            assert!(error(got, expected) < 1e-4, "off by {}", error(got, expected));
        }
    }
}

#[test]
fn a_row_is_the_same_whatever_its_neighbours() {
    let (rows, d) = (150, 37);
    let x = (tensor((rows, d), 1) * 3.0).unwrap();
    let w = tensor((1, d), 2).squeeze(0).unwrap();
    let ops = fast(Precision::F32);
    let norm = |x: &Tensor| ops.layer_norm(x, &w, &w, 1e-5).unwrap();
    let gelu = |x: &Tensor| ops.gelu(x).unwrap();
    let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (from, count) in [(0, 1), (3, 2), (70, 80), (149, 1)] {
        let part = x.narrow(0, from, count).unwrap().contiguous().unwrap();
        for f in [&norm as &dyn Fn(&Tensor) -> Tensor, &gelu] {
            assert_eq!(bits(&f(&part)), bits(&f(&x).narrow(0, from, count).unwrap()));
        }
    }
}
