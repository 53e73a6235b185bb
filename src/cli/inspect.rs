//! `shoal inspect`: which experts and adapters work for which task, as tables and as a picture.
//!
//! What a gate that sees tokens does with a task is measured: the built-in inputs run through the
//! engine that serves, which says where each row went.

use super::heatmap::{self, Matrix};
use super::{Outcome, set_threads};
use anyhow::{Context, Result, bail};
use futures::executor::block_on;
use shoal::adapter::Loaded;
use shoal::adapter::registry::{Bounds, Registry};
use shoal::bench::inputs;
use shoal::bundle::{Bundle, job_of};
use shoal::config::{Compute, DEFAULT_BUNDLE};
use shoal::engine::{EngineHandle, Event, Job, Settings, State};
use shoal::metrics::Metrics;
use shoal::model::LoadOptions;
use shoal::request::ExpertUse;
use shoal::task::{Task, TaskTable};
use shoal::telemetry;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

/// What stands behind a row of shares.
const LEGEND: &str =
    "entropy is over ln E: 1 for an even split; of all tasks, the balance of the load\n";

/// What `shoal inspect` can be told.
#[derive(clap::Args, Clone, Debug)]
pub struct Inspect {
    /// Folder of the bundle
    #[arg(default_value = DEFAULT_BUNDLE)]
    pub bundle: PathBuf,
    /// Where to draw the picture
    #[arg(long, value_name = "FILE.svg", default_value = "inspect.svg")]
    pub out: PathBuf,
    /// Most new tokens after each input, while experts are watched
    #[arg(long, default_value_t = 32)]
    pub tokens: u32,
    /// What computes
    #[command(flatten)]
    pub compute: Compute,
}

/// Prints the tables and draws the picture.
pub fn run(args: &Inspect) -> Result<Outcome> {
    telemetry::init("warn", false).map_err(anyhow::Error::msg)?;
    set_threads(&args.compute)?;
    let mut bundle = Bundle::open(&args.bundle, None)?;
    let tasks = listed(&bundle.tasks);
    let adapters = of_adapters(&bundle.adapters, &tasks);
    let mut matrices = Vec::new();
    if bundle.spec.moe.is_some() {
        let Some(probe) = Probe::start(&mut bundle, args)? else {
            return Ok(Outcome::EngineFailed);
        };
        let uses: Result<Vec<_>> = tasks.iter().map(|task| probe.watch(&bundle, task)).collect();
        matrices = of_experts(&uses?, &tasks);
    }
    matrices.extend(adapters);
    let mut out = std::io::stdout();
    if matrices.is_empty() {
        writeln!(out, "{} has neither experts nor adapters", bundle.id)?;
        return Ok(Outcome::Done);
    }
    for matrix in &matrices {
        writeln!(out, "{}", matrix.table())?;
    }
    if matrices.iter().any(|matrix| matrix.shares) {
        out.write_all(LEGEND.as_bytes())?;
    }
    heatmap::write(&matrices, &args.out)?;
    writeln!(out, "drawn in {}", args.out.display())?;
    Ok(Outcome::Done)
}

/// The bundle's tasks; the bundle itself only if it has no others.
fn listed(tasks: &TaskTable) -> Vec<Arc<Task>> {
    let named: Vec<_> = tasks.named().cloned().collect();
    if named.is_empty() { vec![tasks.bundle().clone()] } else { named }
}

/// A bundle at work.
struct Probe {
    engine: EngineHandle,
    adapters: Registry,
    tokens: u32,
}

impl Probe {
    /// Starts the engine; `None` if that fails.
    fn start(bundle: &mut Bundle, args: &Inspect) -> Result<Option<Self>> {
        let dtype = args.compute.dtype;
        let metrics = Arc::new(Metrics::new(&bundle.tasks.names()));
        let options = LoadOptions { dtype, ..LoadOptions::default() };
        // A row that is taken over from another sequence is not computed, and would not be counted.
        let settings = Settings { prefix_cache: false, ..Settings::default() };
        let (engine, _) = bundle.start(options, settings, metrics.clone());
        let adapters = bundle.registry(dtype, Bounds::NONE, metrics)?;
        let mut state = engine.watch();
        let state = *block_on(state.wait_for(|&state| state != State::Loading))?;
        Ok((state == State::Ready).then_some(Self { engine, adapters, tokens: args.tokens }))
    }

    /// Where the rows of a task's inputs went, layer by layer.
    fn watch(&self, bundle: &Bundle, task: &Task) -> Result<Vec<ExpertUse>> {
        let inputs = inputs::built_in();
        let mut sum: Vec<ExpertUse> = Vec::new();
        for (seed, input) in (0..).zip(inputs::of_task(&inputs, &task.name)?) {
            let prompt = bundle.prompts.encode(task, input, &BTreeMap::new());
            let prompt = prompt.with_context(|| format!("{}: {input}", task.name))?.tokens;
            let uses = self.finish(self.job(task, prompt, seed)?)?;
            if sum.is_empty() {
                sum = uses;
                continue;
            }
            for (sum, layer) in sum.iter_mut().zip(uses) {
                sum.rows.iter_mut().zip(layer.rows).for_each(|(sum, n)| *sum += n);
            }
        }
        Ok(sum)
    }

    /// A job with the task's own defaults, but for what ends a text.
    fn job(&self, task: &Task, mut prompt: Vec<u32>, seed: u64) -> Result<Job> {
        let context = self.engine.ready()?.context;
        prompt.truncate(context);
        let max_new = self.tokens.min((context - prompt.len()) as u32);
        Ok(Job {
            seed,
            report_experts: true,
            // Otherwise the last layer computes no more of a prompt than its end.
            score_prompt: Some(0),
            ..job_of(task, prompt, max_new, &self.adapters, &self.engine)?
        })
    }

    fn finish(&self, job: Job) -> Result<Vec<ExpertUse>> {
        let mut events = self.engine.submit(job)?;
        loop {
            match events.blocking_recv() {
                Some(Event::Done { experts, .. }) => return Ok(experts),
                Some(Event::Failed(error)) => return Err(error.into()),
                Some(_) => {}
                None => bail!("the engine stopped"),
            }
        }
    }
}

/// Task by expert, over all layers of experts and, of several, for each: shares of a task's rows.
/// `uses` has the layers of each task. The last row is the mean, as if all tasks came equally often.
fn of_experts(uses: &[Vec<ExpertUse>], tasks: &[Arc<Task>]) -> Vec<Matrix> {
    let layers: Vec<usize> = uses.iter().take(1).flatten().map(|layer| layer.layer).collect();
    let matrix = |title: String, wanted: &[usize]| {
        let of_task = |uses: &Vec<ExpertUse>| {
            let wanted = uses.iter().filter(|layer| wanted.contains(&layer.layer));
            shares(wanted.map(|layer| layer.rows.as_slice()))
        };
        let mut values: Vec<Vec<f64>> = uses.iter().map(of_task).collect();
        values.push(mean(&values));
        let mut rows = names(tasks);
        rows.push("all tasks".into());
        Matrix { title, rows, columns: numbers(values[0].len()), values, shares: true }
    };
    let mut matrices = Vec::new();
    if layers.len() > 1 {
        matrices.push(matrix("experts, all layers".into(), &layers));
    }
    for &layer in &layers {
        matrices.push(matrix(format!("experts, layer {layer}"), &[layer]));
    }
    matrices
}

/// Task by adapter: which one a task uses. And for each mixture of task adapters, task by expert.
fn of_adapters(adapters: &BTreeMap<String, Loaded>, tasks: &[Arc<Task>]) -> Vec<Matrix> {
    let mut matrices = Vec::new();
    if adapters.is_empty() {
        return matrices;
    }
    let uses = |task: &Arc<Task>| {
        let own = |name: &String| f64::from(u8::from(task.adapter.as_ref() == Some(name)));
        adapters.keys().map(own).collect()
    };
    matrices.push(Matrix {
        title: "adapters".into(),
        rows: names(tasks),
        columns: adapters.keys().cloned().collect(),
        values: tasks.iter().map(uses).collect(),
        shares: false,
    });
    let mixtures = adapters.iter().filter(|(_, adapter)| !adapter.mixture.is_empty());
    matrices.extend(mixtures.map(|(name, adapter)| Matrix {
        title: format!("adapter {name}, its experts"),
        rows: adapter.tasks.iter().cloned().chain(["any other".into()]).collect(),
        columns: numbers(adapter.mixture[0].len()),
        values: adapter.mixture.clone(),
        shares: true,
    }));
    matrices
}

fn names(tasks: &[Arc<Task>]) -> Vec<String> {
    tasks.iter().map(|task| task.name.clone()).collect()
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

/// The columns' shares of all rows; zeros if there are none.
fn shares<'a>(layers: impl Iterator<Item = &'a [u64]>) -> Vec<f64> {
    let mut sums: Vec<u64> = Vec::new();
    for layer in layers {
        sums.resize(layer.len(), 0);
        sums.iter_mut().zip(layer).for_each(|(sum, n)| *sum += n);
    }
    let all = sums.iter().sum::<u64>().max(1) as f64;
    sums.into_iter().map(|n| n as f64 / all).collect()
}

fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    let mut mean = vec![0.0; rows.first().map_or(0, Vec::len)];
    for row in rows {
        mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x / rows.len() as f64);
    }
    mean
}
