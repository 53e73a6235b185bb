//! Seam 1: the shell's hold on the core, and the thread that the core runs on.
//!
//! The handle checks what can be known at the door (state, length, queue) and hands the job over by
//! channel. What both sides share is small: the state, the capacity, the gate, and the time of the last
//! tick.

use super::core::Core;
use super::gate::{Gate, Permit, Wish};
use super::scheduler::TaskLimits;
use super::seq::{Reply, earliest};
use super::{Event, Job, Settings, State};
use crate::error::{Error, Kind, Result};
use crate::metrics::{Metrics, TaskMetrics};
use crate::model::step::{Capacity, Experts, Runner, StepError};
use crate::task::{Slo, TaskTable};
use crate::telemetry;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender, channel, unbounded_channel};
use tokio::sync::watch;

/// A job without a deadline is due this long after its arrival, and no job is due later: what is not
/// urgent is overtaken, but not for ever.
const PATIENCE: Duration = Duration::from_secs(30);

/// When to come back to a replica that is loading or draining.
const RETRY_UNAVAILABLE: Duration = Duration::from_secs(2);

/// What the core is told.
#[derive(Debug)]
pub(super) enum Command {
    /// Run these; they arrive together.
    Run(Vec<Admitted>),
    /// There is one more task.
    AddTask(TaskLimits, Arc<TaskMetrics>),
    /// Finish what was accepted, then end.
    Drain,
}

/// A job that passed the door.
#[derive(Debug)]
pub(super) struct Admitted {
    pub job: Job,
    pub due: Instant,
    pub reply: Reply,
    pub permit: Permit,
}

/// What handle and core share.
#[derive(Debug)]
pub(super) struct Shared {
    state: watch::Sender<State>,
    capacity: OnceLock<Capacity>,
    experts: OnceLock<Experts>,
    pub gate: Arc<Gate>,
    /// The last tick, while there is work.
    beat: Mutex<Option<Instant>>,
}

impl Shared {
    fn new(tasks: &TaskTable, settings: &Settings) -> Self {
        let queues = tasks.iter().map(|task| task.slo.max_waiting);
        Self {
            state: watch::channel(State::Loading).0,
            capacity: OnceLock::new(),
            experts: OnceLock::new(),
            gate: Gate::new(settings.max_waiting, queues),
            beat: Mutex::new(None),
        }
    }

    /// The model is there: from now on jobs are accepted, unless a drain came first.
    pub fn ready(&self, capacity: Capacity, experts: Option<Experts>) {
        self.capacity.get_or_init(|| capacity);
        experts.map(|experts| self.experts.get_or_init(|| experts));
        self.change(State::Ready, |now| now == State::Loading);
    }

    /// Nothing is accepted any more.
    pub fn failed(&self) {
        self.change(State::Failed, |_| true);
    }

    /// Records a tick, or that there is no work.
    pub fn beat(&self, tick: Option<Instant>) {
        *self.beat.lock().unwrap_or_else(PoisonError::into_inner) = tick;
    }

    /// When the core last ticked with work to do; `None` if it has none.
    pub fn last_beat(&self) -> Option<Instant> {
        *self.beat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, to: State, from: impl Fn(State) -> bool) {
        self.state.send_if_modified(|state| {
            let changes = *state != to && from(*state);
            if changes {
                *state = to;
            }
            changes
        });
    }
}

/// The shell's hold on the engine. When the last one is gone the engine finishes its work and ends.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: UnboundedSender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    pub(super) fn new(
        tasks: &TaskTable,
        settings: &Settings,
    ) -> (Self, Arc<Shared>, UnboundedReceiver<Command>) {
        let (commands, inbox) = unbounded_channel();
        let shared = Arc::new(Shared::new(tasks, settings));
        (Self { commands, shared: shared.clone() }, shared, inbox)
    }

    /// Hands in a job. Its events end with exactly one terminal one; dropping the receiver cancels it.
    ///
    /// # Errors
    /// `Unavailable` while loading, draining or failed; `ContextLength` if prompt and new tokens can
    /// never fit; `Overloaded` if a queue is full or the deadline would pass in it.
    pub fn submit(&self, job: Job) -> Result<Receiver<Event>> {
        let (admitted, events) = self.admit(job)?;
        self.send(vec![admitted])?;
        Ok(events)
    }

    /// Hands in several jobs, all or none.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`], for the first job that is refused.
    pub fn submit_all(&self, jobs: Vec<Job>) -> Result<Vec<Receiver<Event>>> {
        let admitted = jobs.into_iter().map(|job| self.admit(job)).collect::<Result<Vec<_>>>()?;
        let (jobs, events) = admitted.into_iter().unzip();
        self.send(jobs)?;
        Ok(events)
    }

    /// What the engine is able to do now.
    pub fn state(&self) -> State {
        *self.shared.state.borrow()
    }

    /// Follows the state.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.shared.state.subscribe()
    }

    /// Refuses new work from now on; what was accepted is finished, then the thread ends.
    pub fn drain(&self) {
        let may = |now| matches!(now, State::Loading | State::Ready);
        self.shared.change(State::Draining, may);
        // It fails only if the thread has ended already.
        let _ = self.commands.send(Command::Drain);
    }

    /// What the runner can hold, if it takes on work.
    ///
    /// # Errors
    /// `Unavailable` while loading, draining or failed.
    pub fn ready(&self) -> Result<Capacity> {
        let why = match (self.state(), self.capacity()) {
            (State::Ready, Some(capacity)) => return Ok(capacity),
            (State::Ready | State::Loading, _) => "the model is loading",
            (State::Draining, _) => "the server is shutting down",
            (State::Failed, _) => "the engine has failed",
        };
        Err(unavailable(why))
    }

    /// What the runner can hold; `None` while loading.
    pub fn capacity(&self) -> Option<Capacity> {
        self.shared.capacity.get().copied()
    }

    /// The model's experts, if it is loaded and has any.
    pub fn experts(&self) -> Option<&Experts> {
        self.shared.experts.get()
    }

    /// How the gates of experts count the task of this name, if they know it.
    pub fn gate(&self, task: &str) -> Option<u32> {
        let place = self.experts()?.tasks.iter().position(|name| name == task);
        place.map(|place| place as u32)
    }

    /// One more task, whose id is the next one: its queue is open when this returns.
    ///
    /// # Errors
    /// `Unavailable` if the engine has ended.
    pub fn add_task(&self, slo: &Slo, metrics: Arc<TaskMetrics>) -> Result<()> {
        let command = Command::AddTask(TaskLimits::from(slo), metrics);
        // The core hears of the task before any job of it can pass the gate.
        self.commands.send(command).map_err(|_| unavailable("the engine has ended"))?;
        self.shared.gate.add_task(slo.max_waiting);
        Ok(())
    }

    /// How many jobs may wait at once, over all tasks.
    pub fn max_waiting(&self) -> usize {
        self.shared.gate.max_waiting
    }

    /// How long since the core's last tick while it has work; zero when it has none.
    pub fn heartbeat_age(&self) -> Duration {
        let age = |tick| telemetry::now().saturating_duration_since(tick);
        self.shared.last_beat().map_or(Duration::ZERO, age)
    }

    fn admit(&self, job: Job) -> Result<(Admitted, Receiver<Event>)> {
        let capacity = self.ready()?;
        check_length(&job, &capacity)?;
        let latest = earliest(job.deadline, job.first_token_deadline);
        let patience = job.arrived + PATIENCE;
        let due = latest.map_or(patience, |latest| latest.min(patience));
        let permit =
            self.shared.gate.enter(job.task, Wish { arrived: job.arrived, due, latest })?;
        // Room for the prompt's scores, every token and the end, so that sending never waits.
        let (sender, events) = channel(job.max_new as usize + 3);
        Ok((Admitted { job, due, reply: Reply::new(sender), permit }, events))
    }

    fn send(&self, admitted: Vec<Admitted>) -> Result<()> {
        self.commands.send(Command::Run(admitted)).map_err(|_| unavailable("the engine has ended"))
    }
}

fn check_length(job: &Job, capacity: &Capacity) -> Result<()> {
    let (prompt, new) = (job.tokens.len(), job.max_new as usize);
    if prompt == 0 {
        return Err(Error::invalid("prompt", "the prompt has no tokens"));
    }
    if let Some(id) = job.tokens.iter().find(|&&id| id as usize >= capacity.vocab) {
        let message = format!("token id {id} is not below {}", capacity.vocab);
        return Err(Error::invalid("prompt", message));
    }
    if job.score_from >= prompt {
        let message = format!("score_from is {}, of {prompt} prompt tokens", job.score_from);
        return Err(Error::invalid("prompt", message));
    }
    // The last new token is not run, so it needs no place in the cache.
    let pool = (capacity.blocks * capacity.block_size).saturating_add(1);
    let limit = capacity.context.min(pool);
    if prompt.saturating_add(new) > limit {
        let message = format!(
            "prompt ({prompt} tokens) and new tokens (up to {new}) are more than {limit}, the \
             longest sequence"
        );
        return Err(Error::new(Kind::ContextLength, message));
    }
    Ok(())
}

fn unavailable(message: &str) -> Error {
    Error::new(Kind::Unavailable, message).with_retry_after(RETRY_UNAVAILABLE)
}

/// Starts the engine on a thread of its own, where `build` makes the runner. The state is `Loading` until
/// it has, and `Failed` if it errs.
///
/// # Panics
/// If the operating system refuses a thread.
pub fn start<R: Runner>(
    build: impl FnOnce() -> Result<R, StepError> + Send + 'static,
    tasks: &TaskTable,
    settings: Settings,
    metrics: Arc<Metrics>,
) -> (EngineHandle, JoinHandle<()>) {
    let (handle, shared, mut inbox) = EngineHandle::new(tasks, &settings);
    let tasks = tasks.clone();
    let body = move || {
        let work = AssertUnwindSafe(|| -> Result<(), StepError> {
            let runner = build()?;
            let capacity = checked(runner.capacity())?;
            let experts = runner.experts();
            metrics.publish_kv_size(capacity.blocks, capacity.block_size);
            let core = Core::new(runner, &tasks, &settings, metrics, shared.clone());
            shared.ready(capacity, experts);
            core.run(&mut inbox, &telemetry::now)
        });
        match catch_unwind(work) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "the engine failed");
                shared.failed();
            }
            Err(_) => {
                tracing::error!("the engine panicked");
                shared.failed();
            }
        }
        shared.beat(None);
        // Jobs that were handed in meanwhile hear of the end as their replies are dropped.
        inbox.close();
        while inbox.blocking_recv().is_some() {}
    };
    let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(body);
    (handle, thread.expect("a process at its start may have one more thread"))
}

fn checked(capacity: Capacity) -> Result<Capacity, StepError> {
    let Capacity { blocks, block_size, context, vocab } = capacity;
    if [blocks, block_size, context, vocab].contains(&0) || blocks > u32::MAX as usize {
        return Err(format!("the runner's capacity is unusable: {capacity:?}").into());
    }
    Ok(capacity)
}
