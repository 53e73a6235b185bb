//! Groups of odd shapes against plain loops, and rows that do not notice one another.

use super::*;
use crate::kernels::Precision;
use crate::kernels::tests::{error, tensor, values};
use proptest::prelude::*;

fn packed(w: &Tensor, precision: Precision) -> PackedMatrix {
    PackedMatrix::from_in_out(w, precision).unwrap()
}

/// Groups of these sizes, one after the other.
fn ranges(sizes: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |&size: &usize| {
        end += size;
        end - size..end
    };
    sizes.iter().map(next).collect()
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
}

fn rows_of(t: &Tensor, rows: &Range<usize>) -> Tensor {
    t.narrow(0, rows.start, rows.len()).unwrap().contiguous().unwrap()
}

const BOTH: [(Precision, f32); 2] = [(Precision::F32, 1e-5), (Precision::Bf16, 2e-2)];

/// One linear layer per group.
struct Layers {
    rows: Vec<Range<usize>>,
    w: Vec<Tensor>,
    bias: Vec<Option<Tensor>>,
}

impl Layers {
    fn new(sizes: &[usize], inner: usize, columns: usize) -> Self {
        let seed = |i: usize| 10 + i as u32;
        let bias = |i| tensor((1, columns), 50 + seed(i)).squeeze(0).unwrap();
        Self {
            rows: ranges(sizes),
            w: (0..sizes.len()).map(|i| tensor((inner, columns), seed(i))).collect(),
            bias: (0..sizes.len()).map(|i| (i % 3 != 1).then(|| bias(i))).collect(),
        }
    }

    fn multiply(&self, x: &Tensor, precision: Precision) -> Result<Tensor> {
        let w: Vec<_> = self.w.iter().map(|w| packed(w, precision)).collect();
        let groups: Vec<_> = (0..w.len())
            .map(|i| Group { rows: self.rows[i].clone(), w: &w[i], bias: self.bias[i].as_ref() })
            .collect();
        grouped_matmul(x, &groups, self.w[0].dim(1)?)
    }
}

fn check_matmul(sizes: &[usize], inner: usize, columns: usize) {
    let layers = Layers::new(sizes, inner, columns);
    let x = tensor((sizes.iter().sum(), inner), 1);
    for (precision, tolerance) in BOTH {
        let got = layers.multiply(&x, precision).unwrap();
        for (i, rows) in layers.rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            let (got, x) = (rows_of(&got, rows), rows_of(&x, rows));
            let alone =
                packed(&layers.w[i], precision).matmul(&x, layers.bias[i].as_ref()).unwrap();
            assert_eq!(bits(&got), bits(&alone), "group {i} of {sizes:?}");
            let mut plain = x.matmul(&layers.w[i]).unwrap();
            if let Some(bias) = &layers.bias[i] {
                plain = plain.broadcast_add(bias).unwrap();
            }
            assert!(error(&got, &plain) < tolerance * inner as f32, "group {i} of {sizes:?}");
        }
    }
}

/// A low-rank product: its rows, rank and weight.
type Spec = (Range<usize>, usize, f32);

/// Factors of some products, drawn by their place in the list.
fn factors(specs: &[Spec], inner: usize, columns: usize) -> Vec<(Tensor, Tensor)> {
    let draw = |(i, (_, rank, _)): (usize, &Spec)| {
        (tensor((inner, *rank), 20 + i as u32), tensor((*rank, columns), 70 + i as u32))
    };
    specs.iter().enumerate().map(draw).collect()
}

fn add(y: &Tensor, x: &Tensor, specs: &[Spec], ab: &[(Tensor, Tensor)], p: Precision) -> Tensor {
    let ab: Vec<_> = ab.iter().map(|(a, b)| (packed(a, p), packed(b, p))).collect();
    let groups: Vec<_> = specs
        .iter()
        .zip(&ab)
        .map(|((rows, _, weight), (a, b))| LowRankGroup {
            rows: rows.clone(),
            a,
            b,
            weight: *weight,
        })
        .collect();
    low_rank_add(y.copy().unwrap(), x, &groups).unwrap()
}

/// The same in plain f64 loops.
fn plain(y: &Tensor, x: &Tensor, specs: &[Spec], ab: &[(Tensor, Tensor)]) -> Tensor {
    let wide = |t: &Tensor| t.to_dtype(candle_core::DType::F64).unwrap();
    let mut sums = wide(y).to_vec2::<f64>().unwrap();
    for ((rows, _, weight), (a, b)) in specs.iter().zip(ab).filter(|((r, ..), _)| !r.is_empty()) {
        let product = wide(&rows_of(x, rows)).matmul(&wide(a)).unwrap().matmul(&wide(b)).unwrap();
        for (y, product) in sums[rows.clone()].iter_mut().zip(product.to_vec2::<f64>().unwrap()) {
            y.iter_mut().zip(product).for_each(|(y, p)| *y += f64::from(*weight) * p);
        }
    }
    let sums: Vec<f32> = sums.concat().iter().map(|&x| x as f32).collect();
    Tensor::from_vec(sums, y.shape(), &Device::Cpu).unwrap()
}

fn check_low_rank(specs: &[Spec], rows: usize, inner: usize, columns: usize) {
    let (y, x) = (tensor((rows, columns), 2), tensor((rows, inner), 3));
    let ab = factors(specs, inner, columns);
    let expected = plain(&y, &x, specs, &ab);
    for (precision, tolerance) in BOTH {
        let got = add(&y, &x, specs, &ab, precision);
        assert!(error(&got, &expected) < tolerance * 2.0, "{specs:?} {}", error(&got, &expected));
        for row in [0, rows / 2, rows - 1] {
            let own = row..row + 1;
            let here = specs
                .iter()
                .map(|(r, rank, w)| (if r.contains(&row) { 0..1 } else { 0..0 }, *rank, *w));
            let here: Vec<Spec> = here.collect();
            let alone = add(&rows_of(&y, &own), &rows_of(&x, &own), &here, &ab, precision);
            assert_eq!(bits(&alone), bits(&rows_of(&got, &own)), "row {row} of {specs:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn groups_agree_with_one_product_each(
        sizes in prop::collection::vec(0usize..12, 1..9), inner in 1usize..90, columns in 1usize..200,
    ) {
        check_matmul(&sizes, inner, columns);
    }

    #[test]
    fn low_rank_products_agree_with_plain_loops(
        specs in prop::collection::vec((0usize..40, 0usize..40, 1usize..40, -2f32..2.0), 0..6),
        inner in 1usize..90, columns in 1usize..200,
    ) {
        let specs: Vec<Spec> =
            specs.iter().map(|&(a, b, rank, weight)| (a.min(b)..a.max(b), rank, weight)).collect();
        check_low_rank(&specs, 40, inner, columns);
    }
}

#[test]
fn groups_of_many_tasks_agree() {
    check_matmul(&[3, 1, 0, 9, 3], 256, 1024);
    check_matmul(&[30, 1, 40], 64, 100);
    check_matmul(&[90, 3, 500, 207], 64, 100);
    check_low_rank(&[(0..7, 16, 1.0), (7..16, 8, 0.5), (3..9, 256, 1.0)], 16, 256, 1024);
    check_low_rank(&[(0..150, 16, 1.0), (90..260, 33, -1.5)], 300, 130, 300);
}

#[test]
fn a_row_is_the_same_whatever_the_groups() {
    let (inner, columns) = (300, 530);
    let w = packed(&tensor((inner, columns), 1), Precision::F32);
    let x = tensor((300, inner), 2);
    let all = w.matmul(&x, None).unwrap();
    for sizes in [&[300][..], &[1, 16, 100, 3, 180], &[75; 4]] {
        let groups: Vec<_> =
            ranges(sizes).into_iter().map(|rows| Group { rows, w: &w, bias: None }).collect();
        assert_eq!(bits(&grouped_matmul(&x, &groups, columns).unwrap()), bits(&all));
    }
}

#[test]
fn no_rows_and_no_groups_are_nothing() {
    let (y, x) = (tensor((3, 5), 1), tensor((3, 4), 2));
    assert_eq!(bits(&low_rank_add(y.copy().unwrap(), &x, &[]).unwrap()), bits(&y));
    let empty = Tensor::from_vec(Vec::<f32>::new(), (0, 4), &Device::Cpu).unwrap();
    assert_eq!(grouped_matmul(&empty, &[], 5).unwrap().dims(), [0, 5]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (w, narrow) = (packed(&tensor((4, 5), 1), Precision::F32), tensor((4, 5), 1));
    let narrow = packed(&narrow, Precision::Bf16);
    let (x, bias) = (tensor((6, 4), 2), tensor((1, 6), 3));
    let group = |rows| Group { rows, w: &w, bias: None };
    let wrong = [
        (vec![group(0..3), group(3..5)], 5),
        (vec![group(0..3), group(2..6)], 5),
        (vec![group(0..3), group(4..6)], 5),
        (vec![group(0..7)], 5),
        (vec![group(0..6)], 6),
        (vec![Group { bias: Some(&bias), ..group(0..6) }], 5),
        (vec![group(0..3), Group { w: &narrow, ..group(3..6) }], 5),
        (vec![], 5),
    ];
    for (groups, columns) in wrong {
        assert!(grouped_matmul(&x, &groups, columns).is_err(), "{groups:?} to {columns}");
    }
    let (a, b) = (packed(&tensor((4, 2), 4), Precision::F32), tensor((2, 7), 5));
    let (b, c) = (packed(&b, Precision::F32), packed(&b, Precision::Bf16));
    let group = LowRankGroup { rows: 0..6, a: &a, b: &b, weight: 1.0 };
    let y = || tensor((6, 7), 6);
    assert!(low_rank_add(y(), &x, std::slice::from_ref(&group)).is_ok());
    let wrong = [
        LowRankGroup { rows: 0..7, ..group.clone() },
        LowRankGroup { a: &b, ..group.clone() },
        LowRankGroup { b: &a, ..group.clone() },
        LowRankGroup { b: &c, ..group.clone() },
    ];
    for group in wrong {
        assert!(low_rank_add(y(), &x, &[group]).is_err());
    }
    assert!(low_rank_add(tensor((5, 7), 6), &x, std::slice::from_ref(&group)).is_err());
    assert!(low_rank_add(tensor((7, 6), 6).t().unwrap(), &x, &[group]).is_err());
}

#[test]
fn memory_that_the_input_shares_is_an_error() {
    let square = packed(&tensor((4, 4), 1), Precision::F32);
    let group = LowRankGroup { rows: 0..3, a: &square, b: &square, weight: 1.0 };
    let x = Tensor::from_vec(values(12, 1), (3, 4), &Device::Cpu).unwrap();
    assert!(low_rank_add(x.clone(), &x, &[group]).is_err());
}
