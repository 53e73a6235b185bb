//! What KServe's wire looks like, for the document.

use super::generate::Answer;
use super::infer::{INPUT, OUTPUTS, TEXTS};
use super::refusal;
use crate::api::docs::{Document, Operation, Wire, reference};
use crate::api::http::schema::{
    Properties, common, echo, object, optional, optional_object, properties, sampling, switch,
};
use crate::error::Kind;
use serde_json::{Value, json};

const WIRE: Wire =
    Wire { tag: "KServe's Open Inference Protocol", error: "OipError", wording: refusal };

/// What tensors are made of.
const DATATYPES: [&str; 12] = [
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP32",
    "FP64", "BYTES",
];

/// Its models' routes are there twice: what stands before their paths and their ids.
const PLACES: [(&str, &str, bool); 2] = [
    ("/v2/models/{model}", "oip", false),
    ("/v2/models/{model}/versions/{version}", "oipVersion", true),
];

/// Adds this wire.
pub fn describe(document: &mut Document) {
    document
        .schema("OipError", object(&["error"], [properties(json!({"error": {"type": "string"}}))]));
    document.derived::<Answer>("OipAnswer");
    document.schema("OipGenerateRequest", generate_body());
    document.schema("OipInferRequest", infer_body());
    document.schema("OipInferAnswer", infer_answer());
    document.schema("OipModel", metadata());
    let names = json!({
        "name": {"type": "string"},
        "version": {"type": "string"},
        "extensions": {"type": "array", "items": {"type": "string"}},
    });
    let server = object(&["name", "version", "extensions"], [properties(names)]);
    let operation = Operation::get(WIRE, "oipServer", "This server");
    document.add("/v2", operation.answers("200", "Its name.", server));
    for (name, summary) in [("live", "Not in need of a restart"), ("ready", "Able to take work")] {
        let answer = object(&[name], [properties(json!({name: {"const": true}}))]);
        let operation = Operation::get(WIRE, &format!("oip_{name}"), summary);
        let operation = operation.errors(&[Kind::Unavailable]).answers("200", "It is.", answer);
        document.add(&format!("/v2/health/{name}"), operation);
    }
    for (path, id, versioned) in PLACES {
        let at = |operation: Operation| {
            let operation = operation.path("model", "A task, the bundle or an adapter.", "image");
            match versioned {
                true => operation.path("version", "The only one.", super::VERSION),
                false => operation,
            }
        };
        let mut add = |rest: &str, operation| document.add(&format!("{path}{rest}"), at(operation));
        add("", model(&format!("{id}Model")));
        add("/ready", ready(&format!("{id}Ready")));
        add("/infer", infer(&format!("{id}Infer")));
        let generate = generation(&format!("{id}Generate"), "A text for a text", false);
        add("/generate", generate.answers("200", "The text.", reference("OipAnswer")));
        let stream = generation(&format!("{id}GenerateStream"), "The same as it comes", true);
        let text = "Events whose data is an OipAnswer with more text or, last, an error.";
        add("/generate_stream", stream.streams(text, reference("OipAnswer")));
    }
}

fn model(id: &str) -> Operation {
    let operation = Operation::get(WIRE, id, "A model's tensors").errors(&[Kind::NotFound]);
    operation.answers("200", "Its tensors.", reference("OipModel"))
}

fn ready(id: &str) -> Operation {
    let answer = json!({"name": {"type": "string"}, "ready": {"const": true}});
    Operation::get(WIRE, id, "Whether a model can take work")
        .errors(&[Kind::NotFound, Kind::Unavailable])
        .answers("200", "It can.", object(&["name", "ready"], [properties(answer)]))
}

fn infer(id: &str) -> Operation {
    let body = json!({
        "inputs": [{
            "name": INPUT, "datatype": "BYTES", "shape": [1], "data": ["a fox in the snow"],
        }],
        "parameters": {"max_tokens": 40, "words": 12},
    });
    let length = json!({"type": "integer", "minimum": 0});
    Operation::post(WIRE, id, "Tensors for tensors")
        .describe(
            "A tensor is JSON, or it is bytes after the JSON, whose length is then in a header: Triton's \
             extension. A tensor that is not `text_input` is a parameter of its name.",
        )
        .asks_the_model()
        .header("inference-header-content-length", "How many bytes of the body are JSON.", length)
        .body_of_any_type(reference("OipInferRequest"), &[("a text", body)])
        .answers("200", "The texts, and why each ended.", reference("OipInferAnswer"))
        .answers_with(
            "200",
            "",
            "application/octet-stream",
            json!({"type": "string", "format": "binary"}),
        )
}

fn generation(id: &str, summary: &str, stream: bool) -> Operation {
    let body = json!({INPUT: "a fox in the snow", "parameters": {"max_tokens": 40}});
    let other =
        json!({INPUT: "a fox in the snow", "max_tokens": 40, "words": 12, "stream": stream});
    Operation::post(WIRE, id, summary)
        .describe("`stream` must agree with the route.")
        .asks_the_model()
        .body_of_any_type(
            reference("OipGenerateRequest"),
            &[("as KServe has it", body), ("as Triton has it", other)],
        )
}

/// What [`super::infer::generation`] reads.
fn parameters() -> Properties {
    let mut all = sampling();
    all.extend(common());
    all.shift_remove("debug");
    all.insert("echo".into(), echo());
    for name in TEXTS.into_iter().chain(["choice"]) {
        if let Some(own) = all.get_mut(name) {
            let text = json!({"type": "string", "description": "The same as a text in JSON."});
            *own = json!({"anyOf": [own.take(), text]});
        }
    }
    let controls = json!({
        "type": ["object", "string", "null"],
        "description": "The task's controls, perhaps as a text in JSON.",
    });
    all.insert("controls".into(), controls);
    let time = json!({"minimum": 0, "maximum": u64::MAX});
    let text = "Within how many microseconds the answer must be out; 0 is no limit.";
    all.insert("timeout".into(), optional("integer", time, text));
    all
}

/// What may stand beside known parameters: a control of the task.
fn control() -> Value {
    json!({"type": ["integer", "string"], "description": "A control of the task, by its name."})
}

/// What [`super::generate`] reads.
fn generate_body() -> Value {
    let text = "In `parameters` or beside them, but not in both.";
    let own = properties(json!({
        "stream": optional("boolean", json!({}), "As the route has it."),
        "id": optional("string", json!({}), "The client's name for it."),
        "details": switch("Tells why the text ended, and its tokens."),
    }));
    let mut inner = object(&[], [own.clone(), parameters()]);
    inner["additionalProperties"] = control();
    inner["type"] = json!(["object", "null"]);
    inner["description"] = text.into();
    let input = json!({INPUT: {"type": "string"}, "parameters": inner});
    let mut schema = object(&[INPUT], [properties(input), own, parameters()]);
    schema["additionalProperties"] = control();
    schema
}

/// What [`super::http`] reads.
fn infer_body() -> Value {
    let input = json!({
        "name": {"type": "string"},
        "datatype": {"enum": DATATYPES},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "data": {"type": ["array", "null"], "description": "Its elements, flat or nested."},
        "parameters": optional_object(&[], json!({
            "binary_data_size": optional("integer", json!({"minimum": 0}),
                "How many of the bytes after the JSON it is, in place of `data`."),
        }), "Triton's extension."),
    });
    let output = json!({
        "name": {"enum": OUTPUTS},
        "parameters": optional_object(&[], json!({
            "binary_data": optional("boolean", json!({}), "As bytes after the JSON."),
        }), "Triton's extension."),
    });
    let mut given = parameters();
    given.insert("binary_data_output".into(), switch("All outputs as bytes after the JSON."));
    let mut given = object(&[], [given]);
    given["additionalProperties"] = control();
    given["type"] = json!(["object", "null"]);
    let input = object(&["name", "datatype", "shape"], [properties(input)]);
    let body = json!({
        "id": optional("string", json!({}), "The client's name for it."),
        "inputs": {"type": "array", "items": input, "minItems": 1},
        "outputs": optional("array", json!({"items": object(&["name"], [properties(output)])}),
            "The tensors that the answer is to have; none are all."),
        "parameters": given,
    });
    object(&["inputs"], [properties(body)])
}

fn infer_answer() -> Value {
    let output = json!({
        "name": {"enum": OUTPUTS},
        "datatype": {"const": "BYTES"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "array", "items": {"type": "string"}},
        "parameters": {"type": "object"},
    });
    let usage = json!({
        "prompt_tokens": {"type": "integer"}, "completion_tokens": {"type": "integer"},
    });
    let names = ["model_name", "model_version", "parameters", "outputs"];
    let output = object(&["name", "datatype", "shape"], [properties(output)]);
    object(
        &names,
        [properties(json!({
            "id": {"type": "string"},
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "parameters": object(&["prompt_tokens", "completion_tokens"], [properties(usage)]),
            "outputs": {"type": "array", "items": output},
        }))],
    )
}

fn metadata() -> Value {
    let tensor = json!({
        "name": {"type": "string"},
        "datatype": {"enum": DATATYPES},
        "shape": {"type": "array", "items": {"type": "integer"}},
    });
    let tensors = json!({
        "type": "array", "items": object(&["name", "datatype", "shape"], [properties(tensor)]),
    });
    object(
        &["name", "versions", "platform", "inputs", "outputs"],
        [properties(json!({
            "name": {"type": "string"},
            "versions": {"type": "array", "items": {"type": "string"}},
            "platform": {"type": "string"},
            "inputs": tensors.clone(),
            "outputs": tensors,
        }))],
    )
}
