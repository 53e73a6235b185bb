//! What this wire's bodies ask for: `{"inputs", "parameters", "stream"}`.

use crate::api::http::call::Call;
use crate::api::http::fields::{Fields, missing};
use crate::api::http::grammar::typed;
use crate::api::http::params::{Asked, request};
use crate::error::{Error, Result};
use crate::request::{Grammar, Input, Params, Request};

/// What of a body is about its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// As server-sent events.
    pub stream: bool,
    /// With `details`.
    pub details: bool,
    /// With the prompt's tokens in them.
    pub prefill: bool,
    /// With the likeliest tokens beside each.
    pub top_tokens: bool,
    /// Whether tokens are drawn, so that the answer has a seed.
    pub sampled: bool,
    /// Characters of the prompt.
    pub characters: usize,
    /// What stands before the text in `generated_text`.
    pub prefix: String,
}

/// Reads a body, for `bundle` unless it names an adapter or a task.
pub fn read(
    mut body: Fields,
    call: &Call,
    bundle: &str,
    always_stream: bool,
) -> Result<(Request, Wanted)> {
    body.refuse("debug")?;
    let inputs: String = body.take("inputs")?.ok_or_else(|| missing("inputs"))?;
    let stream = body.take("stream")?.unwrap_or(false) || always_stream;
    let given = body.take_object("parameters", "parameters.")?;
    // Without `parameters`, this wire draws; with empty ones, it does not.
    let draws = given.is_none();
    let mut given = given.unwrap_or_default();
    let model = given.take("adapter_id")?.unwrap_or_else(|| bundle.to_owned());
    let prefill = given.take("decoder_input_details")?.unwrap_or(false);
    if prefill && stream {
        let message = "decoder_input_details is not possible in a stream";
        return Err(Error::invalid("decoder_input_details", message));
    }
    let details = given.take("details")?.unwrap_or(false);
    let grammar = match given.take_object("grammar", "grammar.")? {
        Some(grammar) => Some(("grammar", read_grammar(grammar)?)),
        None => None,
    };
    let full = given.take("return_full_text")?.unwrap_or(false);
    refuse_unsupported(&mut given)?;
    let (params, sampled) = params(&mut given, draws, prefill)?;
    given.finish()?;
    let wanted = Wanted {
        stream,
        details: details || prefill,
        prefill,
        top_tokens: params.logprobs > Some(0),
        sampled,
        characters: inputs.chars().count(),
        prefix: if full { inputs.clone() } else { String::new() },
    };
    let inputs = vec![Input::Text(inputs)];
    let prompt_field = "inputs";
    let asked = Asked { model, inputs, prompt_field, params, usual_max_tokens: None };
    let request = request(body, call, asked)?;
    if let (Some(_), Some((second, _))) = (&grammar, &request.grammar) {
        let message = format!("{second} is given beside parameters.grammar; allowed: one of them");
        return Err(Error::invalid(*second, message));
    }
    Ok((Request { grammar: grammar.or(request.grammar), ..request }, wanted))
}

/// The parameters, and whether tokens are drawn: if that was said, or if something was said that matters
/// only then. Otherwise the likeliest token is taken.
fn params(given: &mut Fields, draws: bool, prefill: bool) -> Result<(Params, bool)> {
    let temperature: Option<f32> = given.take("temperature")?;
    let (top_k, top_p): (Option<i64>, Option<f32>) = (given.take("top_k")?, given.take("top_p")?);
    let sampled = given.take("do_sample")?.unwrap_or(draws)
        || temperature.is_some_and(|t| t != 1.0)
        || top_k.is_some_and(|k| k > 0)
        || top_p.is_some_and(|p| p < 1.0);
    let mut stop: Vec<String> = given.take("stop")?.unwrap_or_default();
    stop.append(&mut given.take("stop_sequences")?.unwrap_or_default());
    let params = Params {
        max_tokens: given.take("max_new_tokens")?,
        temperature: if sampled { temperature } else { Some(0.0) },
        top_k,
        top_p,
        repetition_penalty: given.take("repetition_penalty")?,
        frequency_penalty: given.take("frequency_penalty")?,
        seed: given.take("seed")?,
        stop: Some(stop).filter(|stop| !stop.is_empty()),
        logprobs: Some(given.take("top_n_tokens")?.unwrap_or(0)),
        // The prompt's tokens are scored where they are echoed.
        echo: Some(prefill),
        n: Some(1),
        truncate: given.take("truncate")?,
        ..Params::default()
    };
    Ok((params, sampled))
}

/// `{"type", "value"}`.
fn read_grammar(mut grammar: Fields) -> Result<Grammar> {
    let kind: String = grammar.take("type")?.ok_or_else(|| grammar.missing("type"))?;
    let value = grammar.take_value("value").ok_or_else(|| grammar.missing("value"))?;
    grammar.finish()?;
    typed("grammar", &kind, value)
}

/// Takes what this wire has and this server has not, if it asks for nothing.
fn refuse_unsupported(given: &mut Fields) -> Result<()> {
    let typical = given.take::<f32>("typical_p")?.is_none_or(|p| p == 1.0);
    let watermark = given.take::<bool>("watermark")?.unwrap_or(false);
    let best_of = given.take::<u32>("best_of")?.is_none_or(|n| n == 1);
    for (fine, name, allowed) in [
        (typical, "typical_p", "null or 1"),
        (!watermark, "watermark", "false"),
        (best_of, "best_of", "null or 1"),
    ] {
        if !fine {
            let message = format!("{name} is not supported; allowed: {allowed}");
            return Err(Error::invalid(name, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(body: &str) -> Result<(Request, Wanted)> {
        read(Fields::parse(body.as_bytes())?, &Call::test(), "tiny", false)
    }

    fn with(parameters: &str) -> Result<(Request, Wanted)> {
        ask(&format!(r#"{{"inputs": "x", "parameters": {{{parameters}}}}}"#))
    }

    #[test]
    fn tokens_are_drawn_if_anything_asks_for_it() {
        let temperature = |parameters: &str| {
            let (request, wanted) = with(parameters).unwrap();
            (request.params.temperature, wanted.sampled)
        };
        for greedy in [
            "",
            r#""do_sample": false"#,
            r#""temperature": null, "top_k": null"#,
            r#""temperature": 1.0, "top_p": 1.0, "top_k": 0"#,
        ] {
            assert_eq!(temperature(greedy), (Some(0.0), false), "{greedy}");
        }
        assert_eq!(temperature(r#""temperature": 0.5"#), (Some(0.5), true));
        for drawn in [r#""do_sample": true"#, r#""top_k": 3"#, r#""top_p": 0.9"#] {
            assert_eq!(temperature(drawn), (None, true), "{drawn}");
        }
        let (request, wanted) = ask(r#"{"inputs": "x"}"#).unwrap();
        assert_eq!((request.params.temperature, wanted.sampled), (None, true));
    }

    #[test]
    fn what_its_clients_always_send_is_taken() {
        let body = r#""do_sample": false, "max_new_tokens": 20, "repetition_penalty": null,
            "frequency_penalty": null, "return_full_text": false, "stop": [], "seed": null,
            "temperature": null, "top_k": null, "top_p": null, "truncate": null, "typical_p": null,
            "best_of": null, "watermark": false, "details": true, "decoder_input_details": false,
            "top_n_tokens": null, "grammar": null"#;
        let (request, wanted) = with(body).unwrap();
        assert_eq!((request.model.as_str(), request.params.max_tokens), ("tiny", Some(20)));
        assert_eq!(request.params.stop, None, "a task's own stop strings hold");
        assert!(wanted.details && !wanted.stream && !wanted.top_tokens);
    }

    #[test]
    fn what_is_refused_is_named() {
        for (parameters, param) in [
            (r#""typical_p": 0.9"#, "typical_p"),
            (r#""watermark": true"#, "watermark"),
            (r#""best_of": 2"#, "best_of"),
            (r#""max_tokens": 2"#, "parameters.max_tokens"),
            (r#""seed": "x""#, "parameters.seed"),
            (r#""stop": "x""#, "parameters.stop"),
            (r#""grammar": {"type": "xml", "value": "a"}"#, "grammar"),
            (r#""grammar": {"type": "regex"}"#, "grammar.value"),
        ] {
            assert_eq!(with(parameters).unwrap_err().param.as_deref(), Some(param));
        }
        let two = r#"{"inputs": "x", "regex": "a+",
            "parameters": {"grammar": {"type": "regex", "value": "b+"}}}"#;
        assert_eq!(ask(two).unwrap_err().param.as_deref(), Some("regex"));
        let streamed = r#"{"inputs": "x", "stream": true,
            "parameters": {"decoder_input_details": true}}"#;
        assert_eq!(ask(streamed).unwrap_err().param.as_deref(), Some("decoder_input_details"));
        assert_eq!(ask("{}").unwrap_err().param.as_deref(), Some("inputs"));
        let outside = r#"{"inputs": "x", "max_new_tokens": 3}"#;
        assert_eq!(ask(outside).unwrap_err().param.as_deref(), Some("max_new_tokens"));
    }

    #[test]
    fn names_of_this_wire() {
        let (request, _) = with(
            r#""adapter_id": "image", "max_new_tokens": 7, "stop": ["a"], "stop_sequences": ["b"],
            "top_n_tokens": 2, "truncate": 9, "decoder_input_details": true"#,
        )
        .unwrap();
        assert_eq!(request.model, "image");
        let params = request.params;
        assert_eq!((params.max_tokens, params.logprobs), (Some(7), Some(2)));
        assert_eq!((params.truncate, params.echo), (Some(9), Some(true)));
        assert_eq!(params.stop, Some(vec!["a".into(), "b".into()]));
        let (request, _) = with(r#""grammar": {"type": "regex", "value": "a+"}"#).unwrap();
        assert_eq!(request.grammar, Some(("grammar", Grammar::Regex("a+".into()))));
    }
}
