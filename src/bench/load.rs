//! The two shapes of load. *Closed loop*: a fixed number of streams, each sends its next request when
//! the last one ended. *Open loop*: requests arrive at random times that do not depend on the server,
//! and all latencies count from the intended arrival, so a server that falls behind cannot hide it.

use super::client::{Client, Failure, Reply};
use crate::telemetry;
use futures::StreamExt;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// What to send: requests numbered from 0, the tasks taking turns.
pub struct Workload {
    /// At least one.
    pub tasks: Vec<TaskLoad>,
    /// Whether the tasks are model ids for `/v1/completions` rather than native tasks.
    pub completions: bool,
    /// Fields that every body carries.
    pub common: Map<String, Value>,
    /// Request `i` asks for this seed plus `i`.
    pub seed: u64,
    /// A request that takes longer has failed.
    pub timeout: Duration,
}

/// One task's part of the load.
pub struct TaskLoad {
    /// Its name on the wire.
    pub name: String,
    /// Used in turn; at least one.
    pub inputs: Vec<String>,
}

/// What became of one request.
pub struct Sample {
    /// Index into [`Workload::tasks`].
    pub task: usize,
    /// From the intended arrival until this generator really sent it.
    pub lag: Duration,
    /// How it ended.
    pub result: Result<Reply, Failure>,
}

/// When to stop sending; requests under way are always waited for.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// After this many requests.
    pub requests: Option<u64>,
    /// After this much time.
    pub duration: Option<Duration>,
}

impl Limit {
    fn allows(&self, request: u64, elapsed: Duration) -> bool {
        self.requests.is_none_or(|most| request < most) && self.duration.is_none_or(|d| elapsed < d)
    }
}

impl Workload {
    fn task_of(&self, request: u64) -> (usize, &TaskLoad) {
        let task = (request % self.tasks.len() as u64) as usize;
        (task, &self.tasks[task])
    }

    /// Path and body of a request.
    pub fn request(&self, request: u64) -> (String, Vec<u8>) {
        let (_, task) = self.task_of(request);
        let turn = request / self.tasks.len() as u64;
        let input = &task.inputs[(turn % task.inputs.len() as u64) as usize];
        let mut body = self.common.clone();
        body.insert("seed".into(), json!(self.seed.wrapping_add(request) & i64::MAX as u64));
        body.insert("stream".into(), json!(true));
        let path = if self.completions {
            body.insert("model".into(), json!(task.name));
            body.insert("prompt".into(), json!(input));
            body.insert("stream_options".into(), json!({"include_usage": true}));
            "/v1/completions".to_owned()
        } else {
            body.insert("input".into(), json!(input));
            format!("/v1/tasks/{}/generate", task.name)
        };
        (path, Value::Object(body).to_string().into_bytes())
    }

    /// Sends one request that was due at `due` and waits for its end.
    pub async fn send(&self, client: &Client, request: u64, due: Instant) -> Sample {
        let (path, body) = self.request(request);
        let lag = telemetry::now().saturating_duration_since(due);
        let reply = client.stream(&path, body, due);
        let result = tokio::time::timeout(self.timeout, reply).await.unwrap_or_else(|_| {
            Err(Failure::new("timeout", format!("no end within {:?}", self.timeout)))
        });
        Sample { task: self.task_of(request).0, lag, result }
    }

    /// Keeps `streams` requests under way until `limit`.
    pub async fn closed(&self, client: &Client, streams: usize, limit: Limit) -> Vec<Sample> {
        let start = telemetry::now();
        let next = Cell::new(0);
        let stream = async || {
            let mut samples = Vec::new();
            loop {
                let request = next.get();
                let now = telemetry::now();
                if !limit.allows(request, now - start) {
                    return samples;
                }
                next.set(request + 1);
                samples.push(self.send(client, request, now).await);
            }
        };
        join_all((0..streams).map(|_| stream())).await.into_iter().flatten().collect()
    }

    /// Sends at the times of [`arrivals`] until `limit`, however many are under way.
    pub async fn open(&self, client: &Client, rate: f64, limit: Limit) -> Vec<Sample> {
        let start = telemetry::now();
        let mut under_way = FuturesUnordered::new();
        let mut samples = Vec::new();
        for (request, at) in (0..).zip(arrivals(rate, self.seed)) {
            if !limit.allows(request, at) {
                break;
            }
            let due = start + at;
            loop {
                tokio::select! {
                    Some(sample) = under_way.next() => samples.push(sample),
                    () = tokio::time::sleep_until(due.into()) => break,
                }
            }
            under_way.push(self.send(client, request, due));
        }
        while let Some(sample) = under_way.next().await {
            samples.push(sample);
        }
        samples
    }
}

/// A Poisson process: independent, exponentially distributed gaps of `1 / rate` seconds on average.
/// The same seed gives the same schedule.
pub fn arrivals(rate: f64, seed: u64) -> impl Iterator<Item = Duration> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut at = 0.0;
    std::iter::repeat_with(move || {
        at -= (1.0 - rng.random::<f64>()).ln() / rate;
        Duration::from_secs_f64(at)
    })
}
