//! How fast the engine is, measured where it counts: a queue's drain rate only while somebody waits in
//! it (an idle queue says nothing), and rows per second of step time.

use crate::ids::TaskId;
use std::time::Duration;

/// Observations fade over this much observed time.
const MEMORY_SECONDS: f64 = 30.0;
/// A rate is believed once this much time and this many events were observed.
const ENOUGH_SECONDS: f64 = 1.0;
const ENOUGH_EVENTS: f64 = 8.0;

/// Events per second, recent ones counting more.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    events: f64,
    seconds: f64,
}

impl Rate {
    fn observe(&mut self, events: usize, seconds: f64) {
        let keep = (-seconds / MEMORY_SECONDS).exp();
        self.events = self.events * keep + events as f64;
        self.seconds = self.seconds * keep + seconds;
    }

    fn per_second(&self) -> Option<f64> {
        let enough = self.seconds >= ENOUGH_SECONDS && self.events >= ENOUGH_EVENTS;
        enough.then(|| self.events / self.seconds)
    }
}

/// The engine's measured rates.
#[derive(Debug)]
pub struct Meter {
    /// Sequences that began to run in the current step, by task.
    started: Vec<usize>,
    task_drains: Vec<Rate>,
    drain: Rate,
    rows: Rate,
    /// The part of the tokens allowed that recent sequences really generated.
    used_share: f64,
}

impl Meter {
    /// A meter of `tasks` tasks that has seen nothing.
    pub fn new(tasks: usize) -> Self {
        Self {
            started: vec![0; tasks],
            task_drains: vec![Rate::default(); tasks],
            drain: Rate::default(),
            rows: Rate::default(),
            used_share: 1.0,
        }
    }

    /// One more task.
    pub fn add_task(&mut self) {
        self.started.push(0);
        self.task_drains.push(Rate::default());
    }

    /// A sequence of `task` begins to run in the current step.
    pub fn started(&mut self, task: TaskId) {
        self.started[usize::from(task.0)] += 1;
    }

    /// A sequence that was allowed `allowed` new tokens ended after `generated`.
    pub fn ended(&mut self, generated: usize, allowed: usize) {
        if allowed > 0 {
            self.used_share += 0.05 * (generated as f64 / allowed as f64 - self.used_share);
        }
    }

    /// The current step ends: it ran `rows` rows in `elapsed`, and `counts` sequences of each task are now
    /// (running, waiting).
    pub fn step(
        &mut self,
        counts: impl Iterator<Item = (usize, usize)>,
        rows: usize,
        elapsed: Duration,
    ) {
        let seconds = elapsed.as_secs_f64();
        self.rows.observe(rows, seconds);
        let (mut all, mut queued) = (0, false);
        for ((started, rate), (_, waiting)) in
            self.started.iter_mut().zip(&mut self.task_drains).zip(counts)
        {
            if *started > 0 || waiting > 0 {
                rate.observe(*started, seconds);
                queued = true;
            }
            all += std::mem::take(started);
        }
        if queued {
            self.drain.observe(all, seconds);
        }
    }

    /// Sequences of any task that begin to run per second while some wait.
    pub fn drain(&self) -> Option<f64> {
        self.drain.per_second()
    }

    /// The same for each task, in the order of the ids.
    pub fn task_drains(&self) -> impl Iterator<Item = Option<f64>> {
        self.task_drains.iter().map(Rate::per_second)
    }

    /// Seconds that `rows` known rows and at most `tokens` new tokens will take; 0 until measured.
    pub fn seconds_for(&self, rows: usize, tokens: usize) -> f64 {
        let expected = rows as f64 + self.used_share * tokens as f64;
        self.rows.per_second().map_or(0.0, |rate| expected / rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_queues_say_nothing_and_new_rates_replace_old_ones() {
        let mut meter = Meter::new(1);
        let second = Duration::from_secs(1);
        for _ in 0..100 {
            meter.step([(5, 0)].into_iter(), 100, second);
        }
        assert_eq!(meter.drain(), None);
        assert_eq!(meter.seconds_for(200, 0).round(), 2.0);
        for per_second in [10, 40] {
            for _ in 0..200 {
                (0..per_second).for_each(|_| meter.started(TaskId(0)));
                meter.step([(5, 9)].into_iter(), 100, second);
            }
            let drain = meter.task_drains().next().unwrap().unwrap();
            assert!((drain - f64::from(per_second)).abs() < 0.1 * f64::from(per_second), "{drain}");
        }
    }

    #[test]
    fn the_backlog_expects_what_sequences_usually_use() {
        let mut meter = Meter::new(1);
        meter.step([(1, 0)].into_iter(), 1000, Duration::from_secs(10));
        assert_eq!(meter.seconds_for(0, 1000).round(), 10.0);
        (0..200).for_each(|_| meter.ended(20, 80));
        assert_eq!((meter.seconds_for(0, 1000) * 10.0).round(), 25.0);
    }
}
