//! One table of requests over HTTP and over gRPC, whole and streamed: the answers and the refusals are
//! the same.

use crate::harness::{BUNDLE, Reply, Server, Setup, called, message, repeater};
use prost_types::value::Kind;
use serde_json::{Map, Value, json};
use shoal::api::grpc::proto::{self, GenerateResponse};
use shoal::error::TABLE;
use shoal::task::{Control, ControlKind};
use tonic::{Code, Status};

/// What a request came to, on whichever wire.
#[derive(Debug, PartialEq)]
enum Answer {
    /// The choices, without log-probabilities of streams, and the usage.
    Good(Vec<Value>, Value),
    Bad(Refusal),
}

#[derive(Debug, PartialEq)]
struct Refusal {
    /// gRPC's code.
    status: i32,
    message: String,
    param: Option<String>,
    code: Option<String>,
    again: bool,
}

type Headers<'a> = &'a [(&'static str, &'a str)];

/// The answer to `body`, the same on all wires. `status` is HTTP's.
async fn ask(
    server: &Server,
    task: &str,
    headers: Headers<'_>,
    body: &Value,
    status: u16,
) -> Answer {
    let mut rpc = server.rpc().await.shoal;
    let path = format!("/v1/tasks/{task}/generate");
    let whole = server.client.post_with(&path, headers, body).await;
    assert_eq!(whole.status, status, "{body}: {}", String::from_utf8_lossy(&whole.body));
    let want = over_http(&whole);
    let once = rpc.generate_once(called(message(task, body), headers)).await;
    let once = once.map(|reply| reply.into_inner());
    assert_eq!(over_grpc(once), want, "{body}");
    let frames = match rpc.generate(called(message(task, body), headers)).await {
        Ok(stream) => drained(stream.into_inner()).await,
        Err(status) => Err(status),
    };
    let count = frames.as_ref().map_or(0, Vec::len);
    assert_eq!(over_grpc(frames.map(joined)), want, "{body}");
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    match server.client.try_stream(&path, headers, &streamed).await {
        Err(reply) => assert_eq!(over_http(&reply), want, "{body}"),
        Ok(mut stream) => assert_eq!(stream.rest().await.len(), count, "{body}: frames"),
    }
    want
}

fn over_http(reply: &Reply) -> Answer {
    if reply.status == 200 {
        let json = reply.json();
        return Answer::Good(json["choices"].as_array().unwrap().clone(), json["usage"].clone());
    }
    let (status, _, param, code) = reply.error();
    let text = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    let narrow = |code: &Option<String>| TABLE.iter().find(|r| r.code == code.as_deref());
    let row = narrow(&code).filter(|row| row.http == status && code.is_some());
    let row = row.or_else(|| TABLE.iter().find(|row| row.http == status)).unwrap();
    // Metadata are ASCII.
    let param = param.map(|param| param.escape_default().to_string());
    let again = !reply.header("retry-after").is_empty();
    Answer::Bad(Refusal { status: row.grpc, message: text, param, code, again })
}

fn over_grpc(reply: Result<GenerateResponse, Status>) -> Answer {
    let reply = match reply {
        Ok(reply) => reply,
        Err(status) => {
            let said = |name| status.metadata().get(name).map(|v| v.to_str().unwrap().to_owned());
            return Answer::Bad(Refusal {
                status: status.code() as i32,
                message: status.message().into(),
                param: said("shoal-param"),
                code: said("shoal-code"),
                again: said("retry-after").is_some(),
            });
        }
    };
    let usage = reply.usage.unwrap();
    let usage = json!({"prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens, "total_tokens": usage.total_tokens});
    Answer::Good(reply.choices.into_iter().map(choice).collect(), usage)
}

/// A choice as the native route has it.
fn choice(choice: proto::Choice) -> Value {
    let mut json = json!({"index": choice.index, "text": choice.text});
    if !choice.logprobs.is_empty() {
        let of = |f: &dyn Fn(&proto::TokenLogprob) -> Value| -> Vec<Value> {
            choice.logprobs.iter().map(f).collect()
        };
        json["logprobs"] = json!({
            "tokens": of(&|t| json!(t.token)),
            "token_logprobs": of(&|t| t.logprob.map_or(Value::Null, number)),
            "top_logprobs": of(&|t| match t.logprob {
                Some(_) => t.top_logprobs.iter().map(|t| (t.token.clone(), number(t.logprob))).collect(),
                None => Value::Null,
            }),
            "text_offset": of(&|t| json!(t.text_offset)),
        });
    }
    json["finish_reason"] = json!(choice.finish_reason);
    json["words"] = json!(choice.words);
    json
}

/// A float as JSON that was read has it.
fn number(float: f32) -> Value {
    serde_json::from_str(&serde_json::to_string(&float).unwrap()).unwrap()
}

async fn drained(
    mut stream: tonic::Streaming<GenerateResponse>,
) -> Result<Vec<GenerateResponse>, Status> {
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

/// A stream's messages as one.
fn joined(messages: Vec<GenerateResponse>) -> GenerateResponse {
    let mut whole = GenerateResponse::default();
    for message in messages {
        assert!(whole.usage.is_none(), "usage is in the last message alone");
        let [more] = <[_; 1]>::try_from(message.choices).unwrap();
        let index = more.index as usize;
        let room = whole.choices.len().max(index + 1);
        whole.choices.resize(room, proto::Choice::default());
        let choice = &mut whole.choices[index];
        assert!(choice.finish_reason.is_none(), "nothing follows the finish reason");
        choice.text.push_str(&more.text);
        choice.logprobs.extend(more.logprobs);
        *choice = proto::Choice {
            text: std::mem::take(&mut choice.text),
            logprobs: std::mem::take(&mut choice.logprobs),
            ..more
        };
        whole.usage = message.usage;
    }
    whole
}

#[tokio::test]
async fn good_requests_have_the_same_answer_on_all_wires() {
    let server = Server::usual().await;
    for body in [
        json!({"input": "a red  fox\u{2003}runs"}),
        json!({"input": "a fox", "seed": 7, "temperature": 0.7, "top_p": 0.9, "top_k": 40}),
        json!({"input": "a fox", "n": 3, "seed": -1}),
        json!({"input": "ünïcödé 🦊 fox", "controls": {"words": 20}}),
        json!({"input": "a fox", "controls": {"words": 20}, "echo": true}),
        json!({"input": "a fox", "logprobs": 2}),
        json!({"input": "a fox", "logprobs": 1, "echo": true, "max_tokens": 0}),
        json!({"input": "~ab", "max_tokens": 9}),
        json!({"input": "one two three", "stop": ["two"]}),
        json!({"input": "a fox", "min_tokens": 2, "min_p": 0.1, "repetition_penalty": 1.5}),
        json!({"input": "a fox", "presence_penalty": 0.5, "frequency_penalty": -0.5}),
        json!({"input": "a fox", "logit_bias": {"3": 1.5}, "max_tokens": 8, "ignore_eos": true}),
        json!({"input": "a fox", "timeout_ms": 60_000.5, "adapters": []}),
        json!({"input": "", "max_tokens": 3}),
        json!({"input": "a fox", "choice": ["a fox runs", "a hen"]}),
        json!({"input": "a fox", "regex": "[a-z]{3}"}),
        json!({"input": "a fox", "json_schema": {"enum": [1, 2]}}),
    ] {
        let Answer::Good(choices, usage) = ask(&server, "image", &[], &body, 200).await else {
            panic!("{body}")
        };
        assert_eq!(choices.len() as u64, body["n"].as_u64().unwrap_or(1));
        assert!(usage["total_tokens"].as_u64().unwrap() > 0);
    }
    let raw = json!({"input": "raw|", "max_tokens": 20});
    ask(&server, BUNDLE, &[], &raw, 200).await;
}

#[tokio::test]
async fn bad_requests_are_refused_alike_on_all_wires() {
    let server = Server::usual().await;
    let long = "fox ".repeat(300);
    for (task, body, status, param) in [
        ("image", json!({}), 400, Some("input")),
        ("image", json!({"input": "x", "controls": {"words": 1}}), 400, Some("controls.words")),
        ("image", json!({"input": "x", "controls": {"words": 4.5}}), 400, Some("controls.words")),
        ("image", json!({"input": "x", "controls": {"words": "4"}}), 400, Some("controls.words")),
        ("image", json!({"input": "x", "controls": {"words": [4]}}), 400, Some("controls.words")),
        ("image", json!({"input": "x", "controls": {"wörds": 4}}), 400, Some("controls.wörds")),
        ("image", json!({"input": "x", "temperature": 3}), 400, Some("temperature")),
        ("image", json!({"input": "x", "top_p": 0}), 400, Some("top_p")),
        ("image", json!({"input": "x", "n": 17}), 400, Some("n")),
        ("image", json!({"input": "x", "max_tokens": 0}), 400, Some("max_tokens")),
        ("image", json!({"input": "x", "stop": [""]}), 400, Some("stop")),
        ("image", json!({"input": "x", "logit_bias": {"9999": 1}}), 400, Some("logit_bias")),
        ("image", json!({"input": "x", "timeout_ms": 0}), 400, Some("timeout_ms")),
        (
            "image",
            json!({"input": "x", "adapters": [{"name": "a", "weight": 1}]}),
            400,
            Some("adapters"),
        ),
        ("image", json!({"input": long}), 400, Some("input")),
        ("image", json!({"input": "x", "max_tokens": 1000}), 400, Some("max_tokens")),
        ("nothing", json!({"input": "x"}), 404, Some("model")),
        ("image", json!({"input": "x", "choice": []}), 400, Some("choice")),
        ("image", json!({"input": "x", "regex": "("}), 400, Some("regex")),
        ("image", json!({"input": "x", "json_schema": {"type": "x"}}), 400, Some("json_schema")),
    ] {
        let Answer::Bad(refusal) = ask(&server, task, &[], &body, status).await else {
            panic!("{body}")
        };
        let param = param.map(|param| param.escape_default().to_string());
        assert_eq!(refusal.param, param);
    }
    for (headers, status) in [
        ([("x-request-timeout-ms", "0.001")], 504),
        ([("x-llm-d-slo-ttft-ms", "0.001")], 504),
        ([("x-request-timeout-ms", "soon")], 400),
    ] {
        ask(&server, "image", &headers, &json!({"input": "x"}), status).await;
    }
}

/// A request that goes on until it is full.
fn endless() -> Value {
    json!({"input": "~ab", "max_tokens": 100})
}

#[tokio::test]
async fn an_overloaded_server_refuses_alike_on_all_wires() {
    let (runner, gate) = repeater().gated();
    let mut setup = Setup::default();
    setup.settings.max_running = 1;
    setup.tasks[0].slo.max_waiting = 1;
    let server = Server::with(setup, runner).await;
    let mut rpc = server.rpc().await.shoal;
    let first = rpc.generate(message("image", &endless())).await.unwrap();
    gate.pass(1);
    let mut first = first.into_inner();
    first.message().await.unwrap();
    let waiting = rpc.generate(message("image", &endless())).await.unwrap();
    let refused = ask(&server, "image", &[], &endless(), 429).await;
    let Answer::Bad(refusal) = refused else { panic!("{refused:?}") };
    assert!(refusal.again, "{refusal:?}");
    drop(gate);
    assert_eq!(drained(first).await.unwrap().len(), 99);
    assert_eq!(drained(waiting.into_inner()).await.unwrap().len(), 100);
}

#[tokio::test]
async fn a_server_that_loads_refuses_alike_on_all_wires() {
    let (finish, wait) = std::sync::mpsc::channel::<()>();
    let server = Server::loading(Setup::default(), move || {
        wait.recv()?;
        Ok(repeater())
    })
    .await;
    let refused = ask(&server, "image", &[], &endless(), 503).await;
    let Answer::Bad(refusal) = refused else { panic!("{refused:?}") };
    assert!(refusal.again, "{refusal:?}");
    drop(finish);
}

#[tokio::test]
async fn a_deadline_ends_requests_alike_on_all_wires() {
    let (runner, _gate) = repeater().gated();
    let server = Server::with(Setup::default(), runner).await;
    let body = json!({"input": "a fox", "timeout_ms": 20});
    let path = "/v1/tasks/image/generate";
    let late = over_http(&server.client.post(path, &body).await);
    let mut rpc = server.rpc().await.shoal;
    let once = rpc.generate_once(message("image", &body)).await.unwrap_err();
    assert_eq!(once.code(), Code::DeadlineExceeded);
    assert_eq!(over_grpc(Err(once)), late);
    let stream = rpc.generate(message("image", &body)).await.unwrap().into_inner();
    assert_eq!(over_grpc(drained(stream).await.map(joined)), late);
}

#[tokio::test]
async fn a_failing_step_is_told_alike_on_all_wires() {
    let server = Server::with(Setup::default(), repeater().failing_at([0, 2, 4])).await;
    let body = json!({"input": "a fox", "max_tokens": 1});
    let failed = over_http(&server.client.post("/v1/tasks/image/generate", &body).await);
    let good = || server.client.post("/v1/tasks/image/generate", &body);
    assert_eq!(good().await.status, 200, "the next step goes well");
    let mut rpc = server.rpc().await.shoal;
    let once = rpc.generate_once(message("image", &body)).await;
    assert_eq!(over_grpc(once.map(|reply| reply.into_inner())), failed);
    assert_eq!(good().await.status, 200);
    let stream = rpc.generate(message("image", &body)).await.unwrap().into_inner();
    assert_eq!(over_grpc(drained(stream).await.map(joined)), failed);
}

#[tokio::test]
async fn tasks_are_listed_alike_on_all_wires() {
    let mut setup = Setup::default();
    let genre = Control {
        kind: ControlKind::Enum(vec!["20".into(), "none".into()]),
        token: "<|words:{}|>".into(),
        default: Some("none".into()),
    };
    setup.tasks[1].controls.insert("genre".into(), genre);
    setup.tasks[2].controls.get_mut("words").unwrap().default = Some("20".into());
    let server = Server::with(setup, repeater()).await;
    let json = server.client.get("/v1/tasks").await.json();
    let tasks = server.rpc().await.shoal.list_tasks(proto::ListTasksRequest {}).await.unwrap();
    let control = |control: &proto::Control| {
        let default = control.default.as_ref().and_then(|value| value.kind.as_ref());
        let default = default.map(|kind| match kind {
            Kind::NumberValue(number) => json!(*number as i64),
            Kind::StringValue(text) => json!(text),
            other => panic!("{other:?}"),
        });
        let kind = &control.r#type;
        match kind.as_str() {
            "integer" => json!({"type": kind, "minimum": control.minimum,
                "maximum": control.maximum, "default": default}),
            _ => json!({"type": kind, "enum": control.r#enum, "default": default}),
        }
    };
    let entry = |task: &proto::Task| {
        let controls: Map<String, Value> =
            task.controls.iter().map(|(name, c)| (name.clone(), control(c))).collect();
        json!({"id": task.id, "description": task.description, "adapter": task.adapter,
            "controls": controls})
    };
    let data: Vec<Value> = tasks.into_inner().data.iter().map(entry).collect();
    assert_eq!(json["data"], json!(data));
}

#[tokio::test]
async fn labels_are_scored_alike_on_all_wires() {
    let server = Server::usual().await;
    let mut rpc = server.rpc().await.shoal;
    let labels = |labels: &[&str]| labels.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>();
    for (task, input, labels, words, status) in [
        ("image", Some("a fox"), labels(&["good", "bad", "ünsure 🦊"]), 20, 200),
        ("image", Some("a fox"), labels(&["only"]), 4, 200),
        ("image", Some("a fox"), labels(&[]), 4, 400),
        ("image", Some("a fox"), labels(&["a", "a"]), 4, 400),
        ("image", Some("a fox"), labels(&["a", ""]), 4, 400),
        ("image", Some("a fox"), labels(&["a"]), 1, 400),
        ("image", None, labels(&["a"]), 4, 400),
        ("none", Some("a fox"), labels(&["a"]), 4, 404),
    ] {
        let mut body = json!({"labels": labels, "controls": {"words": words}});
        if let Some(input) = input {
            body["input"] = json!(input);
        }
        let reply = server.client.post(&format!("/v1/tasks/{task}/score"), &body).await;
        assert_eq!(reply.status, status, "{body}");
        let common = message(task, &json!({"input": input, "controls": {"words": words}}));
        let (input, controls) = (common.input, common.controls);
        let asked = proto::ScoreRequest {
            task: task.into(),
            input,
            controls,
            labels,
            ..proto::ScoreRequest::default()
        };
        let scored = rpc.score(called(asked, &[("x-request-id", "mine")])).await;
        let scores = match scored {
            Err(error) => {
                assert_eq!(over_grpc(Err(error)), over_http(&reply), "{body}");
                continue;
            }
            Ok(scored) => scored.into_inner(),
        };
        assert_eq!((scores.id.as_str(), scores.model.as_str()), ("score-mine", BUNDLE));
        let usage = scores.usage.unwrap();
        let score = |score: &proto::LabelScore| {
            json!({"label": score.label, "logprob": score.logprob,
                "probability": score.probability, "tokens": score.tokens})
        };
        let json = reply.json();
        let rounded = |scores: Vec<Value>| scores.iter().map(approximate).collect::<Vec<_>>();
        assert_eq!(
            rounded(scores.scores.iter().map(score).collect()),
            rounded(json["scores"].as_array().unwrap().clone())
        );
        assert_eq!(json["usage"]["total_tokens"], usage.total_tokens);
        assert_eq!(json["usage"]["prompt_tokens"], usage.prompt_tokens);
    }
}

/// A score whose floats are what JSON's writing of them leaves.
fn approximate(score: &Value) -> Value {
    let float = |name: &str| (score[name].as_f64().unwrap() * 1e5).round();
    json!([score["label"], float("logprob"), float("probability"), score["tokens"]])
}
