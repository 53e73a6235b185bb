//! Tests of the engine: [`scheduler`] alone, texts that are [`guided`], the [`handle`] with its thread, and a seeded
//! [`simulation`] of the core in virtual time. None of them sleeps.

mod guided;
mod handle;
mod scheduler;
mod simulation;

use super::fake::FakeRunner;
use super::seq::Body;
use super::{EngineHandle, Event, Job, Mix, Settings, start};
use crate::error::Error;
use crate::ids::TaskId;
use crate::metrics::Metrics;
use crate::model::step::{Runner, Sampled};
use crate::request::{Finish, Params, Sampling, Timing, TokenLogprob};
use crate::task::{Limits, Slo, Task, TaskTable};
use crate::telemetry::now;
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::sync::mpsc::Receiver;

fn tasks(slos: impl IntoIterator<Item = Slo>) -> TaskTable {
    let task = |(index, slo): (usize, Slo)| Task {
        id: TaskId(0),
        name: format!("task-{index}"),
        description: String::new(),
        template: String::new(),
        chat_template: None,
        adapter: None,
        controls: Default::default(),
        defaults: Params::default(),
        limits: Limits::default(),
        slo,
    };
    TaskTable::new(slos.into_iter().enumerate().map(task).collect())
}

fn greedy() -> Arc<Sampling> {
    Arc::new(Params { temperature: Some(0.0), ..Params::default() }.sampling())
}

fn job(tokens: impl Into<Vec<u32>>, max_new: u32) -> Job {
    Job::new(TaskId(0), tokens.into(), greedy(), max_new, now())
}

/// An engine over one task, ready.
fn ready<R: Runner>(
    build: impl FnOnce() -> R + Send + 'static,
    slo: Slo,
    settings: Settings,
) -> (EngineHandle, JoinHandle<()>) {
    let table = tasks([slo]);
    let metrics = Arc::new(Metrics::new(&table.names()));
    let (handle, thread) = start(|| Ok(build()), &table, settings, metrics);
    wait_until_loaded(&handle);
    (handle, thread)
}

fn wait_until_loaded(handle: &EngineHandle) {
    let mut state = handle.watch();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(state.wait_for(|&state| state != super::State::Loading)).unwrap();
}

/// All that a job heard.
#[derive(Debug, Default)]
struct Heard {
    prompt: Option<Vec<Option<TokenLogprob>>>,
    tokens: Vec<u32>,
    finish: Option<Finish>,
    stop: Option<Sampled>,
    timing: Timing,
    failed: Option<Error>,
}

impl Heard {
    fn ended(&self) -> bool {
        self.finish.is_some() || self.failed.is_some()
    }

    fn hear(&mut self, event: Event) {
        assert!(!self.ended(), "an event after the terminal one");
        match event {
            Event::Prompt(scores) => {
                assert!(self.tokens.is_empty(), "scores come before tokens");
                assert!(self.prompt.replace(scores).is_none(), "scores come once");
            }
            Event::Token { id, .. } => self.tokens.push(id),
            Event::Done { finish, stop, timing, .. } => {
                self.finish = Some(finish);
                self.stop = stop;
                self.timing = timing;
            }
            Event::Failed(error) => self.failed = Some(error),
        }
    }
}

/// Listens until the stream closes, and checks that it ended.
fn listen(mut events: Receiver<Event>) -> Heard {
    let mut heard = Heard::default();
    while let Some(event) = events.blocking_recv() {
        heard.hear(event);
    }
    assert!(heard.ended(), "a stream closed without a terminal event");
    heard
}

/// The scores that the pretend model gives to the prompt of a job that asks for them.
fn scores(runner: &FakeRunner, job: &Job) -> Option<Vec<Option<TokenLogprob>>> {
    let (variant, prompt) = (Body::variant_of(job), &job.tokens);
    let top = job.score_prompt?;
    let score = |at: usize| (at > 0).then(|| runner.score(variant, &prompt[..at], prompt[at], top));
    Some((job.score_from..prompt.len()).map(score).collect())
}
