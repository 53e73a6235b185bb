//! What OpenAI's wire looks like, for the document.

use super::chat::{self, EMPTY_IN_BODY, EMPTY_IN_MESSAGE};
use super::completions;
use crate::api::docs::{Document, Operation, Wire, reference};
use crate::api::http::schema::{
    Properties, common, controls, echo_and_logprobs, list, object, optional, optional_object,
    properties, sampling, switch,
};
use crate::error::Kind;
use crate::request::{MAX_LOGPROBS, ROLES};
use crate::text::MAX_MESSAGES;
use serde_json::{Value, json};

/// Its routes are there twice: what stands before their paths and their ids, and their heading.
const PLACES: [(&str, &str, Wire); 2] = [
    ("", "", Wire::usual("OpenAI")),
    ("/openai", "kserve_", Wire::usual("OpenAI, where KServe's clients look")),
];

/// Adds this wire.
pub fn describe(document: &mut Document) {
    // What a generic type is made of does not come with it.
    document.derived::<chat::Whole>("ChatChoice");
    document.derived::<chat::Piece>("ChatChunkChoice");
    document.derived::<chat::Completion<chat::Whole>>("ChatCompletion");
    document.derived::<chat::Completion<chat::Piece>>("ChatCompletionChunk");
    document.derived::<completions::Completion>("Completion");
    document.schema("ChatRequest", chat_body());
    document.schema("CompletionRequest", completion_body());
    document.schema("TokenizeRequest", tokenize_body());
    document.schema("DetokenizeRequest", detokenize_body());
    let model = document.schema("Model", model());
    document.schema("Models", list(model));
    for (prefix, id, wire) in PLACES {
        let mut add = |path: &str, operation| document.add(&format!("{prefix}{path}"), operation);
        add("/v1/chat/completions", chat_completions(wire, id));
        add("/v1/completions", completion(wire, id));
        add("/tokenize", tokenize(wire, id));
        add("/detokenize", detokenize(wire, id));
        let models = Operation::get(wire, &format!("{id}listModels"), "What a model can be");
        let text = "The bundle, its tasks, its adapters.";
        add("/v1/models", models.answers("200", text, reference("Models")));
        let model = Operation::get(wire, &format!("{id}getModel"), "One of them")
            .path("id", "The bundle's id, a task's name or an adapter's.", "image")
            .errors(&[Kind::NotFound])
            .answers("200", "The model.", reference("Model"));
        add("/v1/models/{id}", model);
    }
}

fn chat_completions(wire: Wire, id: &str) -> Operation {
    let user = json!([{"role": "user", "content": "a fox in the snow"}]);
    Operation::post(wire, &format!("{id}createChatCompletion"), "Answers a conversation")
        .describe("A task takes one message of a user as its input; the bundle needs a chat template.")
        .asks_the_model()
        .body(
            reference("ChatRequest"),
            &[
                ("a task", json!({"model": "image", "messages": user, "controls": {"words": 12}})),
                ("a stream", json!({"model": "image", "messages": user, "stream": true, "seed": 7})),
            ],
        )
        .answers("200", "The answer.", reference("ChatCompletion"))
        .streams(
            "Events whose data is a ChatCompletionChunk or, last, an error; `[DONE]` ends a good one.",
            reference("ChatCompletionChunk"),
        )
}

fn completion(wire: Wire, id: &str) -> Operation {
    let body = |more: Value| {
        let mut body = properties(json!({"model": "image", "prompt": "a fox in the snow"}));
        body.extend(properties(more));
        Value::Object(body)
    };
    Operation::post(wire, &format!("{id}createCompletion"), "Completes prompts")
        .asks_the_model()
        .body(
            reference("CompletionRequest"),
            &[
                ("a task", body(json!({"controls": {"words": 12}, "max_tokens": 40}))),
                ("two of them", body(json!({"n": 2, "seed": 7, "logprobs": 1}))),
                ("a stream", body(json!({"stream": true, "max_tokens": 40}))),
                ("one of three", body(json!({"choice": ["red", "green", "blue"]}))),
            ],
        )
        .answers("200", "`n` texts for each prompt, in order.", reference("Completion"))
        .streams(
            "Events whose data is a Completion with more text or, last, an error; `[DONE]` ends a good \
             one.",
            reference("Completion"),
        )
}

fn tokenize(wire: Wire, id: &str) -> Operation {
    let answer = object(
        &["count", "max_model_len", "token_strs", "tokens"],
        [properties(json!({
            "count": {"type": "integer", "minimum": 0},
            "max_model_len": {"type": "integer", "minimum": 1, "description": "The context."},
            "token_strs": {"type": ["array", "null"], "items": {"type": "string"}},
            "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        }))],
    );
    Operation::post(wire, &format!("{id}tokenize"), "What the model reads of a prompt")
        .errors(&[Kind::NotFound, Kind::ContextLength, Kind::Unavailable])
        .body(
            reference("TokenizeRequest"),
            &[("a task", json!({"model": "image", "prompt": "a fox", "return_token_strs": true}))],
        )
        .answers("200", "The prompt under its task's template, in tokens.", answer)
}

fn detokenize(wire: Wire, id: &str) -> Operation {
    let answer = object(&["prompt"], [properties(json!({"prompt": {"type": "string"}}))]);
    Operation::post(wire, &format!("{id}detokenize"), "What tokens are as text")
        .body(reference("DetokenizeRequest"), &[("two tokens", json!({"tokens": [5, 6]}))])
        .errors(&[Kind::NotFound])
        .answers("200", "The text.", answer)
}

/// What [`super::chat`] reads.
fn chat_body() -> Value {
    let own = json!({
        "model": model_name(),
        "messages": messages(),
        "logprobs": switch("Tells the log-probability of each token."),
        "top_logprobs": optional("integer", json!({"minimum": 0, "maximum": MAX_LOGPROBS}),
            "And of this many others; only with `logprobs`."),
    });
    let empty = empty(&EMPTY_IN_BODY);
    object(&["model", "messages"], [properties(own), empty, delivery(), sampling(), common()])
}

/// Fields that are there for clients that always send them.
fn empty(names: &[&str]) -> Properties {
    let nothing = json!({"type": ["array", "null"], "maxItems": 0, "description": "Says nothing."});
    names.iter().map(|&name| (name.to_owned(), nothing.clone())).collect()
}

/// What [`chat::messages`] reads.
fn messages() -> Value {
    let text = object(
        &["type", "text"],
        [properties(json!({"type": {"const": "text"}, "text": {"type": "string"}}))],
    );
    let mut message = properties(json!({
        "role": {"type": "string", "enum": ROLES},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": text}]},
    }));
    message.extend(empty(&EMPTY_IN_MESSAGE));
    let message = object(&["role", "content"], [message]);
    json!({"type": "array", "items": message, "minItems": 1, "maxItems": MAX_MESSAGES})
}

/// What [`super::completions`] reads.
fn completion_body() -> Value {
    let ids =
        json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}});
    let mut some = ids.clone();
    some["minItems"] = json!(1);
    let many = |items: Value| json!({"type": "array", "items": items, "minItems": 1});
    let own = json!({
        "model": model_name(),
        "prompt": {
            "anyOf": [{"type": "string"}, many(json!({"type": "string"})), some, many(ids)],
            "description": "One text or several, or their tokens; tokens are for the bundle and adapters.",
        },
    });
    let parts = [properties(own), delivery(), echo_and_logprobs(), sampling(), common()];
    object(&["model", "prompt"], parts)
}

/// What [`super::Delivery`] reads.
fn delivery() -> Properties {
    properties(json!({
        "stream": switch("Answers with events as the text comes."),
        "stream_options": optional_object(&[], json!({
            "include_usage": switch("Ends with an event that has `usage`."),
            "continuous_usage_stats": switch("Has `usage` in every event."),
        }), "Only with `stream`."),
    }))
}

/// What [`super::tokenize`] reads.
fn tokenize_body() -> Value {
    let own = json!({
        "model": optional("string", json!({}), "Whose template; without one, the bundle's."),
        "prompt": {"type": "string"},
        "messages": messages(),
        "return_token_strs": switch("Tells the tokens' texts too."),
        "add_special_tokens": switch("Has no effect: a tokenizer here adds none."),
    });
    let mut schema = object(&[], [properties(own), controls()]);
    schema["oneOf"] = json!([{"required": ["prompt"]}, {"required": ["messages"]}]);
    schema
}

fn detokenize_body() -> Value {
    object(
        &["tokens"],
        [properties(json!({
            "model": optional("string", json!({}), "Has no effect: all have one tokenizer."),
            "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}},
        }))],
    )
}

fn model_name() -> Value {
    json!({
        "type": "string",
        "description": "A task's name; the bundle's id or an adapter's name for raw text.",
        "examples": ["image"],
    })
}

fn model() -> Value {
    let names = ["id", "object", "created", "owned_by", "parent", "root"];
    object(
        &names,
        [properties(json!({
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer", "description": "When the server started."},
            "owned_by": {"type": "string"},
            "parent": {"type": ["string", "null"], "description": "What it adds to."},
            "root": {"type": "string", "description": "The bundle's id."},
        }))],
    )
}
