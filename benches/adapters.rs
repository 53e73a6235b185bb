//! What adapters and experts cost in the kernels: a low-rank product and a grouped one beside the linear
//! layer under them.
//!
//! `cargo bench --bench adapters`

use candle_core::{Device, Result, Tensor};
use shoal::kernels::{
    Group, LowRankGroup, PackedMatrix, Precision, grouped_matmul, in_pool, low_rank_add,
};
use std::hint::black_box;
use std::ops::Range;

const RANK: usize = 16;
const CALLS: usize = 200;

fn random(rows: usize, columns: usize) -> Result<Tensor> {
    Tensor::randn(0f32, 0.02, (rows, columns), &Device::Cpu)
}

fn packed(inner: usize, outer: usize, precision: Precision) -> Result<PackedMatrix> {
    PackedMatrix::from_in_out(&random(inner, outer)?, precision)
}

/// The rows in as many groups as there are, as equal as they can be.
fn split(rows: usize, groups: usize) -> Vec<Range<usize>> {
    (0..groups).map(|i| i * rows / groups..(i + 1) * rows / groups).collect()
}

/// Microseconds of one call on a compute thread: the best of many, which others on the machine disturb
/// least.
fn time(mut call: impl FnMut() -> Result<Tensor> + Send) -> Result<f64> {
    in_pool(|| {
        let mut best = f64::MAX;
        for _ in 0..CALLS {
            let start = shoal::telemetry::now();
            black_box(call()?);
            best = best.min(start.elapsed().as_secs_f64() * 1e6);
        }
        Ok(best)
    })
}

fn main() -> Result<()> {
    for (width, precision) in [(256, Precision::F32), (256, Precision::Bf16), (768, Precision::F32)]
    {
        let outer = 3 * width;
        let layers: Vec<PackedMatrix> =
            (0..4).map(|_| packed(width, outer, precision)).collect::<Result<_>>()?;
        let factors = (0..4)
            .map(|_| Ok((packed(width, RANK, precision)?, packed(RANK, outer, precision)?)))
            .collect::<Result<Vec<_>>>()?;
        for rows in [1, 4, 16] {
            let (x, y) = (random(rows, width)?, random(rows, outer)?);
            let linear = time(|| layers[0].matmul(&x, None))?;
            for groups in [1, 4] {
                let ranges = split(rows, groups);
                let group = |(i, rows): (usize, &Range<usize>)| Group {
                    rows: rows.clone(),
                    w: &layers[i],
                    bias: None,
                };
                let experts: Vec<_> = ranges.iter().enumerate().map(group).collect();
                let experts = time(|| grouped_matmul(&x, &experts, outer))?;
                let added = ranges.iter().zip(&factors);
                let low_rank: Vec<_> = added
                    .map(|(rows, (a, b))| LowRankGroup { rows: rows.clone(), a, b, weight: 1.0 })
                    .collect();
                let low_rank = time(|| low_rank_add(y.clone(), &x, &low_rank))?;
                println!(
                    "{width} to {outer} {precision:?}, {rows:2} rows in {groups} groups: linear {linear:.1} us, \
                     grouped {experts:.1} us, rank {RANK} added {low_rank:.1} us",
                );
            }
        }
    }
    Ok(())
}
