//! From a request that was understood to the jobs of its texts: one for each, of the right length and with
//! a seed of its own.

use super::catalog::Target;
use super::encode::fits;
use super::ticket::Echo;
use crate::engine::Job;
use crate::error::{Error, Kind, Result};
use crate::ids::{GAMMA, mix};
use crate::request::{Guide, Params, Request, Sampling};
use crate::text::{Prompt, Tokenizer};
use std::sync::Arc;

/// What the jobs of a request follow from.
pub struct Plan<'a> {
    /// What was asked.
    pub request: &'a Request,
    /// What it is for.
    pub target: &'a Target,
    /// Its parameters, over the task's defaults.
    pub params: &'a Params,
    /// Of its first text.
    pub seed: u64,
    /// Longest sequence.
    pub context: usize,
    /// The tokens that end a text.
    pub ends: &'a [u32],
    /// Whether the model has experts to tell of.
    pub experts: bool,
}

/// The jobs of a request.
pub struct Planned {
    /// One for each text.
    pub jobs: Vec<Job>,
    /// What begins each text, if that is wanted.
    pub echoes: Vec<Option<Arc<Echo>>>,
    /// Tokens that the model reads.
    pub prompt_tokens: u32,
}

/// How long a text may get.
struct Lengths {
    max_new: u32,
    min_new: u32,
}

impl Plan<'_> {
    /// `n` texts for each prompt, held to a grammar by `guide`.
    pub fn texts(&self, prompts: Vec<Prompt>, guide: Option<Box<dyn Guide>>) -> Result<Planned> {
        let params = self.params;
        let sampling = Arc::new(params.sampling());
        let endless = params.ignore_eos.unwrap_or(false);
        let stop_ids: Arc<[u32]> = if endless { [].into() } else { self.ends.into() };
        let echoes = params.echo.unwrap_or(false);
        // It is for the first token of the whole answer, so that the first job must keep it.
        let mut first_token_deadline = self.request.first_token_deadline;
        let mut planned = Planned { jobs: Vec::new(), echoes: Vec::new(), prompt_tokens: 0 };
        for prompt in prompts {
            let lengths = lengths(self, prompt.tokens.len())?;
            planned.prompt_tokens += prompt.tokens.len() as u32;
            let echo =
                echoes.then(|| Arc::new(Echo { text: prompt.text, tokens: prompt.tokens.clone() }));
            for choice in 0..params.n.unwrap_or(1) {
                planned.jobs.push(Job {
                    seed: choice_seed(self.seed, choice),
                    min_new: lengths.min_new,
                    stop_ids: stop_ids.clone(),
                    guide: guide.clone(),
                    score_prompt: params.logprobs.filter(|_| echoes),
                    first_token_deadline: first_token_deadline.take(),
                    ..self.job(&sampling, prompt.tokens.clone(), lengths.max_new)
                });
                planned.echoes.push(echo.clone());
            }
        }
        Ok(planned)
    }

    /// Each label after the request's one prompt, to be scored: up to `most` tokens together. The engine
    /// computes what they share once.
    pub fn labels(
        &self,
        prompts: Vec<Prompt>,
        tokenizer: &Tokenizer,
        most: usize,
    ) -> Result<Planned> {
        let prompt: Vec<u32> = prompts.into_iter().flat_map(|prompt| prompt.tokens).collect();
        let sampling = Arc::new(Params::default().sampling());
        let mut planned =
            Planned { jobs: Vec::new(), echoes: Vec::new(), prompt_tokens: prompt.len() as u32 };
        for label in &self.request.labels {
            let label_tokens = tokenizer.encode_plain(label)?;
            let tokens = [prompt.as_slice(), &label_tokens].concat();
            if tokens.len() > most {
                let count = tokens.len();
                let message =
                    format!("a label and the prompt have {count} tokens; allowed: up to {most}");
                return Err(Error::new(Kind::ContextLength, message).with_param("labels"));
            }
            planned.prompt_tokens += label_tokens.len() as u32;
            planned.jobs.push(Job {
                score_prompt: Some(0),
                score_from: prompt.len(),
                ..self.job(&sampling, tokens, 0)
            });
            let echo = Echo { text: label.clone(), tokens: label_tokens };
            planned.echoes.push(Some(Arc::new(echo)));
        }
        Ok(planned)
    }

    fn job(&self, sampling: &Arc<Sampling>, tokens: Vec<u32>, max_new: u32) -> Job {
        let (request, target) = (self.request, self.target);
        let arrived = request.record.arrived;
        Job {
            adapters: target.adapters.as_ref().map(|chosen| chosen.mix.clone()),
            gate: target.gate,
            report_experts: request.debug && self.experts,
            deadline: request.deadline,
            ..Job::new(target.task.id, tokens, sampling.clone(), max_new, arrived)
        }
    }
}

/// How many tokens may follow a prompt of `length` tokens in a context of `context`.
fn lengths(plan: &Plan, length: usize) -> Result<Lengths> {
    let Plan { request, params, context, .. } = *plan;
    let task = &plan.target.task;
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
