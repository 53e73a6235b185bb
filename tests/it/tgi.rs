//! Text-generation-inference's wire, as its clients speak it.

use crate::harness::{BUNDLE, Reply, Server, Setup, repeater};
use hyper::Method;
use serde_json::{Value, json};
use shoal::api::Limits;
use shoal::engine::Settings;

/// What the clients send with every request, for as much as a test does not say.
fn body(inputs: &str, parameters: &Value) -> Value {
    let mut all = json!({"do_sample": false, "max_new_tokens": 20, "stop": [], "seed": null,
        "details": true, "decoder_input_details": false, "watermark": false, "grammar": null});
    all.as_object_mut().unwrap().extend(parameters.as_object().unwrap().clone());
    json!({"inputs": inputs, "parameters": all})
}

async fn generate(server: &Server, inputs: &str, parameters: Value) -> Value {
    let reply = server.client.post("/generate", &body(inputs, &parameters)).await;
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    reply.json()
}

/// All frames of a stream, which must end without `[DONE]`.
async fn frames(server: &Server, path: &str, body: &Value) -> Vec<Value> {
    let mut stream = server.client.stream(path, body).await;
    let mut frames = Vec::new();
    while let Some(data) = stream.data().await {
        frames.push(serde_json::from_str(&data).unwrap());
    }
    frames
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The texts of tokens that are part of the text.
fn shown<'a>(tokens: impl IntoIterator<Item = &'a Value>) -> String {
    let shown = tokens.into_iter().filter(|token| token["special"] == false);
    shown.map(|token| token["text"].as_str().unwrap()).collect()
}

/// The parts of an error body of this wire.
fn error(reply: &Reply) -> (u16, String, Option<String>) {
    let body = reply.json();
    let kind = body["error_type"].as_str().map(str::to_owned);
    (reply.status, body["error"].as_str().expect("a string").to_owned(), kind)
}

#[tokio::test]
async fn a_whole_answer_with_details() {
    let server = Server::usual().await;
    let reply = generate(&server, "naïve 🙂|", json!({})).await;
    assert_eq!(keys(&reply), ["generated_text", "details"]);
    assert_eq!(reply["generated_text"], "naïve 🙂");
    let details = &reply["details"];
    assert_eq!(keys(details), ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]);
    assert_eq!((&details["finish_reason"], &details["seed"]), (&json!("eos_token"), &Value::Null));
    assert_eq!(details["prefill"], json!([]));
    let tokens = details["tokens"].as_array().unwrap();
    assert_eq!(details["generated_tokens"], tokens.len());
    assert!(tokens.iter().all(|token| keys(token) == ["id", "text", "logprob", "special"]));
    assert_eq!(shown(tokens), "naïve 🙂", "the texts of the tokens are the text");
    let (last, others) = tokens.split_last().unwrap();
    assert_eq!((&last["text"], &last["special"]), (&json!("<|endoftext|>"), &json!(true)));
    assert!(tokens.iter().all(|token| token["logprob"].as_f64().unwrap() <= 0.0));
    assert!(others.iter().all(|token| token["special"] == false));
}

#[tokio::test]
async fn the_three_routes_differ_in_shape_only() {
    let server = Server::usual().await;
    let plain = json!({"inputs": "a fox|", "parameters": {"details": false}});
    let object = server.client.post("/generate", &plain).await.json();
    assert_eq!(object, json!({"generated_text": "a fox"}));
    assert_eq!(server.client.post("/", &plain).await.json(), json!([object]));
    let mut streamed = plain.clone();
    streamed["stream"] = json!(true);
    let want = frames(&server, "/generate_stream", &plain).await;
    assert_eq!(want.last().unwrap()["generated_text"], "a fox");
    for path in ["/", "/generate", "/generate_stream"] {
        assert_eq!(frames(&server, path, &streamed).await, want, "{path}");
    }
}

#[tokio::test]
async fn a_stream_has_one_frame_a_token_and_no_done() {
    let server = Server::usual().await;
    let whole = generate(&server, "é🙂 fox|", json!({"top_n_tokens": 2})).await;
    let body = body("é🙂 fox|", &json!({"top_n_tokens": 2}));
    let frames = frames(&server, "/generate_stream", &body).await;
    let tokens: Vec<&Value> = frames.iter().map(|frame| &frame["token"]).collect();
    assert_eq!(json!(tokens), whole["details"]["tokens"]);
    for (i, frame) in frames.iter().enumerate() {
        assert_eq!(frame["index"], i + 1);
        let last = i + 1 == frames.len();
        let all = ["index", "token", "top_tokens", "generated_text", "details"];
        match last {
            true => assert_eq!(keys(frame), [all[0], all[1], all[3], all[4]]),
            false => assert_eq!(keys(frame), all),
        }
        let text = if last { json!("é🙂 fox") } else { Value::Null };
        assert_eq!(frame["generated_text"], text);
        assert_eq!(frame["details"].is_null(), !last);
    }
    let details = &frames.last().unwrap()["details"];
    assert_eq!(keys(details), ["finish_reason", "generated_tokens", "seed", "input_length"]);
    assert_eq!(details["finish_reason"], "eos_token");
    assert_eq!(details["generated_tokens"], frames.len());
    assert!(details["input_length"].as_u64().unwrap() > 1);
    let tops: Vec<&Value> = frames.iter().filter_map(|frame| frame.get("top_tokens")).collect();
    assert_eq!(json!(tops), whole["details"]["top_tokens"]);
    assert!(tops.iter().all(|top| top.as_array().unwrap().len() == 2));
}

#[tokio::test]
async fn why_a_text_ended() {
    let server = Server::usual().await;
    let reply = generate(&server, "one two three|", json!({"stop": ["tw"]})).await;
    assert_eq!(reply["details"]["finish_reason"], "stop_sequence");
    let text = reply["generated_text"].as_str().unwrap();
    assert!(text.starts_with("one tw") && !text.contains("three"), "the stop string stays: {text}");
    assert_eq!(shown(reply["details"]["tokens"].as_array().unwrap()), text);
    let stream = body("one two three|", &json!({"stop": ["tw"]}));
    let last = frames(&server, "/generate_stream", &stream).await.pop().unwrap();
    assert_eq!(last["generated_text"], text);
    assert_eq!(last["details"]["finish_reason"], "stop_sequence");
    let reply = generate(&server, "~ab|", json!({"max_new_tokens": 3})).await;
    let details = &reply["details"];
    assert_eq!(
        (&details["finish_reason"], &details["generated_tokens"]),
        (&json!("length"), &json!(3))
    );
}

#[tokio::test]
async fn a_stop_string_of_the_task_ends_a_text_with_a_grammar_too() {
    let mut setup = Setup::default();
    setup.tasks[0].defaults.stop = Some(vec!["y".into()]);
    let server = Server::with(setup, repeater()).await;
    let grammar = json!({"type": "regex", "value": "xyzzz"});
    let asked = json!({"adapter_id": "image", "grammar": grammar});
    let reply = generate(&server, "a", asked.clone()).await;
    let details = &reply["details"];
    assert_eq!(details["finish_reason"], "stop_sequence");
    assert_eq!(details["generated_tokens"], details["tokens"].as_array().unwrap().len());
    let frames = frames(&server, "/generate_stream", &body("a", &asked)).await;
    let last = frames.last().unwrap();
    assert_eq!(last["generated_text"], reply["generated_text"]);
    assert_eq!(last["details"]["finish_reason"], "stop_sequence");
}

#[tokio::test]
async fn the_prompt_before_the_text_and_its_tokens_beside_it() {
    let server = Server::usual().await;
    let asked = json!({"return_full_text": true, "decoder_input_details": true});
    let reply = generate(&server, "a fox|", asked).await;
    assert_eq!(reply["generated_text"], "a fox|a fox");
    let prefill = reply["details"]["prefill"].as_array().unwrap();
    assert!(prefill.iter().all(|token| keys(token) == ["id", "text", "logprob"]));
    let texts: String = prefill.iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert_eq!(texts, "a fox|");
    assert!(prefill[0]["logprob"].is_null() && prefill[1]["logprob"].is_number());
    assert_eq!(shown(reply["details"]["tokens"].as_array().unwrap()), "a fox");
    let full = body("a fox|", &json!({"return_full_text": true}));
    let frames = frames(&server, "/generate_stream", &full).await;
    assert_eq!(shown(frames.iter().map(|frame| &frame["token"])), "a fox");
    assert_eq!(frames.last().unwrap()["generated_text"], "a fox|a fox");
}

#[tokio::test]
async fn an_adapter_id_may_name_a_task() {
    let server = Server::usual().await;
    let mut body = body("a fox", &json!({"adapter_id": "image", "return_full_text": true}));
    body["controls"] = json!({"words": 9});
    let reply = server.client.post("/generate", &body).await.json();
    assert_eq!(reply["generated_text"], "a foxa fox");
    assert_eq!(server.metric(r#"shoal_requests_total{outcome="ok",task="image"}"#).await, 1.0);
}

#[tokio::test]
async fn an_answer_that_was_drawn_has_its_seed() {
    let server = Server::usual().await;
    let seed = |reply: &Value| reply["details"]["seed"].clone();
    let given = generate(&server, "a|", json!({"do_sample": true, "seed": 7})).await;
    assert_eq!(seed(&given), 7);
    assert_eq!(seed(&generate(&server, "a|", json!({"seed": 7})).await), Value::Null);
    let made = seed(&generate(&server, "a|", json!({"temperature": 0.5})).await);
    let again = generate(&server, "a|", json!({"temperature": 0.5, "seed": made})).await;
    assert_eq!(seed(&again), made, "a seed that was made can be asked for");
}

#[tokio::test]
async fn truncate_keeps_a_prompts_last_tokens() {
    let server = Server::usual().await;
    for (inputs, truncate) in [("one two three|", 3), (&*format!("{} b|", "a ".repeat(40_000)), 4)]
    {
        let reply =
            server.client.post("/generate", &body(inputs, &json!({"truncate": truncate}))).await;
        assert_eq!(reply.header("x-prompt-tokens"), truncate.to_string());
        let reply = reply.json();
        let text = reply["generated_text"].as_str().unwrap();
        assert!(inputs.ends_with(&format!("{text}|")) && text.len() < 12, "{text}");
    }
    for (parameters, reason) in [
        (json!({"truncate": 0}), "truncate is 0"),
        (json!({"truncate": 2, "adapter_id": "image"}), "truncate is for raw text"),
    ] {
        let reply = server.client.post("/generate", &body("a|", &parameters)).await;
        assert!(error(&reply).1.contains(reason), "{reply:?}");
    }
}

#[tokio::test]
async fn headers_say_where_the_time_went() {
    let server = Server::usual().await;
    let reply = server.client.post("/generate", &body("é🙂|", &json!({}))).await;
    let number = |name: &str| -> f64 { reply.header(name).parse().unwrap() };
    assert_eq!(reply.header("x-compute-type"), "cpu");
    assert_eq!(number("x-compute-characters"), 3.0);
    assert!(number("x-compute-time") > 0.0 && number("x-compute-time") < 60.0);
    for name in [
        "x-total-time",
        "x-validation-time",
        "x-queue-time",
        "x-inference-time",
        "x-time-per-token",
    ] {
        assert!(reply.header(name).parse::<u64>().is_ok(), "{name}");
    }
    assert!(number("x-prompt-tokens") > 2.0);
    assert_eq!(reply.json()["details"]["generated_tokens"], number("x-generated-tokens"));
    assert!(reply.header("server-timing").starts_with("queue;dur="));
}

#[tokio::test]
async fn refusals_have_this_wires_shape() {
    let server = Server::usual().await;
    for (parameters, status, reason, kind) in [
        (json!({"temperature": 9}), 422, "temperature is 9", Some("validation")),
        (json!({"max_new_tokens": 9999}), 422, "max_new_tokens is 9999", Some("validation")),
        (json!({"top_n_tokens": 21}), 422, "top_n_tokens is 21", Some("validation")),
        (json!({"typical_p": 0.5}), 422, "typical_p is not supported", Some("validation")),
        (json!({"best_of": 2}), 422, "best_of is not supported", Some("validation")),
        (json!({"beams": 2}), 422, "unknown field parameters.beams", Some("validation")),
        (json!({"adapter_id": "nobody"}), 404, "no model or task", None),
    ] {
        for path in ["/", "/generate", "/generate_stream"] {
            let reply = server.client.post(path, &body("a|", &parameters)).await;
            let (got, message, got_kind) = error(&reply);
            assert_eq!((got, got_kind.as_deref()), (status, kind), "{path} {parameters}");
            assert!(message.contains(reason), "{message}");
            assert_eq!(reply.header("content-type"), "application/json");
        }
    }
    let reply = server.client.call(Method::GET, "/generate", &[], "").await;
    assert_eq!((error(&reply).0, reply.header("allow")), (405, "POST"));
    let json = [("content-type", "application/json")];
    let reply = server.client.call(Method::POST, "/generate", &json, "{").await;
    assert_eq!((error(&reply).0, error(&reply).2.as_deref()), (422, Some("validation")));
    let other = server.client.post("/v1/completions", &json!({"model": BUNDLE})).await;
    assert_eq!(other.error().0, 400, "other routes keep theirs");
}

#[tokio::test]
async fn load_and_size_are_told_in_its_words() {
    let settings = Settings { max_waiting: 1, ..Settings::default() };
    let limits = Limits { max_body_bytes: 1000, ..Limits::default() };
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup { settings, limits, ..Setup::default() }, runner).await;
    let large = body(&"x".repeat(2000), &json!({}));
    let reply = server.client.post("/generate", &large).await;
    assert_eq!((error(&reply).0, error(&reply).2.as_deref()), (413, Some("validation")));
    let stream = body("a|", &json!({}));
    let mut held = Vec::new();
    let refused = loop {
        match server.client.try_stream("/generate_stream", &[], &stream).await {
            Ok(stream) => held.push(stream),
            Err(reply) => break reply,
        }
    };
    assert_eq!((error(&refused).0, error(&refused).2.as_deref()), (429, Some("overloaded")));
    assert!(!refused.header("retry-after").is_empty());
    drop(gate);
    for mut stream in held {
        while stream.data().await.is_some() {}
    }
}

#[tokio::test]
async fn an_error_in_a_stream_is_a_frame() {
    let server = Server::with(Setup::default(), repeater().failing_at([3])).await;
    let frames = frames(&server, "/generate_stream", &body("~ab|", &json!({}))).await;
    let (last, others) = frames.split_last().unwrap();
    assert!(others.iter().all(|frame| frame["generated_text"].is_null()));
    assert_eq!(keys(last), ["error", "error_type"]);
    assert_eq!(last["error_type"], "generation");
}

#[tokio::test]
async fn info_has_its_names() {
    let server = Server::usual().await;
    let info = server.client.get("/info").await.json();
    assert_eq!((&info["model_id"], &info["model_dtype"]), (&json!(BUNDLE), &json!("f32")));
    assert_eq!(info["model_device_type"], "cpu");
    assert_eq!(info["max_total_tokens"], crate::harness::CONTEXT);
    assert_eq!(info["max_input_tokens"], crate::harness::CONTEXT - 1);
    assert_eq!(info["max_stop_sequences"], 16);
    assert!(info["max_concurrent_requests"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_grammar_holds_the_text() {
    let server = Server::usual().await;
    let regex = json!({"type": "regex", "value": "[0-9]{3}"});
    let reply = generate(&server, "a fox|", json!({"grammar": regex})).await;
    let text = reply["generated_text"].as_str().unwrap();
    assert!(text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit()), "{text}");
    let details = &reply["details"];
    assert_eq!(details["finish_reason"], "eos_token");
    let tokens = details["tokens"].as_array().unwrap();
    assert_eq!((&details["generated_tokens"], shown(tokens)), (&json!(tokens.len()), text.into()));
    assert!(tokens.iter().all(|token| token["logprob"].is_number()), "{details}");
    let stream = body("a fox|", &json!({"grammar": regex}));
    let frames = frames(&server, "/generate_stream", &stream).await;
    let last = frames.last().unwrap();
    assert_eq!((&last["generated_text"], frames.len()), (&json!(text), tokens.len()));
    assert_eq!(last["details"]["finish_reason"], "eos_token");
    let bad = body("a|", &json!({"grammar": {"type": "regex", "value": "("}}));
    let reply = server.client.post("/generate", &bad).await;
    assert_eq!((error(&reply).0, error(&reply).2.as_deref()), (422, Some("validation")));
}
