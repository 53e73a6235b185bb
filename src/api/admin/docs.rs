//! What administration looks like, for the document.

use crate::api::docs::{Document, Operation, Wire, reference};
use crate::api::http::schema::{list, object, optional, properties, switch};
use crate::error::Kind;
use serde_json::{Value, json};

const WIRE: Wire = Wire::usual("Administration");

/// What may be wrong with a change, beside its body.
const CHANGE: [Kind; 5] =
    [Kind::NotFound, Kind::Conflict, Kind::Overloaded, Kind::Unavailable, Kind::Internal];

/// Adds these routes.
pub fn describe(document: &mut Document) {
    let adapter = document.schema("Adapter", adapter());
    let adapters = document.schema("Adapters", list(adapter));
    document.schema("LoadAdapterRequest", load_body());
    document.schema("UnloadAdapterRequest", unload_body());
    document.schema("AddTaskRequest", add_task_body());
    let operation = Operation::get(WIRE, "listAdapters", "The adapters that are loaded");
    let operation = operation.for_administrators().answers("200", "The adapters.", adapters);
    document.add("/v1/adapters", operation);
    document.add("/v1/load_lora_adapter", load());
    document.add("/v1/unload_lora_adapter", unload());
    document.add("/v1/tasks", add_task());
}

fn load() -> Operation {
    let body = json!({"lora_name": "style", "lora_path": "style"});
    Operation::post(WIRE, "loadAdapter", "Loads an adapter while all else is served")
        .for_administrators()
        .errors(&CHANGE)
        .body(reference("LoadAdapterRequest"), &[("a folder", body)])
        .answers("200", "The adapter.", reference("Adapter"))
}

fn unload() -> Operation {
    Operation::post(WIRE, "unloadAdapter", "Forgets an adapter that no task needs")
        .for_administrators()
        .errors(&CHANGE)
        .body(reference("UnloadAdapterRequest"), &[("by name", json!({"lora_name": "style"}))])
        .answers("200", "What it was.", reference("Adapter"))
}

fn add_task() -> Operation {
    let body = json!({"name": "echo", "toml": "description = \"Completes.\"\ntemplate = \"{{ input }}\"\n"});
    Operation::post(WIRE, "addTask", "Adds a task")
        .for_administrators()
        .errors(&CHANGE)
        .body(reference("AddTaskRequest"), &[("raw text", body)])
        .answers("201", "The task.", reference("Task"))
}

/// What [`super::load`] reads.
fn load_body() -> Value {
    object(
        &["lora_name", "lora_path"],
        [properties(json!({
            "lora_name": {"type": "string", "description": "What requests will call it."},
            "lora_path": {"type": "string", "description": "Its folder, below the adapter root."},
            "load_inplace": switch("Takes the place of the one with this name."),
            "expected_generation": generation(),
            "pinned": switch("Is never given up to make room."),
            "base_model_name": optional("string", json!({}), "The bundle's id."),
            "is_3d_lora_weight": switch("Not supported."),
        }))],
    )
}

/// What [`super::unload`] reads.
fn unload_body() -> Value {
    object(
        &["lora_name"],
        [properties(json!({
            "lora_name": {"type": "string"},
            "expected_generation": generation(),
            "lora_int_id": {"description": "Has no effect."},
        }))],
    )
}

/// What [`super::add_task`] reads.
fn add_task_body() -> Value {
    object(
        &["name", "toml"],
        [properties(json!({
            "name": {"type": "string"},
            "toml": {"type": "string", "description": "The text of a task's file."},
        }))],
    )
}

fn generation() -> Value {
    let range = json!({"minimum": 0, "maximum": u64::MAX});
    optional("integer", range, "Refused unless the one that is loaded has this generation.")
}

fn adapter() -> Value {
    let names = ["id", "object", "generation", "kind", "rank", "bytes", "pinned", "tasks"];
    object(
        &names,
        [properties(json!({
            "id": {"type": "string"},
            "object": {"const": "adapter"},
            "generation": {"type": "integer", "minimum": 1, "description": "How often it was loaded."},
            "kind": {"enum": ["lora", "mta"]},
            "rank": {"type": "integer", "minimum": 1},
            "bytes": {"type": "integer", "minimum": 0},
            "pinned": {"type": "boolean"},
            "tasks": {"type": "array", "items": {"type": "string"}},
        }))],
    )
}
