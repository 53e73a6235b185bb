//! What Shoal's own wire looks like, for the document.

use super::generate::Answer;
use super::score::REFUSED;
use crate::api::docs::{Document, Operation, Wire, reference};
use crate::api::http::schema::{
    common, echo_and_logprobs, list, object, properties, sampling, switch,
};
use crate::api::score::MAX_LABELS;
use serde_json::{Value, json};

const WIRE: Wire = Wire::usual("Tasks");

/// Adds this wire.
pub fn describe(document: &mut Document) {
    let task = document.schema("Task", task());
    let tasks = document.schema("Tasks", list(task));
    document.derived::<Answer>("TaskAnswer");
    document.schema("GenerateRequest", generate_body());
    document.schema("ScoreRequest", score_body());
    document.schema("Scores", scores());
    let operation = Operation::get(WIRE, "listTasks", "The tasks, and what their controls take");
    document.add("/v1/tasks", operation.answers("200", "The tasks.", tasks));
    document.add("/v1/tasks/{task}/generate", generate());
    document.add("/v1/tasks/{task}/score", score());
}

fn generate() -> Operation {
    let body = json!({"input": "a fox in the snow", "controls": {"words": 12}});
    let stream = json!({"input": "a fox in the snow", "stream": true});
    Operation::post(WIRE, "generate", "Texts of a task")
        .path("task", "A task's name.", "image")
        .asks_the_model()
        .body(reference("GenerateRequest"), &[("twelve words", body), ("a stream", stream)])
        .answers("200", "`n` texts.", reference("TaskAnswer"))
        .streams(
            "Events whose data is a TaskAnswer with more text or, last, an error; `[DONE]` ends a good \
             one.",
            reference("TaskAnswer"),
        )
}

fn score() -> Operation {
    let body = json!({"input": "a fox in the snow", "labels": [" red", " white"]});
    Operation::post(WIRE, "score", "How likely a task finds texts")
        .path("task", "A task's name.", "image")
        .asks_the_model()
        .body(reference("ScoreRequest"), &[("two labels", body)])
        .answers("200", "Each label's score, in order.", reference("Scores"))
}

/// What [`super::generate`] reads.
fn generate_body() -> Value {
    let own = json!({"input": input(), "stream": switch("Answers with events as the text comes.")});
    object(&["input"], [properties(own), echo_and_logprobs(), sampling(), common()])
}

/// What [`super::score`] reads.
fn score_body() -> Value {
    let labels = json!({
        "type": "array",
        "items": {"type": "string", "minLength": 1},
        "minItems": 1,
        "maxItems": MAX_LABELS,
        "uniqueItems": true,
        "description": "What may follow the prompt; white space between them is part of a label.",
    });
    let own = json!({"input": input(), "labels": labels});
    let mut all = common();
    REFUSED.iter().for_each(|&name| drop(all.shift_remove(name)));
    object(&["input", "labels"], [properties(own), all])
}

fn input() -> Value {
    json!({"type": "string", "description": "What the task's template makes a prompt of."})
}

/// A task as it is listed.
fn task() -> Value {
    let control = object(
        &["type", "default"],
        [properties(json!({
            "type": {"enum": ["integer", "string"]},
            "minimum": {"type": "integer"},
            "maximum": {"type": "integer"},
            "enum": {"type": "array", "items": {"type": "string"}},
            "default": {"type": ["integer", "string", "null"]},
        }))],
    );
    object(
        &["id", "description", "adapter", "controls"],
        [properties(json!({
            "id": {"type": "string"},
            "description": {"type": "string"},
            "adapter": {"type": ["string", "null"], "description": "What it adds to the base weights."},
            "controls": {
                "type": "object",
                "additionalProperties": control,
                "description": "JSON schemas of its controls, by name.",
            },
        }))],
    )
}

fn scores() -> Value {
    let score = object(
        &["label", "logprob", "probability", "tokens"],
        [properties(json!({
            "label": {"type": "string"},
            "logprob": {"type": "number", "description": "Natural, of all its tokens together."},
            "probability": {"type": "number", "description": "Its share among the labels."},
            "tokens": {"type": "integer", "minimum": 1},
        }))],
    );
    object(
        &["id", "task", "model", "created", "scores", "usage"],
        [properties(json!({
            "id": {"type": "string"},
            "task": {"type": "string"},
            "model": {"type": "string", "description": "The bundle's id."},
            "created": {"type": "integer"},
            "scores": {"type": "array", "items": score},
            "usage": reference("Usage"),
        }))],
    )
}
