//! What the kernels reach: GFLOP/s of the products, milliseconds of the other operations, and tokens
//! per second of a whole training step of a GPT-2 shape with random data.
//!
//! `cargo bench --bench train_ops`; an argument selects a section (`packed`, `products`, `operations`, `step`).

use candle_core::{Device, Result, Tensor, Var};
use shoal::kernels::{AdamW, Ops, PackedMatrix, Precision, adamw_step, l2_norm_squared};
use std::time::Duration;

/// Best of some runs, which other programs on the machine disturb least.
fn best(runs: usize, mut f: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    f()?;
    for _ in 0..runs {
        let start = shoal::telemetry::now();
        f()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

fn random(rows: usize, columns: usize) -> Result<Tensor> {
    Tensor::randn(0f32, 0.5, (rows, columns), &Device::Cpu)
}

fn packed() -> Result<()> {
    println!("packed matrices [k, n], GFLOP/s and GB/s of weights at m rows");
    for (k, n) in [(256, 768), (256, 8192), (768, 3072), (3072, 768)] {
        let w = random(k, n)?;
        for precision in [Precision::F32, Precision::Bf16] {
            let packed = PackedMatrix::from_in_out(&w, precision)?;
            print!("{k:5} x {n:5} {precision:?}:");
            for m in [1, 2, 4, 8, 16, 64, 256] {
                let x = random(m, k)?;
                let seconds = best(60, || packed.matmul(&x, None).map(drop))?.as_secs_f64();
                let flop = 2.0 * (m * k * n) as f64;
                let bytes = packed.bytes() as f64;
                print!("  {m}: {:.0}/{:.0}", flop / seconds / 1e9, bytes / seconds / 1e9);
            }
            println!();
        }
    }
    Ok(())
}

fn products() -> Result<()> {
    println!(
        "training products of 2048 rows, GFLOP/s by wall (best), and by CPU time of two cores"
    );
    for (k, n) in [(256, 256), (256, 768), (256, 1024), (1024, 256), (256, 8192)] {
        let (x, w) = (Var::from_tensor(&random(2048, k)?)?, Var::from_tensor(&random(k, n)?)?);
        let dy = random(2048, n)?;
        let gflop = 2.0 * (2048 * k * n) as f64 / 1e9;
        for precision in [Precision::F32, Precision::Bf16] {
            let ops = Ops::new(&Device::Cpu, precision);
            let packed = PackedMatrix::from_in_out(&w, precision)?;
            let bare = cost(20, || packed.matmul(&x, None).map(drop))?;
            let forward = cost(20, || ops.linear(&x, &w, None).map(drop))?;
            let y = ops.linear(&x, &w, None)?;
            let backward = cost(20, || ops.backward_from(&y, &dy).map(drop))?;
            print!("{k:5} x {n:5} {precision:?}:");
            for (name, cost, products) in
                [("packed", bare, 1.0), ("forward", forward, 1.0), ("backward", backward, 2.0)]
            {
                let flop = gflop * products;
                print!("  {name} {:.0} {:.0}", flop / cost.0 * 1e3, 2.0 * flop / cost.1 * 1e3);
            }
            println!();
        }
    }
    Ok(())
}

/// GPT-2 with random weights; what one training step does to it.
struct Model {
    ops: Ops,
    heads: usize,
    table: Var,
    positions: Var,
    layers: Vec<Vec<Var>>,
    norm: [Var; 2],
}

const D: usize = 256;
const LAYERS: usize = 6;
const VOCAB: usize = 8192;
const BATCH: usize = 16;

impl Model {
    fn new(ops: Ops, length: usize, heads: usize) -> Result<Self> {
        let matrix =
            |rows: usize, columns: usize| Var::from_tensor(&(random(rows, columns)? * 0.04)?);
        let row = |n: usize, value: f64| {
            Var::from_tensor(&(Tensor::zeros(n, candle_core::DType::F32, &Device::Cpu)? + value)?)
        };
        let layer = || {
            Ok(vec![
                row(D, 1.0)?,
                row(D, 0.0)?,
                matrix(D, 3 * D)?,
                row(3 * D, 0.0)?,
                matrix(D, D)?,
                row(D, 0.0)?,
                row(D, 1.0)?,
                row(D, 0.0)?,
                matrix(D, 4 * D)?,
                row(4 * D, 0.0)?,
                matrix(4 * D, D)?,
                row(D, 0.0)?,
            ])
        };
        Ok(Self {
            ops,
            heads,
            table: matrix(VOCAB, D)?,
            positions: matrix(length, D)?,
            layers: (0..LAYERS).map(|_| layer()).collect::<Result<_>>()?,
            norm: [row(D, 1.0)?, row(D, 0.0)?],
        })
    }

    fn vars(&self) -> Vec<Var> {
        let ends = [&self.table, &self.positions, &self.norm[0], &self.norm[1]];
        ends.into_iter().chain(self.layers.iter().flatten()).cloned().collect()
    }

    fn loss(
        &self,
        ids: &Tensor,
        places: &Tensor,
        targets: &[u32],
        starts: &[usize],
    ) -> Result<Tensor> {
        let ops = &self.ops;
        let mut x = ops.add(&ops.embed(&self.table, ids)?, &ops.embed(&self.positions, places)?)?;
        for w in &self.layers {
            let h = ops.layer_norm(&x, &w[0], &w[1], 1e-5)?;
            let qkv = ops.linear(&h, &w[2], Some(&w[3]))?;
            let h = ops.causal_attention(&qkv, starts, self.heads)?;
            x = ops.add(&x, &ops.linear(&h, &w[4], Some(&w[5]))?)?;
            let h = ops.layer_norm(&x, &w[6], &w[7], 1e-5)?;
            let h = ops.gelu(&ops.linear(&h, &w[8], Some(&w[9]))?)?;
            x = ops.add(&x, &ops.linear(&h, &w[10], Some(&w[11]))?)?;
        }
        let x = ops.layer_norm(&x, &self.norm[0], &self.norm[1], 1e-5)?;
        ops.cross_entropy(&x, &self.table, targets)
    }
}

/// CPU time of this process's threads so far, in seconds (Linux; else 0): what other programs on the
/// machine disturb least.
fn cpu_seconds() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanoseconds = tasks.filter_map(|task| {
        let line = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// Best wall time and mean CPU time of `f` in milliseconds.
fn cost(runs: usize, mut f: impl FnMut() -> Result<()>) -> Result<(f64, f64)> {
    f()?;
    let before = cpu_seconds();
    let best = best(runs - 1, &mut f)?;
    Ok((best.as_secs_f64() * 1e3, (cpu_seconds() - before) / runs as f64 * 1e3))
}

fn operations() -> Result<()> {
    println!(
        "operations on 2048 rows of 256, bf16: forward + backward, wall (best) and CPU, in ms"
    );
    let ops = Ops::new(&Device::Cpu, Precision::Bf16);
    let var = |rows, columns| Var::from_tensor(&random(rows, columns)?);
    let (x, y, wide) = (var(2048, D)?, var(2048, D)?, var(2048, 4 * D)?);
    let (qkv, table) = (var(2048, 3 * D)?, var(VOCAB, D)?);
    let row = |n| Var::from_tensor(&random(1, n)?.squeeze(0)?);
    let (w, fc, fc_bias) = (row(D)?, var(D, 4 * D)?, row(4 * D)?);
    let ids: Vec<u32> = (0..2048).map(|i| (i * 7919 % VOCAB) as u32).collect();
    let id_tensor = Tensor::from_vec(ids.clone(), 2048, &Device::Cpu)?;
    let starts: Vec<usize> = (0..=16).map(|i| i * 128).collect();
    let long: Vec<usize> = (0..=8).map(|i| i * 256).collect();
    type F<'a> = Box<dyn Fn() -> Result<Tensor> + 'a>;
    let cases: Vec<(&str, F<'_>)> = vec![
        ("linear 256 x 1024 + bias", Box::new(|| ops.linear(&x, &fc, Some(&fc_bias)))),
        ("layer norm", Box::new(|| ops.layer_norm(&x, &w, &w, 1e-5))),
        ("gelu 1024", Box::new(|| ops.gelu(&wide))),
        ("add", Box::new(|| ops.add(&x, &y))),
        ("embed", Box::new(|| ops.embed(&table, &id_tensor))),
        ("attention 16 x 128, 4 heads", Box::new(|| ops.causal_attention(&qkv, &starts, 4))),
        ("attention 8 x 256, 8 heads", Box::new(|| ops.causal_attention(&qkv, &long, 8))),
        ("cross entropy 8192", Box::new(|| ops.cross_entropy(&x, &table, &ids))),
    ];
    for (name, f) in cases {
        let forward = cost(20, || f().map(drop))?;
        let y = f()?;
        let dy = y.ones_like()?;
        let backward = cost(20, || ops.backward_from(&y, &dy).map(drop))?;
        println!(
            "{name:30} {:6.2} + {:6.2}   {:6.2} + {:6.2}",
            forward.0, backward.0, forward.1, backward.1
        );
    }
    Ok(())
}

fn step(length: usize, heads: usize, precision: Precision, runs: usize) -> Result<()> {
    let ops = Ops::new(&Device::Cpu, precision);
    let model = Model::new(ops, length, heads)?;
    let vars = model.vars();
    let zeros =
        || vars.iter().map(|v| Var::from_tensor(&v.zeros_like()?)).collect::<Result<Vec<_>>>();
    let (m, v) = (zeros()?, zeros()?);
    let rows = BATCH * length;
    let ids: Vec<u32> = (0..rows).map(|i| (i * 7919 % VOCAB) as u32).collect();
    let targets: Vec<u32> = ids.iter().map(|id| (id * 31 + 7) % VOCAB as u32).collect();
    let ids = Tensor::from_vec(ids, rows, &Device::Cpu)?;
    let places: Vec<u32> = (0..rows).map(|i| (i % length) as u32).collect();
    let places = Tensor::from_vec(places, rows, &Device::Cpu)?;
    let starts: Vec<usize> = (0..=BATCH).map(|i| i * length).collect();
    let mut times = [Duration::MAX; 4];
    let (mut first, mut last) = (0.0, 0.0);
    let mut cpu = 0.0;
    for run in 0..runs + 2 {
        if run == 2 {
            cpu = cpu_seconds();
        }
        let start = shoal::telemetry::now();
        let loss = model.loss(&ids, &places, &targets, &starts)?;
        let forward = start.elapsed();
        let grads = ops.backward(&loss)?;
        let backward = start.elapsed();
        let mut norm = 0.0;
        for var in &vars {
            norm += grads.get(var).map_or(Ok(0.0), l2_norm_squared)?;
        }
        let how = AdamW {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step: run + 1,
            grad_scale: (1.0 / norm.sqrt()).min(1.0),
        };
        for ((var, m), v) in vars.iter().zip(&m).zip(&v) {
            if let Some(grad) = grads.get(var) {
                adamw_step(var, grad, m, v, &how)?;
            }
        }
        let all = start.elapsed();
        last = loss.to_scalar::<f32>()?;
        if run == 0 {
            first = last;
        }
        for (best, time) in times.iter_mut().zip([forward, backward - forward, all - backward, all])
        {
            *best = time.min(*best);
        }
    }
    let cpu = (cpu_seconds() - cpu) / runs as f64;
    let [forward, backward, update, all] = times.map(|t| t.as_secs_f64() * 1e3);
    println!(
        "step 6 x 256, {BATCH} x {length}, {heads} heads, {precision:?}: {:.0} tok/s ({:.0} ms: forward {forward:.0}, \
         backward {backward:.0}, update {update:.0}); {:.0} tok/s by CPU time over two cores; loss {first:.3} -> {last:.3}",
        rows as f64 / all * 1e3,
        all,
        rows as f64 / cpu * 2.0,
    );
    Ok(())
}

fn main() -> Result<()> {
    let section = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    let wants = |name: &str| section.as_deref().is_none_or(|s| s == name);
    if wants("packed") {
        packed()?;
    }
    if wants("products") {
        products()?;
    }
    if wants("operations") {
        operations()?;
    }
    if wants("step") {
        step(128, 4, Precision::Bf16, 20)?;
        step(256, 8, Precision::Bf16, 10)?;
        step(128, 4, Precision::F32, 10)?;
    }
    Ok(())
}
