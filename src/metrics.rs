//! Every metric: one struct, one registration. Names and buckets follow the Prometheus conventions
//! (base units, bounded labels); the only label that grows with a deployment is `task`.
//!
//! The core feeds the engine's part, the shell the requests' part; nobody else registers anything. What a
//! deployment cannot feed (experts, adapters) is registered only where it can.

mod request;

pub use request::RequestMeter;

use crate::ids::TaskId;
use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

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
    families: TaskFamilies,
    /// By id.
    tasks: RwLock<Vec<Arc<TaskMetrics>>>,
    requests: IntCounterVec,
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
    /// Tokens of starting sequences that were looked for in the prefix cache.
    pub prefix_queries: IntCounter,
    /// How many of them were there.
    pub prefix_hits: IntCounter,
    router: OnceLock<RouterMetrics>,
    adapters: OnceLock<AdapterMetrics>,
    startup: prometheus::GaugeVec,
}

/// Where rows went, of a model with experts.
pub struct RouterMetrics {
    /// Rows by group of layers, expert and task.
    pub expert_rows: IntCounterVec,
    /// Entropy of the gates' softmax over its largest possible value, mean of the last step's rows.
    pub gate_entropy: Gauge,
    /// Entropy of the experts' recent shares of the rows over its largest possible value: 1 is even.
    pub balance: Gauge,
}

/// What happens to adapters.
pub struct AdapterMetrics {
    /// Seconds to load one, successful or not.
    pub load_seconds: Histogram,
    /// Loads by outcome: `ok` or `error`.
    pub loads: IntCounterVec,
    /// Adapters given up to make room for others.
    pub evictions: IntCounter,
    /// Adapters that can be asked for.
    pub resident: IntGauge,
    /// Their bytes in memory.
    pub resident_bytes: IntGauge,
    /// Always 1; name, generation, kind and rank are in the labels.
    pub info: IntGaugeVec,
}

/// The metrics of one task.
#[derive(Debug)]
pub struct TaskMetrics {
    /// Its name, the value of the label.
    pub name: String,
    /// Rows (tokens) computed.
    pub rows: IntCounter,
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
        publish_version(r);
        let families = TaskFamilies::new(r);
        let tasks = task_names.iter().map(|name| Arc::new(families.of(name))).collect();
        Self {
            tasks: RwLock::new(tasks),
            families,
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
            prefix_queries: single!(
                IntCounter,
                r,
                "shoal_prefix_cache_queries_tokens_total",
                "Tokens of starting sequences looked for in the prefix cache."
            ),
            prefix_hits: single!(
                IntCounter,
                r,
                "shoal_prefix_cache_hits_tokens_total",
                "Tokens of starting sequences found in the prefix cache."
            ),
            router: OnceLock::new(),
            adapters: OnceLock::new(),
            startup: startup(r),
            registry,
        }
    }

    /// The metrics of one task.
    pub fn task(&self, id: TaskId) -> Arc<TaskMetrics> {
        self.tasks.read().unwrap_or_else(PoisonError::into_inner)[usize::from(id.0)].clone()
    }

    /// The metrics of all tasks, in the order of their ids.
    pub fn all_tasks(&self) -> Vec<Arc<TaskMetrics>> {
        self.tasks.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Registers one more task; its id is the next one.
    pub fn add_task(&self, name: &str) -> Arc<TaskMetrics> {
        let task = Arc::new(self.families.of(name));
        self.tasks.write().unwrap_or_else(PoisonError::into_inner).push(task.clone());
        task
    }

    /// Counts a request that ended with `outcome`; `None` is a request whose task is unknown.
    pub fn count_request(&self, task: Option<TaskId>, outcome: &str) {
        let task = task.map(|id| self.task(id));
        let name = task.as_ref().map_or("other", |task| task.name.as_str());
        self.requests.with_label_values(&[name, outcome]).inc();
    }

    /// Counts a request against its task's objective `slo` (such as `ttft`).
    pub fn count_slo(&self, task: TaskId, slo: &str, met: bool) {
        let met = if met { "true" } else { "false" };
        self.slo.with_label_values(&[self.task(task).name.as_str(), slo, met]).inc();
    }

    /// The metrics of experts, registered when first asked for.
    pub fn router(&self) -> &RouterMetrics {
        self.router.get_or_init(|| RouterMetrics::new(&self.registry))
    }

    /// The metrics of adapters, registered when first asked for.
    pub fn adapters(&self) -> &AdapterMetrics {
        self.adapters.get_or_init(|| AdapterMetrics::new(&self.registry))
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

fn publish_version(r: &Registry) {
    let opts = Opts::new("shoal_build_info", "Always 1; the version is in the label.");
    let build = IntGaugeVec::new(opts, &["version"]).expect("constant options are valid");
    register(r, build).with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
}

fn startup(r: &Registry) -> prometheus::GaugeVec {
    let opts = Opts::new("shoal_startup_seconds", "Seconds spent in each phase of start-up.");
    let phases = prometheus::GaugeVec::new(opts, &["phase"]);
    register(r, phases.expect("constant options are valid"))
}

fn per_phase(r: &Registry) -> HistogramVec {
    let opts = HistogramOpts::new("shoal_step_seconds", "Seconds per engine step, by phase.")
        .buckets(INTER_TOKEN.to_vec());
    register(r, HistogramVec::new(opts, &["phase"]).expect("constant options are valid"))
}

impl RouterMetrics {
    fn new(r: &Registry) -> Self {
        Self {
            expert_rows: counters(
                r,
                "shoal_router_expert_tokens_total",
                "Tokens that went to an expert, by third of the layers, expert and task.",
                &["layer_group", "expert", "task"],
            ),
            gate_entropy: single!(
                Gauge,
                r,
                "shoal_router_gate_entropy_ratio",
                "Entropy of the gates over its maximum, mean of the last step."
            ),
            balance: single!(
                Gauge,
                r,
                "shoal_router_balance_ratio",
                "Entropy of the experts' recent load over its maximum; 1 is even."
            ),
        }
    }
}

impl AdapterMetrics {
    fn new(r: &Registry) -> Self {
        let info = Opts::new("shoal_adapters_info", "Always 1 for each adapter that is loaded.");
        let info = IntGaugeVec::new(info, &["adapter", "generation", "kind", "rank"]);
        Self {
            load_seconds: histogram(
                r,
                "shoal_adapter_load_seconds",
                "Seconds to load an adapter.",
                SECONDS,
            ),
            loads: counters(r, "shoal_adapter_loads_total", "Loads by outcome.", &["outcome"]),
            evictions: single!(
                IntCounter,
                r,
                "shoal_adapter_evictions_total",
                "Adapters given up to make room for others."
            ),
            resident: single!(IntGauge, r, "shoal_adapters_resident", "Adapters loaded."),
            resident_bytes: single!(
                IntGauge,
                r,
                "shoal_adapters_resident_bytes",
                "Memory that loaded adapters take."
            ),
            info: register(r, info.expect("constant options are valid")),
        }
    }
}

/// The metrics that there are once per task.
struct TaskFamilies {
    rows: IntCounterVec,
    queue: HistogramVec,
    prefill: HistogramVec,
    ttft: HistogramVec,
    inter_token: HistogramVec,
    duration: HistogramVec,
    prompt: HistogramVec,
    generated: HistogramVec,
    length_error: HistogramVec,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
}

impl TaskFamilies {
    fn new(r: &Registry) -> Self {
        let (ttft, inter_token) =
            ("shoal_time_to_first_token_seconds", "shoal_inter_token_seconds");
        Self {
            rows: counters(r, "shoal_task_rows_total", "Rows (tokens) computed.", &["task"]),
            queue: per_task(r, "shoal_request_queue_seconds", "Arrival to first step.", SECONDS),
            prefill: per_task(
                r,
                "shoal_request_prefill_seconds",
                "First step to first token.",
                SECONDS,
            ),
            ttft: per_task(r, ttft, "Arrival to first token.", SECONDS),
            inter_token: per_task(r, inter_token, "Between two tokens of a sequence.", INTER_TOKEN),
            duration: per_task(
                r,
                "shoal_request_duration_seconds",
                "Arrival to last byte.",
                SECONDS,
            ),
            prompt: per_task(r, "shoal_request_prompt_tokens", "Tokens per prompt.", TOKENS),
            generated: per_task(r, "shoal_request_generated_tokens", "Tokens per reply.", TOKENS),
            length_error: per_task(
                r,
                "shoal_length_error_words",
                "Absolute difference between words asked for and words given.",
                WORDS,
            ),
            running: gauges(r, "shoal_task_requests_running", "Sequences in the running batch."),
            waiting: gauges(r, "shoal_task_requests_waiting", "Sequences waiting to run."),
        }
    }

    fn of(&self, name: &str) -> TaskMetrics {
        let l = &[name];
        TaskMetrics {
            name: name.to_owned(),
            rows: self.rows.with_label_values(l),
            queue: self.queue.with_label_values(l),
            prefill: self.prefill.with_label_values(l),
            ttft: self.ttft.with_label_values(l),
            inter_token: self.inter_token.with_label_values(l),
            duration: self.duration.with_label_values(l),
            prompt_tokens: self.prompt.with_label_values(l),
            generated_tokens: self.generated.with_label_values(l),
            length_error: self.length_error.with_label_values(l),
            running: self.running.with_label_values(l),
            waiting: self.waiting.with_label_values(l),
        }
    }
}
