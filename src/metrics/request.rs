//! What one request leaves in the metrics.

use super::Metrics;
use crate::ids::TaskId;
use crate::task::Task;
use crate::telemetry::{Record, now};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Watches one request and records it when dropped, exactly once. A request that nobody
/// [ended](RequestMeter::end) was cancelled.
pub struct RequestMeter {
    metrics: Arc<Metrics>,
    record: Arc<Record>,
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
    /// Begins to watch the request of this record.
    pub fn new(metrics: Arc<Metrics>, record: Arc<Record>) -> Self {
        Self {
            metrics,
            record,
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
        let due = self.record.arrived + objective;
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
        let outcome = self.outcome.unwrap_or("cancelled");
        self.metrics.count_request(self.task, outcome);
        self.record.note(|facts| {
            facts.outcome = Some(outcome);
            facts.usage.prompt_tokens = self.prompt_tokens.unwrap_or(0);
            facts.usage.completion_tokens = self.generated_tokens;
        });
        let (Some(id), Some(prompt_tokens)) = (self.task, self.prompt_tokens) else { return };
        let ended = now();
        let task = self.metrics.task(id);
        task.duration.observe((ended - self.record.arrived).as_secs_f64());
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
            chat_template: None,
            adapter: None,
            controls: BTreeMap::new(),
            defaults: Params::default(),
            limits: Limits::default(),
            slo: Slo { ttft_ms: Some(1e6), ..Slo::default() },
        }
    }

    fn meter(metrics: &Arc<Metrics>) -> RequestMeter {
        let mut meter = RequestMeter::new(metrics.clone(), Record::new("id"));
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
        drop(RequestMeter::new(metrics.clone(), Record::new("id")));
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
            let mut meter = RequestMeter::new(metrics.clone(), Record::new("id"));
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
        let mut meter = RequestMeter::new(metrics.clone(), Record::new("id"));
        let task = Task { controls: [("words".to_string(), words)].into(), ..task() };
        meter.task(&task, &BTreeMap::new());
        meter.prompt_tokens = Some(3);
        meter.text(15);
        drop(meter);
        let page = String::from_utf8(metrics.render()).unwrap();
        assert!(page.contains("shoal_length_error_words_sum{task=\"image\"} 5"), "{page}");
    }
}
