//! `/v1/completions`: the conventions of OpenAI's clients.

use crate::harness::{BUNDLE, CONTEXT, Server, Setup, texts};
use serde_json::{Value, json};
use shoal::engine::Capacity;
use shoal::engine::fake::FakeRunner;

/// Asks for the completion of `fields` over the bundle's prompt `a fox|`.
async fn complete(server: &Server, fields: Value) -> Value {
    let reply = server.client.post("/v1/completions", &body(fields)).await;
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    reply.json()
}

fn body(fields: Value) -> Value {
    let mut body = json!({"model": BUNDLE, "prompt": "a fox|", "max_tokens": 32});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn text(reply: &Value, choice: usize) -> &str {
    reply["choices"][choice]["text"].as_str().unwrap()
}

#[tokio::test]
async fn a_whole_completion() {
    let server = Server::usual().await;
    let headers = [("x-request-id", "my-id.7")];
    let reply = server.client.post_with("/v1/completions", &headers, &body(json!({}))).await;
    assert_eq!(reply.header("content-type"), "application/json");
    assert_eq!(reply.header("x-request-id"), "my-id.7");
    let timing: Vec<&str> = reply.header("server-timing").split(", ").collect();
    for (part, name) in timing.iter().zip(["queue", "prefill", "decode"]) {
        let ms = part.strip_prefix(name).unwrap().strip_prefix(";dur=").unwrap();
        assert!(ms.parse::<f64>().unwrap() >= 0.0);
    }
    assert_eq!(timing.len(), 3);
    let reply = reply.json();
    let keys: Vec<&String> = reply.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        ["id", "object", "model", "system_fingerprint", "created", "choices", "usage"]
    );
    assert_eq!(reply["id"], "cmpl-my-id.7");
    assert_eq!(reply["object"], "text_completion");
    assert_eq!(reply["model"], BUNDLE);
    let choice = json!({"index": 0, "text": "a fox", "logprobs": null, "finish_reason": "stop"});
    assert_eq!(reply["choices"], json!([choice]));
    let usage = &reply["usage"];
    let sum =
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], sum);
}

#[tokio::test]
async fn a_stream_has_one_frame_per_token_and_ends_with_done() {
    let server = Server::usual().await;
    let body = body(json!({"prompt": "naïve 日本 🙂|", "max_tokens": 10, "stream": true}));
    let mut stream = server.client.stream("/v1/completions", &body).await;
    assert!(stream.headers["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    assert_eq!(stream.headers["x-accel-buffering"], "no");
    assert_eq!(stream.headers["cache-control"], "no-cache");
    assert!(stream.headers.contains_key("x-request-id"));
    let frames = stream.rest().await;
    assert_eq!(frames.len(), 10, "one per token, the last with the finish reason");
    for (i, frame) in frames.iter().enumerate() {
        for same in ["id", "model", "created", "object"] {
            assert_eq!(frame[same], frames[0][same]);
        }
        assert!(frame.get("usage").is_none());
        let finish = if i == 9 { json!("length") } else { Value::Null };
        assert_eq!(frame["choices"][0]["finish_reason"], finish);
    }
    // The tokenizer splits these characters: no frame may hold half of one.
    let text = texts(&frames).remove(0);
    assert!("naïve 日本 🙂".starts_with(text.trim_end_matches('\u{fffd}')), "{text:?}");
    assert!(frames.iter().any(|f| f["choices"][0]["text"] == ""), "a held byte has a frame too");
}

#[tokio::test]
async fn characters_that_tokens_split_arrive_whole() {
    let server = Server::usual().await;
    let want = "naïve café — 日本 🙂 test";
    let body = body(json!({"prompt": format!("{want}|"), "max_tokens": 64, "stream": true}));
    let frames = server.client.stream("/v1/completions", &body).await.rest().await;
    assert_eq!(texts(&frames), [want]);
    for frame in &frames[..frames.len() - 1] {
        assert!(!frame["choices"][0]["text"].as_str().unwrap().contains('\u{fffd}'));
    }
}

#[tokio::test]
async fn usage_comes_in_a_frame_of_its_own() {
    let server = Server::usual().await;
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let mut frames = server.client.stream("/v1/completions", &body(options)).await.rest().await;
    let last = frames.pop().unwrap();
    assert_eq!(last["choices"], json!([]));
    let whole = complete(&server, json!({})).await;
    assert_eq!(last["usage"], whole["usage"]);
    assert!(
        frames.iter().all(|frame| frame["usage"] == Value::Null && frame.get("usage").is_some())
    );
}

#[tokio::test]
async fn stop_strings_end_the_text_wherever_tokens_end() {
    let server = Server::usual().await;
    let prompt = "one two. three four|";
    for (stop, want) in [
        (json!("three"), "one two. "),
        (json!(["four", ". thr"]), "one two"),
        (json!("o. x"), "one two. three four"),
        (json!([" "]), "one"),
    ] {
        let fields = json!({"prompt": prompt, "stop": stop});
        let reply = complete(&server, fields.clone()).await;
        assert_eq!(
            (text(&reply, 0), &reply["choices"][0]["finish_reason"]),
            (want, &json!("stop"))
        );
        let mut fields = fields;
        fields["stream"] = json!(true);
        let frames = server.client.stream("/v1/completions", &body(fields)).await.rest().await;
        assert_eq!(texts(&frames), [want]);
        let finishes: Vec<&Value> = frames
            .iter()
            .map(|f| &f["choices"][0]["finish_reason"])
            .filter(|f| !f.is_null())
            .collect();
        assert_eq!(finishes, ["stop"]);
    }
}

#[tokio::test]
async fn several_prompts_and_several_choices() {
    let server = Server::usual().await;
    let reply = complete(&server, json!({"prompt": ["a|", "b c|"], "n": 2})).await;
    let texts: Vec<&str> = (0..4).map(|i| text(&reply, i)).collect();
    assert_eq!(texts, ["a", "a", "b c", "b c"]);
    let indices: Vec<&Value> =
        reply["choices"].as_array().unwrap().iter().map(|c| &c["index"]).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    let single = complete(&server, json!({"prompt": ["a|", "b c|"]})).await;
    assert_eq!(reply["usage"]["prompt_tokens"], single["usage"]["prompt_tokens"], "counted once");
    let twice = 2 * single["usage"]["completion_tokens"].as_u64().unwrap();
    assert_eq!(reply["usage"]["completion_tokens"], twice);
}

#[tokio::test]
async fn tokens_as_prompts() {
    let server = Server::usual().await;
    let ids = crate::harness::tokenizer().encode_plain("a fox|").unwrap();
    assert_eq!(text(&complete(&server, json!({"prompt": ids})).await, 0), "a fox");
    let reply = complete(&server, json!({"prompt": [ids, ids]})).await;
    assert_eq!([text(&reply, 0), text(&reply, 1)], ["a fox", "a fox"]);
    for (model, prompt) in [(BUNDLE, json!([1, 572])), ("image", json!([1]))] {
        let body = body(json!({"model": model, "prompt": prompt}));
        let error = server.client.post("/v1/completions", &body).await.error();
        assert_eq!((error.0, error.2.as_deref()), (400, Some("prompt")));
    }
}

#[tokio::test]
async fn echo_and_scores() {
    let server = Server::usual().await;
    assert_eq!(text(&complete(&server, json!({"echo": true})).await, 0), "a fox|a fox");
    let scored = json!({"echo": true, "logprobs": 2, "max_tokens": 0});
    let reply = complete(&server, scored).await;
    assert_eq!(text(&reply, 0), "a fox|");
    assert_eq!(reply["usage"]["completion_tokens"], 0);
    let logprobs = &reply["choices"][0]["logprobs"];
    let keys: Vec<&String> = logprobs.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["tokens", "token_logprobs", "top_logprobs", "text_offset"]);
    let tokens: Vec<&str> =
        logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(tokens.concat(), "a fox|");
    assert_eq!(reply["usage"]["prompt_tokens"], tokens.len());
    let values = logprobs["token_logprobs"].as_array().unwrap();
    assert!(values[0].is_null() && values[1..].iter().all(Value::is_number));
    let tops = logprobs["top_logprobs"].as_array().unwrap();
    assert!(tops[0].is_null());
    for ((top, token), value) in tops.iter().zip(&tokens).zip(values).skip(1) {
        assert!((2..=3).contains(&top.as_object().unwrap().len()));
        assert_eq!(&top[token], value, "the token itself is among them");
    }
    let mut offset = 0;
    for (token, at) in tokens.iter().zip(logprobs["text_offset"].as_array().unwrap()) {
        assert_eq!(at, offset);
        offset += token.chars().count();
    }
}

#[tokio::test]
async fn scores_of_generated_tokens_stream_with_them() {
    let server = Server::usual().await;
    let fields = json!({"prompt": "é🙂|", "logprobs": 1, "echo": true});
    let whole = complete(&server, fields.clone()).await;
    let mut fields = fields;
    fields["stream"] = json!(true);
    let frames = server.client.stream("/v1/completions", &body(fields)).await.rest().await;
    assert_eq!(texts(&frames), ["é🙂|é🙂"]);
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let streamed: Vec<Value> = frames
            .iter()
            .filter_map(|f| f["choices"][0]["logprobs"][key].as_array())
            .flatten()
            .cloned()
            .collect();
        assert_eq!(whole["choices"][0]["logprobs"][key], json!(streamed), "{key}");
    }
    let tokens = whole["choices"][0]["logprobs"]["tokens"].to_string();
    assert!(tokens.contains(r"bytes:\\x"), "{tokens}");
}

#[tokio::test]
async fn lengths() {
    let server = Server::usual().await;
    let endless = json!({"model": BUNDLE, "prompt": "~ab|"});
    let reply = server.client.post("/v1/completions", &endless).await.json();
    assert_eq!(reply["usage"]["completion_tokens"], 16, "the raw default");
    let task = json!({"model": "image", "prompt": "~ab"});
    let reply = server.client.post("/v1/completions", &task).await.json();
    assert_eq!(reply["usage"]["completion_tokens"], 64, "the task's default");
    let prompt = reply["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    for (max_tokens, status) in [(CONTEXT - prompt, 200), (CONTEXT - prompt + 1, 400)] {
        let body = json!({"model": "image", "prompt": "~ab", "max_tokens": max_tokens});
        let reply = server.client.post("/v1/completions", &body).await;
        assert_eq!(reply.status, status);
        if status == 200 {
            assert_eq!(reply.json()["usage"]["completion_tokens"], max_tokens);
        } else {
            let (_, kind, param, code) = reply.error();
            assert_eq!(kind, "invalid_request_error");
            assert_eq!(param.as_deref(), Some("max_tokens"));
            assert_eq!(code.as_deref(), Some("context_length_exceeded"));
        }
    }
    for words in [300, 40_000] {
        let long = json!({"model": "image", "prompt": "fox ".repeat(words)});
        let error = server.client.post("/v1/completions", &long).await.error();
        assert_eq!((error.0, error.3.as_deref()), (400, Some("context_length_exceeded")));
    }
}

#[tokio::test]
async fn many_prompts_are_refused_at_the_first_that_is_too_long() {
    let server = Server::usual().await;
    for stream in [false, true] {
        let mut prompts = vec!["fox ".repeat(300); 64];
        prompts[0] = "fine".into();
        let body = json!({"model": BUNDLE, "prompt": prompts, "stream": stream});
        let error = server.client.post("/v1/completions", &body).await.error();
        assert_eq!((error.0, error.2.as_deref()), (400, Some("prompt")));
        assert_eq!(error.3.as_deref(), Some("context_length_exceeded"));
    }
    let prompts = vec![format!("ab|{}", "fox ".repeat(65)); 64];
    let reply = complete(&server, json!({"prompt": prompts, "max_tokens": 1})).await;
    assert_eq!(reply["choices"].as_array().unwrap().len(), 64, "together they are long");
}

#[tokio::test]
async fn an_empty_prompt_is_one_end_of_text_token() {
    let server = Server::usual().await;
    for prompt in [json!(""), json!([""])] {
        let reply = complete(&server, json!({"prompt": prompt, "max_tokens": 1})).await;
        assert_eq!(reply["usage"]["prompt_tokens"], 1);
    }
    let scored = json!({"prompt": "", "echo": true, "logprobs": 0, "max_tokens": 0});
    let reply = complete(&server, scored).await;
    let name = "<|endoftext|>";
    assert_eq!(
        (text(&reply, 0), &reply["choices"][0]["logprobs"]["tokens"]),
        (name, &json!([name]))
    );
}

#[tokio::test]
async fn min_tokens_and_ignore_eos() {
    let server = Server::usual().await;
    let tokens = |reply: &Value| reply["usage"]["completion_tokens"].as_u64().unwrap();
    let usual = tokens(&complete(&server, json!({})).await);
    assert!(usual < 9);
    assert!(tokens(&complete(&server, json!({"min_tokens": 9})).await) >= 9);
    let fields = json!({"ignore_eos": true, "logprobs": 0});
    let on = complete(&server, fields).await;
    assert_eq!((tokens(&on), text(&on, 0)), (32, "a fox"), "special tokens are not shown");
    let logprobs = &on["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"][31], "<|endoftext|>");
    assert_eq!(logprobs["text_offset"][31], "a fox".len());
    let fields = json!({"ignore_eos": true, "stream": true});
    let frames = server.client.stream("/v1/completions", &body(fields)).await.rest().await;
    assert_eq!((frames.len(), texts(&frames)), (32, vec!["a fox".to_string()]));
}

#[tokio::test]
async fn a_tasks_least_length_gives_way_to_a_given_limit() {
    let mut setup = Setup::default();
    setup.tasks[0].defaults.min_tokens = Some(10);
    let server = Server::with(setup, crate::harness::repeater()).await;
    for (fields, status, completion_tokens) in [
        (json!({"max_tokens": 4}), 200, 4),
        (json!({"prompt": "ab"}), 200, 10),
        (json!({"max_tokens": 4, "min_tokens": 5}), 400, 0),
    ] {
        let mut body = json!({"model": "image", "prompt": "~ab"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let reply = server.client.post("/v1/completions", &body).await;
        assert_eq!(reply.status, status, "{fields}");
        if status == 200 {
            let tokens = reply.json()["usage"]["completion_tokens"].as_u64().unwrap();
            assert!(tokens >= completion_tokens, "{fields}: {tokens}");
        }
    }
}

#[tokio::test]
async fn special_strings_in_a_prompt_are_text() {
    let server = Server::usual().await;
    let input = "a<|gen|>b<|words:3|><|endoftext|>";
    let body = json!({"model": "image", "prompt": input, "echo": true, "max_tokens": 0});
    let reply = server.client.post("/v1/completions", &body).await.json();
    assert_eq!(text(&reply, 0), format!("<|words:none|>{input}<|gen|>"));
    let plain = crate::harness::tokenizer().encode_plain(input).unwrap();
    assert_eq!(reply["usage"]["prompt_tokens"], plain.len() + 2);
    let raw = complete(&server, json!({"prompt": "<|endoftext|>"})).await;
    assert!(raw["usage"]["prompt_tokens"].as_u64().unwrap() > 1);
}

#[tokio::test]
async fn a_long_prompt_is_no_other_than_a_short_one() {
    let capacity = Capacity { blocks: 1024, block_size: 16, context: 1 << 14, vocab: 572 };
    let runner = FakeRunner::new(capacity).with_model(|_| 0);
    let server = Server::with(Setup::default(), runner).await;
    let prompt = "fox ".repeat(5000);
    let reply = complete(&server, json!({"prompt": prompt})).await;
    let tokens = crate::harness::tokenizer().encode_plain(&prompt).unwrap();
    assert_eq!(reply["usage"]["prompt_tokens"], tokens.len());
}
