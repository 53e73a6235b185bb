//! From start to end: loading, overload, deadlines, clients that leave, failing steps, drain.

use crate::harness::{BUNDLE, CONTEXT, Server, Setup, Stream, repeater, texts};
use serde_json::{Value, json};
use shoal::api::{Ended, Limits};
use shoal::engine::fake::FakeRunner;
use shoal::engine::{Capacity, Settings, State};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

const COMPLETIONS: &str = "/v1/completions";
const TASKS: [&str; 3] = ["image", "music", "video"];

/// A stream that goes on until the context is full.
fn endless(model: &str) -> Value {
    json!({"model": model, "prompt": "~ab|", "max_tokens": 100, "stream": true})
}

fn short() -> Value {
    json!({"model": BUNDLE, "prompt": "ab|"})
}

/// How many requests ended so, over all tasks.
async fn outcomes(server: &Server, outcome: &str) -> f64 {
    let mut sum = 0.0;
    for task in TASKS.iter().chain([&BUNDLE]) {
        let labels = format!("{{outcome=\"{outcome}\",task=\"{task}\"}}");
        sum += server.metric(&format!("shoal_requests_total{labels}")).await;
    }
    sum
}

async fn until_outcomes(server: &Server, outcome: &str, count: f64) {
    while outcomes(server, outcome).await != count {
        tokio::task::yield_now().await;
    }
}

/// Reads an in-stream error, which must be the stream's end.
async fn ends_in_error(stream: &mut Stream) -> Value {
    loop {
        let frame = stream.frame().await;
        if frame.get("error").is_some() {
            assert_eq!(stream.raw().await, None, "nothing follows an error, not even [DONE]");
            return frame["error"].clone();
        }
        assert_eq!(frame["choices"][0]["finish_reason"], Value::Null);
    }
}

#[tokio::test]
async fn probes_are_answered_while_the_model_loads() {
    let (finish, wait) = std::sync::mpsc::channel::<()>();
    let server = Server::loading(Setup::default(), move || {
        wait.recv()?;
        Ok(repeater())
    })
    .await;
    assert_eq!(server.client.get("/livez").await.status, 200);
    for path in ["/readyz", "/startupz", "/health"] {
        let reply = server.client.get(path).await;
        assert_eq!(reply.error().0, 503);
        assert!(reply.header("retry-after").parse::<u32>().unwrap() >= 1);
    }
    let refused = server.client.post(COMPLETIONS, &short()).await;
    assert_eq!(refused.error().3.as_deref(), Some("unavailable"));
    assert!(refused.header("retry-after").parse::<u32>().unwrap() >= 1);
    assert_eq!(server.client.get("/info").await.json()["state"], "loading");
    assert_eq!(server.client.get("/v1/models").await.status, 200);
    finish.send(()).unwrap();
    server.engine.watch().wait_for(|s| *s == State::Ready).await.unwrap();
    for path in ["/livez", "/readyz", "/startupz", "/health"] {
        assert_eq!(server.client.get(path).await.status, 200, "{path}");
    }
    assert_eq!(server.client.post(COMPLETIONS, &short()).await.status, 200);
}

#[tokio::test]
async fn a_model_that_does_not_load_ends_the_server() {
    let build = || Err::<FakeRunner, _>("no such file".into());
    let server = Server::loading(Setup::default(), build).await;
    assert_eq!(server.ended().await, Ended::Failed);
}

#[tokio::test]
async fn clients_that_leave_free_their_memory() {
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup::default(), runner).await;
    let mut streams = Vec::new();
    for i in 0..64 {
        streams.push(server.client.stream(COMPLETIONS, &endless(TASKS[i % 3])).await);
    }
    // The first step may have begun before all were there; the next two have them all.
    gate.pass(3);
    for stream in &mut streams {
        stream.frame().await;
    }
    let full = server.metric("shoal_kv_cache_usage_ratio").await;
    assert_eq!(server.metric("shoal_requests_running").await, 64.0);
    streams.truncate(32);
    until_outcomes(&server, "cancelled", 32.0).await;
    gate.pass(2);
    server.until("shoal_requests_running", 32.0).await;
    assert_eq!(server.metric("shoal_kv_cache_usage_ratio").await, full / 2.0);
    drop(gate);
    for stream in &mut streams {
        let frames = stream.rest().await;
        assert_eq!(frames.last().unwrap()["choices"][0]["finish_reason"], "length");
    }
    until_outcomes(&server, "ok", 32.0).await;
    server.until("shoal_requests_running", 0.0).await;
    assert_eq!(server.metric("shoal_kv_cache_usage_ratio").await, 0.0);
}

#[tokio::test]
async fn clients_that_leave_the_queue_are_never_run() {
    let (runner, gate) = repeater().gated();
    let settings = Settings { max_running: 1, ..Settings::default() };
    let server = Server::with(Setup { settings, ..Setup::default() }, runner).await;
    let mut first = server.client.stream(COMPLETIONS, &endless(BUNDLE)).await;
    gate.pass(1);
    first.frame().await;
    drop(server.client.stream(COMPLETIONS, &endless("image")).await);
    until_outcomes(&server, "cancelled", 1.0).await;
    drop(gate);
    first.rest().await;
    server.until("shoal_requests_waiting", 0.0).await;
    let ran = server.metric("shoal_request_queue_seconds_count{task=\"image\"}").await;
    assert_eq!(ran, 0.0);
}

#[tokio::test]
async fn a_client_that_waits_for_a_whole_answer_can_leave() {
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup::default(), runner).await;
    let client = server.client;
    let asking = tokio::spawn(async move { client.post(COMPLETIONS, &short()).await });
    let arrived = tokio::task::spawn_blocking(move || gate.arrival().map(|_| gate));
    let gate = arrived.await.unwrap().expect("the request's first step");
    asking.abort();
    until_outcomes(&server, "cancelled", 1.0).await;
    drop(gate);
    server.until("shoal_requests_running", 0.0).await;
    assert_eq!(server.metric("shoal_kv_cache_usage_ratio").await, 0.0);
}

#[tokio::test]
async fn a_full_queue_refuses_with_a_time_to_come_back() {
    let (runner, gate) = repeater().gated();
    let mut setup = Setup::default();
    setup.settings.max_running = 1;
    setup.tasks[0].slo.max_waiting = 1;
    let server = Server::with(setup, runner).await;
    let mut running = server.client.stream(COMPLETIONS, &endless("image")).await;
    gate.pass(1);
    running.frame().await;
    let mut waiting = server.client.stream(COMPLETIONS, &endless("image")).await;
    for stream in [false, true] {
        let mut body = endless("image");
        body["stream"] = json!(stream);
        let refused = server.client.post(COMPLETIONS, &body).await;
        assert_eq!(refused.error().0, 429);
        assert_eq!(refused.error().1, "rate_limit_error");
        assert!(refused.header("retry-after").parse::<u32>().unwrap() >= 1);
    }
    let too_many = json!({"input": "x", "n": 2});
    let never = server.client.post("/v1/tasks/image/generate", &too_many).await;
    assert_eq!(never.error().2.as_deref(), Some("n"), "coming back would not help");
    let too_many = json!({"model": "image", "prompt": ["x", "y"]});
    let never = server.client.post(COMPLETIONS, &too_many).await;
    assert_eq!((never.error().0, never.error().2.as_deref()), (400, Some("prompt")));
    let other = server.client.stream(COMPLETIONS, &endless("music")).await;
    drop(gate);
    for stream in [&mut running, &mut waiting, &mut { other }] {
        stream.rest().await;
    }
    assert_eq!(outcomes(&server, "overloaded").await, 2.0);
    assert_eq!(outcomes(&server, "ok").await, 3.0);
}

#[tokio::test]
async fn a_deadline_is_an_error_and_never_a_length() {
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup::default(), runner).await;
    let mut body = short();
    body["timeout_ms"] = json!(20);
    let late = server.client.post(COMPLETIONS, &body).await;
    assert_eq!(late.error().0, 504);
    assert_eq!(late.error().3.as_deref(), Some("deadline_exceeded"));
    for header in ["x-request-timeout-ms", "x-llm-d-slo-ttft-ms"] {
        let late = server.client.post_with(COMPLETIONS, &[(header, "20")], &short()).await;
        assert_eq!(late.error().0, 504, "{header}");
    }
    // The first token is in time and the whole is not; a busy machine gets more time for the first.
    let mut late = 3.0;
    for ms in [400, 2_000, 20_000] {
        let mut body = endless(BUNDLE);
        body["timeout_ms"] = json!(ms + 100);
        let first = ms.to_string();
        let headers = [("x-llm-d-slo-ttft-ms", first.as_str())];
        let mut stream = server.client.try_stream(COMPLETIONS, &headers, &body).await.ok().unwrap();
        // Three steps may stand at the gate for those that are gone; then one brings the first token.
        gate.pass(4);
        let answered = stream.frame().await.get("error").is_none();
        if answered {
            let error = ends_in_error(&mut stream).await;
            assert_eq!(error["code"], "deadline_exceeded");
        }
        late += 1.0;
        if answered {
            break;
        }
    }
    assert_eq!(outcomes(&server, "deadline").await, late);
    drop(gate);
    assert_eq!(server.client.post(COMPLETIONS, &short()).await.status, 200);
}

#[tokio::test]
async fn a_deadline_that_has_passed_is_refused_at_the_door() {
    let server = Server::usual().await;
    for (header, stream) in [
        ("x-request-timeout-ms", false),
        ("x-request-timeout-ms", true),
        ("x-llm-d-slo-ttft-ms", true),
    ] {
        let mut body = short();
        body["stream"] = json!(stream);
        let late = server.client.post_with(COMPLETIONS, &[(header, "0.001")], &body).await;
        assert_eq!(late.error().0, 504, "{header}");
    }
    assert_eq!(outcomes(&server, "deadline").await, 3.0);
}

#[tokio::test]
async fn draining_cuts_no_stream_and_takes_no_work() {
    let (runner, gate) = repeater().gated();
    let mut server = Server::with(Setup::default(), runner).await;
    let mut streams = Vec::new();
    for task in TASKS {
        streams.push(server.client.stream(COMPLETIONS, &endless(task)).await);
    }
    gate.pass(3);
    for stream in &mut streams {
        stream.frame().await;
    }
    server.signals.send(()).await.unwrap();
    server.engine.watch().wait_for(|s| *s == State::Draining).await.unwrap();
    for path in ["/readyz", "/health"] {
        assert_eq!(server.client.get(path).await.error().0, 503);
    }
    for path in ["/livez", "/startupz", "/metrics"] {
        assert_eq!(server.client.get(path).await.status, 200, "{path}");
    }
    assert_eq!(server.client.get("/info").await.json()["state"], "draining");
    let refused = server.client.post(COMPLETIONS, &short()).await;
    assert_eq!(refused.error().0, 503);
    assert!(refused.header("retry-after").parse::<u32>().unwrap() >= 1);
    drop(gate);
    for stream in &mut streams {
        assert_eq!(stream.rest().await.len(), 99, "every token that was left");
    }
    let thread = server.thread.take().unwrap();
    let client = server.client;
    assert_eq!(server.ended().await, Ended::Drained);
    assert!(TcpStream::connect(client.0).await.is_err(), "nobody listens any more");
    thread.join().unwrap();
}

#[tokio::test]
async fn an_idle_server_drains_at_once() {
    let server = Server::usual().await;
    server.signals.send(()).await.unwrap();
    assert_eq!(server.ended().await, Ended::Drained);
}

#[tokio::test]
async fn a_signal_while_loading_waits_for_no_model() {
    let (finish, wait) = std::sync::mpsc::channel::<()>();
    let server = Server::loading(Setup::default(), move || {
        wait.recv()?;
        Ok(repeater())
    })
    .await;
    server.signals.send(()).await.unwrap();
    assert_eq!(server.ended().await, Ended::Drained);
    drop(finish);
}

#[tokio::test]
async fn half_a_request_does_not_hold_up_the_end() {
    let limits = Limits {
        body_timeout: Duration::from_secs(3600),
        closing_grace: Duration::from_millis(20),
        ..Limits::default()
    };
    let server = Server::with(Setup { limits, ..Setup::default() }, repeater()).await;
    let mut sockets = Vec::new();
    for half in ["", "POST /v1/comp", "POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{"]
    {
        let mut socket = TcpStream::connect(server.client.0).await.unwrap();
        socket.write_all(half.as_bytes()).await.unwrap();
        sockets.push(socket);
    }
    // Whoever is answered was accepted after them.
    assert_eq!(server.client.get("/livez").await.status, 200);
    server.signals.send(()).await.unwrap();
    assert_eq!(server.ended().await, Ended::Drained);
}

#[tokio::test]
async fn draining_ends_in_time_and_at_once_when_asked_twice() {
    for (timeout, second, want) in [
        (Duration::from_millis(20), false, Ended::TimedOut),
        (Duration::MAX, true, Ended::Interrupted),
    ] {
        let (runner, _gate) = repeater().gated();
        let setup = Setup { shutdown_timeout: timeout, ..Setup::default() };
        let server = Server::with(setup, runner).await;
        let _stream = server.client.stream(COMPLETIONS, &endless(BUNDLE)).await;
        server.signals.send(()).await.unwrap();
        if second {
            server.signals.send(()).await.unwrap();
        }
        assert_eq!(server.ended().await, want);
    }
}

#[tokio::test]
async fn a_failed_step_takes_only_its_own_requests() {
    for runner in [repeater().failing_at([0, 3]), repeater().panicking_at([0, 3])] {
        let server = Server::with(Setup::default(), runner).await;
        let failed = server.client.post(COMPLETIONS, &short()).await;
        let (status, kind, _, _) = failed.error();
        assert_eq!((status, kind.as_str()), (500, "server_error"));
        assert!(!String::from_utf8_lossy(&failed.body).contains("made to"), "the cause is hidden");
        let mut stream = server.client.stream(COMPLETIONS, &endless(BUNDLE)).await;
        let error = ends_in_error(&mut stream).await;
        assert_eq!((&error["type"], &error["param"]), (&json!("server_error"), &Value::Null));
        let reply = server.client.post(COMPLETIONS, &short()).await.json();
        assert_eq!(reply["choices"][0]["text"], "ab", "the server goes on");
        assert_eq!(outcomes(&server, "internal").await, 2.0);
        assert_eq!(server.metric("shoal_step_failures_total").await, 2.0);
        server.until("shoal_kv_cache_usage_ratio", 0.0).await;
    }
}

#[tokio::test]
async fn three_failed_steps_in_a_row_end_the_server() {
    let server = Server::with(Setup::default(), repeater().failing_at([1, 2, 3])).await;
    let mut stream = server.client.stream(COMPLETIONS, &endless(BUNDLE)).await;
    ends_in_error(&mut stream).await;
    for _ in 0..2 {
        assert_eq!(server.client.post(COMPLETIONS, &short()).await.error().0, 500);
    }
    server.engine.watch().wait_for(|s| *s == State::Failed).await.unwrap();
    for path in ["/readyz", "/livez"] {
        assert_eq!(server.client.get(path).await.error().0, 503, "{path}");
    }
    assert_eq!(server.client.post(COMPLETIONS, &short()).await.error().0, 503);
    assert_eq!(server.ended().await, Ended::Failed);
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive() {
    let (runner, gate) = repeater().gated();
    let limits = Limits { keep_alive: Duration::from_millis(5), ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }, runner).await;
    let mut stream = server.client.stream(COMPLETIONS, &endless(BUNDLE)).await;
    for _ in 0..2 {
        assert!(stream.raw().await.unwrap().starts_with(':'));
    }
    drop(gate);
    assert_eq!(texts(&stream.rest().await), ["ab".repeat(100)]);
}

#[tokio::test]
async fn a_crowd_is_served_in_batches() {
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup::default(), runner).await;
    let mut streams = Vec::new();
    for i in 0..64 {
        let word = format!("w{i} ");
        let body = json!({"input": format!("~{word}"), "max_tokens": 24, "stream": true});
        let path = format!("/v1/tasks/{}/generate", TASKS[i % 3]);
        streams.push((word, server.client.stream(&path, &body).await));
    }
    drop(gate);
    for (word, stream) in &mut streams {
        let text = texts(&stream.rest().await).remove(0);
        assert!(word.repeat(24).starts_with(&text), "{text:?}");
    }
    let steps = server.metric("shoal_batch_size_count").await;
    assert!(steps <= 30.0, "64 texts of 24 tokens took {steps} steps");
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_up_nobody() {
    let server = Server::usual().await;
    let mut body = endless(BUNDLE);
    body["max_tokens"] = json!(CONTEXT - 10);
    let _unread = server.client.stream(COMPLETIONS, &body).await;
    let mut read = server.client.stream(COMPLETIONS, &body).await;
    assert_eq!(read.rest().await.len(), CONTEXT - 10);
}

#[tokio::test]
async fn a_reader_that_never_reads_is_given_up() {
    let context = 1 << 19;
    let capacity = Capacity { blocks: context / 16, block_size: 16, context, vocab: 572 };
    let (runner, gate) = FakeRunner::new(capacity).gated();
    let limits = Limits { write_timeout: Duration::from_millis(50), ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }, runner).await;
    // More echoes than the sockets' buffers take.
    let prompt = "fox ".repeat(100_000);
    let body = json!({"model": BUNDLE, "prompt": prompt, "n": 16, "echo": true, "stream": true});
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut socket = socket.connect(server.client.0).await.unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    until_outcomes(&server, "cancelled", 1.0).await;
    drop(gate);
}
