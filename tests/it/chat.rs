//! OpenAI's chat, tokens of texts, and texts that must look like something.

use crate::harness::{BUNDLE, Server, Setup, repeater};
use serde_json::{Value, json};

const PATH: &str = "/v1/chat/completions";

fn user(content: &str) -> Value {
    json!([{"role": "user", "content": content}])
}

#[tokio::test]
async fn a_whole_answer() {
    let server = Server::usual().await;
    let body = json!({"model": "image", "messages": user("a red fox"), "n": 2, "logprobs": true,
        "top_logprobs": 2});
    let reply = server.client.post(PATH, &body).await.json();
    assert_eq!((&reply["object"], &reply["model"]), (&json!("chat.completion"), &json!("image")));
    assert!(reply["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(reply["system_fingerprint"].as_str().unwrap().starts_with("shoal-"));
    for index in 0..2 {
        let choice = &reply["choices"][index];
        let message = json!({"role": "assistant", "content": "a red fox", "refusal": null});
        assert_eq!((&choice["index"], &choice["message"]), (&json!(index), &message));
        assert_eq!(choice["finish_reason"], "stop");
        let tokens = choice["logprobs"]["content"].as_array().unwrap();
        let bytes = |token: &Value| serde_json::from_value(token["bytes"].clone()).unwrap();
        let text: Vec<u8> = tokens.iter().flat_map(|t| -> Vec<u8> { bytes(t) }).collect();
        assert_eq!(String::from_utf8(text).unwrap(), "a red fox");
        assert!(tokens.iter().all(|t| t["top_logprobs"].as_array().unwrap().len() == 2));
    }
    let usage = &reply["usage"];
    let sum = |name: &str| usage[name].as_u64().unwrap();
    assert_eq!(sum("total_tokens"), sum("prompt_tokens") + sum("completion_tokens"));
}

#[tokio::test]
async fn a_stream_says_who_speaks_then_what_then_why_it_ended() {
    let server = Server::usual().await;
    let body = json!({"model": "image", "messages": user("one two three"), "stream": true,
        "stream_options": {"include_usage": true}});
    let frames = server.client.stream(PATH, &body).await.rest().await;
    let (usage, frames) = frames.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    let (last, frames) = frames.split_last().unwrap();
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    let delta = |frame: &Value| frame["choices"][0]["delta"].clone();
    assert_eq!(delta(&frames[0]), json!({"role": "assistant", "content": ""}));
    let texts =
        frames[1..].iter().map(|frame| delta(frame)["content"].as_str().unwrap().to_owned());
    assert_eq!(texts.collect::<String>(), "one two three");
    for frame in frames.iter().chain([last, usage]) {
        assert_eq!(frame["object"], "chat.completion.chunk");
        assert_eq!((&frame["id"], &frame["created"]), (&usage["id"], &usage["created"]));
        assert_eq!(frame["usage"].is_null(), frame["choices"] != json!([]));
    }
    // The end of the text may come with a frame of its own, which no token is counted for.
    let generated = usage["usage"]["completion_tokens"].as_u64().unwrap() as usize;
    assert!([generated, generated + 1].contains(&(frames.len() - 1)));
}

#[tokio::test]
async fn refusals_name_the_field() {
    let server = Server::usual().await;
    let two = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]);
    let long = user(&"word ".repeat(300));
    for (body, status, param, code) in [
        (json!({"model": BUNDLE, "messages": user("x")}), 400, "model", Some("no_chat_template")),
        (json!({"model": "image", "messages": two}), 400, "messages", None),
        (json!({"model": "none", "messages": user("x")}), 404, "model", Some("model_not_found")),
        (json!({"model": "image", "messages": []}), 400, "messages", None),
        (
            json!({"model": "image", "messages": long}),
            400,
            "messages",
            Some("context_length_exceeded"),
        ),
        (
            json!({"model": "image", "messages": user("x"), "tools": [{}]}),
            400,
            "tools",
            Some("unknown_field"),
        ),
    ] {
        let (found, _, at, is) = server.client.post(PATH, &body).await.error();
        assert_eq!((found, at.as_deref(), is.as_deref()), (status, Some(param), code), "{body}");
    }
}

#[tokio::test]
async fn a_text_is_what_its_grammar_allows() {
    let server = Server::usual().await;
    let text = async |path: &str, body: Value| {
        let reply = server.client.post(path, &body).await.json();
        assert_eq!(reply["choices"][0]["finish_reason"], "stop", "{body}: {reply}");
        let choice = &reply["choices"][0];
        let text = choice["text"].as_str().or(choice["message"]["content"].as_str());
        text.unwrap_or_else(|| panic!("{reply}")).to_owned()
    };
    let native = json!({"input": "maybe", "choice": ["yes", "no"]});
    assert!(["yes", "no"].contains(&text("/v1/tasks/image/generate", native).await.as_str()));
    let legacy = json!({"model": "image", "prompt": "x", "regex": "(ab|cd){2}"});
    assert_eq!(text("/v1/completions", legacy).await.len(), 4);
    let schema = json!({"type": "object", "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    let chat = json!({"model": "image", "messages": user("x"), "response_format": format});
    let value: Value = serde_json::from_str(&text(PATH, chat).await).unwrap();
    assert!(value["yes"].is_boolean(), "{value}");
}

#[tokio::test]
async fn a_grammar_that_nothing_satisfies_is_refused_by_its_field() {
    let server = Server::usual().await;
    let huge: Vec<String> = (0..2000).map(|n| n.to_string()).collect();
    for (grammar, param) in [
        (json!({"choice": []}), "choice"),
        (json!({"choice": huge}), "choice"),
        (json!({"regex": "("}), "regex"),
        (json!({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}), "json_schema"),
        (
            json!({"response_format": {"type": "json_schema",
                "json_schema": {"schema": {"type": "nonsense"}}}}),
            "response_format",
        ),
    ] {
        let mut body = json!({"input": "x"});
        body.as_object_mut().unwrap().extend(grammar.as_object().unwrap().clone());
        let reply = server.client.post("/v1/tasks/image/generate", &body).await;
        let (status, _, at, _) = reply.error();
        assert_eq!((status, at.as_deref()), (400, Some(param)), "{grammar}");
    }
    assert_eq!(server.metric("shoal_requests_running").await, 0.0);
}

#[tokio::test]
async fn an_answer_never_begins_with_the_conversation() {
    let mut setup = Setup::default();
    setup.tasks[0].defaults.echo = Some(true);
    let server = Server::with(setup, repeater()).await;
    let body = json!({"model": "image", "messages": user("a fox")});
    let reply = server.client.post(PATH, &body).await.json();
    assert_eq!(reply["choices"][0]["message"]["content"], "a fox");
}

#[tokio::test]
async fn texts_and_tokens() {
    let server = Server::usual().await;
    let raw = json!({"prompt": "a red fox", "return_token_strs": true});
    let reply = server.client.post("/tokenize", &raw).await.json();
    let strings: Vec<&str> =
        reply["token_strs"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    assert_eq!(strings.concat(), "a red fox");
    assert_eq!(reply["count"], strings.len());
    let body = json!({"tokens": reply["tokens"]});
    let back = server.client.post("/detokenize", &body).await.json();
    assert_eq!(back, json!({"prompt": "a red fox"}));
    // Under a task's template, as that task would read it.
    let chat = json!({"model": "image", "messages": user("a red fox"), "controls": {"words": 9}});
    let under = server.client.post("/tokenize", &chat).await.json();
    assert_eq!(under["count"].as_u64(), reply["count"].as_u64().map(|count| count + 2));
    assert_eq!(under["token_strs"], Value::Null);
    for (path, body, param) in [
        ("/tokenize", json!({}), "messages"),
        ("/tokenize", json!({"prompt": "x", "model": "none"}), "model"),
        ("/tokenize", json!({"prompt": "x", "max_tokens": 3}), "max_tokens"),
        ("/tokenize", json!({"prompt": "x", "regex": "a"}), "regex"),
        ("/tokenize", json!({"prompt": "x", "debug": {"routing": true}}), "debug"),
        ("/tokenize", json!({"prompt": "x", "task": "image"}), "task"),
        ("/tokenize", json!({"prompt": "x", "adapters": []}), "adapters"),
        ("/tokenize", json!({"prompt": "x", "timeout_ms": 5}), "timeout_ms"),
        ("/tokenize", json!({"messages": user(&"x ".repeat(900)), "model": "image"}), "messages"),
        ("/detokenize", json!({"tokens": [9999]}), "tokens"),
        (
            "/v1/tasks/image/score",
            json!({"input": "x", "labels": ["a"], "debug": {"routing": true}}),
            "debug",
        ),
        ("/detokenize", json!({}), "tokens"),
    ] {
        let (_, _, at, _) = server.client.post(path, &body).await.error();
        assert_eq!(at.as_deref(), Some(param), "{path} {body}");
    }
}
