//! What `/metrics` says after known traffic, and the names that dashboards rely on.

use crate::harness::{Server, Setup, repeater};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Every family of `/metrics` with its type. A name that changes here breaks somebody's dashboard.
const FAMILIES: [(&str, &str); 27] = [
    ("shoal_prefix_cache_hits_tokens_total", "counter"),
    ("shoal_prefix_cache_queries_tokens_total", "counter"),
    ("shoal_task_rows_total", "counter"),
    ("shoal_backlog_seconds", "gauge"),
    ("shoal_batch_size", "histogram"),
    ("shoal_build_info", "gauge"),
    ("shoal_inter_token_seconds", "histogram"),
    ("shoal_kv_cache_info", "gauge"),
    ("shoal_kv_cache_usage_ratio", "gauge"),
    ("shoal_length_error_words", "histogram"),
    ("shoal_preemptions_total", "counter"),
    ("shoal_request_duration_seconds", "histogram"),
    ("shoal_request_generated_tokens", "histogram"),
    ("shoal_request_prefill_seconds", "histogram"),
    ("shoal_request_prompt_tokens", "histogram"),
    ("shoal_request_queue_seconds", "histogram"),
    ("shoal_requests_running", "gauge"),
    ("shoal_requests_total", "counter"),
    ("shoal_requests_waiting", "gauge"),
    ("shoal_slo_requests_total", "counter"),
    ("shoal_startup_seconds", "gauge"),
    ("shoal_step_failures_total", "counter"),
    ("shoal_step_rows", "histogram"),
    ("shoal_step_seconds", "histogram"),
    ("shoal_task_requests_running", "gauge"),
    ("shoal_task_requests_waiting", "gauge"),
    ("shoal_time_to_first_token_seconds", "histogram"),
];

/// A page of metrics, taken apart by the rules of the text format.
struct Page {
    types: BTreeMap<String, String>,
    series: BTreeMap<String, f64>,
}

impl Page {
    async fn of(server: &Server) -> Self {
        let reply = server.client.get("/metrics").await;
        assert_eq!(reply.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
        let (mut types, mut series) = (BTreeMap::new(), BTreeMap::new());
        for line in String::from_utf8(reply.body).unwrap().lines() {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(types.insert(name.to_string(), kind.to_string()).is_none(), "{name} twice");
            } else if !line.starts_with("# HELP ") {
                let (name, value) = line.rsplit_once(' ').unwrap();
                let family = name.split('{').next().unwrap();
                assert!(family.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{family}");
                let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
                assert!(series.insert(name.to_string(), value).is_none(), "{name} twice");
            }
        }
        Self { types, series }
    }

    fn value(&self, series: &str) -> f64 {
        *self.series.get(series).unwrap_or_else(|| panic!("no {series}"))
    }

    fn task(&self, name: &str, task: &str) -> f64 {
        self.value(&format!("{name}{{task=\"{task}\"}}"))
    }
}

/// What a client saw of one task's requests.
#[derive(Default)]
struct Seen {
    requests: f64,
    prompt_tokens: f64,
    completion_tokens: f64,
    time: Duration,
}

fn now() -> std::time::Instant {
    shoal::telemetry::now()
}

/// Asks `task` for `count` texts one after the other, half of them as streams.
async fn traffic(server: &Server, task: &str, count: usize) -> Seen {
    let mut seen = Seen::default();
    let path = format!("/v1/tasks/{task}/generate");
    for i in 0..count {
        let mut body = json!({"input": "one two three four", "controls": {"words": 10 + i}});
        let begin = now();
        let usage = if i % 2 == 0 {
            server.client.post(&path, &body).await.json()["usage"].clone()
        } else {
            body["stream"] = json!(true);
            server.client.stream(&path, &body).await.rest().await.pop().unwrap()["usage"].clone()
        };
        seen.time += begin.elapsed();
        seen.requests += 1.0;
        seen.prompt_tokens += usage["prompt_tokens"].as_f64().unwrap();
        seen.completion_tokens += usage["completion_tokens"].as_f64().unwrap();
    }
    seen
}

#[tokio::test]
async fn counts_are_exact_and_sums_agree_with_the_client() {
    let server = Server::usual().await;
    for (task, count) in [("image", 2), ("music", 3), ("video", 5)] {
        let seen = traffic(&server, task, count).await;
        let page = Page::of(&server).await;
        let ok = format!("shoal_requests_total{{outcome=\"ok\",task=\"{task}\"}}");
        assert_eq!(page.value(&ok), seen.requests);
        for name in [
            "shoal_request_queue_seconds",
            "shoal_request_prefill_seconds",
            "shoal_time_to_first_token_seconds",
            "shoal_request_duration_seconds",
            "shoal_request_prompt_tokens",
            "shoal_request_generated_tokens",
            "shoal_length_error_words",
        ] {
            assert_eq!(page.task(&format!("{name}_count"), task), seen.requests, "{name}");
        }
        assert_eq!(page.task("shoal_request_prompt_tokens_sum", task), seen.prompt_tokens);
        assert_eq!(page.task("shoal_request_generated_tokens_sum", task), seen.completion_tokens);
        // One gap follows each token: the last is that to the end-of-text token.
        assert_eq!(page.task("shoal_inter_token_seconds_count", task), seen.completion_tokens);
        // Four words were given for 10, 11, ... asked for.
        let error: usize = (0..count).map(|i| 6 + i).sum();
        assert_eq!(page.task("shoal_length_error_words_sum", task), error as f64);

        let sum = |name: &str| page.task(&format!("{name}_sum"), task);
        let duration = sum("shoal_request_duration_seconds");
        let first = sum("shoal_time_to_first_token_seconds");
        let later = sum("shoal_inter_token_seconds");
        assert!(duration <= seen.time.as_secs_f64(), "the client waits for all of it");
        assert!(first + later <= duration, "{first} + {later} are parts of {duration}");
        let parts = sum("shoal_request_queue_seconds") + sum("shoal_request_prefill_seconds");
        assert!((first - parts).abs() < 1e-6 && first > 0.0, "{first} is {parts}");
        let met = format!("shoal_slo_requests_total{{met=\"true\",slo=\"ttft\",task=\"{task}\"}}");
        assert_eq!(page.value(&met), seen.requests);
    }
}

#[tokio::test]
async fn a_missed_objective_is_counted() {
    let mut setup = Setup::default();
    setup.tasks[0].slo.ttft_ms = Some(1e-6);
    let server = Server::with(setup, repeater()).await;
    traffic(&server, "image", 2).await;
    let page = Page::of(&server).await;
    let missed = "shoal_slo_requests_total{met=\"false\",slo=\"ttft\",task=\"image\"}";
    assert_eq!(page.value(missed), 2.0);
}

#[tokio::test]
async fn names_are_frozen_and_clients_cannot_make_new_ones() {
    let server = Server::usual().await;
    traffic(&server, "image", 1).await;
    let bad = [
        ("/v1/completions", json!({"model": "made-up-1", "prompt": "x"})),
        ("/v1/completions", json!({"model": "made-up-2", "prompt": "x"})),
        ("/v1/completions", json!({"model": 3, "prompt": "x"})),
        ("/v1/tasks/made-up-3/generate", json!({"input": "x"})),
        ("/v1/tasks/made-up-4/generate", json!({"input": 3})),
        ("/v1/tasks/image/generate", json!({"input": "x", "top_p": 9})),
    ];
    for (path, body) in &bad {
        assert!(server.client.post(path, body).await.status >= 400);
    }
    let page = Page::of(&server).await;
    let refused = |outcome: &str, task: &str| {
        page.value(&format!("shoal_requests_total{{outcome=\"{outcome}\",task=\"{task}\"}}"))
    };
    assert_eq!(refused("not_found", "other"), 3.0);
    assert_eq!(refused("invalid", "other"), 2.0);
    assert_eq!(refused("invalid", "image"), 1.0);
    let count = page.series.len();
    for (path, body) in &bad {
        server.client.post(path, body).await;
    }
    let page = Page::of(&server).await;
    assert_eq!(page.series.len(), count, "no series was added");
    assert!(page.series.keys().all(|name| !name.contains("made-up")));
    let found: BTreeSet<(&str, &str)> =
        page.types.iter().map(|(n, k)| (n.as_str(), k.as_str())).collect();
    let mut frozen = BTreeSet::from(FAMILIES);
    frozen.remove(&("shoal_startup_seconds", "gauge"));
    assert_eq!(found, frozen);
    let version = format!("shoal_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    assert_eq!(page.value(&version), 1.0);
}

#[tokio::test]
async fn histograms_add_up() {
    let server = Server::usual().await;
    let _: Value = server
        .client
        .post("/v1/tasks/image/generate", &json!({"input": "a b", "n": 3}))
        .await
        .json();
    let page = Page::of(&server).await;
    let mut histograms = 0;
    for (name, kind) in &page.types {
        if kind != "histogram" {
            continue;
        }
        for (series, value) in &page.series {
            let Some(labels) = series.strip_prefix(&format!("{name}_count")) else { continue };
            let labels = labels.trim_start_matches('{').trim_end_matches('}');
            let separator = if labels.is_empty() { "" } else { "," };
            let infinite = format!("{name}_bucket{{{labels}{separator}le=\"+Inf\"}}");
            assert_eq!(page.value(&infinite), *value, "{series}");
            histograms += 1;
        }
    }
    assert!(histograms > 20);
}
