//! The one path of a request, whichever wire it came by: gate, task, parameters, prompt, admission,
//! engine. What comes back is a [`Ticket`]; everything that can be refused is refused before it.
//!
//! Knows no sockets and no JSON bodies. Holds no lock.

use super::catalog::{Catalog, Target};
use super::encode::{Encoder, Subject};
use super::jobs::{Plan, Planned};
use super::ticket::{InFlight, Source, Terms, Ticket};
use crate::adapter::registry::Registry;
use crate::engine::{Capacity, EngineHandle};
use crate::error::{Error, Kind, Result};
use crate::ids::random;
use crate::metrics::{Metrics, RequestMeter};
use crate::request::{Input, Params, Request};
use crate::task::{Task, TaskTable};
use crate::telemetry::{Record, now};
use crate::text::{Prompt, Prompts, Tokenizer};
use std::sync::Arc;
use tokio::sync::watch;

/// The most texts that one request may ask for, over all its prompts.
const MAX_CHOICES: usize = 1024;

/// What requests may take of the whole server, whatever their task allows; `None` bounds nothing more.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caps {
    /// Requests that are being worked on at once, over all wires.
    pub requests: Option<usize>,
    /// Tokens of one prompt, as the model sees it.
    pub input_tokens: Option<usize>,
}

/// Everything that a request needs.
pub struct Service {
    catalog: Catalog,
    encoder: Encoder,
    engine: EngineHandle,
    metrics: Arc<Metrics>,
    caps: Caps,
    /// Requests that are being admitted, and tickets that are not dropped yet.
    in_flight: watch::Sender<usize>,
}

impl Service {
    /// A service of these tasks and adapters, whose texts end with one of `ends`.
    pub fn new(
        tasks: TaskTable,
        prompts: Prompts,
        adapters: Option<Arc<Registry>>,
        ends: Vec<u32>,
        engine: EngineHandle,
        metrics: Arc<Metrics>,
    ) -> Self {
        let encoder = Encoder::new(prompts.tokenizer().clone(), ends);
        let catalog = Catalog::new(tasks, prompts, adapters);
        let (caps, in_flight) = (Caps::default(), watch::Sender::new(0));
        Self { catalog, encoder, engine, metrics, caps, in_flight }
    }

    /// The same, with caps.
    pub fn with_caps(self, caps: Caps) -> Self {
        Self { caps, ..self }
    }

    /// What requests may take of the whole server.
    pub fn caps(&self) -> Caps {
        self.caps
    }

    /// Returns when no request is being worked on.
    pub async fn idle(&self) {
        let mut count = self.in_flight.subscribe();
        // The sender is ours, so that waiting cannot fail.
        let _ = count.wait_for(|n| *n == 0).await;
    }

    /// Everything that a request can name.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The engine.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// The metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Hands a request to the engine; all that can be wrong with it is known when this returns.
    pub async fn submit(&self, request: Request) -> Result<Ticket> {
        let mut meter = RequestMeter::new(self.metrics.clone(), request.record.clone());
        let field = request.prompt_field;
        match self.admit(request, &mut meter).await {
            Ok((terms, sources)) => Ok(Ticket::new(terms, sources, meter)),
            Err(error) => {
                meter.end(error.kind.row().outcome);
                Err(named(error, field))
            }
        }
    }

    /// What the model would read of a request.
    pub async fn prompts(&self, request: &Request) -> Result<Vec<Prompt>> {
        let found = self.catalog.find(&request.model)?;
        let capacity = self.engine.ready()?;
        let target = self.catalog.target(request, found, &self.engine)?;
        let prompts = self.encode(&target, request, capacity).await;
        prompts.map_err(|error| named(error, request.prompt_field))
    }

    /// Turns text into tokens and back.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        self.encoder.tokenizer()
    }

    /// Counts a request that was refused before it could be understood.
    pub fn count_refused(&self, record: &Arc<Record>, error: &Error) {
        RequestMeter::new(self.metrics.clone(), record.clone()).end(error.kind.row().outcome);
    }

    async fn admit(
        &self,
        request: Request,
        meter: &mut RequestMeter,
    ) -> Result<(Terms, Vec<Source>)> {
        let found = self.catalog.find(&request.model)?;
        meter.task(&found.0, &request.controls);
        let capacity = self.engine.ready()?;
        let in_flight = self.enter()?;
        let target = self.catalog.target(&request, found, &self.engine)?;
        request.record.note(|facts| {
            facts.model = Some(request.model.clone());
            facts.operation = match request.inputs.first() {
                _ if !request.labels.is_empty() => "score",
                Some(Input::Chat(_)) => "chat",
                _ => "text_completion",
            };
            let parts = target.adapters.iter().flat_map(|chosen| &chosen.parts);
            facts.adapters = parts.map(|(name, ..)| name.clone()).collect();
        });
        let task = &target.task;
        let params = merged(&request.params, task);
        params.check()?;
        self.check_ids(&params, &capacity)?;
        self.check_choices(&request, &params, task)?;
        check_truncate(&params, &target)?;
        let seed = params.seed.map_or_else(|| random() >> 1, |seed| seed as u64);
        let plan = Plan {
            request: &request,
            target: &target,
            params: &params,
            seed,
            context: capacity.context,
            ends: self.encoder.ends(),
            experts: self.engine.experts().is_some(),
        };
        let prompts = in_time(&request, self.encode(&target, &request, capacity)).await?;
        let guide = in_time(&request, self.encoder.guide(&request)).await?;
        let Planned { jobs, echoes, prompt_tokens } = match request.labels.is_empty() {
            true => plan.texts(prompts, guide)?,
            false => {
                let most = self.caps.input_tokens.unwrap_or(capacity.context);
                plan.labels(prompts, self.encoder.tokenizer(), most.min(capacity.context))?
            }
        };
        let most: Vec<u32> = jobs.iter().map(|job| job.max_new).collect();
        let events = self.engine.submit_all(jobs)?;
        let sources = std::iter::zip(events, std::iter::zip(most, echoes))
            .map(|(events, (max_new, echo))| Source { events, max_new, echo })
            .collect();
        let terms = Terms {
            record: request.record,
            model: request.model,
            tokenizer: self.encoder.tokenizer().clone(),
            stop: params.stop.unwrap_or_default(),
            logprobs: params.logprobs.is_some() || !request.labels.is_empty(),
            grammar: request.grammar.map(|(field, _)| field),
            debug: request.debug.then(|| target.adapters.map_or_else(Vec::new, |a| a.parts)),
            prompt_tokens,
            seed,
            deadline: request.deadline,
            first_token_deadline: request.first_token_deadline,
            in_flight,
        };
        Ok((terms, sources))
    }

    /// Takes one of the places that there are for requests at once.
    fn enter(&self) -> Result<InFlight> {
        let most = self.caps.requests.unwrap_or(usize::MAX);
        InFlight::new(&self.in_flight, most).ok_or_else(|| {
            let message = format!("{most} requests are under way, which is the most at once");
            Error::new(Kind::Overloaded, message)
        })
    }

    fn check_ids(&self, params: &Params, capacity: &Capacity) -> Result<()> {
        match params.logit_bias.iter().flatten().find(|(id, _)| **id as usize >= capacity.vocab) {
            None => Ok(()),
            Some((id, _)) => {
                let message =
                    format!("logit_bias names token {id}; ids are below {}", capacity.vocab);
                Err(Error::invalid("logit_bias", message))
            }
        }
    }

    /// Refuses more texts than could ever wait at once: coming back would not help.
    fn check_choices(&self, request: &Request, params: &Params, task: &Task) -> Result<()> {
        let most = MAX_CHOICES.min(task.slo.max_waiting).min(self.engine.max_waiting());
        let n = params.n.unwrap_or(1) as usize;
        let (texts, field) = match (request.labels.len(), n) {
            (0, 1) => (request.inputs.len(), "prompt"),
            (0, n) => (n * request.inputs.len(), "n"),
            (labels, _) => (labels, "labels"),
        };
        if texts <= most {
            return Ok(());
        }
        let message = format!("{texts} texts are asked for; allowed: up to {most}");
        Err(Error::invalid(field, message))
    }

    async fn encode(
        &self,
        target: &Target,
        request: &Request,
        capacity: Capacity,
    ) -> Result<Vec<Prompt>> {
        let Target { task, raw, prompts, .. } = target;
        let most = self.caps.input_tokens;
        let subject = Subject { prompts: prompts.clone(), task: task.clone(), raw: *raw, most };
        self.encoder.encode(subject, request, capacity).await
    }
}

/// The error, with the prompt called as the client calls it.
fn named(error: Error, prompt_field: &'static str) -> Error {
    let of_prompt = match &error.param {
        Some(param) => param == "prompt",
        None => error.kind == Kind::ContextLength,
    };
    if of_prompt { error.with_param(prompt_field) } else { error }
}

/// Does a part of a request's work unless its deadlines pass before that is done.
async fn in_time<T>(request: &Request, work: impl Future<Output = Result<T>>) -> Result<T> {
    let late = || Error::new(Kind::Deadline, "the request's deadline passed");
    let Some(limit) = request.deadline.into_iter().chain(request.first_token_deadline).min() else {
        return work.await;
    };
    if now() >= limit {
        return Err(late());
    }
    let done = tokio::time::timeout_at(limit.into(), work).await.map_err(|_| late())??;
    if now() < limit { Ok(done) } else { Err(late()) }
}

/// Refuses to cut what a template has put around a text.
fn check_truncate(params: &Params, target: &Target) -> Result<()> {
    if params.truncate.is_none() || target.raw {
        return Ok(());
    }
    let message = format!("truncate is for raw text; {} is a task", target.task.name);
    Err(Error::invalid("truncate", message))
}

/// What was asked for, over the task's defaults. A default of `min_tokens` gives way to a `max_tokens`
/// that was asked for.
fn merged(given: &Params, task: &Task) -> Params {
    let mut params = given.clone().over(&task.defaults);
    if let (None, Some(usual), Some(most)) = (given.min_tokens, params.min_tokens, given.max_tokens)
    {
        params.min_tokens = Some(usual.min(most));
    }
    params
}

#[cfg(test)]
pub mod tests;
