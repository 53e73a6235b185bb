//! What the core's own bookkeeping costs per step, without a model: `cargo bench --bench scheduler`.
//!
//! Two parts: planning alone, and whole ticks of the engine over a runner that computes nothing. Nothing is
//! asserted; a step of a small model takes about a millisecond, and all this should be lost in that.

use shoal::engine::blocks::BlockPool;
use shoal::engine::plan::Plan;
use shoal::engine::prefix::Variant;
use shoal::engine::scheduler::{Limits, Scheduler, TaskLimits};
use shoal::engine::{Content, Job, Seq, Settings, State, start};
use shoal::ids::{SeqId, TaskId};
use shoal::metrics::Metrics;
use shoal::model::step::{Capacity, Runner, Sampled, StepError, StepInput, StepOutput};
use shoal::request::Params;
use shoal::task::{Slo, Task, TaskTable};
use shoal::telemetry::now;
use std::sync::Arc;
use std::time::{Duration, Instant};

const BLOCK: usize = 16;

/// A sequence's length at its end; it shares nothing.
struct Last(usize);

impl Content for Last {
    fn variant(&self) -> Variant {
        Variant::default()
    }

    fn tokens(&self) -> &[u32] {
        &[]
    }

    fn skippable(&self) -> usize {
        0
    }
}

fn scheduler(tasks: usize, running: usize, blocks: usize) -> Scheduler<Last> {
    let tasks = vec![TaskLimits { weight: 1.0, max_batch: running }; tasks];
    let limits = Limits { max_rows: 512, max_running: running, prefill_chunk: 256, tasks };
    Scheduler::new(limits, BlockPool::new(blocks, BLOCK, true))
}

/// Keeps `running` sequences busy and `waiting` queued, each with `prompt` tokens and `new` to come, and
/// times planning and advancing apart from what the core would do between.
fn churn(name: &str, tasks: usize, running: usize, waiting: usize, blocks: usize) {
    let (prompt, new, steps) = (24, 40, 20_000u32);
    let mut scheduler = scheduler(tasks, running, blocks);
    let mut plan = Plan::default();
    let epoch = now();
    let (mut next, mut rows, mut preempted) = (0u64, 0, 0);
    let mut times = Vec::with_capacity(steps as usize);
    for _ in 0..steps {
        while scheduler.running() + scheduler.waiting() < running + waiting {
            let task = TaskId((next % tasks as u64) as u16);
            let due = epoch + Duration::from_micros(next);
            // The length at the end differs, so that sequences do not move in step.
            let last = prompt + new / 2 + next as usize * 7 % new;
            scheduler.add(Seq::new(SeqId(next), task, due, prompt, Last(last)));
            next += 1;
        }
        let begin: Instant = now();
        scheduler.plan(&mut plan);
        times.push(begin.elapsed());
        rows += plan.rows();
        preempted += plan.preempted;
        for chunk in &plan.chunks {
            scheduler.advance(chunk.slot, chunk.rows);
            let (len, last, pending) = {
                let seq = scheduler.seq(chunk.slot);
                (seq.len, seq.body.0, seq.pending())
            };
            match pending {
                0 if len < last => scheduler.grow(chunk.slot),
                0 => drop(scheduler.remove(chunk.slot)),
                _ => {}
            }
        }
    }
    times.sort_unstable();
    let at = |share: f64| times[(share * times.len() as f64) as usize].as_secs_f64() * 1e6;
    println!(
        "plan, {name:<34} p50 {:>6.2} us, p99 {:>6.2} us, {:>5.1} rows a step, {preempted} preempted",
        at(0.5),
        at(0.99),
        rows as f64 / f64::from(steps),
    );
}

/// Answers every step at once, always with the same token.
struct NoModel;

impl Runner for NoModel {
    fn capacity(&self) -> Capacity {
        Capacity { blocks: 16_384, block_size: BLOCK, context: 1024, vocab: 8192 }
    }

    fn step(&mut self, input: &StepInput) -> Result<StepOutput, StepError> {
        let sampled = vec![Ok(Sampled { token: 7, logprob: None }); input.samples.len()];
        Ok(StepOutput { sampled, ..StepOutput::default() })
    }
}

fn table() -> TaskTable {
    TaskTable::new(vec![Task {
        id: TaskId(0),
        name: "bench".to_owned(),
        description: String::new(),
        template: String::new(),
        chat_template: None,
        adapter: None,
        controls: Default::default(),
        defaults: Params::default(),
        limits: Default::default(),
        slo: Slo::default(),
    }])
}

/// Runs `streams` sequences at once through the engine's thread and times a token.
fn engine(streams: usize) {
    let tokens = 900;
    let table = table();
    let metrics = Arc::new(Metrics::new(&table.names()));
    let (handle, thread) = start(|| Ok(NoModel), &table, Settings::default(), metrics.clone());
    while handle.state() == State::Loading {
        std::thread::yield_now();
    }
    let sampling = Arc::new(Params::default().sampling());
    let job = |n: usize| Job {
        seed: n as u64,
        ..Job::new(TaskId(0), vec![1; 24], sampling.clone(), tokens, now())
    };
    let begin = now();
    let events = handle.submit_all((0..streams).map(job).collect());
    handle.drain();
    thread.join().expect("the engine thread does not panic");
    let seconds = begin.elapsed().as_secs_f64();
    drop(events);
    let steps = metrics.step_rows.get_sample_count();
    println!(
        "tick, {streams:>3} streams: {:>7.2} us a step, {:>6.3} us a token",
        seconds * 1e6 / steps as f64,
        seconds * 1e6 / (streams as f64 * f64::from(tokens)),
    );
}

fn main() {
    churn("1 running", 1, 1, 0, 4096);
    churn("64 running, 6 tasks", 6, 64, 16, 4096);
    churn("256 running, 6 tasks", 6, 256, 64, 4096);
    churn("256 running, 6 tasks, 2048 waiting", 6, 256, 2048, 4096);
    churn("256 running, 200 tasks", 200, 256, 2048, 4096);
    churn("256 seats, pool too small", 6, 256, 2048, 700);
    [1, 16, 64, 256].into_iter().for_each(engine);
}
