//! A bundle at work in this process: the engine that serves it, without sockets. Many requests are kept
//! under way, as a busy server would have them.

use crate::adapter::registry::{Bounds, Registry};
use crate::bundle::{Bundle, job_of};
use crate::engine::{EngineHandle, Event, Job, Settings, State};
use crate::metrics::Metrics;
use crate::model::LoadOptions;
use crate::request::{Finish, Params, TokenLogprob};
use crate::task::{Task, TaskTable};
use crate::telemetry;
use crate::text::{Incremental, Prompts};
use anyhow::{Context, Result, bail, ensure};
use futures::executor::block_on;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::mpsc::Receiver;

/// Requests under way.
const STREAMS: usize = 64;

/// A loaded bundle.
pub struct Model {
    /// Its tasks.
    pub tasks: TaskTable,
    /// Number of parameters.
    pub parameters: usize,
    prompts: Prompts,
    adapters: Registry,
    engine: EngineHandle,
    context: usize,
    /// What follows a scored text.
    end_of_text: u32,
    /// What ends a generated one.
    ends: Arc<[u32]>,
}

/// What became of one job.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Log-probabilities of the prompt, if asked for.
    pub prompt: Vec<Option<TokenLogprob>>,
    /// The generated text.
    pub text: String,
    /// Whether it ran into a limit.
    pub cut: bool,
}

impl Model {
    /// Loads `bundle` as `shoal serve` does.
    pub fn load(bundle: &Path) -> Result<Self> {
        let mut bundle = Bundle::open(bundle, None)?;
        let end_of_text = bundle.end_of_text();
        let end_of_text = end_of_text.context("the bundle names no end of text")?;
        let ends = bundle.ends().into();
        let metrics = Arc::new(Metrics::new(&bundle.tasks.names()));
        let options = LoadOptions::default();
        let adapters = bundle.registry(options.dtype, Bounds::NONE, metrics.clone())?;
        let (engine, _) = bundle.start(options, Settings::default(), metrics);
        let mut state = engine.watch();
        let state = *block_on(state.wait_for(|&state| state != State::Loading))?;
        ensure!(state == State::Ready, "the engine failed to start");
        let context = engine.capacity().map_or(bundle.spec.context, |c| c.context);
        let parameters = bundle.spec.parameters();
        let Bundle { tasks, prompts, .. } = bundle;
        Ok(Self { tasks, parameters, prompts, adapters, engine, context, end_of_text, ends })
    }

    /// The prompt of `task` for `input`, asking for `words` words if it has that control.
    pub fn prompt(&self, task: &Task, input: &str, words: Option<usize>) -> Result<Vec<u32>> {
        let words = words.filter(|_| task.controls.contains_key("words"));
        let controls = words.map(|n| ("words".to_owned(), n.into()));
        let controls = BTreeMap::from_iter(controls);
        let prompt = self.prompts.encode(task, input, &controls);
        Ok(prompt.with_context(|| format!("{}: {input}", task.name))?.tokens)
    }

    /// A job that scores `output` after `prompt`; `None` if both do not fit into the context.
    pub fn scoring(&self, task: &Task, mut prompt: Vec<u32>, output: &str) -> Result<Option<Job>> {
        prompt.extend(self.prompts.tokenizer().encode_plain(output)?);
        prompt.push(self.end_of_text);
        if prompt.len() > self.context {
            return Ok(None);
        }
        Ok(Some(Job { score_prompt: Some(0), max_new: 0, ..self.job(task, prompt, 0)? }))
    }

    /// A job that generates after `prompt` with the task's own defaults.
    pub fn job(&self, task: &Task, prompt: Vec<u32>, seed: u64) -> Result<Job> {
        let Params { max_tokens, min_tokens, .. } = task.defaults;
        let room = self.context.saturating_sub(prompt.len()) as u32;
        let max_new = max_tokens.map_or(room, |most| most.min(room));
        Ok(Job {
            seed,
            min_new: min_tokens.unwrap_or(0),
            stop_ids: self.ends.clone(),
            ..job_of(task, prompt, max_new, &self.adapters, &self.engine)?
        })
    }

    /// Runs all jobs and hands each outcome to `each`, in their order.
    pub fn run(
        &self,
        jobs: impl IntoIterator<Item = Job>,
        mut each: impl FnMut(usize, Outcome),
    ) -> Result<()> {
        let mut under_way = VecDeque::new();
        let mut finish = |(i, stops, events): (usize, Vec<String>, _)| -> Result<()> {
            each(i, self.outcome(&stops, events)?);
            Ok(())
        };
        for (i, job) in jobs.into_iter().enumerate() {
            if under_way.len() == STREAMS
                && let Some(oldest) = under_way.pop_front()
            {
                finish(oldest)?;
            }
            let stops = self.tasks.get(job.task).defaults.stop.clone().unwrap_or_default();
            // It arrives when it is handed in, not when it was made.
            let job = Job { arrived: telemetry::now(), ..job };
            under_way.push_back((i, stops, self.engine.submit(job)?));
        }
        under_way.into_iter().try_for_each(finish)
    }

    fn outcome(&self, stops: &[String], mut events: Receiver<Event>) -> Result<Outcome> {
        let mut decoder = Incremental::new(stops);
        let mut outcome = Outcome::default();
        loop {
            match events.blocking_recv() {
                Some(Event::Prompt(scores)) => outcome.prompt = scores,
                Some(Event::Token { id, .. }) => {
                    let piece = decoder.push(self.prompts.tokenizer().token_bytes(id));
                    outcome.text += &piece.text;
                    if piece.stopped {
                        return Ok(outcome);
                    }
                }
                Some(Event::Done { finish, .. }) => {
                    outcome.text += &decoder.finish();
                    outcome.cut = finish == Finish::Length;
                    return Ok(outcome);
                }
                Some(Event::Failed(error)) => return Err(error.into()),
                None => bail!("the engine stopped"),
            }
        }
    }
}
