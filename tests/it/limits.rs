//! What a client may cost: heads, time, prompts, requests at once. Each limit over real sockets, read
//! until the server closes.

use crate::harness::{BUNDLE, COMPLETIONS, Server, Setup, called, message, repeater};
use serde_json::{Value, json};
use shoal::api::{Caps, Limits};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Code;

const SOON: Duration = Duration::from_millis(20);
/// When what should have happened long ago never will.
const HANGS: Duration = Duration::from_secs(60);
const NEVER: Duration = Duration::from_secs(3600);
const GET: &str = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";

async fn limited(limits: Limits) -> Server {
    Server::with(Setup { limits, ..Setup::default() }, repeater()).await
}

async fn capped(caps: Caps) -> Server {
    Server::with(Setup { caps, ..Setup::default() }, repeater()).await
}

/// All that the server says to `bytes` until it closes.
async fn said(server: &Server, bytes: &str) -> String {
    let mut socket = TcpStream::connect(server.client.0).await.unwrap();
    socket.write_all(bytes.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let closed = timeout(HANGS, socket.read_to_string(&mut answer)).await;
    closed.expect("the server closes").unwrap();
    answer
}

#[tokio::test]
async fn heads_have_a_size_and_a_number_of_headers() {
    let limits = Limits { max_header_bytes: 1024, max_headers: 8, ..Limits::default() };
    let server = limited(limits).await;
    let get =
        |more: &str| format!("GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n");
    let long = |bytes: usize| get(&format!("a: {}\r\n", "x".repeat(bytes)));
    let rest = 1024 - long(0).len();
    for (head, status) in [
        (get(&"a: b\r\n".repeat(6)), "200"),
        (get(&"a: b\r\n".repeat(7)), "431"),
        (long(rest), "200"),
        (long(rest + 1), "431"),
    ] {
        let answer = said(&server, &head).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
}

#[tokio::test]
async fn a_head_that_comes_slowly_is_given_up() {
    let limits = Limits { body_timeout: SOON, idle_timeout: NEVER, ..Limits::default() };
    let server = limited(limits).await;
    assert_eq!(said(&server, "GET /livez HTTP/1.1\r\nhost:").await, "");
    // The same of a later request on a connection that may stay.
    let mut socket = TcpStream::connect(server.client.0).await.unwrap();
    socket.write_all(GET.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        socket.read_buf(&mut answer).await.unwrap();
    }
    socket.write_all(b"GET /li").await.unwrap();
    assert_eq!(timeout(HANGS, socket.read(&mut [0])).await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed() {
    let limits = Limits { body_timeout: NEVER, idle_timeout: SOON, ..Limits::default() };
    let server = limited(limits).await;
    assert_eq!(said(&server, "").await, "");
    // One, two, and one with half of another behind it.
    for (bytes, answers) in [(GET.into(), 1), (GET.repeat(2), 2), (format!("{GET}GET /li"), 1)] {
        let answer = said(&server, &bytes).await;
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), answers, "{answer}");
    }
}

#[tokio::test]
async fn an_answer_that_takes_long_is_not_idle() {
    let (runner, gate) = repeater().gated();
    let limits = Limits {
        body_timeout: NEVER,
        idle_timeout: 5 * SOON,
        keep_alive: SOON,
        ..Limits::default()
    };
    let server = Server::with(Setup { limits, ..Setup::default() }, runner).await;
    let body = json!({"model": BUNDLE, "prompt": "ab|", "stream": true});
    let mut stream = server.client.stream(COMPLETIONS, &body).await;
    for _ in 0..8 {
        assert!(stream.raw().await.unwrap().starts_with(':'));
    }
    drop(gate);
    assert!(!stream.rest().await.is_empty());
}

#[tokio::test]
async fn bodies_that_are_being_read_have_a_size_together() {
    let room = 1000;
    let limits = Limits {
        max_body_bytes: room,
        max_reading_bytes: room,
        body_timeout: NEVER,
        ..Limits::default()
    };
    let server = limited(limits).await;
    let long = "z".repeat(room / 2);
    let body = json!({"model": BUNDLE, "prompt": "a|", "stop": [long]});
    let until = async |status: u16| loop {
        let reply = server.client.post(COMPLETIONS, &body).await;
        if reply.status == status {
            return reply;
        }
    };
    let whole = timeout(Duration::from_secs(30), async {
        let mut slow = TcpStream::connect(server.client.0).await.unwrap();
        let head =
            format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {room}\r\n\r\n");
        slow.write_all(format!("{head}{long}").as_bytes()).await.unwrap();
        let reply = until(429).await;
        assert_eq!(reply.error().3.as_deref(), Some("overloaded"));
        let asked = called(message("image", &json!({"input": "a", "stop": [long]})), &[]);
        let refused = server.rpc().await.shoal.generate_once(asked).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        drop(slow);
        until(200).await;
    });
    whole.await.unwrap();
}

#[tokio::test]
async fn prompts_have_a_length_whatever_the_context() {
    let server = capped(Caps { input_tokens: Some(6), ..Caps::default() }).await;
    let ask = async |prompt: Value| {
        let body = json!({"model": BUNDLE, "prompt": prompt, "max_tokens": 1});
        server.client.post(COMPLETIONS, &body).await
    };
    assert_eq!(ask(json!([1, 2, 3, 4, 5, 6])).await.status, 200);
    let long = "x".repeat(1 << 15);
    for prompt in [json!([1, 2, 3, 4, 5, 6, 7]), json!("one two three four five"), json!(long)] {
        let reply = ask(prompt).await;
        let (status, _, param, code) = reply.error();
        assert_eq!((status, param.as_deref()), (400, Some("prompt")));
        assert_eq!(code.as_deref(), Some("context_length_exceeded"));
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(" 6"), "{message}");
    }
    // The template counts: two tokens stand around the input.
    let native = "/v1/tasks/image/generate";
    for (input, status) in [("abcd", 200), ("one two three four five", 400)] {
        let reply = server.client.post(native, &json!({"input": input, "max_tokens": 1})).await;
        assert_eq!(reply.status, status);
    }
    assert_eq!(server.client.get("/info").await.json()["limits"]["max_input_tokens"], 6);
}

#[tokio::test]
async fn requests_beyond_the_limit_are_told_to_come_back() {
    let (runner, gate) = repeater().gated();
    let caps = Caps { requests: Some(2), ..Caps::default() };
    let server = Server::with(Setup { caps, ..Setup::default() }, runner).await;
    let endless = json!({"model": BUNDLE, "prompt": "~ab|", "max_tokens": 50, "stream": true});
    let mut first = server.client.stream(COMPLETIONS, &endless).await;
    let second = server.client.stream(COMPLETIONS, &endless).await;
    for (path, body) in [
        (COMPLETIONS, endless.clone()),
        ("/v1/tasks/image/generate", json!({"input": "ab", "max_tokens": 1})),
    ] {
        let reply = server.client.post(path, &body).await;
        let (status, kind, _, code) = reply.error();
        assert_eq!((status, kind.as_str()), (429, "rate_limit_error"), "{path}");
        assert_eq!((code.as_deref(), reply.header("retry-after")), (Some("overloaded"), "1"));
    }
    drop(second);
    let cancelled = format!("shoal_requests_total{{outcome=\"cancelled\",task=\"{BUNDLE}\"}}");
    server.until(&cancelled, 1.0).await;
    let mut third = server.client.stream(COMPLETIONS, &endless).await;
    drop(gate);
    for stream in [&mut first, &mut third] {
        stream.rest().await;
    }
    let refused = "shoal_requests_total{outcome=\"overloaded\",task=\"image\"}";
    assert_eq!(server.metric(refused).await, 1.0);
}
