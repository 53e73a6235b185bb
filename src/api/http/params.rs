//! What the bodies of all generation routes share: sampling parameters, controls, adapters, deadlines.
//! What such a body may hold stands here and nowhere else; what its values mean is
//! [`crate::api::service`]'s.

use super::call::{Call, milliseconds};
use super::fields::Fields;
use super::grammar::grammar;
use crate::error::{Error, Result};
use crate::request::{Input, Params, Request};
use serde_json::{Map, Value};

/// What OpenAI's clients send and what changes nothing here.
pub const WITHOUT_EFFECT: [&str; 5] =
    ["user", "metadata", "store", "service_tier", "parallel_tool_calls"];

/// What a wire has read of a body before [`request`] reads the rest.
pub struct Asked {
    /// A task's name; the bundle's id or an adapter's name for raw text.
    pub model: String,
    /// The prompts.
    pub inputs: Vec<Input>,
    /// The field that they are in.
    pub prompt_field: &'static str,
    /// Sampling and lengths.
    pub params: Params,
    /// What `max_tokens` is where nobody says; `None` is all that the context leaves.
    pub usual_max_tokens: Option<u32>,
}

impl Asked {
    /// The request, with the body's controls and with nothing else that bodies share.
    pub fn request(self, body: &mut Fields, call: &Call) -> Result<Request> {
        let (deadline, first_token_deadline) = call.deadlines(None);
        Ok(Request {
            record: call.record.clone(),
            model: self.model,
            adapters: None,
            task: None,
            debug: false,
            inputs: self.inputs,
            prompt_field: self.prompt_field,
            controls: body.take("controls")?.unwrap_or_default(),
            params: self.params,
            labels: Vec::new(),
            grammar: None,
            usual_max_tokens: self.usual_max_tokens,
            deadline,
            first_token_deadline,
        })
    }
}

/// Reads the rest of a body, after the fields of its own that a wire has taken.
pub fn request(mut body: Fields, call: &Call, asked: Asked) -> Result<Request> {
    let request = asked.request(&mut body, call)?;
    let adapters = mixture(&mut body)?;
    let grammar = grammar(&mut body)?;
    let task = body.take("task")?;
    let debug = match body.take_object("debug", "debug.")? {
        None => false,
        Some(mut debug) => {
            let routing = debug.take("routing")?.unwrap_or(false);
            debug.finish()?;
            routing
        }
    };
    let timeout = match body.take::<f64>("timeout_ms")? {
        Some(ms) => Some(milliseconds("timeout_ms", ms)?),
        None => None,
    };
    for name in WITHOUT_EFFECT {
        body.take_value(name);
    }
    if body.take_value("suffix").is_some() {
        return Err(Error::invalid("suffix", "suffix is not supported; leave it out"));
    }
    if let Some(best_of) = body.take::<u32>("best_of")?
        && best_of != request.params.n.unwrap_or(1)
    {
        let message = "best_of is supported only where it equals n";
        return Err(Error::invalid("best_of", message));
    }
    body.finish()?;
    let (deadline, first_token_deadline) = call.deadlines(timeout);
    Ok(Request { adapters, task, debug, grammar, deadline, first_token_deadline, ..request })
}

/// `adapters`: an array of `{"name", "weight"}`.
fn mixture(body: &mut Fields) -> Result<Option<Vec<(String, f32)>>> {
    let part = |given| {
        let mut given = Fields::of(given, "adapters.");
        let name = given.take("name")?.ok_or_else(|| given.missing("name"))?;
        let weight = given.take("weight")?.ok_or_else(|| given.missing("weight"))?;
        given.finish()?;
        Ok((name, weight))
    };
    let parts: Option<Vec<Map<String, Value>>> = body.take("adapters")?;
    parts.map(|parts| parts.into_iter().map(part).collect()).transpose()
}

/// The parameters of completions and of the native route.
pub fn params(body: &mut Fields) -> Result<Params> {
    let (logprobs, echo) = (body.take("logprobs")?, body.take("echo")?);
    Ok(Params { logprobs, echo, ..sampling(body)? })
}

/// The parameters that have the same name on all routes of ours and OpenAI's.
pub fn sampling(body: &mut Fields) -> Result<Params> {
    let max_tokens = body.take("max_tokens")?;
    let max_completion_tokens = body.take("max_completion_tokens")?;
    if let (Some(a), Some(b)) = (max_tokens, max_completion_tokens)
        && a != b
    {
        let message = format!("max_completion_tokens is {b}, but max_tokens is {a}");
        return Err(Error::invalid("max_completion_tokens", message));
    }
    let stop =
        match body.take_value("stop") {
            None => None,
            Some(Value::String(one)) => Some(vec![one]),
            Some(list) => Some(serde_json::from_value(list).map_err(|_| {
                Error::invalid("stop", "stop must be a string or an array of strings")
            })?),
        };
    Ok(Params {
        max_tokens: max_tokens.or(max_completion_tokens),
        min_tokens: body.take("min_tokens")?,
        temperature: body.take("temperature")?,
        top_k: body.take("top_k")?,
        top_p: body.take("top_p")?,
        min_p: body.take("min_p")?,
        repetition_penalty: body.take("repetition_penalty")?,
        presence_penalty: body.take("presence_penalty")?,
        frequency_penalty: body.take("frequency_penalty")?,
        seed: body.take("seed")?,
        stop,
        logit_bias: body.take("logit_bias")?,
        ignore_eos: body.take("ignore_eos")?,
        n: body.take("n")?,
        ..Params::default()
    })
}
