//! `shoal bench URL`: load against a server, over the same wire that its clients use. Works against any
//! server with OpenAI's `/v1/completions`, so that comparisons use one generator.
//!
//! Owns what a latency is here: measured at the client, from the request (closed loop) or from its
//! intended arrival (open loop) to the bytes of a frame; percentiles are taken over all requests that
//! ended well, and those that did not are counted by kind. Knows nothing of the server's insides. Runs
//! on one thread, and says how much CPU that thread took from the server.

pub mod bundle;
pub mod client;
pub mod inputs;
pub mod load;
pub mod report;
pub mod sse;

#[cfg(test)]
mod tests;

use crate::telemetry;
use anyhow::{Context, Result, bail, ensure};
use client::Client;
use load::{Limit, TaskLoad, Workload};
use report::{Load, Report, Run};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// How long a run lasts when neither `--requests` nor `--duration` is given.
const DEFAULT_DURATION: Duration = Duration::from_secs(10);

/// What to measure.
#[derive(clap::Args, Clone, Debug, Serialize)]
pub struct Args {
    /// The server, such as http://127.0.0.1:8000
    #[arg(default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Closed loop: requests kept under way; each number is a run
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    pub streams: Vec<usize>,
    /// Open loop instead: Poisson arrivals per second; each number is a run
    #[arg(long, value_delimiter = ',', conflicts_with = "streams")]
    pub rate: Vec<f64>,
    /// Tasks that take turns [default: all that the server lists]
    #[arg(long, value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Ask /v1/completions for these models, which take turns, rather than for tasks
    #[arg(long, value_delimiter = ',', conflicts_with = "tasks")]
    pub model: Vec<String>,
    /// Requests per run
    #[arg(long)]
    pub requests: Option<u64>,
    /// Seconds per run in which requests are sent [default: 10, unless --requests is given]
    #[arg(long)]
    pub duration: Option<f64>,
    /// Most tokens per reply [default: the server's]
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// The control `words` of every request
    #[arg(long)]
    pub words: Option<u32>,
    /// Generate past the end of text, so that every reply has --max-tokens tokens
    #[arg(long)]
    pub ignore_eos: bool,
    /// Inputs, one a line (text, or .jsonl with `input` or `intent` and perhaps `task`)
    #[arg(long)]
    pub inputs: Option<PathBuf>,
    /// Seed of arrivals and replies
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Seconds after which a request has failed
    #[arg(long, default_value_t = 60.0)]
    pub timeout: f64,
    /// Requests per task before the first run, not counted
    #[arg(long, default_value_t = 1)]
    pub warmup: u64,
    /// Write the report here as JSON
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Measure nothing: write a bundle of random weights to serve
    #[command(flatten)]
    pub make: bundle::Make,
}

/// Measures as `args` say, prints each run's table as it ends and writes the JSON.
pub fn run(args: &Args) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(measure(args, |run| println!("{run}")))?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(report)
}

/// Measures as `args` say and shows each run as it ends. Its CPU figure is right on a runtime of one
/// thread that does nothing else.
pub async fn measure(args: &Args, mut show: impl FnMut(&Run)) -> Result<Report> {
    let client = Client::new(&args.url)?;
    let limit = check(args)?;
    let workload = workload(args, &client).await?;
    let warmup =
        Limit { requests: Some(args.warmup * workload.tasks.len() as u64), duration: None };
    workload.closed(&client, 1, warmup).await;
    let loads: Vec<_> = if args.rate.is_empty() {
        args.streams.iter().map(|&n| Load::Streams(n)).collect()
    } else {
        args.rate.iter().map(|&r| Load::Rate(r)).collect()
    };
    let mut runs = Vec::new();
    for load in loads {
        let (start, cpu) = (telemetry::now(), cpu_seconds());
        let samples = match load {
            Load::Streams(streams) => workload.closed(&client, streams, limit).await,
            Load::Rate(rate) => workload.open(&client, rate, limit).await,
        };
        let cpu = cpu_seconds().zip(cpu).map(|(after, before)| after - before);
        let mut run = Run::new(load, &workload, &samples, start.elapsed().as_secs_f64());
        run.generator_cpu_seconds = cpu;
        show(&run);
        runs.push(run);
    }
    Ok(Report { shoal: env!("CARGO_PKG_VERSION"), options: args.clone(), runs })
}

/// Refuses what cannot be measured; gives the limit of each run.
fn check(args: &Args) -> Result<Limit> {
    let positive = |v: f64| v.is_finite() && v > 0.0;
    ensure!(args.streams.iter().all(|&n| n > 0), "--streams must be above 0");
    ensure!(args.rate.iter().all(|&r| positive(r)), "--rate must be above 0");
    ensure!(args.duration.is_none_or(positive), "--duration must be above 0");
    ensure!(positive(args.timeout), "--timeout must be above 0");
    ensure!(args.requests != Some(0), "--requests must be above 0");
    ensure!(
        !args.ignore_eos || args.max_tokens.is_some(),
        "--ignore-eos needs --max-tokens, which then is the length of every reply"
    );
    let duration = args.duration.map(Duration::from_secs_f64);
    let duration = duration.or(args.requests.is_none().then_some(DEFAULT_DURATION));
    Ok(Limit { requests: args.requests, duration })
}

async fn workload(args: &Args, client: &Client) -> Result<Workload> {
    let names = match (args.model.is_empty(), args.tasks.is_empty()) {
        (false, _) => args.model.clone(),
        (true, false) => args.tasks.clone(),
        (true, true) => listed_tasks(client).await?,
    };
    let inputs = match &args.inputs {
        Some(path) => inputs::read(path)?,
        None => inputs::built_in(),
    };
    let task = |name: String| -> Result<TaskLoad> {
        let inputs = inputs::of_task(&inputs, &name)?.to_vec();
        Ok(TaskLoad { name, inputs })
    };
    let mut common = Map::new();
    if let Some(most) = args.max_tokens {
        common.insert("max_tokens".into(), json!(most));
    }
    if args.ignore_eos {
        common.insert("ignore_eos".into(), json!(true));
    }
    if let Some(words) = args.words {
        common.insert("controls".into(), json!({"words": words}));
    }
    Ok(Workload {
        tasks: names.into_iter().map(task).collect::<Result<_>>()?,
        completions: !args.model.is_empty(),
        common,
        seed: args.seed,
        timeout: Duration::from_secs_f64(args.timeout),
    })
}

/// The tasks that the server serves.
async fn listed_tasks(client: &Client) -> Result<Vec<String>> {
    let body = client.get("/v1/tasks").await.context("cannot list the tasks (or give --model)")?;
    let listing: Value = serde_json::from_slice(&body).context("GET /v1/tasks is not JSON")?;
    let entries = listing["data"].as_array().context("GET /v1/tasks has no data")?;
    let names: Vec<_> =
        entries.iter().filter_map(|t| t["id"].as_str()).map(str::to_owned).collect();
    if names.is_empty() {
        bail!("the server lists no tasks; give --model");
    }
    Ok(names)
}

/// CPU seconds of this thread so far; Linux only.
fn cpu_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: f64 = text.split(' ').next()?.parse().ok()?;
    Some(nanoseconds / 1e9)
}
