//! What becomes of a model's choice of experts: counters by task, how even the load is, and a text's own
//! account for those who ask.

use crate::ids::TaskId;
use crate::metrics::Metrics;
use crate::model::step::{Experts, Routing};
use crate::request::ExpertUse;
use prometheus::IntCounter;
use std::ops::Range;
use std::sync::Arc;

/// Layers are counted in thirds, so that a deep model makes no more series than a shallow one.
const GROUPS: [&str; 3] = ["first", "middle", "last"];

/// What earlier steps weigh, in the load's balance, beside the next one.
const MEMORY: f64 = 0.98;

/// Follows where rows go.
pub struct ExpertMeter {
    experts: Experts,
    metrics: Arc<Metrics>,
    /// By task, then `[GROUPS, count]`; made when a task first runs.
    counters: Vec<Vec<IntCounter>>,
    /// Recent rows of each expert, over all layers.
    load: Vec<f64>,
}

impl ExpertMeter {
    /// A meter for a model with these experts.
    pub fn new(experts: Experts, metrics: Arc<Metrics>) -> Self {
        let load = vec![0.0; experts.count];
        Self { experts, metrics, counters: Vec::new(), load }
    }

    /// Refuses a routing of `rows` rows that has not the right size or names unknown experts.
    pub fn check(&self, routing: &Routing, rows: usize) -> Result<(), String> {
        let Experts { layers, count, top_k, .. } = &self.experts;
        let wanted = (layers.len() * rows * top_k, layers.len() * rows);
        let got = (routing.experts.len(), routing.entropy.len());
        if got != wanted {
            return Err(format!(
                "the step gave (experts, entropies) {got:?} instead of {wanted:?}"
            ));
        }
        let known = |&e: &u16| e == Routing::NONE || usize::from(e) < *count;
        match routing.experts.iter().find(|e| !known(e)) {
            Some(e) => Err(format!("the step gave expert {e}, which is not below {count}")),
            None => Ok(()),
        }
    }

    /// Counts a step's routing: `tasks` are its rows' tasks, in order and without gaps.
    pub fn observe(&mut self, routing: &Routing, tasks: &[(TaskId, Range<usize>)]) {
        let rows = tasks.last().map_or(0, |(_, range)| range.end);
        self.load.iter_mut().for_each(|load| *load *= MEMORY);
        for (task, range) in tasks {
            let counts = self.counts(routing, rows, range.clone());
            let per_group = self.by_group(&counts);
            for (counter, &n) in self.counters(*task).iter().zip(&per_group) {
                counter.inc_by(n);
            }
            for layer in counts.chunks_exact(self.experts.count) {
                for (load, &n) in self.load.iter_mut().zip(layer) {
                    *load += n as f64;
                }
            }
        }
        let most = (self.experts.count as f64).ln();
        let ratio = |entropy: f64| if most > 0.0 { entropy / most } else { 1.0 };
        let known: Vec<f64> =
            routing.entropy.iter().filter(|e| !e.is_nan()).map(|&e| f64::from(e)).collect();
        let router = self.metrics.router();
        if !known.is_empty() {
            router.gate_entropy.set(ratio(known.iter().sum::<f64>() / known.len() as f64));
        }
        router.balance.set(ratio(entropy(&self.load)));
    }

    /// Adds to `report` where these rows of a step of `rows` rows went.
    pub fn add(
        &self,
        report: &mut Vec<ExpertUse>,
        routing: &Routing,
        rows: usize,
        range: Range<usize>,
    ) {
        if report.is_empty() {
            let of = |&layer: &usize| ExpertUse { layer, rows: vec![0; self.experts.count] };
            report.extend(self.experts.layers.iter().map(of));
        }
        let counts = self.counts(routing, rows, range);
        for (layer, counts) in report.iter_mut().zip(counts.chunks_exact(self.experts.count)) {
            for (sum, n) in layer.rows.iter_mut().zip(counts) {
                *sum += n;
            }
        }
    }

    /// `[layers, count]`: how many of these rows each expert took.
    fn counts(&self, routing: &Routing, rows: usize, range: Range<usize>) -> Vec<u64> {
        let Experts { layers, count, top_k, .. } = &self.experts;
        let mut counts = vec![0; layers.len() * count];
        for layer in 0..layers.len() {
            let first = layer * rows;
            let part = (first + range.start) * top_k..(first + range.end) * top_k;
            for &expert in &routing.experts[part] {
                if expert != Routing::NONE {
                    counts[layer * count + usize::from(expert)] += 1;
                }
            }
        }
        counts
    }

    fn by_group(&self, counts: &[u64]) -> Vec<u64> {
        let (layers, count) = (self.experts.layers.len(), self.experts.count);
        let mut sums = vec![0; GROUPS.len() * count];
        for (layer, counts) in counts.chunks_exact(count).enumerate() {
            let group = layer * GROUPS.len() / layers;
            for (sum, n) in sums[group * count..].iter_mut().zip(counts) {
                *sum += n;
            }
        }
        sums
    }

    fn counters(&mut self, task: TaskId) -> &[IntCounter] {
        let index = usize::from(task.0);
        if self.counters.len() <= index {
            self.counters.resize_with(index + 1, Vec::new);
        }
        let counters = &mut self.counters[index];
        if counters.is_empty() {
            let (family, task) = (&self.metrics.router().expert_rows, self.metrics.task(task));
            for group in GROUPS {
                counters.extend((0..self.experts.count).map(|expert| {
                    family.with_label_values(&[group, &expert.to_string(), &task.name])
                }));
            }
        }
        counters
    }
}

/// Entropy of shares in nats.
fn entropy(amounts: &[f64]) -> f64 {
    let sum: f64 = amounts.iter().sum();
    let shares = amounts.iter().map(|a| a / sum).filter(|share| *share > 0.0);
    shares.map(|share| -share * share.ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: u16 = Routing::NONE;

    fn meter() -> (ExpertMeter, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new(&["image".into(), "music".into()]));
        let experts = Experts { layers: vec![1, 3], count: 3, top_k: 2, tasks: Vec::new() };
        (ExpertMeter::new(experts, metrics.clone()), metrics)
    }

    /// Two layers of three rows; behind the last layer one row was not wanted.
    fn routing() -> Routing {
        Routing {
            experts: vec![0, 1, 0, 2, 1, 2, 2, 1, N, N, 2, 0],
            entropy: vec![1.0, 1.0, 1.0, 0.5, f32::NAN, 0.5],
        }
    }

    #[test]
    fn rows_are_counted_by_task_and_layer() {
        let (mut meter, metrics) = meter();
        meter.check(&routing(), 3).unwrap();
        meter.observe(&routing(), &[(TaskId(0), 0..2), (TaskId(1), 2..3)]);
        let page = String::from_utf8(metrics.render()).unwrap();
        for (group, expert, task, n) in
            [("first", 0, "image", 2), ("first", 2, "music", 1), ("middle", 1, "image", 1)]
        {
            let line = format!(
                "shoal_router_expert_tokens_total{{expert=\"{expert}\",layer_group=\"{group}\",\
                 task=\"{task}\"}} {n}"
            );
            assert!(page.contains(&line), "{line} is not in\n{page}");
        }
        let mut report = Vec::new();
        meter.add(&mut report, &routing(), 3, 0..2);
        meter.add(&mut report, &routing(), 3, 2..3);
        assert_eq!(report[0], ExpertUse { layer: 1, rows: vec![2, 2, 2] });
        assert_eq!(report[1], ExpertUse { layer: 3, rows: vec![1, 1, 2] });
    }

    #[test]
    fn an_even_load_has_balance_one() {
        let (mut meter, metrics) = meter();
        let even = Routing { experts: vec![0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2], ..routing() };
        meter.observe(&even, &[(TaskId(0), 0..3)]);
        assert!((metrics.router().balance.get() - 1.0).abs() < 1e-9);
        let entropies = (3.0 * 1.0 + 2.0 * 0.5) / 5.0 / 3f64.ln();
        assert!((metrics.router().gate_entropy.get() - entropies).abs() < 1e-9);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (meter, _) = meter();
        assert!(meter.check(&routing(), 2).is_err());
        let mut unknown = routing();
        unknown.experts[4] = 3;
        assert!(meter.check(&unknown, 3).is_err());
    }
}
