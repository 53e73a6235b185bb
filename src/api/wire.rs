//! JSON in: the bodies of `/v1/completions` and of the native route become a [`Request`]. What a body
//! may hold stands here and nowhere else; what its values mean is [`super::service`]'s.

use super::call::{Call, milliseconds};
use super::fields::{Fields, missing};
use crate::error::{Error, Result};
use crate::request::{Input, Params, Request};
use serde::Deserialize;
use serde_json::Value;

/// `max_tokens` of `/v1/completions` where nobody says; OpenAI's.
const COMPLETION_MAX_TOKENS: u32 = 16;

/// The most prompts that one body may hold.
const MAX_PROMPTS: usize = 256;

/// What OpenAI's clients send and what changes nothing here.
const WITHOUT_EFFECT: [&str; 5] =
    ["user", "metadata", "store", "service_tier", "parallel_tool_calls"];

/// A body, understood.
#[derive(Debug)]
pub struct Asked {
    /// What to do.
    pub request: Request,
    /// How to answer.
    pub delivery: Delivery,
}

/// How a client wants its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// As server-sent events.
    pub stream: bool,
    /// With a frame of usage at the stream's end.
    pub include_usage: bool,
}

/// Reads a body of `POST /v1/completions`.
pub fn completion(mut body: Fields, call: &Call) -> Result<Asked> {
    let model = body.take("model")?.ok_or_else(|| missing("model"))?;
    let prompt = body.take_value("prompt").ok_or_else(|| missing("prompt"))?;
    let inputs = prompts(prompt)?;
    let stream: bool = body.take("stream")?.unwrap_or(false);
    let include_usage = stream_options(&mut body, stream)?;
    let params = params(&mut body)?;
    let delivery = Delivery { stream, include_usage };
    finish(body, call, model, inputs, params, Some(COMPLETION_MAX_TOKENS), delivery)
}

/// Reads a body of `POST /v1/tasks/{task}/generate`.
pub fn native(mut body: Fields, task: String, call: &Call) -> Result<Asked> {
    let input: String = body.take("input")?.ok_or_else(|| missing("input"))?;
    let stream = body.take("stream")?.unwrap_or(false);
    let params = params(&mut body)?;
    let delivery = Delivery { stream, include_usage: false };
    finish(body, call, task, vec![Input::Text(input)], params, None, delivery)
}

fn finish(
    mut body: Fields,
    call: &Call,
    model: String,
    inputs: Vec<Input>,
    params: Params,
    usual_max_tokens: Option<u32>,
    delivery: Delivery,
) -> Result<Asked> {
    let controls = body.take("controls")?.unwrap_or_default();
    let adapters = mixture(&mut body)?;
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
        && best_of != params.n.unwrap_or(1)
    {
        let message = "best_of is supported only where it equals n";
        return Err(Error::invalid("best_of", message));
    }
    body.finish()?;
    let timeout = timeout.into_iter().chain(call.timeout).min();
    let request = Request {
        id: call.id.clone(),
        model,
        adapters,
        task,
        debug,
        inputs,
        controls,
        params,
        usual_max_tokens,
        arrived: call.arrived,
        deadline: timeout.map(|t| call.arrived + t),
        first_token_deadline: call.first_token_timeout.map(|t| call.arrived + t),
    };
    Ok(Asked { request, delivery })
}

/// `adapters`: an array of `{"name", "weight"}`.
fn mixture(body: &mut Fields) -> Result<Option<Vec<(String, f32)>>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Part {
        name: String,
        weight: f32,
    }
    let parts = body.take::<Vec<Part>>("adapters")?;
    Ok(parts.map(|parts| parts.into_iter().map(|part| (part.name, part.weight)).collect()))
}

fn params(body: &mut Fields) -> Result<Params> {
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
        logprobs: body.take("logprobs")?,
        ignore_eos: body.take("ignore_eos")?,
        echo: body.take("echo")?,
        n: body.take("n")?,
    })
}

fn stream_options(body: &mut Fields, stream: bool) -> Result<bool> {
    let Some(mut options) = body.take_object("stream_options", "stream_options.")? else {
        return Ok(false);
    };
    if !stream {
        let message = "stream_options is allowed only with stream";
        return Err(Error::invalid("stream_options", message));
    }
    let include_usage = options.take("include_usage")?.unwrap_or(false);
    options.finish()?;
    Ok(include_usage)
}

/// The four forms of `prompt`: a string, strings, token ids, or arrays of token ids.
fn prompts(value: Value) -> Result<Vec<Input>> {
    let bad = || {
        let message = "prompt must be a string, an array of strings, an array of token ids, or an \
                       array of arrays of token ids";
        Error::invalid("prompt", message)
    };
    let list = match value {
        Value::String(text) => return Ok(vec![Input::Text(text)]),
        Value::Array(list) => list,
        _ => return Err(bad()),
    };
    if list.first().is_some_and(Value::is_number) {
        return Ok(vec![Input::Tokens(token_ids(Value::Array(list)).ok_or_else(bad)?)]);
    }
    if list.is_empty() || list.len() > MAX_PROMPTS {
        let message = format!("prompt has {} entries; allowed: 1 to {MAX_PROMPTS}", list.len());
        return Err(Error::invalid("prompt", message));
    }
    let texts = list[0].is_string();
    list.into_iter()
        .map(|entry| match entry {
            Value::String(text) if texts => Ok(Input::Text(text)),
            entry if !texts => token_ids(entry).map(Input::Tokens).ok_or_else(bad),
            _ => Err(bad()),
        })
        .collect()
}

fn token_ids(value: Value) -> Option<Vec<u32>> {
    serde_json::from_value(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::now;
    use std::time::Duration;

    fn call() -> Call {
        Call { id: "id".into(), arrived: now(), timeout: None, first_token_timeout: None }
    }

    fn read(body: &str) -> Result<Asked> {
        completion(Fields::parse(body.as_bytes())?, &call())
    }

    #[test]
    fn the_four_forms_of_a_prompt() {
        let forms = [
            (r#""a b""#, vec![Input::Text("a b".into())]),
            (r#"["a", ""]"#, vec![Input::Text("a".into()), Input::Text(String::new())]),
            ("[1, 2]", vec![Input::Tokens(vec![1, 2])]),
            ("[[1], [2, 3]]", vec![Input::Tokens(vec![1]), Input::Tokens(vec![2, 3])]),
        ];
        for (json, want) in forms {
            let asked = read(&format!(r#"{{"model": "m", "prompt": {json}}}"#)).unwrap();
            assert_eq!(asked.request.inputs, want, "{json}");
        }
        for json in ["3", "{}", "[]", "[1, \"a\"]", "[\"a\", 1]", "[-1]", "[1.5]", "[[\"a\"]]"] {
            let error = read(&format!(r#"{{"model": "m", "prompt": {json}}}"#)).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("prompt"), "{json}");
        }
    }

    #[test]
    fn what_is_refused_is_named() {
        let cases = [
            (r#""top_kk": 3"#, "top_kk"),
            (r#""temperature": "hot""#, "temperature"),
            (r#""max_tokens": -1"#, "max_tokens"),
            (r#""max_tokens": 2, "max_completion_tokens": 3"#, "max_completion_tokens"),
            (r#""stop": 3"#, "stop"),
            (r#""logit_bias": {"x": 1}"#, "logit_bias"),
            (r#""suffix": "x""#, "suffix"),
            (r#""best_of": 2"#, "best_of"),
            (r#""stream_options": {}"#, "stream_options"),
            (r#""stream": true, "stream_options": {"x": 1}"#, "stream_options.x"),
            (r#""timeout_ms": 0"#, "timeout_ms"),
            (r#""controls": 3"#, "controls"),
            (r#""adapters": {"a": 1}"#, "adapters"),
            (r#""adapters": [{"name": "a"}]"#, "adapters"),
            (r#""adapters": [{"name": "a", "weight": 1, "rank": 2}]"#, "adapters"),
            (r#""task": 3"#, "task"),
            (r#""debug": {"router": true}"#, "debug.router"),
        ];
        for (fields, param) in cases {
            let body = format!(r#"{{"model": "m", "prompt": "p", {fields}}}"#);
            assert_eq!(read(&body).unwrap_err().param.as_deref(), Some(param), "{fields}");
        }
        let error = read(r#"{"prompt": "p"}"#).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("model"));
    }

    #[test]
    fn what_has_no_effect_is_accepted() {
        let body = r#"{"model": "m", "prompt": "p", "user": "u", "metadata": {}, "store": false,
            "service_tier": "auto", "parallel_tool_calls": true, "suffix": null, "n": 2,
            "best_of": 2, "stop": null, "max_completion_tokens": 7, "logit_bias": {"5": -100}}"#;
        let params = read(body).unwrap().request.params;
        assert_eq!((params.n, params.max_tokens), (Some(2), Some(7)));
        assert_eq!(params.logit_bias, Some([(5, -100.0)].into()));
    }

    #[test]
    fn both_routes_take_the_same_fields() {
        let read = |fields: &str| {
            let body = format!(r#"{{"input": "x", "suffix": null, "n": 2, {fields}}}"#);
            native(Fields::parse(body.as_bytes())?, "image".into(), &call())
        };
        assert_eq!(read(r#""best_of": 2"#).unwrap().request.params.n, Some(2));
        assert_eq!(read(r#""best_of": 3"#).unwrap_err().param.as_deref(), Some("best_of"));
    }

    #[test]
    fn the_smallest_time_limit_wins() {
        let call = Call { timeout: Some(Duration::from_millis(50)), ..call() };
        let body = Fields::parse(br#"{"input": "x", "timeout_ms": 20.5}"#).unwrap();
        let request = native(body, "image".into(), &call).unwrap().request;
        assert_eq!(request.deadline, Some(call.arrived + Duration::from_micros(20_500)));
    }
}
