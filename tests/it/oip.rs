//! KServe's Open Inference Protocol over HTTP, as Triton's clients speak it.

use crate::harness::{BUNDLE, Reply, Server, Setup, repeater};
use hyper::Method;
use serde_json::{Value, json};

const INFER: &str = "/v2/models/tiny/infer";
const JSON_LENGTH: &str = "inference-header-content-length";

/// The tensor of prompts, in JSON.
fn text(prompts: &[&str]) -> Value {
    json!({"name": "text_input", "datatype": "BYTES", "shape": [prompts.len()], "data": prompts})
}

/// The elements of `BYTES`.
fn bytes(texts: &[&str]) -> Vec<u8> {
    let one = |text: &&str| [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    texts.iter().flat_map(one).collect()
}

/// Sends JSON and what follows it, without a content type, as Triton's client does.
async fn infer(server: &Server, json: &Value, rest: &[u8]) -> Reply {
    let json = json.to_string();
    let length = json.len().to_string();
    let headers = [(JSON_LENGTH, length.as_str())];
    let headers = if rest.is_empty() { &headers[..0] } else { &headers[..] };
    let body = [json.as_bytes(), rest].concat();
    server.client.call(Method::POST, INFER, headers, body).await
}

/// The parts of an error body of this wire.
fn error(reply: &Reply) -> (u16, String) {
    let body = reply.json();
    assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
    (reply.status, body["error"].as_str().expect("a string").to_owned())
}

#[tokio::test]
async fn the_server_and_its_models() {
    let server = Server::usual().await;
    let about = server.client.get("/v2").await.json();
    assert_eq!(
        (&about["name"], &about["version"]),
        (&json!("shoal"), &json!(env!("CARGO_PKG_VERSION")))
    );
    assert_eq!(about["extensions"], json!(["binary_tensor_data", "generate", "parameters"]));
    assert_eq!(server.client.get("/v2/health/live").await.json(), json!({"live": true}));
    assert_eq!(server.client.get("/v2/health/ready").await.json(), json!({"ready": true}));
    let tensor = |name: &str| json!({"name": name, "datatype": "BYTES", "shape": [-1]});
    for name in [BUNDLE, "image"] {
        for path in [format!("/v2/models/{name}"), format!("/v2/models/{name}/versions/1")] {
            let want = json!({"name": name, "versions": ["1"], "platform": "shoal",
                "inputs": [tensor("text_input")],
                "outputs": [tensor("text_output"), tensor("finish_reason")]});
            assert_eq!(server.client.get(&path).await.json(), want);
            let ready = server.client.get(&format!("{path}/ready")).await;
            assert_eq!((ready.status, ready.json()), (200, json!({"name": name, "ready": true})));
        }
    }
    for path in ["nobody", "nobody/ready", "tiny/versions/2", "tiny/versions/2/ready"] {
        let (status, message) = error(&server.client.get(&format!("/v2/models/{path}")).await);
        assert_eq!(status, 404, "{path}");
        assert!(message.contains("nobody") || message.contains("only one is"), "{message}");
    }
}

#[tokio::test]
async fn health_is_the_truth() {
    let (finish, wait) = std::sync::mpsc::channel::<()>();
    let server = Server::loading(Setup::default(), move || {
        wait.recv()?;
        Ok(repeater())
    })
    .await;
    assert_eq!(server.client.get("/v2/health/live").await.status, 200);
    for path in ["/v2/health/ready", "/v2/models/tiny/ready"] {
        let reply = server.client.get(path).await;
        assert_eq!(error(&reply).0, 503);
        assert!(!reply.header("retry-after").is_empty());
    }
    let body = json!({"inputs": [text(&["a|"])]});
    assert_eq!(error(&server.client.post(INFER, &body).await).0, 503);
    finish.send(()).unwrap();
    let mut state = server.engine.watch();
    state.wait_for(|state| *state == shoal::engine::State::Ready).await.unwrap();
    assert_eq!(server.client.get("/v2/health/ready").await.status, 200);
}

#[tokio::test]
async fn tensors_in_json() {
    let server = Server::usual().await;
    let body = json!({"id": "r1", "inputs": [text(&["a fox|", "é🙂|"])]});
    let reply = infer(&server, &body, &[]).await;
    assert_eq!(reply.header("content-type"), "application/json");
    assert!(reply.headers.get(JSON_LENGTH).is_none());
    let mut reply = reply.json();
    let usage = reply["parameters"].take();
    let output = |name: &str, data: Value| json!({"name": name, "datatype": "BYTES", "shape": [2], "data": data});
    assert_eq!(
        reply,
        json!({"id": "r1", "model_name": BUNDLE, "model_version": "1", "parameters": null,
            "outputs": [output("text_output", json!(["a fox", "é🙂"])),
                output("finish_reason", json!(["stop", "stop"]))]})
    );
    assert!(usage["prompt_tokens"].as_u64() > usage["completion_tokens"].as_u64());
    let column = json!({"name": "text_input", "datatype": "BYTES", "shape": [2, 1],
        "data": [["a|"], ["b|"]]});
    let body = json!({"inputs": [column], "outputs": [{"name": "text_output"}]});
    let reply = infer(&server, &body, &[]).await.json();
    assert!(reply.get("id").is_none());
    let want = json!([{"name": "text_output", "datatype": "BYTES", "shape": [2, 1],
        "data": ["a", "b"]}]);
    assert_eq!(reply["outputs"], want);
}

#[tokio::test]
async fn tensors_in_bytes() {
    let server = Server::usual().await;
    let (prompts, length) = (bytes(&["a fox|", "~é|"]), 5i32.to_le_bytes());
    let rest = [&prompts[..], &length].concat();
    let inputs = json!([
        {"name": "text_input", "datatype": "BYTES", "shape": [2],
            "parameters": {"binary_data_size": prompts.len()}},
        {"name": "max_tokens", "datatype": "INT32", "shape": [1],
            "parameters": {"binary_data_size": 4}},
    ]);
    let asked = json!({"inputs": inputs, "parameters": {"binary_data_output": true}});
    let reply = infer(&server, &asked, &rest).await;
    assert_eq!(reply.header("content-type"), "application/octet-stream");
    let (json, rest) = reply.body.split_at(reply.header(JSON_LENGTH).parse().unwrap());
    let json: Value = serde_json::from_slice(json).unwrap();
    let usage = json["parameters"]["completion_tokens"].as_u64().unwrap();
    let size = |i: usize| json["outputs"][i]["parameters"]["binary_data_size"].as_u64().unwrap();
    assert!(json["outputs"][0].get("data").is_none());
    let (texts, reasons) = rest.split_at(size(0) as usize);
    assert!(texts.starts_with(&bytes(&["a fox"])), "{texts:?}");
    assert_eq!(reasons, bytes(&["stop", "length"]));
    assert_eq!(reasons.len() as u64, size(1));
    assert!(usage <= 10, "max_tokens held for both");
    let outputs = json!([{"name": "finish_reason", "parameters": {"binary_data": false}},
        {"name": "text_output", "parameters": {"binary_data": true}}]);
    let asked = json!({"inputs": [text(&["a fox|"])], "outputs": outputs});
    let reply = infer(&server, &asked, &[]).await;
    let (json, rest) = reply.body.split_at(reply.header(JSON_LENGTH).parse().unwrap());
    let json: Value = serde_json::from_slice(json).unwrap();
    assert_eq!(json["outputs"][0]["data"], json!(["stop"]));
    assert_eq!((&json["outputs"][1]["name"], rest), (&json!("text_output"), &*bytes(&["a fox"])));
}

#[tokio::test]
async fn parameters_and_controls() {
    let server = Server::usual().await;
    let path = "/v2/models/image/versions/1/infer";
    let echoed = |fields: Value| {
        let mut body = json!({"inputs": [text(&["x"])], "parameters": {"echo": true}});
        let parameters = body["parameters"].as_object_mut().unwrap();
        parameters.extend(fields.as_object().unwrap().clone());
        let client = server.client;
        async move { client.post(path, &body).await.json()["outputs"][0]["data"][0].clone() }
    };
    let want = "<|words:9|>x<|gen|>x";
    assert_eq!(echoed(json!({"words": 9})).await, want);
    assert_eq!(echoed(json!({"controls": {"words": 9}})).await, want);
    assert_eq!(echoed(json!({"controls": "{\"words\": 9}"})).await, want);
    for (datatype, number) in [("INT64", json!(9)), ("FP64", json!(9.0))] {
        let words = json!({"name": "words", "datatype": datatype, "shape": [1], "data": [number]});
        let body = json!({"inputs": [text(&["x"]), words], "parameters": {"echo": true}});
        let reply = server.client.post(path, &body).await.json();
        assert_eq!(reply["outputs"][0]["data"][0], want, "{datatype}");
    }
    let parameters = json!({"max_tokens": 3, "temperature": 0, "top_k": 5, "seed": 3, "n": 2,
        "timeout": 60_000_000});
    let body = json!({"inputs": [text(&["~ab|", "~cd|"])], "parameters": parameters});
    let reply = server.client.post(INFER, &body).await.json();
    assert_eq!(reply["outputs"][0]["shape"], json!([4]), "each prompt's texts follow each other");
    let data = reply["outputs"][0]["data"].as_array().unwrap();
    assert_eq!((&data[0], &data[2]), (&data[1], &data[3]));
    assert_eq!(reply["parameters"]["completion_tokens"], 12);
}

#[tokio::test]
async fn refusals_name_what_is_wrong() {
    let server = Server::usual().await;
    let tensor = |name: &str, datatype: &str, shape: Value, data: Value| json!({"name": name, "datatype": datatype, "shape": shape, "data": data});
    let one = |input: Value| json!({"inputs": [input]});
    let with = |parameters: Value| json!({"inputs": [text(&["a|"])], "parameters": parameters});
    for (body, reason) in [
        (json!({}), "missing field inputs"),
        (json!({"inputs": []}), "missing field text_input"),
        (one(tensor("text_input", "INT32", json!([1]), json!([1]))), "allowed: BYTES"),
        (one(tensor("text_input", "BYTES", json!([2]), json!(["a"]))), "has 1 elements"),
        (one(tensor("text_input", "BYTES", json!([1, 2]), json!(["a", "b"]))), "[n] and [n, 1]"),
        (one(tensor("text_input", "BYTES", json!([0]), json!([]))), "[n] and [n, 1]"),
        (one(tensor("text_input", "BYTES", json!([-1]), json!(["a"]))), "inputs.shape"),
        (one(tensor("text_input", "STRING", json!([1]), json!(["a"]))), "inputs.datatype"),
        (one(tensor("text_input", "BYTES", json!([1]), json!([1]))), "tensor text_input"),
        (one(json!({"name": "text_input", "datatype": "BYTES", "shape": [1]})), "either data or"),
        (json!({"inputs": [text(&["a"]), text(&["b"])]}), "text_input is given twice"),
        (with(json!({"beams": 2})), "unknown field beams"),
        (with(json!({"debug": {}})), "unknown field debug"),
        (with(json!({"json_schema": "{"})), "json_schema must be JSON"),
        (with(json!({"logit_bias": "{\"9999\": 1}"})), "logit_bias names token 9999"),
        (with(json!({"choice": "a", "regex": "a"})), "regex is given beside choice"),
        (
            json!({"inputs": [text(&["a|"])], "outputs": [
                {"name": "text_output"}, {"name": "finish_reason"}, {"name": "text_output"}]}),
            "output text_output is given twice",
        ),
        (with(json!({"temperature": 9})), "temperature is 9"),
        (with(json!({"controls": "x"})), "controls must be a JSON object"),
        (json!({"inputs": [text(&["a|"])], "outputs": [{"name": "logits"}]}), "text_output"),
        (json!({"inputs": [text(&["a|"])], "batch": 1}), "unknown field batch"),
    ] {
        let (status, message) = error(&infer(&server, &body, &[]).await);
        assert_eq!(status, 400, "{body}");
        assert!(message.contains(reason), "{message}: {reason}");
    }
    let sized = |size: usize| {
        one(json!({"name": "text_input", "datatype": "BYTES", "shape": [1],
            "parameters": {"binary_data_size": size}}))
    };
    let rest = bytes(&["a|"]);
    for size in [rest.len() - 1, rest.len() + 1, 0] {
        assert_eq!(error(&infer(&server, &sized(size), &rest).await).0, 400, "{size}");
    }
    for length in ["-1", "9999", "x"] {
        let headers = [(JSON_LENGTH, length)];
        let reply = server.client.call(Method::POST, INFER, &headers, "{}").await;
        assert!(error(&reply).1.contains(JSON_LENGTH), "{length}");
    }
    let zipped = [("content-encoding", "gzip")];
    let reply = server.client.call(Method::POST, INFER, &zipped, "{}").await;
    assert_eq!(error(&reply).0, 415);
    let reply = server.client.post("/v2/models/nobody/infer", &with(json!({}))).await;
    assert_eq!(error(&reply).0, 404);
    assert_eq!(error(&server.client.get(INFER).await).0, 405);
    assert_eq!(error(&server.client.get("/v2/nowhere").await).0, 404);
}

#[tokio::test]
async fn a_generation_without_tensors() {
    let server = Server::usual().await;
    let path = "/v2/models/tiny/generate";
    let want = json!({"model_name": BUNDLE, "model_version": "1", "text_output": "a fox"});
    for body in [
        json!({"text_input": "a fox|", "parameters": {"max_tokens": 9, "temperature": 0}}),
        json!({"text_input": "a fox|", "max_tokens": 9, "temperature": 0, "stream": false}),
        json!({"text_input": "a fox|", "max_tokens": 9, "parameters": {"max_tokens": null}}),
        json!({"text_input": "a fox|", "max_tokens": null, "parameters": {"max_tokens": 9}}),
    ] {
        assert_eq!(server.client.post(path, &body).await.json(), want);
    }
    let body = json!({"text_input": "a fox|", "id": "7", "parameters": {"details": true}});
    let reply = server.client.post("/v2/models/tiny/versions/1/generate", &body).await.json();
    assert_eq!((&reply["id"], &reply["text_output"]), (&json!("7"), &json!("a fox")));
    let details = reply["details"].as_object().unwrap();
    let keys: Vec<&String> = details.keys().collect();
    assert_eq!(keys, ["finish_reason", "prompt_tokens", "completion_tokens"]);
    for (body, reason) in [
        (json!({"parameters": {}}), "missing field text_input"),
        (json!({"text_input": ["a"]}), "text_input"),
        (json!({"text_input": "a", "max_tokens": 2, "parameters": {"max_tokens": 2}}), "twice"),
        (json!({"text_input": "a", "n": 2}), "n: 2 texts are asked for"),
        (json!({"text_input": "a", "stream": true}), "stream must be"),
        (json!({"text_input": "a", "parameters": {"beams": 2}}), "unknown field beams"),
    ] {
        let (status, message) = error(&server.client.post(path, &body).await);
        assert_eq!(status, 400, "{body}");
        assert!(message.contains(reason), "{message}");
    }
}

#[tokio::test]
async fn a_generation_is_one_text_whatever_its_task_says() {
    let mut setup = Setup::default();
    setup.tasks[0].defaults.n = Some(2);
    let server = Server::with(setup, repeater()).await;
    let body = json!({"text_input": "a fox", "details": true});
    let reply = server.client.post("/v2/models/image/generate", &body).await.json();
    assert_eq!(reply["text_output"], "a fox");
    let mut stream = server.client.stream("/v2/models/image/generate_stream", &body).await;
    let (mut text, mut last) = (String::new(), Value::Null);
    while let Some(data) = stream.data().await {
        last = serde_json::from_str(&data).unwrap();
        text.push_str(last["text_output"].as_str().unwrap());
    }
    assert_eq!((text.as_str(), &last["details"]), ("a fox", &reply["details"]));
}

#[tokio::test]
async fn what_parameters_cannot_hold_comes_as_text() {
    let server = Server::usual().await;
    let first = async |parameters: Value| {
        let body = json!({"inputs": [text(&["a fox|"])], "parameters": parameters});
        let reply = infer(&server, &body, &[]).await.json();
        let text = reply["outputs"][0]["data"][0].as_str();
        text.unwrap_or_else(|| panic!("{reply}")).to_owned()
    };
    let schema = json!({"type": "object", "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"schema": schema}});
    for parameters in [
        json!({"json_schema": schema}),
        json!({"json_schema": schema.to_string()}),
        json!({"response_format": format.to_string()}),
    ] {
        let value: Value = serde_json::from_str(&first(parameters).await).unwrap();
        assert!(value["yes"].is_boolean(), "{value}");
    }
    assert_eq!(first(json!({"choice": "yes"})).await, "yes");
    assert_eq!(first(json!({"choice": r#"["no"]"#})).await, "no");
    assert_eq!(first(json!({"regex": "(ab|cd){2}"})).await.len(), 4);
    assert_eq!(first(json!({"logit_bias": r#"{"3": 1}"#})).await, "a fox");
    for choices in [vec!["maybe"], vec!["yes", "no"]] {
        let shape = [choices.len()];
        let tensor =
            json!({"name": "choice", "datatype": "BYTES", "shape": shape, "data": choices});
        let body = json!({"inputs": [text(&["a|"]), tensor]});
        let reply = infer(&server, &body, &[]).await.json();
        let text = reply["outputs"][0]["data"][0].as_str().unwrap_or_else(|| panic!("{reply}"));
        assert!(choices.contains(&text), "{text}");
    }
}

#[tokio::test]
async fn whoever_is_still_writing_hears_of_the_version_and_is_counted() {
    let server = Server::usual().await;
    let body = json!({"text_input": "x".repeat(1_000_000)});
    for (i, route) in ["infer", "generate", "generate_stream"].into_iter().enumerate() {
        let path = format!("/v2/models/tiny/versions/2/{route}");
        let (status, message) = error(&server.client.post(&path, &body).await);
        assert_eq!((status, message.contains("only one is")), (404, true), "{message}");
        let counted = r#"shoal_requests_total{outcome="not_found",task="other"}"#;
        assert_eq!(server.metric(counted).await, (i + 1) as f64);
    }
}

#[tokio::test]
async fn a_stream_of_deltas() {
    let server = Server::usual().await;
    let body = json!({"text_input": "a é🙂", "stream": true, "parameters": {"details": true}});
    let mut stream = server.client.stream("/v2/models/image/generate_stream", &body).await;
    let mut frames: Vec<Value> = Vec::new();
    while let Some(data) = stream.data().await {
        frames.push(serde_json::from_str(&data).expect("no [DONE]"));
    }
    let text: String = frames.iter().map(|frame| frame["text_output"].as_str().unwrap()).collect();
    assert_eq!(text, "a é🙂");
    for (i, frame) in frames.iter().enumerate() {
        let last = i + 1 == frames.len();
        assert_eq!((&frame["model_name"], &frame["done"]), (&json!("image"), &json!(last)));
        assert_eq!(frame.get("details").is_some(), last);
    }
    let server = Server::with(Setup::default(), repeater().failing_at([2])).await;
    let body = json!({"text_input": "~a|"});
    let mut stream = server.client.stream("/v2/models/tiny/generate_stream", &body).await;
    loop {
        let frame = stream.frame().await;
        if let Some(error) = frame["error"].as_str() {
            assert_eq!((error, stream.raw().await), ("internal error", None));
            break;
        }
        assert_eq!(frame["done"], false);
    }
}

#[tokio::test]
async fn openais_wire_is_where_kserve_has_it() {
    let server = Server::usual().await;
    let body = json!({"model": BUNDLE, "prompt": "a fox|", "max_tokens": 9});
    let reply = server.client.post("/openai/v1/completions", &body).await.json();
    assert_eq!(reply["choices"][0]["text"], "a fox");
    let models = server.client.get("/openai/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], BUNDLE);
}
