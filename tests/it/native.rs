//! `POST /v1/tasks/{task}/generate`.

use crate::harness::{BUNDLE, CONTEXT, Server, texts};
use serde_json::{Value, json};

const PATH: &str = "/v1/tasks/image/generate";

#[tokio::test]
async fn a_whole_answer() {
    let server = Server::usual().await;
    let body = json!({"input": "a red  fox\u{2003}runs", "controls": {"words": 4}, "n": 2});
    let reply = server.client.post(PATH, &body).await;
    assert!(reply.header("server-timing").contains("prefill;dur="));
    let reply = reply.json();
    let keys: Vec<&String> = reply.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["id", "task", "model", "created", "choices", "usage"]);
    assert_eq!((&reply["task"], &reply["model"]), (&json!("image"), &json!(BUNDLE)));
    let choice = |index: usize| {
        json!({"index": index, "text": "a red  fox\u{2003}runs", "finish_reason": "stop",
            "words": 4})
    };
    assert_eq!(reply["choices"], json!([choice(0), choice(1)]));
    let keys: Vec<&String> = reply["usage"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["prompt_tokens", "completion_tokens", "total_tokens"]);
}

#[tokio::test]
async fn frames_carry_the_same_object() {
    let server = Server::usual().await;
    let body = json!({"input": "one two three", "stream": true});
    let frames = server.client.stream(PATH, &body).await.rest().await;
    assert_eq!(texts(&frames), ["one two three"]);
    let whole = server.client.post(PATH, &json!({"input": "one two three"})).await.json();
    for (i, frame) in frames.iter().enumerate() {
        let last = i + 1 == frames.len();
        let keys: Vec<&String> = frame.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["id", "task", "model", "created", "choices", "usage"]);
        let choice = &frame["choices"][0];
        let end = if last { (json!("stop"), json!(3)) } else { (Value::Null, Value::Null) };
        assert_eq!((&choice["finish_reason"], &choice["words"]), (&end.0, &end.1));
        assert_eq!(frame["usage"], if last { whole["usage"].clone() } else { Value::Null });
    }
}

#[tokio::test]
async fn controls_reach_the_prompt() {
    let server = Server::usual().await;
    for (controls, token) in [(json!({"words": 20}), "20"), (json!({}), "none")] {
        let body = json!({"input": "x", "controls": controls, "echo": true});
        let reply = server.client.post(PATH, &body).await.json();
        assert_eq!(reply["choices"][0]["text"], format!("<|words:{token}|>x<|gen|>x"));
        assert_eq!(reply["choices"][0]["words"], 1, "of what was generated");
    }
    let openai = json!({"model": "image", "prompt": "x", "controls": {"words": 9}, "echo": true});
    let reply = server.client.post("/v1/completions", &openai).await.json();
    assert_eq!(reply["choices"][0]["text"], "<|words:9|>x<|gen|>x");
}

#[tokio::test]
async fn refusals() {
    let server = Server::usual().await;
    for (body, param) in [
        (json!({}), "input"),
        (json!({"input": 3}), "input"),
        (json!({"input": "x", "prompt": "x"}), "prompt"),
        (json!({"input": "x", "model": "image"}), "model"),
        (json!({"input": "x", "controls": {"words": 1}}), "controls.words"),
        (json!({"input": "x", "top_p": 2}), "top_p"),
    ] {
        assert_eq!(server.client.post(PATH, &body).await.error().2.as_deref(), Some(param));
    }
}

#[tokio::test]
async fn without_max_tokens_a_text_may_fill_the_context() {
    let mut setup = crate::harness::Setup::default();
    setup.tasks[0].defaults.max_tokens = None;
    let server = Server::with(setup, crate::harness::repeater()).await;
    let reply = server.client.post(PATH, &json!({"input": "~ab"})).await.json();
    assert_eq!(reply["usage"]["total_tokens"], CONTEXT);
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    let mut setup = crate::harness::Setup::default();
    setup.tasks[0].limits.max_tokens = Some(7);
    let server = Server::with(setup, crate::harness::repeater()).await;
    let reply = server.client.post(PATH, &json!({"input": "~ab"})).await.json();
    assert_eq!(reply["usage"]["completion_tokens"], 7);
    let over = json!({"input": "~ab", "max_tokens": 8});
    assert_eq!(server.client.post(PATH, &over).await.error().2.as_deref(), Some("max_tokens"));
}

#[tokio::test]
async fn scores_can_be_asked_for() {
    let server = Server::usual().await;
    let body = json!({"input": "a fox", "logprobs": 0});
    let reply = server.client.post(PATH, &body).await.json();
    let tokens = reply["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    assert_eq!(reply["usage"]["completion_tokens"], tokens.len());
}
