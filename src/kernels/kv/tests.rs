//! Paged attention against the reference on whole sequences.

use super::*;
use crate::kernels::tests::{error, tensor};
use crate::kernels::{Mode, Ops};

fn shape(
    layers: usize,
    block_size: usize,
    heads: usize,
    head_dim: usize,
    precision: Precision,
) -> KvShape {
    KvShape { layers, block_size, heads, head_dim, precision }
}

#[test]
fn a_pool_takes_the_bytes_that_its_shape_says() {
    for (block_size, head_dim, bytes) in [(16, 64, 4), (16, 6, 4), (5, 64, 8), (16, 7, 8)] {
        let shape = shape(3, block_size, 2, head_dim, Precision::Bf16);
        let pool = KvPool::new(shape, 10).unwrap();
        let held = size_of_val(pool.words.as_slice());
        assert_eq!(held, shape.bytes_per_position() * block_size * 10);
        assert_eq!(shape.bytes_per_position(), bytes * 3 * 2 * head_dim);
    }
}

#[test]
fn a_pool_beyond_all_memory_is_an_error() {
    // More than any address space; still a size.
    let error = KvPool::new(shape(1, 16, 1, 64, Precision::F32), 1 << 46).unwrap_err();
    assert!(error.to_string().contains("no memory"), "{error}");
    assert!(KvPool::new(shape(1, 16, 1, 64, Precision::F32), usize::MAX / 2).is_err());
}

/// What earlier tenants left in the blocks must not show.
fn poison(pool: &mut KvPool) {
    let len = pool.words.as_slice().len();
    // SAFETY: the pages hold as many words.
    unsafe { std::slice::from_raw_parts_mut(pool.words.as_mut_ptr(), len) }.fill(u32::MAX);
}

#[test]
fn paged_attention_in_chunks_equals_causal_attention() {
    for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 2e-2)] {
        // An even and an odd block, whole vectors and parts of them.
        for (head_dim, block) in [(8, 4), (20, 4), (6, 5), (40, 18)] {
            check_chunks(head_dim, block, precision, tolerance);
        }
    }
}

fn check_chunks(head_dim: usize, block: usize, precision: Precision, tolerance: f32) {
    let heads = 3;
    let d = heads * head_dim;
    let lengths = [7usize, 1, 10];
    let total: usize = lengths.iter().sum();
    let qkv = tensor((total, 3 * d), 1);
    let reference = Ops { mode: Mode::Reference, precision: Precision::F32 };
    let expected = reference.causal_attention(&qkv, &[0, 7, 8, 18], heads).unwrap();
    let tables: Vec<u32> = vec![5, 2, 0, 7, 1, 9];
    let slices_of_table = [0..2, 2..3, 3..6];
    let mut pool = KvPool::new(shape(2, block, heads, head_dim, precision), 10).unwrap();
    poison(&mut pool);
    let mut done = [0usize; 3];
    let mut got = vec![Vec::new(); 3];
    while done != lengths {
        // Three rows of each sequence a step.
        let (mut positions, mut slices, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for (i, start) in [0usize, 7, 8].into_iter().enumerate() {
            let take = (lengths[i] - done[i]).min(3);
            let first = positions.len();
            positions.extend((done[i]..done[i] + take).map(|p| p as u32));
            slices.push((first..positions.len(), slices_of_table[i].clone()));
            parts.push(qkv.narrow(0, start + done[i], take).unwrap());
            done[i] += take;
        }
        let rows = PagedRows { positions: &positions, slices: &slices, tables: &tables };
        let out = pool.attend(1, &Tensor::cat(&parts, 0).unwrap(), &rows).unwrap();
        for (i, (rows, _)) in slices.iter().enumerate() {
            got[i].push(out.narrow(0, rows.start, rows.len()).unwrap());
        }
    }
    let got: Vec<Tensor> = got.into_iter().flatten().collect();
    assert!(error(&Tensor::cat(&got, 0).unwrap(), &expected) < tolerance);
}

#[test]
fn paged_attention_refuses_what_is_outside_the_pool() {
    let mut pool = KvPool::new(shape(1, 4, 1, 4, Precision::F32), 2).unwrap();
    let qkv = tensor((1, 12), 2);
    let mut attend = |layer: usize, position: u32, slice: usize, table: Vec<u32>| {
        let slices = [(0..slice, 0..table.len())];
        pool.attend(
            layer,
            &qkv,
            &PagedRows { positions: &[position], slices: &slices, tables: &table },
        )
        .is_ok()
    };
    assert!(attend(0, 7, 1, vec![1, 0]));
    assert!(!attend(1, 0, 1, vec![1]), "layer");
    assert!(!attend(0, 4, 1, vec![1]), "table too short");
    assert!(!attend(0, 0, 1, vec![2]), "block");
    assert!(!attend(0, 0, 2, vec![0]), "rows");
    assert!(!attend(0, 0, 0, vec![0]), "a row without a slice");
}

#[test]
fn a_paged_row_is_the_same_alone_and_in_company() {
    let (heads, size, len) = (4, 32, 40);
    let d = heads * size;
    let qkv = tensor((3 * len, 3 * d), 3);
    let positions: Vec<u32> = (0..3).flat_map(|_| 0..len as u32).collect();
    let run = |sequences: &[usize], chunk: usize, precision: Precision| {
        let mut pool = KvPool::new(shape(1, 16, heads, size, precision), 12).unwrap();
        let mut out = Vec::new();
        for from in (0..len).step_by(chunk) {
            let take = chunk.min(len - from);
            let parts: Vec<Tensor> =
                sequences.iter().map(|s| qkv.narrow(0, s * len + from, take).unwrap()).collect();
            let positions: Vec<u32> = sequences
                .iter()
                .flat_map(|s| positions[s * len + from..][..take].to_vec())
                .collect();
            let slices: Vec<_> = (0..sequences.len())
                .map(|i| (i * take..(i + 1) * take, i * 3..i * 3 + 3))
                .collect();
            let tables: Vec<u32> =
                sequences.iter().flat_map(|&s| [s as u32, 9 - s as u32, 3 + s as u32]).collect();
            let rows = PagedRows { positions: &positions, slices: &slices, tables: &tables };
            let y = pool.attend(0, &Tensor::cat(&parts, 0).unwrap(), &rows).unwrap();
            let last = sequences.len() - 1;
            out.push(y.narrow(0, last * take, take).unwrap());
        }
        Tensor::cat(&out, 0).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    for precision in [Precision::F32, Precision::Bf16] {
        let alone = run(&[1], 40, precision);
        assert_eq!(alone, run(&[0, 2, 1], 40, precision));
        assert_eq!(alone, run(&[2, 1], 1, precision));
        assert_eq!(alone, run(&[0, 1], 7, precision));
    }
}
