//! What probes and pages for operators look like, for the document, and the error that most routes share.

use super::schema::{object, properties};
use crate::api::docs::{Document, Operation, Wire};
use crate::error::{Kind, TABLE};
use serde_json::{Value, json};

const WIRE: Wire = Wire::usual("Operations");

/// Adds these routes.
pub fn describe(document: &mut Document) {
    document.schema("Error", error());
    let info = document.schema("Info", info());
    let operation = Operation::get(WIRE, "getInfo", "What this server is and what it takes");
    document.add("/info", operation.answers("200", "The server.", info));
    for (path, id, status, summary) in [
        ("/livez", "live", "alive", "Not in need of a restart"),
        ("/readyz", "ready", "ready", "Able to take work"),
        ("/health", "health", "ready", "Able to take work"),
        ("/startupz", "started", "started", "Start-up is over"),
    ] {
        let answer = object(&["status"], [properties(json!({"status": {"const": status}}))]);
        let operation = Operation::get(WIRE, id, summary).errors(&[Kind::Unavailable]);
        document.add(path, operation.answers("200", "It is.", answer));
    }
    let text = json!({"type": "string"});
    let metrics = Operation::get(WIRE, "getMetrics", "Counters and histograms");
    let metrics = metrics.answers_with("200", "In Prometheus' text format.", "text/plain", text);
    document.add("/metrics", metrics);
}

/// OpenAI's body of an error.
fn error() -> Value {
    let mut types: Vec<&str> = TABLE.iter().map(|row| row.openai_type).collect();
    types.sort_unstable();
    types.dedup();
    let error = json!({
        "message": {"type": "string", "description": "What is wrong and what is allowed."},
        "type": {"enum": types},
        "param": {"type": ["string", "null"], "description": "The field at fault."},
        "code": {"type": ["string", "null"], "description": "A word for programs."},
    });
    let error = object(&["message", "type", "param", "code"], [properties(error)]);
    object(&["error"], [properties(json!({"error": error}))])
}

/// What [`super::info`] answers: open, for it grows.
fn info() -> Value {
    let names =
        |text: &str| json!({"type": "array", "items": {"type": "string"}, "description": text});
    json!({
        "type": "object",
        "required": ["model", "model_id", "version", "state", "dtype", "tasks", "adapters", "limits"],
        "properties": {
            "model": {"type": "string", "description": "The bundle's id."},
            "model_id": {"type": "string"},
            "version": {"type": "string"},
            "state": {"enum": ["loading", "ready", "draining", "failed"]},
            "dtype": {"type": "string", "description": "What the weights are held in."},
            "tasks": names("Their names."),
            "adapters": names("Those that are loaded."),
            "experts": {"type": ["object", "null"], "description": "Of a mixture of experts."},
            "limits": {"type": "object", "description": "What requests may cost."},
        },
        "additionalProperties": true,
    })
}
