//! The core: owns all sequences and the runner, and advances them tick by tick.
//!
//! One tick: take commands, drop what was cancelled or is late, plan, run the step, apply, send. It is
//! synchronous, blocks only when there is nothing to do, and reads no clock but the one it is handed.
//!
//! A row without an answer ends its own sequence and no other, and so does a guide that errs. A step that fails takes its own sequences
//! with it and no others; three in a row end the engine.

use super::experts::ExpertMeter;
use super::handle::{Admitted, Command, Shared};
use super::meter::Meter;
use super::plan::{Chunk, Plan};
use super::scheduler::{Limits, Scheduler, Slot, TaskLimits};
use super::seq::{Body, Seq};
use super::{Event, Settings, blocks::BlockPool};
use crate::error::{Error, Kind};
use crate::ids::SeqId;
use crate::metrics::{Metrics, TaskMetrics};
use crate::model::step::{Routing, RowError, Runner, Sampled, StepError, StepInput, StepOutput};
use crate::request::{Finish, Guide, TokenLogprob};
use crate::task::TaskTable;
use rayon::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedReceiver;

/// After this many failed steps in a row the runner is taken to be broken.
const MAX_FAILURES: u32 = 3;

/// Owns everything that changes from step to step.
pub(super) struct Core<R> {
    runner: R,
    scheduler: Scheduler<Body>,
    vocab: usize,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    /// By task id.
    task_metrics: Vec<Arc<TaskMetrics>>,
    /// For a model with experts.
    experts: Option<ExpertMeter>,
    meter: Meter,
    /// Failed steps in a row.
    failures: u32,
    draining: bool,
    plan: Plan,
    input: StepInput,
    /// Sequences to drop, while a tick looks for them.
    dropped: Vec<Slot>,
    /// Tokens of texts with a grammar, until their guides have been told.
    guided: Vec<Guided>,
}

/// A token and the guide of its text.
struct Guided {
    slot: Slot,
    token: Sampled,
    guide: Box<dyn Guide>,
    /// Whether something may follow.
    more: Result<bool, Error>,
}

impl<R: Runner> Core<R> {
    pub fn new(
        runner: R,
        tasks: &TaskTable,
        settings: &Settings,
        metrics: Arc<Metrics>,
        shared: Arc<Shared>,
    ) -> Self {
        let capacity = runner.capacity();
        let limits = Limits {
            max_rows: settings.max_rows,
            max_running: settings.max_running,
            prefill_chunk: settings.prefill_chunk,
            tasks: tasks.iter().map(|task| TaskLimits::from(&task.slo)).collect(),
        };
        let meter = Meter::new(limits.tasks.len());
        let pool = BlockPool::new(capacity.blocks, capacity.block_size, settings.prefix_cache);
        let experts = runner.experts();
        Self {
            experts: experts.map(|experts| ExpertMeter::new(experts, metrics.clone())),
            // Those that came while the model was loading are announced by commands.
            task_metrics: metrics.all_tasks().into_iter().take(limits.tasks.len()).collect(),
            runner,
            scheduler: Scheduler::new(limits, pool),
            vocab: capacity.vocab,
            shared,
            metrics,
            meter,
            failures: 0,
            draining: false,
            plan: Plan::default(),
            input: StepInput::default(),
            dropped: Vec::new(),
            guided: Vec::new(),
        }
    }

    /// Ticks while there is work, waits for commands while there is none, and returns when it was drained.
    ///
    /// # Errors
    /// The last of three failed steps in a row.
    pub fn run(
        mut self,
        inbox: &mut UnboundedReceiver<Command>,
        clock: &dyn Fn() -> Instant,
    ) -> Result<(), StepError> {
        loop {
            if self.scheduler.is_empty() {
                if self.draining {
                    // Jobs that were accepted before the drain may still arrive; then no more.
                    inbox.close();
                }
                match inbox.blocking_recv() {
                    Some(command) => self.obey(command, clock()),
                    None => return Ok(()),
                }
            }
            self.tick(inbox, clock)?;
        }
    }

    /// One step of everything that can run, and all that comes before and after it.
    ///
    /// # Errors
    /// The last of three failed steps in a row.
    pub fn tick(
        &mut self,
        inbox: &mut UnboundedReceiver<Command>,
        clock: &dyn Fn() -> Instant,
    ) -> Result<(), StepError> {
        let begin = clock();
        self.shared.beat(Some(begin));
        while let Ok(command) = inbox.try_recv() {
            self.obey(command, begin);
        }
        self.drop_cancelled_and_late(begin);
        self.scheduler.plan(&mut self.plan);
        // What a step is about to run is running, however long it takes.
        self.publish();
        let result = if self.plan.chunks.is_empty() { Ok(()) } else { self.step(begin, clock) };
        if cfg!(debug_assertions) {
            self.scheduler.check_invariants();
        }
        self.publish();
        result
    }

    fn obey(&mut self, command: Command, now: Instant) {
        match command {
            Command::Run(jobs) => jobs.into_iter().for_each(|job| self.accept(job, now)),
            Command::AddTask(limits, metrics) => {
                self.scheduler.add_task(&limits);
                self.meter.add_task();
                self.task_metrics.push(metrics);
            }
            Command::Drain => self.draining = true,
        }
    }

    fn accept(&mut self, admitted: Admitted, now: Instant) {
        let Admitted { job, due, reply, permit } = admitted;
        let task = job.task;
        let mut body = Body::new(job, reply, permit);
        match body.rows_to_run() {
            0 => {
                // A prompt of one token has nothing to compute.
                if body.job.score_prompt.is_some() {
                    let scores = std::mem::take(&mut body.scores);
                    body.reply.send(Event::Prompt(scores));
                }
                let (finish, timing) = (Finish::Length, body.timing(now));
                body.reply.end(Event::Done { finish, stop: None, timing, experts: Vec::new() });
            }
            rows => {
                self.scheduler.add(Seq::new(SeqId::next(), task, due, rows, body));
            }
        }
    }

    /// Drops the sequences whose client has left or whose deadline has passed, waiting or running, and
    /// adds up what the others have left to do.
    fn drop_cancelled_and_late(&mut self, now: Instant) {
        let (mut rows, mut tokens) = (0, 0);
        for (slot, seq) in self.scheduler.iter() {
            let late = seq.body.deadline().is_some_and(|deadline| deadline <= now);
            if late || seq.body.reply.is_closed() {
                self.dropped.push(slot);
            } else {
                rows += seq.pending();
                tokens += seq.body.remaining();
            }
        }
        self.metrics.backlog.set(self.meter.seconds_for(rows, tokens));
        while let Some(slot) = self.dropped.pop() {
            let body = self.scheduler.remove(slot).body;
            let message = match body.generated() {
                0 => "the deadline passed before the first token".to_owned(),
                n => format!("the deadline passed after {n} tokens"),
            };
            // A client that has left hears nothing of it.
            body.reply.end(Event::Failed(Error::new(Kind::Deadline, message)));
        }
    }

    fn step(&mut self, begin: Instant, clock: &dyn Fn() -> Instant) -> Result<(), StepError> {
        let mut prefills = false;
        for chunk in &self.plan.chunks {
            let seq = self.scheduler.seq_mut(chunk.slot);
            prefills |= chunk.rows > 1 || seq.body.generated() == 0;
            let metrics = &self.task_metrics[usize::from(chunk.task.0)];
            metrics.rows.inc_by(chunk.rows as u64);
            if let Some(queued) = seq.body.step_started(begin) {
                self.meter.started(chunk.task);
                metrics.queue.observe(queued.as_secs_f64());
            }
        }
        self.plan.write(&self.scheduler, &mut self.input);
        let outcome = self.compute();
        let end = clock();
        let elapsed = end.saturating_duration_since(begin);
        self.observe_step(elapsed, prefills);
        let result = match outcome {
            Ok(output) => {
                self.failures = 0;
                self.apply(output, end);
                Ok(())
            }
            Err(error) => self.fail(error),
        };
        self.meter.step(self.scheduler.task_counts(), self.input.tokens.len(), elapsed);
        self.shared.gate.learn(&self.meter);
        result
    }

    /// Runs the step; a panic is an error like any other, and so is an answer that does not fit.
    fn compute(&mut self) -> Result<StepOutput, StepError> {
        let step = AssertUnwindSafe(|| self.runner.step(&self.input));
        let output =
            catch_unwind(step).unwrap_or_else(|panic| Err(panic_message(&*panic).into()))?;
        check_output(&self.input, &output, self.vocab)?;
        if let Some(experts) = &self.experts {
            experts.check(&output.routing, self.input.tokens.len())?;
        }
        Ok(output)
    }

    fn apply(&mut self, output: StepOutput, now: Instant) {
        let mut sampled = output.sampled.into_iter();
        let mut scored = output.scored.into_iter();
        let chunks = std::mem::take(&mut self.plan.chunks);
        self.take_routing(&chunks, &output.routing);
        for chunk in &chunks {
            let samples = chunk.samples(self.scheduler.seq(chunk.slot));
            let token = if samples { sampled.next().transpose() } else { Ok(None) };
            match self.take_scores(chunk, &mut scored).and(token) {
                Ok(token) => self.take_rows(chunk, token, now),
                Err(error) => {
                    tracing::warn!(%error, sequence = %chunk.id, "a row failed");
                    let body = self.scheduler.remove(chunk.slot).body;
                    body.reply.end(Event::Failed(Error::internal("a row failed", error)));
                }
            }
        }
        self.plan.chunks = chunks;
        self.take_guided(now);
    }

    /// Tells the guides of the step's tokens about them, all together: some need a tenth of a
    /// millisecond to find out what may follow.
    fn take_guided(&mut self, now: Instant) {
        let mut guided = std::mem::take(&mut self.guided);
        guided.par_iter_mut().for_each(|one| one.more = one.guide.accept(one.token.token));
        for Guided { slot, token, guide, more } in guided.drain(..) {
            match more {
                Ok(more) => {
                    self.scheduler.seq_mut(slot).body.job.guide = Some(guide);
                    self.append(slot, token, more, now);
                }
                Err(error) => self.scheduler.remove(slot).body.reply.end(Event::Failed(error)),
            }
        }
        self.guided = guided;
    }

    /// Counts a chunk's rows as computed and takes the token that they may have given.
    fn take_rows(&mut self, chunk: &Chunk, token: Option<Sampled>, now: Instant) {
        self.scheduler.advance(chunk.slot, chunk.rows);
        match token {
            Some(token) => self.take_token(chunk, token, now),
            None if self.scheduler.seq(chunk.slot).pending() == 0 => {
                self.finish(chunk.slot, Finish::Length, None, now);
            }
            None => {}
        }
    }

    /// Counts where the rows went, for the metrics and for those who asked.
    fn take_routing(&mut self, chunks: &[Chunk], routing: &Routing) {
        let Some(meter) = &mut self.experts else { return };
        let ranges = chunks.iter().zip(&self.input.slices).map(|(c, s)| (c.task, s.rows.clone()));
        let ranges: Vec<_> = ranges.collect();
        meter.observe(routing, &ranges);
        for (chunk, (_, range)) in chunks.iter().zip(ranges) {
            let body = &mut self.scheduler.seq_mut(chunk.slot).body;
            if body.job.report_experts {
                // What runs again after preemption was counted before.
                let known = body.routed.saturating_sub(chunk.start).min(chunk.rows);
                let new = range.start + known..range.end;
                meter.add(&mut body.experts, routing, self.input.tokens.len(), new);
                body.routed = body.routed.max(chunk.start + chunk.rows);
            }
        }
    }

    /// Collects the scores of a chunk's prompt positions, and sends them when they are all there.
    fn take_scores(
        &mut self,
        chunk: &Chunk,
        scored: &mut impl Iterator<Item = Result<TokenLogprob, RowError>>,
    ) -> Result<(), RowError> {
        let body = &mut self.scheduler.seq_mut(chunk.slot).body;
        let new = body.positions_to_score(chunk.start, chunk.rows).len();
        // All of them, for those behind one that failed are not the next chunk's.
        let scores: Vec<_> = scored.take(new).collect();
        for score in scores {
            body.scores.push(Some(score?));
        }
        body.scored += new;
        if body.is_scored() {
            body.reply.send(Event::Prompt(std::mem::take(&mut body.scores)));
        }
        Ok(())
    }

    fn take_token(&mut self, chunk: &Chunk, token: Sampled, now: Instant) {
        let body = &mut self.scheduler.seq_mut(chunk.slot).body;
        let metrics = &self.task_metrics[usize::from(chunk.task.0)];
        let gap = body.token_came(now);
        let timing = body.timing(now);
        if let Some(gap) = gap {
            metrics.inter_token.observe(gap.as_secs_f64());
        } else {
            metrics.prefill.observe(timing.prefill.as_secs_f64());
            metrics.ttft.observe((timing.queue + timing.prefill).as_secs_f64());
        }
        if body.job.stop_ids.contains(&token.token) {
            return self.finish(chunk.slot, Finish::EndToken, Some(token), now);
        }
        match body.job.guide.take() {
            Some(guide) => {
                self.guided.push(Guided { slot: chunk.slot, token, guide, more: Ok(true) });
            }
            None => self.append(chunk.slot, token, true, now),
        }
    }

    /// Adds a token to its text, behind which there may be `more`.
    fn append(&mut self, slot: Slot, token: Sampled, more: bool, now: Instant) {
        let body = &mut self.scheduler.seq_mut(slot).body;
        body.job.tokens.push(token.token);
        let timing = body.timing(now);
        let end = match (more, body.remaining()) {
            (false, _) => Some(Finish::Grammar),
            (true, 0) => Some(Finish::Length),
            _ => None,
        };
        let (id, logprob, last) = (token.token, token.logprob, end.is_some());
        body.reply.send(Event::Token { id, logprob, timing, last });
        match end {
            Some(finish) => self.finish(slot, finish, None, now),
            None => self.scheduler.grow(slot),
        }
    }

    /// Ends a text well; `stop` is the token that ended it, if one did.
    fn finish(&mut self, slot: Slot, finish: Finish, stop: Option<Sampled>, now: Instant) {
        let mut body = self.scheduler.remove(slot).body;
        self.meter.ended(body.generated(), body.job.max_new as usize);
        let (timing, experts) = (body.timing(now), std::mem::take(&mut body.experts));
        body.reply.end(Event::Done { finish, stop, timing, experts });
    }

    fn fail(&mut self, error: StepError) -> Result<(), StepError> {
        self.failures += 1;
        self.metrics.step_failures.inc();
        let last = self.failures >= MAX_FAILURES;
        if last {
            // Before any client hears of it: who asks next must find the door closed.
            self.shared.failed();
        }
        let sequences = self.plan.chunks.len();
        tracing::error!(%error, sequences, in_a_row = self.failures, "a step failed");
        self.scheduler.failed();
        for chunk in &self.plan.chunks {
            let body = self.scheduler.remove(chunk.slot).body;
            body.reply.end(Event::Failed(Error::internal("a step failed", error.to_string())));
        }
        if last { Err(error) } else { Ok(()) }
    }

    fn observe_step(&self, elapsed: Duration, prefills: bool) {
        let metrics = &self.metrics;
        let phase = if prefills { &metrics.step_prefill } else { &metrics.step_decode };
        phase.observe(elapsed.as_secs_f64());
        metrics.batch_size.observe(self.plan.chunks.len() as f64);
        metrics.step_rows.observe(self.input.tokens.len() as f64);
        metrics.preemptions.inc_by(self.plan.preempted as u64);
        metrics.prefix_queries.inc_by(self.plan.prefix_queried as u64);
        metrics.prefix_hits.inc_by(self.plan.prefix_hit as u64);
    }

    fn publish(&self) {
        let (metrics, scheduler) = (&self.metrics, &self.scheduler);
        metrics.running.set(scheduler.running() as i64);
        metrics.waiting.set(scheduler.waiting() as i64);
        let pool = scheduler.pool();
        metrics.kv_usage.set(pool.used() as f64 / pool.total() as f64);
        for (task, (running, waiting)) in self.task_metrics.iter().zip(scheduler.task_counts()) {
            task.running.set(running as i64);
            task.waiting.set(waiting as i64);
        }
        if scheduler.is_empty() {
            metrics.backlog.set(0.0);
            self.shared.beat(None);
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the step panicked: {}", text.unwrap_or("no message"))
}

fn check_output(input: &StepInput, output: &StepOutput, vocab: usize) -> Result<(), StepError> {
    let wanted = (input.samples.len(), input.scores.len());
    let got = (output.sampled.len(), output.scored.len());
    if wanted != got {
        return Err(format!("the step gave (tokens, scores) {got:?} instead of {wanted:?}").into());
    }
    let reported = |l: &TokenLogprob| l.top.iter().map(|top| top.0).chain([l.token]).max();
    let sampled = || output.sampled.iter().flatten();
    let tokens = sampled().map(|sampled| sampled.token);
    let logprobs = sampled().filter_map(|sampled| sampled.logprob.as_ref());
    let known = tokens.chain(logprobs.chain(output.scored.iter().flatten()).filter_map(reported));
    match known.max() {
        Some(id) if id as usize >= vocab => {
            Err(format!("the step gave token {id}, which is not below {vocab}").into())
        }
        _ => Ok(()),
    }
}
