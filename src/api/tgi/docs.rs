//! What text-generation-inference's wire looks like, for the document.

use super::answer::{Answer, Frame};
use super::refusal::refusal;
use crate::api::docs::{Document, Operation, Wire, reference};
use crate::api::http::schema::{common, count, object, optional, properties, sampling, switch};
use crate::request::{MAX_LOGPROBS, MAX_STOP};
use serde_json::{Value, json};

const WIRE: Wire = Wire { tag: "text-generation-inference", error: "TgiError", wording: refusal };

/// Adds this wire.
pub fn describe(document: &mut Document) {
    let error = json!({
        "error": {"type": "string"},
        "error_type": {"enum": ["validation", "overloaded", "generation", "healthcheck"]},
    });
    document.schema("TgiError", object(&["error"], [properties(error)]));
    let answer = document.derived::<Answer>("TgiAnswer");
    document.derived::<Frame>("TgiFrame");
    document.schema("TgiRequest", body());
    let list = json!({"type": "array", "items": answer, "minItems": 1, "maxItems": 1});
    for (path, id, answer) in [
        ("/", "tgiGenerateList", Some(list)),
        ("/generate", "tgiGenerate", Some(answer)),
        ("/generate_stream", "tgiGenerateStream", None),
    ] {
        document.add(path, operation(id, answer));
    }
}

fn operation(id: &str, whole: Option<Value>) -> Operation {
    let parameters = json!({"adapter_id": "image", "max_new_tokens": 40, "details": true});
    let operation = Operation::post(WIRE, id, "Continues a text")
        .describe(
            "Without `parameters` tokens are drawn; with them, the likeliest is taken unless `do_sample`, \
             `temperature`, `top_k` or `top_p` say otherwise.",
        )
        .asks_the_model()
        .body(
            reference("TgiRequest"),
            &[("a task", json!({"inputs": "a fox in the snow", "parameters": parameters}))],
        );
    let operation = match whole {
        Some(whole) => operation.answers("200", "The text.", whole),
        None => operation,
    };
    let text = "Events whose data is a TgiFrame or, last, an error.";
    operation.streams(text, reference("TgiFrame"))
}

/// What [`super::ask`] reads.
fn body() -> Value {
    let mut shared = common();
    shared.shift_remove("debug");
    let own = json!({
        "inputs": {"type": "string"},
        "stream": switch("Answers with events as the text comes."),
        "parameters": parameters(),
    });
    object(&["inputs"], [properties(own), shared])
}

fn parameters() -> Value {
    let ours = sampling();
    let same = |name: &str| ours.get(name).cloned().unwrap_or_default();
    let texts = json!({
        "type": ["array", "null"],
        "items": {"type": "string", "minLength": 1, "maxLength": 1024},
        "maxItems": MAX_STOP,
        "description": "Each ends the text, and stays in it.",
    });
    let nothing = |values: Value, text: &str| json!({"enum": values, "description": text});
    let own = json!({
        "adapter_id": optional("string", json!({}), "A task or an adapter; without one, the bundle."),
        "details": switch("Tells the tokens."),
        "decoder_input_details": switch("And those of the prompt; not in a stream."),
        "return_full_text": switch("Puts the prompt before the text."),
        "do_sample": optional("boolean", json!({}), "Draws tokens."),
        "max_new_tokens": count("At most this many new tokens."),
        "top_n_tokens": optional("integer", json!({"minimum": 0, "maximum": MAX_LOGPROBS}),
            "The likeliest tokens beside each."),
        "truncate": optional("integer", json!({"minimum": 1, "maximum": u32::MAX}),
            "Keeps this many tokens of the prompt, the last ones; not for a task."),
        "stop": texts,
        "stop_sequences": texts,
        "grammar": grammar(),
        "typical_p": nothing(json!([null, 1]), "Not supported."),
        "watermark": nothing(json!([null, false]), "Not supported."),
        "best_of": nothing(json!([null, 1]), "Not supported."),
        "temperature": same("temperature"),
        "top_k": same("top_k"),
        "top_p": same("top_p"),
        "repetition_penalty": same("repetition_penalty"),
        "frequency_penalty": same("frequency_penalty"),
        "seed": same("seed"),
    });
    let mut schema = object(&[], [properties(own)]);
    schema["type"] = json!(["object", "null"]);
    schema
}

fn grammar() -> Value {
    let form = |kinds: Value, value: Value| {
        let properties = properties(json!({"type": {"enum": kinds}, "value": value}));
        object(&["type", "value"], [properties])
    };
    json!({
        "anyOf": [
            form(json!(["regex"]), json!({"type": "string"})),
            form(json!(["json", "json_schema"]), json!({"description": "A JSON schema, or its text."})),
            {"type": "null"},
        ],
        "description": "What the text must look like.",
    })
}
