//! The one path of a request, whichever wire it came by: gate, task, parameters, prompt, admission,
//! engine. What comes back is a [`Ticket`]; everything that can be refused is refused before it.
//!
//! Knows no sockets and no JSON bodies. Holds no lock.

use super::catalog::{Catalog, Target};
use super::encode::{Encoder, Subject, fits};
use super::ticket::{Echo, InFlight, Source, Terms, Ticket};
use crate::adapter::registry::Registry;
use crate::engine::{Capacity, EngineHandle, Job};
use crate::error::{Error, Kind, Result};
use crate::ids::{GAMMA, mix, random};
use crate::metrics::{Metrics, RequestMeter};
use crate::request::{Input, Params, Request, Sampling};
use crate::task::{Task, TaskTable};
use crate::telemetry::{Record, now};
use crate::text::{Prompt, Prompts, Tokenizer};
use std::sync::Arc;
use tokio::sync::watch;

/// The most texts that one request may ask for, over all its prompts.
const MAX_CHOICES: usize = 1024;

/// Everything that a request needs.
pub struct Service {
    catalog: Catalog,
    encoder: Encoder,
    engine: EngineHandle,
    metrics: Arc<Metrics>,
    /// Tickets that are not dropped yet.
    in_flight: watch::Sender<usize>,
}

/// How long a text may get.
struct Lengths {
    max_new: u32,
    min_new: u32,
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
        Self { catalog, encoder, engine, metrics, in_flight: watch::Sender::new(0) }
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
        let field = request.prompt_field();
        match self.admit(request, &mut meter).await {
            Ok((terms, sources)) => Ok(Ticket::new(terms, sources, meter)),
            Err(error) => {
                meter.end(error.kind.row().outcome);
                let of_prompt = match &error.param {
                    Some(param) => param == "prompt",
                    None => error.kind == Kind::ContextLength,
                };
                Err(if of_prompt { error.with_param(field) } else { error })
            }
        }
    }

    /// What the model would read of a request.
    pub async fn prompts(&self, request: &Request) -> Result<Vec<Prompt>> {
        let found = self.catalog.find(&request.model)?;
        let capacity = self.engine.ready()?;
        let target = self.catalog.target(request, found, &self.engine)?;
        self.encode(&target, request, capacity).await
    }

    /// Turns text into tokens and back.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        self.encoder.tokenizer()
    }

    /// The token that ends a text; the first, if there are several.
    pub fn end_of_text(&self) -> Option<u32> {
        self.encoder.ends().first().copied()
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
        let target = self.catalog.target(&request, found, &self.engine)?;
        request.record.note(|facts| {
            facts.model = Some(request.model.clone());
            facts.operation = match request.inputs.first() {
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
        let n = params.n.unwrap_or(1) as usize;
        self.check_choices(n, request.inputs.len(), task)?;
        check_truncate(&params, &target)?;
        let seed = params.seed.map_or_else(|| random() >> 1, |seed| seed as u64);
        let prompts = in_time(&request, self.encode(&target, &request, capacity)).await?;
        let guide = in_time(&request, self.encoder.guide(&request)).await?;
        let (mut jobs, echoes): (Vec<Job>, Vec<_>) =
            self.jobs(&target, &request, (&params, seed), prompts, &capacity)?.into_iter().unzip();
        jobs.iter_mut().for_each(|job| job.guide = guide.clone());
        let prompt_tokens = jobs.iter().step_by(n).map(|job| job.tokens.len() as u32).sum();
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
            logprobs: params.logprobs.is_some(),
            debug: request.debug.then(|| target.adapters.map_or_else(Vec::new, |a| a.parts)),
            prompt_tokens,
            seed,
            deadline: request.deadline,
            first_token_deadline: request.first_token_deadline,
            in_flight: InFlight::new(&self.in_flight),
        };
        Ok((terms, sources))
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
    fn check_choices(&self, n: usize, prompts: usize, task: &Task) -> Result<()> {
        let most = MAX_CHOICES.min(task.slo.max_waiting).min(self.engine.max_waiting());
        let choices = n * prompts;
        if choices <= most {
            return Ok(());
        }
        let message = format!("{choices} texts are asked for; allowed: up to {most}");
        Err(Error::invalid(if n == 1 { "prompt" } else { "n" }, message))
    }

    async fn encode(
        &self,
        target: &Target,
        request: &Request,
        capacity: Capacity,
    ) -> Result<Vec<Prompt>> {
        let Target { task, raw, prompts, .. } = target;
        let subject = Subject { prompts: prompts.clone(), task: task.clone(), raw: *raw };
        self.encoder.encode(subject, request, capacity).await
    }

    /// The jobs of a request, each with the prompt that begins its text, if that is wanted.
    fn jobs(
        &self,
        target: &Target,
        request: &Request,
        (params, seed): (&Params, u64),
        prompts: Vec<Prompt>,
        capacity: &Capacity,
    ) -> Result<Vec<(Job, Option<Arc<Echo>>)>> {
        let task = &target.task;
        let sampling = Arc::new(params.sampling());
        let endless = params.ignore_eos.unwrap_or(false);
        let stop_ids: Arc<[u32]> = if endless { [].into() } else { self.encoder.ends().into() };
        let echoes = params.echo.unwrap_or(false);
        // It is for the first token of the whole answer, so that the first job must keep it.
        let mut first_token_deadline = request.first_token_deadline;
        let mut jobs = Vec::new();
        for prompt in prompts {
            let length = prompt.tokens.len();
            let lengths = lengths(task, request, params, length, capacity.context)?;
            let echo =
                echoes.then(|| Arc::new(Echo { text: prompt.text, tokens: prompt.tokens.clone() }));
            for choice in 0..params.n.unwrap_or(1) {
                let (tokens, max_new) = (prompt.tokens.clone(), lengths.max_new);
                let job = Job {
                    seed: choice_seed(seed, choice),
                    min_new: lengths.min_new,
                    stop_ids: stop_ids.clone(),
                    score_prompt: params.logprobs.filter(|_| echoes),
                    first_token_deadline: first_token_deadline.take(),
                    ..self.job(target, request, sampling.clone(), tokens, max_new)
                };
                jobs.push((job, echo.clone()));
            }
        }
        Ok(jobs)
    }

    /// A job for what `request` is for.
    fn job(
        &self,
        target: &Target,
        request: &Request,
        sampling: Arc<Sampling>,
        tokens: Vec<u32>,
        max_new: u32,
    ) -> Job {
        Job {
            adapters: target.adapters.as_ref().map(|chosen| chosen.mix.clone()),
            gate: target.gate,
            report_experts: request.debug && self.engine.experts().is_some(),
            deadline: request.deadline,
            ..Job::new(target.task.id, tokens, sampling, max_new, request.record.arrived)
        }
    }
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

/// How many tokens may follow a prompt of `length` tokens in a context of `context`.
fn lengths(
    task: &Task,
    request: &Request,
    params: &Params,
    length: usize,
    context: usize,
) -> Result<Lengths> {
    let given = request.params.max_tokens;
    let least = usize::from(params.max_tokens != Some(0));
    fits(length, least, context)?;
    let left = (context - length) as u32;
    if let Some(given) = given
        && given > left
    {
        let message = format!(
            "the prompt has {length} tokens and max_tokens is {given}; together they may have \
             {context} tokens"
        );
        return Err(Error::new(Kind::ContextLength, message).with_param("max_tokens"));
    }
    let limit = task.limits.max_tokens.unwrap_or(u32::MAX);
    if let Some(given) = given
        && given > limit
    {
        let message = format!("max_tokens is {given}; {} allows up to {limit}", task.name);
        return Err(Error::invalid("max_tokens", message));
    }
    let usual = params.max_tokens.or(request.usual_max_tokens).unwrap_or(left);
    let max_new = usual.min(left).min(limit);
    if let Some(given) = request.params.min_tokens
        && given > max_new
    {
        let message = format!("min_tokens is {given}, but at most {max_new} tokens fit");
        return Err(Error::invalid("min_tokens", message));
    }
    Ok(Lengths { max_new, min_new: params.min_tokens.unwrap_or(0).min(max_new) })
}

/// The seed of choice `choice`: the first choice of a request with a seed is the same whether or not
/// there are others.
fn choice_seed(seed: u64, choice: u32) -> u64 {
    mix(seed.wrapping_add(u64::from(choice).wrapping_mul(GAMMA)))
}

#[cfg(test)]
mod tests;
