//! Every metric: one struct, one registration. Names and buckets follow the Prometheus conventions
//! (base units, bounded labels); the only label that grows with a deployment is `task`.
//!
//! The core feeds the engine's part, the shell the requests' part; nobody else registers anything.

use crate::ids::TaskId;
use crate::task::Task;
use crate::telemetry::now;
use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Latency buckets in seconds: from 0.5 ms, because small models are fast.
const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];
/// Inter-token buckets in seconds.
const INTER_TOKEN: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0];
const TOKENS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0];
const ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
const WORDS: &[f64] = &[0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0];

/// All of Shoal's metrics.
pub struct Metrics {
    registry: Registry,
    tasks: Vec<TaskMetrics>,
    requests: IntCounterVec,
    task_names: Vec<String>,
    slo: IntCounterVec,
    /// Sequences in the running batch.
    pub running: IntGauge,
    /// Sequences that wait for their first step.
    pub waiting: IntGauge,
    /// Sequences per step.
    pub batch_size: Histogram,
    /// Rows (tokens) per step.
    pub step_rows: Histogram,
    /// Seconds of steps that only decode.
    pub step_decode: Histogram,
    /// Seconds of steps that prefill, alone or beside decoding.
    pub step_prefill: Histogram,
    /// Steps that ended in an error or a panic.
    pub step_failures: IntCounter,
    /// Share of KV blocks in use, 0 to 1.
    pub kv_usage: Gauge,
    /// Sequences put back to waiting because KV blocks ran out.
    pub preemptions: IntCounter,
    /// Seconds that the work accepted so far will take at the measured rate.
    pub backlog: Gauge,
    startup: prometheus::GaugeVec,
}

/// The metrics of one task.
#[derive(Clone)]
pub struct TaskMetrics {
    /// Arrival to first step.
    pub queue: Histogram,
    /// First step to first token.
    pub prefill: Histogram,
    /// Arrival to first token.
    pub ttft: Histogram,
    /// Between two tokens of a sequence, measured at engine steps.
    pub inter_token: Histogram,
    /// Arrival to the end of the reply.
    pub duration: Histogram,
    /// Tokens per prompt.
    pub prompt_tokens: Histogram,
    /// Tokens per reply, over all its choices.
    pub generated_tokens: Histogram,
    /// Absolute difference between the words asked for and the words given.
    pub length_error: Histogram,
    /// Sequences of this task in the running batch.
    pub running: IntGauge,
    /// Sequences of this task that wait.
    pub waiting: IntGauge,
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> C {
    registry.register(Box::new(metric.clone())).expect("metric names are unique constants");
    metric
}

fn histogram(r: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    register(r, Histogram::with_opts(opts).expect("constant options are valid"))
}

fn per_task(r: &Registry, name: &str, help: &str, buckets: &[f64]) -> HistogramVec {
    let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    register(r, HistogramVec::new(opts, &["task"]).expect("constant options are valid"))
}

fn gauges(r: &Registry, name: &str, help: &str) -> IntGaugeVec {
    let opts = Opts::new(name, help);
    register(r, IntGaugeVec::new(opts, &["task"]).expect("constant options are valid"))
}

fn counters(r: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let opts = Opts::new(name, help);
    register(r, IntCounterVec::new(opts, labels).expect("constant options are valid"))
}

macro_rules! single {
    ($kind:ident, $registry:expr, $name:expr, $help:expr) => {
        register($registry, $kind::new($name, $help).expect("constant options are valid"))
    };
}

impl Metrics {
    /// Registers everything, for these task names in the order of their [`TaskId`]s.
    pub fn new(task_names: &[String]) -> Self {
        let registry = Registry::new();
        let r = &registry;
        let step = per_phase(r);
        let startup = prometheus::GaugeVec::new(
            Opts::new("shoal_startup_seconds", "Seconds spent in each phase of start-up."),
            &["phase"],
        );
        let build = IntGaugeVec::new(
            Opts::new("shoal_build_info", "Always 1; the version is in the label."),
            &["version"],
        );
        let build = register(r, build.expect("constant options are valid"));
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Self {
            tasks: task_metrics(r, task_names),
            requests: counters(
                r,
                "shoal_requests_total",
                "Requests by outcome.",
                &["task", "outcome"],
            ),
            slo: counters(
                r,
                "shoal_slo_requests_total",
                "Requests of tasks with a latency objective, by whether it was met.",
                &["task", "slo", "met"],
            ),
            task_names: task_names.to_vec(),
            running: single!(
                IntGauge,
                r,
                "shoal_requests_running",
                "Sequences in the running batch."
            ),
            waiting: single!(IntGauge, r, "shoal_requests_waiting", "Sequences waiting to run."),
            batch_size: histogram(r, "shoal_batch_size", "Sequences per step.", ROWS),
            step_rows: histogram(r, "shoal_step_rows", "Rows (tokens) per step.", ROWS),
            step_decode: step.with_label_values(&["decode"]),
            step_prefill: step.with_label_values(&["prefill"]),
            step_failures: single!(
                IntCounter,
                r,
                "shoal_step_failures_total",
                "Steps that ended in an error or a panic."
            ),
            kv_usage: single!(Gauge, r, "shoal_kv_cache_usage_ratio", "Share of KV blocks in use."),
            preemptions: single!(
                IntCounter,
                r,
                "shoal_preemptions_total",
                "Sequences put back to waiting because KV blocks ran out."
            ),
            backlog: single!(
                Gauge,
                r,
                "shoal_backlog_seconds",
                "Seconds that the accepted work will take at the measured rate."
            ),
            startup: register(r, startup.expect("constant options are valid")),
            registry,
        }
    }

    /// The metrics of one task.
    pub fn task(&self, id: TaskId) -> &TaskMetrics {
        &self.tasks[usize::from(id.0)]
    }

    /// Counts a request that ended with `outcome`; `None` is a request whose task is unknown.
    pub fn count_request(&self, task: Option<TaskId>, outcome: &str) {
        let task = task.map_or("other", |id| self.task_names[usize::from(id.0)].as_str());
        self.requests.with_label_values(&[task, outcome]).inc();
    }

    /// Counts a request against its task's objective `slo` (such as `ttft`).
    pub fn count_slo(&self, task: TaskId, slo: &str, met: bool) {
        let met = if met { "true" } else { "false" };
        let task = self.task_names[usize::from(task.0)].as_str();
        self.slo.with_label_values(&[task, slo, met]).inc();
    }

    /// Records how long a phase of start-up took.
    pub fn startup(&self, phase: &str, seconds: f64) {
        self.startup.with_label_values(&[phase]).set(seconds);
    }

    /// Publishes what the KV pool can hold.
    pub fn publish_kv_size(&self, blocks: usize, block_size: usize) {
        let opts = Opts::new("shoal_kv_cache_info", "Always 1; the pool's size is in the labels.");
        let info = IntGaugeVec::new(opts, &["block_size", "blocks"]);
        let info = register(&self.registry, info.expect("constant options are valid"));
        let labels = [block_size.to_string(), blocks.to_string()];
        info.with_label_values(&labels).set(1);
    }

    /// Prometheus text exposition of everything.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::with_capacity(1 << 16);
        let families = self.registry.gather();
        TextEncoder::new().encode(&families, &mut text).expect("writing to memory");
        text
    }
}

fn per_phase(r: &Registry) -> HistogramVec {
    let opts = HistogramOpts::new("shoal_step_seconds", "Seconds per engine step, by phase.")
        .buckets(INTER_TOKEN.to_vec());
    register(r, HistogramVec::new(opts, &["phase"]).expect("constant options are valid"))
}

fn task_metrics(r: &Registry, names: &[String]) -> Vec<TaskMetrics> {
    let queue = per_task(r, "shoal_request_queue_seconds", "Arrival to first step.", SECONDS);
    let prefill =
        per_task(r, "shoal_request_prefill_seconds", "First step to first token.", SECONDS);
    let ttft = per_task(r, "shoal_time_to_first_token_seconds", "Arrival to first token.", SECONDS);
    let inter_token =
        per_task(r, "shoal_inter_token_seconds", "Between two tokens of a sequence.", INTER_TOKEN);
    let duration = per_task(r, "shoal_request_duration_seconds", "Arrival to last byte.", SECONDS);
    let prompt = per_task(r, "shoal_request_prompt_tokens", "Tokens per prompt.", TOKENS);
    let generated = per_task(r, "shoal_request_generated_tokens", "Tokens per reply.", TOKENS);
    let length_error = per_task(
        r,
        "shoal_length_error_words",
        "Absolute difference between words asked for and words given.",
        WORDS,
    );
    let running = gauges(r, "shoal_task_requests_running", "Sequences in the running batch.");
    let waiting = gauges(r, "shoal_task_requests_waiting", "Sequences waiting to run.");
    names
        .iter()
        .map(|name| {
            let l = &[name.as_str()];
            TaskMetrics {
                queue: queue.with_label_values(l),
                prefill: prefill.with_label_values(l),
                ttft: ttft.with_label_values(l),
                inter_token: inter_token.with_label_values(l),
                duration: duration.with_label_values(l),
                prompt_tokens: prompt.with_label_values(l),
                generated_tokens: generated.with_label_values(l),
                length_error: length_error.with_label_values(l),
                running: running.with_label_values(l),
                waiting: waiting.with_label_values(l),
            }
        })
        .collect()
}

/// Watches one request and records it when dropped, exactly once. A request that nobody
/// [ended](RequestMeter::end) was cancelled.
pub struct RequestMeter {
    metrics: Arc<Metrics>,
    arrived: Instant,
    task: Option<TaskId>,
    /// The task's objective for the first token.
    objective: Option<Duration>,
    /// The wanted number of words.
    wanted_words: Option<i64>,
    words: Vec<u32>,
    first_token: Option<Instant>,
    generated_tokens: u32,
    outcome: Option<&'static str>,
    /// Tokens of the prompts; `None` while the engine has not accepted them.
    pub prompt_tokens: Option<u32>,
}

impl RequestMeter {
    /// Begins to watch a request that came in at `arrived`.
    pub fn new(metrics: Arc<Metrics>, arrived: Instant) -> Self {
        Self {
            metrics,
            arrived,
            task: None,
            objective: None,
            wanted_words: None,
            words: Vec::new(),
            first_token: None,
            generated_tokens: 0,
            outcome: None,
            prompt_tokens: None,
        }
    }

    /// The request is for `task`, with these controls.
    pub fn task(&mut self, task: &Task, controls: &BTreeMap<String, Value>) {
        self.task = Some(task.id);
        self.objective = task.slo.ttft_ms.map(|ms| Duration::from_secs_f64(ms / 1000.0));
        let usual = || task.controls.get("words")?.default.as_ref()?.parse().ok();
        self.wanted_words = match controls.get("words") {
            Some(given) => given.as_i64(),
            None => usual(),
        };
    }

    /// A token came out.
    pub fn token(&mut self) {
        self.first_token.get_or_insert_with(now);
        self.generated_tokens += 1;
    }

    /// A text ended with this many words.
    pub fn text(&mut self, words: u32) {
        self.words.push(words);
    }

    /// The request ended; the first outcome counts.
    pub fn end(&mut self, outcome: &'static str) {
        self.outcome.get_or_insert(outcome);
    }

    /// Whether the first token met the objective, or the end did where no token was wanted; `None`
    /// where the client left before it was due.
    fn met(&self, objective: Duration, ended: Instant) -> Option<bool> {
        let due = self.arrived + objective;
        match (self.first_token, self.outcome) {
            (Some(at), _) => Some(at <= due),
            (None, Some("ok")) => Some(ended <= due),
            (None, None) if ended < due => None,
            (None, _) => Some(false),
        }
    }
}

impl Drop for RequestMeter {
    fn drop(&mut self) {
        self.metrics.count_request(self.task, self.outcome.unwrap_or("cancelled"));
        let (Some(id), Some(prompt_tokens)) = (self.task, self.prompt_tokens) else { return };
        let ended = now();
        let task = self.metrics.task(id);
        task.duration.observe((ended - self.arrived).as_secs_f64());
        task.prompt_tokens.observe(f64::from(prompt_tokens));
        task.generated_tokens.observe(f64::from(self.generated_tokens));
        if let Some(wanted) = self.wanted_words {
            for &words in &self.words {
                task.length_error.observe((i64::from(words) - wanted).unsigned_abs() as f64);
            }
        }
        if let Some(met) = self.objective.and_then(|objective| self.met(objective, ended)) {
            self.metrics.count_slo(id, "ttft", met);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Params;
    use crate::task::{Control, ControlKind, Limits, Slo};

    fn task() -> Task {
        Task {
            id: TaskId(0),
            name: "image".into(),
            description: String::new(),
            template: String::new(),
            adapter: None,
            controls: BTreeMap::new(),
            defaults: Params::default(),
            limits: Limits::default(),
            slo: Slo { ttft_ms: Some(1e6), ..Slo::default() },
        }
    }

    fn meter(metrics: &Arc<Metrics>) -> RequestMeter {
        let mut meter = RequestMeter::new(metrics.clone(), now());
        meter.task(&task(), &[("words".to_string(), 9.into())].into());
        meter.prompt_tokens = Some(3);
        meter
    }

    #[test]
    fn a_request_is_recorded_once_with_its_first_outcome() {
        let metrics = Arc::new(Metrics::new(&["image".to_string()]));
        let mut ok = meter(&metrics);
        ok.token();
        ok.text(7);
        ok.end("ok");
        ok.end("internal");
        drop(ok);
        drop(meter(&metrics));
        drop(RequestMeter::new(metrics.clone(), now()));
        let page = String::from_utf8(metrics.render()).unwrap();
        for line in [
            "shoal_requests_total{outcome=\"ok\",task=\"image\"} 1",
            "shoal_requests_total{outcome=\"cancelled\",task=\"image\"} 1",
            "shoal_requests_total{outcome=\"cancelled\",task=\"other\"} 1",
            "shoal_slo_requests_total{met=\"true\",slo=\"ttft\",task=\"image\"} 1",
            "shoal_length_error_words_sum{task=\"image\"} 2",
            "shoal_request_prompt_tokens_sum{task=\"image\"} 6",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
        }
        assert!(!page.contains("met=\"false\""), "who left early says nothing of the objective");
    }

    #[test]
    fn an_answer_without_tokens_meets_its_objective_by_its_end() {
        for (objective, met) in [(1e6, "true"), (1e-6, "false")] {
            let metrics = Arc::new(Metrics::new(&["image".to_string()]));
            let mut meter = RequestMeter::new(metrics.clone(), now());
            let slo = Slo { ttft_ms: Some(objective), ..Slo::default() };
            meter.task(&Task { slo, ..task() }, &BTreeMap::new());
            meter.prompt_tokens = Some(3);
            meter.end("ok");
            drop(meter);
            let page = String::from_utf8(metrics.render()).unwrap();
            let line =
                format!("shoal_slo_requests_total{{met=\"{met}\",slo=\"ttft\",task=\"image\"}} 1");
            assert!(page.contains(&line), "{page}");
        }
    }

    #[test]
    fn the_wanted_length_may_be_the_tasks_own() {
        let metrics = Arc::new(Metrics::new(&["image".to_string()]));
        let kind = ControlKind::Integer { minimum: 3, maximum: 60 };
        let words = Control { kind, token: "<|words:{}|>".into(), default: Some("20".into()) };
        let mut meter = RequestMeter::new(metrics.clone(), now());
        let task = Task { controls: [("words".to_string(), words)].into(), ..task() };
        meter.task(&task, &BTreeMap::new());
        meter.prompt_tokens = Some(3);
        meter.text(15);
        drop(meter);
        let page = String::from_utf8(metrics.render()).unwrap();
        assert!(page.contains("shoal_length_error_words_sum{task=\"image\"} 5"), "{page}");
    }
}
