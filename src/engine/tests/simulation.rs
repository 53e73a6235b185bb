//! A seeded simulation of the core in virtual time: arrivals, cancels, deadlines, failed and panicking
//! steps and rows, tiny pools, several tasks. The same seed gives the same history, event for event; what a
//! finished job heard is what the pretend model says alone, so neither chunks, neighbours nor
//! preemption change a text. A failure prints its seed.

use super::guided::Ascent;
use super::*;
use crate::engine::core::Core;
use crate::engine::handle::{Command, Shared};
use crate::error::Kind;
use crate::model::step::Capacity;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedReceiver;

/// Virtual time, in microseconds since an epoch; the runner's steps make it pass.
#[derive(Clone)]
struct Clock(Instant, Arc<AtomicU64>);

impl Clock {
    fn now(&self) -> Instant {
        self.0 + Duration::from_micros(self.1.load(Ordering::Relaxed))
    }

    fn pass(&self, micros: u64) {
        self.1.fetch_add(micros, Ordering::Relaxed);
    }
}

/// A job and what its client has heard.
struct Client {
    job: Job,
    /// `None` once the client has left.
    events: Option<Receiver<Event>>,
    heard: Heard,
}

struct World {
    random: SmallRng,
    /// Most arrivals between two ticks.
    crowd: u32,
    clock: Clock,
    handle: EngineHandle,
    core: Core<FakeRunner>,
    inbox: UnboundedReceiver<Command>,
    metrics: Arc<Metrics>,
    shared: Arc<Shared>,
    /// Says what texts should be.
    oracle: FakeRunner,
    clients: Vec<Client>,
    trace: DefaultHasher,
    tally: Tally,
}

/// What happened, so that a test can tell that the histories are worth their name.
#[derive(Debug, Default)]
struct Tally {
    finished: usize,
    cancelled: usize,
    late: usize,
    failed: usize,
    /// Whose own row failed.
    poisoned: usize,
    refused: usize,
    preempted: usize,
    broken: usize,
    shared: usize,
    /// Whose guide led them to their end.
    guided: usize,
}

fn slo(random: &mut SmallRng) -> Slo {
    Slo {
        ttft_ms: None,
        weight: random.random_range(0.2..5.0),
        max_batch: random.random_range(1..10),
        max_waiting: random.random_range(4..20),
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let block_size = random.random_range(1..8);
        let blocks = random.random_range(6..200usize).max(40 / block_size);
        let capacity = Capacity { blocks, block_size, context: 60, vocab: 30 };
        let settings = Settings {
            max_rows: random.random_range(1..60),
            max_running: random.random_range(1..20),
            max_waiting: random.random_range(5..40),
            prefill_chunk: random.random_range(1..30),
            prefix_cache: random.random_bool(0.8),
        };
        let table = tasks([slo(&mut random), slo(&mut random), slo(&mut random)]);
        let clock = Clock(now(), Arc::default());
        let runner = faulty_runner(capacity, &mut random, clock.clone());
        let metrics = Arc::new(Metrics::new(&table.names()));
        let (handle, shared, inbox) = EngineHandle::new(&table, &settings);
        let core = Core::new(runner, &table, &settings, metrics.clone(), shared.clone());
        shared.ready(capacity, None);
        Self {
            crowd: random.random_range(1..5),
            random,
            clock,
            handle,
            core,
            inbox,
            metrics,
            shared,
            oracle: FakeRunner::new(capacity),
            clients: Vec::new(),
            trace: DefaultHasher::new(),
            tally: Tally::default(),
        }
    }

    fn arrive(&mut self) {
        let random = &mut self.random;
        let arrived = self.clock.now();
        let soon = |random: &mut SmallRng| {
            random
                .random_bool(0.2)
                .then(|| arrived + Duration::from_micros(random.random_range(0..60_000)))
        };
        // Many prompts begin alike, whatever adapters they are for.
        let alike = if random.random_bool(0.6) { random.random_range(0..25) } else { 0 };
        let other = (0..random.random_range(1..12)).map(|_| random.random_range(0..30));
        let prompt: Vec<u32> = (0..alike).chain(other).collect();
        let max_new = random.random_range(0..20);
        let mix = random.random_range(0..4);
        let job = Job {
            adapters: (mix > 0).then(|| Arc::new(Mix { key: mix, parts: Vec::new() })),
            gate: random.random_bool(0.3).then_some(1),
            task: TaskId(random.random_range(0..3)),
            max_new,
            min_new: if random.random_bool(0.3) { random.random_range(0..=max_new) } else { 0 },
            stop_ids: if random.random_bool(0.5) { Arc::new([3]) } else { Arc::new([]) },
            guide: random.random_bool(0.3).then(|| Ascent::boxed(random.random_range(0..9))),
            score_prompt: random.random_bool(0.3).then_some(2),
            score_from: if random.random_bool(0.5) {
                random.random_range(0..prompt.len())
            } else {
                0
            },
            arrived,
            deadline: soon(random),
            first_token_deadline: soon(random),
            ..job(prompt, 0)
        };
        // Several texts of one prompt begin in one step if there is room.
        let copies = if random.random_bool(0.2) { random.random_range(2..5) } else { 1 };
        match self.handle.submit_all(vec![job.clone(); copies]) {
            Ok(events) => self.clients.extend(events.into_iter().map(|events| {
                let (job, events) = (job.clone(), Some(events));
                Client { job, events, heard: Heard::default() }
            })),
            Err(error) => {
                self.tally.refused += 1;
                (error.kind, error.retry_after).hash(&mut self.trace);
            }
        }
    }

    fn leave(&mut self) {
        let present: Vec<usize> = self.present().collect();
        if !present.is_empty() {
            let index = present[self.random.random_range(0..present.len())];
            self.clients[index].events = None;
            self.tally.cancelled += 1;
        }
    }

    /// Clients whose jobs have not ended.
    fn present(&self) -> impl Iterator<Item = usize> {
        let present = |client: &Client| client.events.is_some() && !client.heard.ended();
        (0..self.clients.len()).filter(move |&index| present(&self.clients[index]))
    }

    /// One tick. False if the engine has ended.
    fn tick(&mut self) -> bool {
        let begin = self.clock.now();
        let clock = self.clock.clone();
        let alive = self.core.tick(&mut self.inbox, &move || clock.now()).is_ok();
        self.listen();
        self.check_ends(begin);
        if alive {
            let present = self.present().count() as i64;
            let held = self.metrics.running.get() + self.metrics.waiting.get();
            assert_eq!(held, present, "the core holds others than those who listen");
            assert_eq!(self.shared.last_beat().is_some(), present > 0, "the heart beats for work");
        }
        self.clock.pass(10);
        alive
    }

    /// Who is late at a tick's begin ends in it, and nobody else is told so.
    fn check_ends(&self, begin: Instant) {
        for client in self.clients.iter().filter(|client| client.events.is_some()) {
            let heard = &client.heard;
            let first = client.job.first_token_deadline.filter(|_| heard.tokens.is_empty());
            let late = client.job.deadline.into_iter().chain(first).any(|end| end <= begin);
            assert!(heard.ended() || !late, "a job outlived its deadline");
            let told = heard.failed.as_ref().is_some_and(|error| error.kind == Kind::Deadline);
            assert!(late || !told, "a job missed a deadline that it did not have");
        }
    }

    fn listen(&mut self) {
        for (index, client) in self.clients.iter_mut().enumerate() {
            let Some(events) = client.events.as_mut().filter(|_| !client.heard.ended()) else {
                continue;
            };
            while let Ok(event) = events.try_recv() {
                (self.clock.1.load(Ordering::Relaxed), index).hash(&mut self.trace);
                format!("{event:?}").hash(&mut self.trace);
                client.heard.hear(event);
            }
            if client.heard.ended() {
                check(&self.oracle, client);
                let Timing { queue, prefill, decode } = client.heard.timing;
                let elapsed = self.clock.now() - client.job.arrived;
                if client.heard.finish.is_some() && queue + prefill + decode != elapsed {
                    // Only what needs no step ends before the step does.
                    let Job { max_new, tokens, score_prompt, .. } = &client.job;
                    assert!(*max_new == 0 && (tokens.len() == 1 || score_prompt.is_none()));
                }
                match client.heard.failed.as_ref().map(|error| (error.kind, error.to_string())) {
                    None => {
                        self.tally.finished += 1;
                        let stopped = client.heard.finish != Some(Finish::Length);
                        self.tally.guided += usize::from(stopped && client.job.guide.is_some());
                    }
                    Some((Kind::Deadline, _)) => self.tally.late += 1,
                    Some((Kind::Internal, why)) if why.starts_with("a row failed") => {
                        assert!(why.ends_with("made to fail"), "{why}");
                        self.tally.poisoned += 1;
                    }
                    Some((Kind::Internal, _)) => self.tally.failed += 1,
                    Some((kind, _)) => assert_eq!(kind, Kind::Unavailable),
                }
            }
        }
    }

    /// Lives through a whole history.
    fn run(mut self) -> (u64, Tally) {
        let mut alive = true;
        for _ in 0..300 {
            let arrivals = self.random.random_range(0..=self.crowd);
            (0..arrivals).for_each(|_| self.arrive());
            if self.random.random_bool(0.2) {
                self.leave();
            }
            alive = alive && self.tick();
            if !alive {
                break;
            }
        }
        let mut ticks = 0;
        while alive && self.present().next().is_some() {
            alive = self.tick();
            ticks += 1;
            assert!(ticks < 20_000, "jobs starve");
        }
        self.tally.preempted = self.metrics.preemptions.get() as usize;
        self.tally.broken = usize::from(!alive);
        self.tally.shared = self.metrics.prefix_hits.get() as usize;
        if alive {
            assert_eq!(self.metrics.kv_usage.get(), 0.0, "blocks are lost");
        } else {
            self = self.abandon();
        }
        assert_eq!(self.present().count(), 0, "a job never ended");
        (self.trace.finish(), self.tally)
    }

    /// What the thread does when the engine has failed: everything is dropped.
    fn abandon(mut self) -> Self {
        let fresh = World::new(0);
        self.core = fresh.core;
        self.inbox = fresh.inbox;
        self.listen();
        self
    }
}

/// A runner whose steps take (virtual) time, and sometimes fail or panic.
fn faulty_runner(capacity: Capacity, random: &mut SmallRng, clock: Clock) -> FakeRunner {
    let mut faults = SmallRng::seed_from_u64(random.random());
    let rate = [0.0, 0.05, 0.3][random.random_range(0..3)];
    let faulty = |tokens: &[u32]| tokens.iter().sum::<u32>().is_multiple_of(499);
    FakeRunner::new(capacity).failing_rows(faulty).before_step(move |_, input| {
        clock.pass(200 + 20 * input.tokens.len() as u64);
        match faults.random_bool(rate) {
            // Without the hook, which would print each of them.
            true if faults.random_bool(0.5) => std::panic::resume_unwind(Box::new("made to panic")),
            true => Err("made to fail".into()),
            false => Ok(()),
        }
    })
}

/// What a client heard must be what the model says alone, or a beginning of it.
fn check(oracle: &FakeRunner, client: &Client) {
    let Client { job, heard, .. } = client;
    let (text, finish) = oracle.alone_as(job);
    let scores = scores(oracle, job);
    match heard.finish {
        Some(how) => assert_eq!((how, &heard.tokens, &heard.prompt), (finish, &text, &scores)),
        None => {
            assert!(text.starts_with(&heard.tokens), "a wrong text");
            assert!(heard.prompt.is_none() || heard.prompt == scores, "wrong scores");
        }
    }
}

/// Prints the seed if the history fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the simulation failed with seed {}", self.0);
        }
    }
}

fn live(seed: u64) -> (u64, Tally) {
    let _seed = Seed(seed);
    World::new(seed).run()
}

#[test]
fn histories_hold_their_promises() {
    let mut all = Tally::default();
    for seed in 0..80 {
        let (_, tally) = live(seed);
        all.finished += tally.finished;
        all.cancelled += tally.cancelled;
        all.late += tally.late;
        all.failed += tally.failed;
        all.poisoned += tally.poisoned;
        all.refused += tally.refused;
        all.preempted += tally.preempted;
        all.broken += tally.broken;
        all.shared += tally.shared;
        all.guided += tally.guided;
    }
    let Tally {
        finished,
        cancelled,
        late,
        failed,
        poisoned,
        refused,
        preempted,
        broken,
        shared,
        guided,
    } = all;
    let ends = [finished, cancelled, late, failed, poisoned, refused];
    let seen = ends.into_iter().chain([preempted, broken, shared, guided]);
    assert!(seen.into_iter().all(|count| count > 0), "something never happened: {all:?}");
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in [1, 2, 3] {
        assert_eq!(live(seed).0, live(seed).0, "seed {seed}");
    }
    assert_ne!(live(1).0, live(2).0);
}
