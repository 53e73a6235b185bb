//! The JSON schemas of what [`params`](super::params) and [`grammar`](super::grammar) read, for the
//! document of every wire that uses them: one function for each reader, with the names that it takes. What
//! may be absent may be `null`.

use super::call::MAX_TIMEOUT_MS;
use crate::adapter::registry::{MAX_PARTS, MAX_WEIGHT};
use crate::request::{MAX_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP};
use serde_json::{Map, Value, json};

/// Properties of an object, by name.
pub type Properties = Map<String, Value>;

/// The properties in `value`, an object.
pub fn properties(value: Value) -> Properties {
    match value {
        Value::Object(properties) => properties,
        _ => Properties::new(),
    }
}

/// An object with these properties and no others.
pub fn object<const N: usize>(required: &[&str], parts: [Properties; N]) -> Value {
    let properties: Properties = parts.into_iter().flatten().collect();
    json!({
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": false,
    })
}

/// A property that may be absent: `more` says more of its values, and `text` what it is for.
pub fn optional(kind: &str, more: Value, text: &str) -> Value {
    let mut schema = json!({"type": [kind, "null"], "description": text});
    for (name, value) in properties(more) {
        schema[name] = value;
    }
    schema
}

/// A switch that may be absent.
pub fn switch(text: &str) -> Value {
    optional("boolean", json!({"default": false}), text)
}

/// An object that may be absent, with properties of its own.
pub fn optional_object(required: &[&str], properties: Value, text: &str) -> Value {
    let more = json!({
        "required": required, "properties": properties, "additionalProperties": false,
    });
    optional("object", more, text)
}

/// A whole number from 0.
pub fn count(text: &str) -> Value {
    optional("integer", json!({"minimum": 0, "maximum": u32::MAX}), text)
}

/// A number with its range.
fn number(range: Value, text: &str) -> Value {
    optional("number", range, text)
}

/// What [`super::params::sampling`] reads.
pub fn sampling() -> Properties {
    let text = json!({"type": "string", "minLength": 1, "maxLength": 1024});
    properties(json!({
        "max_tokens": count("At most this many new tokens; 0 only with `echo`, which scores a prompt."),
        "max_completion_tokens": count("Another name of `max_tokens`."),
        "min_tokens": count("The text cannot end before this many new tokens."),
        "temperature": number(json!({"minimum": 0, "maximum": 2}), "0 takes the likeliest token; \
            without it the task's own, else 1."),
        "top_k": optional("integer", json!({"minimum": -1, "maximum": 1 << 20}),
            "Keeps the k likeliest tokens; 0 and -1 keep all."),
        "top_p": number(json!({"exclusiveMinimum": 0, "maximum": 1}),
            "Keeps the smallest set of tokens whose probability reaches this."),
        "min_p": number(json!({"minimum": 0, "maximum": 1}),
            "Drops tokens below this share of the likeliest one's probability."),
        "repetition_penalty": number(json!({"exclusiveMinimum": 0, "maximum": 10}),
            "Divides the logits of tokens that prompt or text has; 1 is off."),
        "presence_penalty": number(json!({"minimum": -2, "maximum": 2}),
            "Subtracted once from the logits of tokens that the text has."),
        "frequency_penalty": number(json!({"minimum": -2, "maximum": 2}),
            "Subtracted from a token's logit for each time that the text has it."),
        "seed": optional("integer", json!({"minimum": i64::MIN, "maximum": i64::MAX}),
            "The same seed gives the same text, whatever else is served meanwhile."),
        "stop": {
            "anyOf": [
                text,
                {"type": "array", "items": text, "maxItems": MAX_STOP},
                {"type": "null"},
            ],
            "description": "The text ends before the first of these.",
        },
        "logit_bias": optional("object", json!({
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                "maxProperties": MAX_BIAS,
            }), "What is added to the logits of tokens, by their ids."),
        "ignore_eos": switch("Goes on after the token that ends a text."),
        "n": optional("integer", json!({"minimum": 1, "maximum": MAX_N, "default": 1}),
            "How many texts for each prompt."),
    }))
}

/// What [`super::params::params`] reads beside that.
pub fn echo_and_logprobs() -> Properties {
    properties(json!({
        "echo": echo(),
        "logprobs": optional("integer", json!({"minimum": 0, "maximum": MAX_LOGPROBS}),
            "Tells the log-probability of each token and of this many others."),
    }))
}

/// `echo`.
pub fn echo() -> Value {
    switch("Puts the prompt before the text.")
}

/// The controls, which are part of every prompt of a task.
pub fn controls() -> Properties {
    properties(json!({
        "controls": optional("object", json!({
                "additionalProperties": {"type": ["integer", "string"]},
                "examples": [{"words": 20}],
            }), "The task's controls, by name; `/v1/tasks` lists them with what they take.")
    }))
}

/// What [`super::params::request`] reads of every body.
pub fn common() -> Properties {
    let part = json!({
        "type": "object",
        "required": ["name", "weight"],
        "properties": {
            "name": {"type": "string"},
            "weight": {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT},
        },
        "additionalProperties": false,
    });
    let mut all = controls();
    all.extend(properties(json!({
        "adapters": optional("array", json!({"items": part, "maxItems": MAX_PARTS}),
            "Adapters with their weights, in place of the task's own; none is the base alone."),
        "task": optional("string", json!({}),
            "Which task raw text is for, where adapters or experts depend on it."),
        "debug": optional_object(&[], json!({
                "routing": switch("Which adapters and experts computed the answer."),
            }), "Asks what computed the answer."),
        "timeout_ms": number(json!({"exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_MS}),
            "Within how many milliseconds the whole answer must be out."),
        "suffix": {"type": "null", "description": "Not supported."},
        "best_of": optional("integer", json!({"minimum": 1, "maximum": MAX_N}),
            "Allowed where it equals `n`."),
    })));
    for name in super::params::WITHOUT_EFFECT {
        all.insert(name.into(), json!({"description": "Has no effect."}));
    }
    all.extend(grammar());
    all
}

/// What [`super::grammar::grammar`] reads: at most one of them.
fn grammar() -> Properties {
    properties(json!({
        "choice": optional("array", json!({
                "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 1000,
            }), "The text is one of these."),
        "regex": optional("string", json!({}), "All of the text matches this regular expression."),
        "json_schema": {"description": "The text is JSON that is valid under this schema."},
        "response_format": response_format(),
    }))
}

fn response_format() -> Value {
    let form = |kinds: Value, name: Option<&str>, more: Value| {
        let mut properties = properties(more);
        properties.insert("type".into(), json!({"type": "string", "enum": kinds}));
        let required: Vec<&str> = ["type"].into_iter().chain(name).collect();
        object(&required, [properties])
    };
    let schema = json!({"description": "A JSON schema."});
    let named = optional_object(
        &["schema"],
        json!({
            "schema": schema.clone(),
            "name": optional("string", json!({}), "Has no effect."),
            "description": optional("string", json!({}), "Has no effect."),
            "strict": optional("boolean", json!({}), "Has no effect: every schema is held to."),
        }),
        "OpenAI's form.",
    );
    json!({
        "anyOf": [
            form(json!(["text", "json_object"]), None, json!({})),
            form(json!(["json_schema"]), Some("json_schema"), json!({"json_schema": named})),
            form(json!(["json_object", "json_schema", "json"]), Some("value"), json!({"value": schema})),
            form(json!(["regex"]), Some("value"), json!({"value": {"type": "string"}})),
            {"type": "null"},
        ],
        "description": "What the text must look like, as OpenAI or text-generation-inference say it.",
    })
}

/// A list of what `items` are, as OpenAI's clients expect it.
pub fn list(items: Value) -> Value {
    object(
        &["object", "data"],
        [properties(json!({
            "object": {"const": "list"},
            "data": {"type": "array", "items": items},
        }))],
    )
}
