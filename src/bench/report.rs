//! From samples to figures: percentiles per task, a table for people and JSON for programs.

use super::Args;
use super::load::{Sample, Workload};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// All runs of one call.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of the generator.
    pub shoal: &'static str,
    /// How it was called.
    pub options: Args,
    /// One run per number of streams, or per rate.
    pub runs: Vec<Run>,
}

/// One load, from its first request to the end of its last.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// What was kept constant.
    pub load: Load,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// CPU seconds that the generator itself used; `None` where the system does not say.
    pub generator_cpu_seconds: Option<f64>,
    /// How late the generator sent requests, in milliseconds (always 0 in a closed loop).
    pub generator_lag_ms: Option<Percentiles>,
    /// One row per task, and `all` at the end when there are several.
    pub rows: Vec<Row>,
}

/// The shape of a run's load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Load {
    /// Closed loop: this many requests under way at any time.
    Streams(usize),
    /// Open loop: this many arrivals a second on average.
    Rate(f64),
}

/// Figures of one task.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The task, or `all`.
    pub task: String,
    /// Requests sent.
    pub requests: u64,
    /// Requests that failed, by kind, each with the first one's text.
    pub errors: BTreeMap<String, Errors>,
    /// Tokens of the prompts that were answered, as the server counts them.
    pub prompt_tokens: u64,
    /// Tokens generated in replies that ended well.
    pub tokens: u64,
    /// `tokens` over the run's seconds.
    pub tokens_per_second: f64,
    /// `tokens` over the summed seconds of the replies: what one client sees.
    pub tokens_per_second_per_stream: f64,
    /// From the request (open loop: its intended arrival) to the first token, in milliseconds.
    pub ttft_ms: Option<Percentiles>,
    /// Between consecutive tokens of a reply, as they arrive here, in milliseconds.
    pub inter_token_ms: Option<Percentiles>,
    /// From the request (open loop: its intended arrival) to the end of the reply, in milliseconds.
    pub end_to_end_ms: Option<Percentiles>,
}

/// Failed requests of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Errors {
    /// How many.
    pub count: u64,
    /// The first one's text.
    pub first: String,
}

/// Percentiles by nearest rank: each is a value that was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half are not above it.
    pub p50: f64,
    /// Nine of ten are not above it.
    pub p90: f64,
    /// 99 of 100 are not above it.
    pub p99: f64,
    /// None is above it.
    pub max: f64,
}

impl Report {
    /// How many requests failed, over all runs.
    pub fn failed(&self) -> u64 {
        self.runs.iter().filter_map(Run::total).map(Row::failed).sum()
    }
}

impl Percentiles {
    /// Of these values; `None` if there are none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        let max = *values.last()?;
        let rank = |percent: usize| values[(values.len() * percent).div_ceil(100).max(1) - 1];
        Some(Self { p50: rank(50), p90: rank(90), p99: rank(99), max })
    }

    fn of_ms<'a>(durations: impl Iterator<Item = &'a Duration>) -> Option<Self> {
        Self::of(durations.map(|d| d.as_secs_f64() * 1e3).collect())
    }
}

impl Run {
    /// The figures of `samples`, taken in `seconds`.
    pub fn new(load: Load, workload: &Workload, samples: &[Sample], seconds: f64) -> Self {
        let mut rows = Vec::new();
        for (index, task) in workload.tasks.iter().enumerate() {
            let own: Vec<_> = samples.iter().filter(|s| s.task == index).collect();
            rows.push(Row::new(&task.name, &own, seconds));
        }
        if rows.len() > 1 {
            rows.push(Row::new("all", &samples.iter().collect::<Vec<_>>(), seconds));
        }
        let lag = Percentiles::of_ms(samples.iter().map(|s| &s.lag));
        Self { load, seconds, generator_cpu_seconds: None, generator_lag_ms: lag, rows }
    }

    /// The row over all tasks.
    pub fn total(&self) -> Option<&Row> {
        self.rows.last()
    }
}

impl Row {
    fn new(task: &str, samples: &[&Sample], seconds: f64) -> Self {
        let mut errors: BTreeMap<String, Errors> = BTreeMap::new();
        let mut replies = Vec::new();
        for sample in samples {
            match &sample.result {
                Ok(reply) => replies.push(reply),
                Err(failure) => {
                    let first = || Errors { count: 0, first: failure.detail.clone() };
                    errors.entry(failure.kind.clone()).or_insert_with(first).count += 1;
                }
            }
        }
        let tokens: u64 = replies.iter().map(|r| r.tokens).sum();
        let busy: f64 = replies.iter().map(|r| r.end.as_secs_f64()).sum();
        let per = |time: f64| if time > 0.0 { tokens as f64 / time } else { 0.0 };
        Self {
            task: task.to_owned(),
            requests: samples.len() as u64,
            errors,
            prompt_tokens: replies.iter().map(|r| r.prompt_tokens).sum(),
            tokens,
            tokens_per_second: per(seconds),
            tokens_per_second_per_stream: per(busy),
            ttft_ms: Percentiles::of_ms(replies.iter().filter_map(|r| r.first_token.as_ref())),
            inter_token_ms: Percentiles::of_ms(replies.iter().flat_map(|r| &r.gaps)),
            end_to_end_ms: Percentiles::of_ms(replies.iter().map(|r| &r.end)),
        }
    }

    /// How many of its requests failed.
    pub fn failed(&self) -> u64 {
        self.errors.values().map(|e| e.count).sum()
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Streams(1) => f.write_str("closed loop, 1 stream"),
            Self::Streams(streams) => write!(f, "closed loop, {streams} streams"),
            Self::Rate(rate) => write!(f, "open loop, {rate} requests/s"),
        }
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:.1} s", self.load, self.seconds)?;
        if let Some(cpu) = self.generator_cpu_seconds {
            write!(f, ", generator CPU {cpu:.2} s")?;
        }
        if let (Load::Rate(_), Some(lag)) = (self.load, &self.generator_lag_ms) {
            write!(f, ", generator lag {:.1} ms p50, {:.1} ms p99", lag.p50, lag.p99)?;
        }
        let width = self.rows.iter().map(|r| r.task.len()).max().unwrap_or(0).max("task".len());
        write!(
            f,
            "\n{:width$} {:>8} {:>6} {:>8} {:>8} {:>8}  {:^26}  {:^23}  {:^26}\n",
            "task",
            "requests",
            "errors",
            "tokens",
            "tok/s",
            "/stream",
            "TTFT ms p50/p90/p99",
            "inter-token ms",
            "end-to-end ms",
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "{:width$} {:>8} {:>6} {:>8} {:>8.1} {:>8.1}  {}  {}  {}",
                row.task,
                row.requests,
                row.failed(),
                row.tokens,
                row.tokens_per_second,
                row.tokens_per_second_per_stream,
                three(row.ttft_ms, 8, 1),
                three(row.inter_token_ms, 7, 2),
                three(row.end_to_end_ms, 8, 1),
            )?;
        }
        for (kind, errors) in self.total().map(|row| &row.errors).into_iter().flatten() {
            writeln!(f, "  {} x {kind}: {}", errors.count, errors.first)?;
        }
        Ok(())
    }
}

fn three(percentiles: Option<Percentiles>, width: usize, decimals: usize) -> String {
    let values = percentiles.map(|p| [p.p50, p.p90, p.p99]);
    let cell = |value: f64| format!("{value:>width$.decimals$}");
    values.map_or_else(|| format!("{:>1$}", "-", 3 * width + 2), |v| v.map(cell).join(" "))
}
