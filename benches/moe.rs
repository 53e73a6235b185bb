//! What a feed-forward network of 8 experts, top-1, costs beside the dense one of the same width.
//!
//! `cargo bench --bench moe`
//!
//! The floor is measured, not assumed: each expert with rows costs at least what it costs alone for that
//! many rows, nothing gathered, with weights that come from memory as a mixture's do. At one row that is
//! the time that its bytes take.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use shoal::kernels::{Ops, PackedMatrix, Precision};
use shoal::model::spec::{Gate, Moe};
use shoal::model::{MoeLayer, Spec, init};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

const EXPERTS: usize = 8;
/// As many, so that a task's gate can name each expert.
const TASKS: usize = EXPERTS;
/// Times that everything is measured in turn: others on the machine disturb all alike.
const ROUNDS: usize = 6;
/// Networks in a row, so that the caches hold what they would in a model.
const LAYERS: usize = 6;

struct Dense {
    c_fc: (PackedMatrix, Tensor),
    c_proj: (PackedMatrix, Tensor),
}

impl Dense {
    fn new(width: usize, precision: Precision) -> Result<Self> {
        let linear = |inputs, outputs| {
            let w = Tensor::randn(0f32, 0.02, (inputs, outputs), &Device::Cpu)?;
            let b = Tensor::zeros(outputs, DType::F32, &Device::Cpu)?;
            Ok::<_, candle_core::Error>((PackedMatrix::from_in_out(&w, precision)?, b))
        };
        Ok(Self { c_fc: linear(width, 4 * width)?, c_proj: linear(4 * width, width)? })
    }

    fn forward(&self, ops: &Ops, x: &Tensor) -> Result<Tensor> {
        let inner = ops.gelu(&self.c_fc.0.matmul(x, Some(&self.c_fc.1))?)?;
        self.c_proj.0.matmul(&inner, Some(&self.c_proj.1))
    }

    fn bytes(&self) -> usize {
        self.c_fc.0.bytes() + self.c_proj.0.bytes()
    }
}

fn spec(width: usize, gate: Gate) -> Spec {
    Spec {
        layers: LAYERS,
        heads: 1,
        width,
        inner: 4 * width,
        context: 1,
        vocab: 1,
        eps: 1e-5,
        eos: Vec::new(),
        tasks: (0..TASKS).map(|t| format!("task-{t}")).collect(),
        moe: Some(Moe { layers: (0..LAYERS).collect(), experts: EXPERTS, top_k: 1, gate }),
    }
}

fn mixtures(width: usize, gate: Gate, precision: Precision) -> Result<Vec<MoeLayer>> {
    let spec = spec(width, gate);
    let Some(moe) = &spec.moe else { return Ok(Vec::new()) };
    let mut tensors: HashMap<String, Tensor> = init::fresh(&spec, 1)?.into_iter().collect();
    for (_, biases) in tensors.iter_mut().filter(|(name, _)| name.ends_with("task_bias")) {
        *biases = Tensor::eye(EXPERTS, DType::F32, &Device::Cpu)?;
    }
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let layer = |i| {
        let vb = vb.pp(format!("transformer.h.{i}.moe"));
        MoeLayer::packed(&spec, moe, &vb, precision)
    };
    (0..LAYERS).map(layer).collect()
}

/// Lowers `best` to the seconds of one of `calls` calls.
fn time(best: &mut f64, calls: usize, mut call: impl FnMut(usize) -> Result<()>) -> Result<()> {
    let begin = shoal::telemetry::now();
    while begin.elapsed() < Duration::from_millis(60) {
        let start = shoal::telemetry::now();
        (0..calls).try_for_each(&mut call)?;
        *best = best.min(start.elapsed().as_secs_f64() / calls as f64);
    }
    Ok(())
}

/// How many rows go to each expert of each layer that gets any.
fn loads(layers: &[MoeLayer], ops: &Ops, x: &Tensor) -> Result<Vec<usize>> {
    let mut loads = Vec::new();
    for layer in layers {
        let (_, routes) = layer.forward(ops, x, &[])?;
        let mut counts = [0; EXPERTS];
        routes.experts.iter().for_each(|&e| counts[usize::from(e)] += 1);
        loads.extend(counts.into_iter().filter(|&count| count > 0));
    }
    Ok(loads)
}

/// Networks of one shape.
struct Case {
    ops: Ops,
    dense: Vec<Dense>,
    token: Vec<MoeLayer>,
    task: Vec<MoeLayer>,
    /// Seconds that an expert takes for so many rows, by itself.
    alone: BTreeMap<usize, f64>,
}

impl Case {
    fn new(width: usize, precision: Precision) -> Result<Self> {
        Ok(Self {
            ops: Ops::new(&Device::Cpu, precision),
            dense: (0..LAYERS).map(|_| Dense::new(width, precision)).collect::<Result<_>>()?,
            token: mixtures(width, Gate::Token, precision)?,
            task: mixtures(width, Gate::Task, precision)?,
            alone: BTreeMap::new(),
        })
    }

    /// `x` has as many rows as wanted, or more.
    fn alone(&mut self, x: &Tensor, rows: usize) -> Result<f64> {
        let x = x.narrow(0, 0, rows)?.contiguous()?;
        let best = self.alone.entry(rows).or_insert(f64::MAX);
        time(best, LAYERS * EXPERTS, |i| {
            let gates = vec![Some((i / LAYERS) as u32); rows];
            self.task[i % LAYERS].forward(&self.ops, &x, &gates).map(drop)
        })?;
        Ok(*best)
    }

    fn measure(&mut self, x: &Tensor) -> Result<()> {
        let (rows, ops) = (x.dim(0)?, self.ops);
        let same = vec![Some(1); rows];
        let loads = loads(&self.token, &ops, x)?;
        let [mut dense, mut token, mut task] = [f64::MAX; 3];
        for _ in 0..ROUNDS {
            time(&mut dense, LAYERS, |i| self.dense[i].forward(&ops, x).map(drop))?;
            time(&mut token, LAYERS, |i| self.token[i].forward(&ops, x, &[]).map(drop))?;
            time(&mut task, LAYERS, |i| self.task[i].forward(&ops, x, &same).map(drop))?;
            for &rows in &loads.iter().collect::<BTreeSet<_>>() {
                self.alone(x, *rows)?;
            }
        }
        let experts = loads.len() as f64 / LAYERS as f64;
        let floor = loads.iter().map(|rows| self.alone[rows]).sum::<f64>() / LAYERS as f64;
        println!(
            "  {rows:2} rows: dense {:7.1} us; {experts:.1} experts {:7.1} us, {:.2} of their floor; one task {:.2} \
             of dense",
            dense * 1e6,
            token * 1e6,
            token / floor.max(dense),
            task / dense,
        );
        Ok(())
    }
}

fn main() -> Result<()> {
    for width in [256, 768] {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut case = Case::new(width, precision)?;
            let x = Tensor::randn(0f32, 1.0, (64, width), &Device::Cpu)?;
            let speed = case.dense[0].bytes() as f64 / case.alone(&x, 1)? / 1e9;
            println!("width {width} {precision:?}: one row reads {speed:.0} GB/s of weights");
            for rows in [1, 16, 64] {
                case.measure(&x.narrow(0, 0, rows)?.contiguous()?)?;
            }
        }
    }
    Ok(())
}
