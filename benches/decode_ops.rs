//! What a serving step costs in the kernels: GPT-2 shapes with random weights, a row per sequence.
//!
//! `cargo bench --bench decode_ops`

use candle_core::{DType, Device, Result, Tensor};
use shoal::kernels::{Format, KvPool, KvShape, Ops, PackedMatrix, PagedRows, Precision};
use std::time::Duration;

const F32: Format = Format::Float(Precision::F32);

struct Shape {
    name: &'static str,
    layers: usize,
    width: usize,
    heads: usize,
    vocab: usize,
}

struct Layer {
    norms: [Tensor; 2],
    qkv: PackedMatrix,
    proj: PackedMatrix,
    fc: PackedMatrix,
    down: PackedMatrix,
}

struct Model {
    ops: Ops,
    layers: Vec<Layer>,
    head: PackedMatrix,
    pool: KvPool,
}

fn random(rows: usize, columns: usize) -> Result<Tensor> {
    Tensor::randn(0f32, 0.02, (rows, columns), &Device::Cpu)
}

impl Model {
    fn new(shape: &Shape, format: Format, sequences: usize) -> Result<Self> {
        let d = shape.width;
        let precision = if format == F32 { Precision::F32 } else { Precision::Bf16 };
        let packed = |k, n| PackedMatrix::from_in_out(&random(k, n)?, format);
        let norm = || Tensor::ones(d, DType::F32, &Device::Cpu);
        let layer = || {
            Ok(Layer {
                norms: [norm()?, norm()?],
                qkv: packed(d, 3 * d)?,
                proj: packed(d, d)?,
                fc: packed(d, 4 * d)?,
                down: packed(4 * d, d)?,
            })
        };
        Ok(Self {
            ops: Ops::new(&Device::Cpu, precision),
            layers: (0..shape.layers).map(|_| layer()).collect::<Result<_>>()?,
            head: PackedMatrix::from_out_in(&random(shape.vocab, d)?, format)?,
            pool: KvPool::new(
                KvShape {
                    layers: shape.layers,
                    block_size: 16,
                    heads: shape.heads,
                    head_dim: d / shape.heads,
                    precision,
                },
                sequences * 8,
            )?,
        })
    }

    fn step(&mut self, x: &Tensor, rows: &PagedRows<'_>) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            let [first, second] = &layer.norms;
            let qkv = layer.qkv.matmul(&self.ops.layer_norm(&x, first, first, 1e-5)?, None)?;
            let attended = self.pool.attend(i, &qkv, rows)?;
            x = self.ops.add(&x, &layer.proj.matmul(&attended, None)?)?;
            let h = layer.fc.matmul(&self.ops.layer_norm(&x, second, second, 1e-5)?, None)?;
            x = self.ops.add(&x, &layer.down.matmul(&self.ops.gelu(&h)?, None)?)?;
        }
        self.head.matmul(&x, None)
    }

    fn bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.proj, &l.fc, &l.down]);
        layers.chain([&self.head]).map(PackedMatrix::bytes).sum()
    }
}

fn main() -> Result<()> {
    let shapes = [
        Shape { name: "7M", layers: 6, width: 256, heads: 8, vocab: 8192 },
        Shape { name: "25M", layers: 8, width: 512, heads: 8, vocab: 8192 },
        Shape { name: "124M", layers: 12, width: 768, heads: 12, vocab: 50257 },
    ];
    for shape in &shapes {
        for format in [F32, Format::Float(Precision::Bf16), Format::Int8] {
            for sequences in [1, 4, 16, 64] {
                let mut model = Model::new(shape, format, sequences)?;
                let x = random(sequences, shape.width)?;
                let positions = vec![96u32; sequences];
                let slices: Vec<_> = (0..sequences).map(|i| (i..i + 1, i * 8..i * 8 + 8)).collect();
                let tables: Vec<u32> = (0..sequences as u32 * 8).collect();
                let rows = PagedRows { positions: &positions, slices: &slices, tables: &tables };
                let mut best = Duration::MAX;
                for _ in 0..60 {
                    let start = shoal::telemetry::now();
                    model.step(&x, &rows)?;
                    best = best.min(start.elapsed());
                }
                let seconds = best.as_secs_f64();
                println!(
                    "{:5} {format:?} {sequences:2} rows: {:.3} ms a step: {:.0} tok/s, {:.0} GB/s of weights",
                    shape.name,
                    seconds * 1e3,
                    sequences as f64 / seconds,
                    model.bytes() as f64 / seconds / 1e9,
                );
            }
        }
    }
    Ok(())
}
