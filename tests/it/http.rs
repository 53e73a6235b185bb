//! What holds for every route: one shape of errors, ids, routes and methods, the lists.

use crate::harness::{BUNDLE, Server, Setup, repeater};
use hyper::Method;
use serde_json::{Value, json};
use shoal::api::Limits;
use std::time::Duration;

const JSON: (&str, &str) = ("content-type", "application/json");

/// Fields of a body for `/v1/completions`, and what they are refused with: status and param.
fn refusals() -> Vec<(Value, u16, Option<&'static str>)> {
    vec![
        (json!({"model": null}), 400, Some("model")),
        (json!({"prompt": null}), 400, Some("prompt")),
        (json!({"prompt": {}}), 400, Some("prompt")),
        (json!({"model": "nobody"}), 404, Some("model")),
        (json!({"temperature": 2.5}), 400, Some("temperature")),
        (json!({"temperature": "hot"}), 400, Some("temperature")),
        (json!({"top_p": 0}), 400, Some("top_p")),
        (json!({"top_k": -2}), 400, Some("top_k")),
        (json!({"min_p": 1.5}), 400, Some("min_p")),
        (json!({"repetition_penalty": 0}), 400, Some("repetition_penalty")),
        (json!({"presence_penalty": 3}), 400, Some("presence_penalty")),
        (json!({"frequency_penalty": -3}), 400, Some("frequency_penalty")),
        (json!({"n": 0}), 400, Some("n")),
        (json!({"n": 17}), 400, Some("n")),
        (json!({"logprobs": 21}), 400, Some("logprobs")),
        (json!({"max_tokens": -1}), 400, Some("max_tokens")),
        (json!({"max_tokens": 0}), 400, Some("max_tokens")),
        (json!({"max_tokens": 1.5}), 400, Some("max_tokens")),
        (json!({"min_tokens": 30}), 400, Some("min_tokens")),
        (json!({"seed": "x"}), 400, Some("seed")),
        (json!({"stop": ""}), 400, Some("stop")),
        (json!({"logit_bias": {"x": 1}}), 400, Some("logit_bias")),
        (json!({"logit_bias": {"5": 101}}), 400, Some("logit_bias")),
        (json!({"logit_bias": {"9999": 1}}), 400, Some("logit_bias")),
        (json!({"best_of": 3}), 400, Some("best_of")),
        (json!({"suffix": "x"}), 400, Some("suffix")),
        (json!({"timeout_ms": -1}), 400, Some("timeout_ms")),
        (json!({"beam_width": 3}), 400, Some("beam_width")),
        (json!({"controls": {"words": 20}}), 400, Some("controls.words")),
        (json!({"model": "image", "controls": {"words": 2}}), 400, Some("controls.words")),
        (json!({"model": "image", "controls": {"words": 61}}), 400, Some("controls.words")),
        (json!({"model": "image", "controls": {"words": "9"}}), 400, Some("controls.words")),
        (json!({"model": "image", "controls": {"tone": 1}}), 400, Some("controls.tone")),
        (json!({"model": "image", "controls": [1]}), 400, Some("controls")),
    ]
}

#[tokio::test]
async fn refusals_name_the_field_whether_streamed_or_not() {
    let server = Server::usual().await;
    for (fields, status, param) in refusals() {
        for stream in [false, true] {
            let mut body = json!({"model": BUNDLE, "prompt": "a|", "max_tokens": 9});
            body["stream"] = json!(stream);
            body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let reply = server.client.post("/v1/completions", &body).await;
            let (got, kind, got_param, code) = reply.error();
            assert_eq!((got, got_param.as_deref()), (status, param), "{fields}");
            match status {
                404 => assert_eq!(code.as_deref(), Some("model_not_found")),
                _ => assert_eq!(kind, "invalid_request_error"),
            }
        }
    }
}

#[tokio::test]
async fn stream_options_belong_to_streams() {
    let server = Server::usual().await;
    for (stream, options, param) in [
        (false, json!({"include_usage": true}), "stream_options"),
        (true, json!({"include_usage": 1}), "stream_options.include_usage"),
        (true, json!({"obfuscate": true}), "stream_options.obfuscate"),
    ] {
        let body = json!({"model": BUNDLE, "prompt": "a|", "stream": stream,
            "stream_options": options});
        let reply = server.client.post("/v1/completions", &body).await;
        assert_eq!(reply.error().2.as_deref(), Some(param));
    }
}

#[tokio::test]
async fn bodies_that_cannot_be_read() {
    let limits = Limits { max_body_bytes: 1000, ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }, repeater()).await;
    let long = json!({"model": BUNDLE, "prompt": "x".repeat(5_000_000)}).to_string();
    let good = json!({"model": BUNDLE, "prompt": "x|", "max_tokens": 1}).to_string();
    let cases = [
        (JSON, String::new(), 400),
        (JSON, "{".into(), 400),
        (JSON, "[]".into(), 400),
        (JSON, long.clone(), 413),
        (("content-type", "text/plain"), long, 413),
        (("content-type", "text/plain"), good.clone(), 415),
        (("accept", "*/*"), good.clone(), 415),
        (("content-type", "application/x-www-form-urlencoded"), good.clone(), 415),
    ];
    for path in ["/v1/completions", "/v1/tasks/image/generate"] {
        for (header, body, status) in &cases {
            let reply = server.client.call(Method::POST, path, &[*header], body.clone()).await;
            assert_eq!(reply.error().0, *status, "{body}");
        }
    }
    let utf8 = [("content-type", "application/json; charset=utf-8")];
    let reply = server.client.call(Method::POST, "/v1/completions", &utf8, good).await;
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn a_body_that_does_not_come_times_out() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let limits = Limits { body_timeout: Duration::from_millis(20), ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }, repeater()).await;
    let mut socket = tokio::net::TcpStream::connect(server.client.0).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                content-length: 100\r\n\r\n{";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains(r#""code":"request_timeout""#), "{answer}");
}

#[tokio::test]
async fn wrong_routes_and_methods_have_the_same_shape() {
    let server = Server::usual().await;
    for (method, path, status) in [
        (Method::GET, "/nowhere", 404),
        (Method::POST, "/v1/nowhere", 404),
        (Method::GET, "/v1/completions", 405),
        (Method::DELETE, "/v1/models", 405),
        (Method::GET, "/v1/tasks/image/generate", 405),
        (Method::GET, "/v1/models/nobody", 404),
        (Method::GET, "/v1/models/%ff", 400),
    ] {
        let reply = server.client.call(method.clone(), path, &[], "").await;
        assert_eq!(reply.error().0, status, "{method} {path}");
        assert!(!reply.header("x-request-id").is_empty());
        assert_eq!(reply.header("content-type"), "application/json");
        if status == 405 {
            assert!(!reply.header("allow").is_empty(), "{path}");
        }
    }
    let body = json!({"input": "x"});
    let reply = server.client.post("/v1/tasks/nothing/generate", &body).await;
    assert_eq!(reply.error().0, 404);
}

#[tokio::test]
async fn what_is_wrong_with_a_head_is_said_after_its_body() {
    let server = Server::usual().await;
    let body = " ".repeat(2_000_000);
    for (headers, status) in [
        (vec![("content-type", "text/plain")], 415),
        (vec![JSON, ("x-request-timeout-ms", "soon")], 400),
    ] {
        let path = "/v1/completions";
        let reply = server.client.call(Method::POST, path, &headers, body.clone()).await;
        assert_eq!(reply.error().0, status);
    }
}

#[tokio::test]
async fn one_connection_takes_many_requests() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Server::usual().await;
    let mut socket = tokio::net::TcpStream::connect(server.client.0).await.unwrap();
    let body = json!({"input": "ab", "max_tokens": 1}).to_string();
    let post = format!(
        "POST /v1/tasks/image/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let get = "GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    socket.write_all(format!("{post}{post}{get}").as_bytes()).await.unwrap();
    let mut answers = String::new();
    socket.read_to_string(&mut answers).await.unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 3, "{answers}");
    assert_eq!(answers.matches(r#""completion_tokens":1"#).count(), 2, "{answers}");
}

#[tokio::test]
async fn head_is_get_without_a_body_and_options_is_no_method() {
    let server = Server::usual().await;
    for path in ["/livez", "/v1/models", "/metrics"] {
        let reply = server.client.call(Method::HEAD, path, &[], "").await;
        assert_eq!((reply.status, reply.body.len()), (200, 0), "{path}");
    }
    for (path, allow) in [("/v1/completions", "POST"), ("/v1/models", "GET,HEAD")] {
        let reply = server.client.call(Method::OPTIONS, path, &[], "").await;
        assert_eq!((reply.error().0, reply.header("allow")), (405, allow), "{path}");
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_are_told_so() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let limits = Limits { max_connections: 1, ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }, repeater()).await;
    let mut held = tokio::net::TcpStream::connect(server.client.0).await.unwrap();
    let refused = server.client.post("/v1/completions", &json!({})).await;
    assert_eq!(refused.error().3.as_deref(), Some("unavailable"));
    assert_eq!((refused.header("retry-after"), refused.header("connection")), ("1", "close"));
    assert_eq!(server.client.get("/livez").await.status, 200);
    let get = "GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    held.write_all(get.as_bytes()).await.unwrap();
    let mut answer = String::new();
    held.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn ids_go_in_and_out() {
    let server = Server::usual().await;
    for fit in ["a", "0f1c-77:x/y.z_w", &"x".repeat(128)] {
        let reply = server.client.call(Method::GET, "/livez", &[("x-request-id", fit)], "").await;
        assert_eq!(reply.header("x-request-id"), fit);
    }
    let mut made = Vec::new();
    for unfit in ["", "a b", "a\"b", &"x".repeat(129)] {
        let reply = server.client.call(Method::GET, "/livez", &[("x-request-id", unfit)], "").await;
        let id = reply.header("x-request-id").to_string();
        assert_eq!(id.len(), 32, "a new one replaces {unfit:?}");
        assert!(!made.contains(&id));
        made.push(id);
    }
}

#[tokio::test]
async fn time_limits_in_headers_are_checked() {
    let server = Server::usual().await;
    let body = json!({"model": BUNDLE, "prompt": "a|"});
    for name in ["x-request-timeout-ms", "x-llm-d-slo-ttft-ms"] {
        for bad in ["soon", "0", "-5", "inf", "NaN"] {
            let reply = server.client.post_with("/v1/completions", &[(name, bad)], &body).await;
            assert_eq!(reply.error().2.as_deref(), Some(name), "{bad}");
        }
        let reply = server.client.post_with("/v1/completions", &[(name, "60000")], &body).await;
        assert_eq!(reply.status, 200);
    }
}

#[tokio::test]
async fn models_are_listed() {
    let server = Server::usual().await;
    let list = server.client.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let cards = list["data"].as_array().unwrap();
    let ids: Vec<&Value> = cards.iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, [BUNDLE, "image", "music", "video"]);
    for card in cards {
        let bundle = card["id"] == BUNDLE;
        assert_eq!((&card["object"], &card["owned_by"]), (&json!("model"), &json!("shoal")));
        assert!(card["created"].as_u64().unwrap() > 1_700_000_000);
        assert_eq!(card["root"], BUNDLE);
        assert_eq!(card["parent"], if bundle { Value::Null } else { json!(BUNDLE) });
        let path = format!("/v1/models/{}", card["id"].as_str().unwrap());
        assert_eq!(server.client.get(&path).await.json(), *card);
    }
}

#[tokio::test]
async fn tasks_are_listed_with_their_controls() {
    let server = Server::usual().await;
    let list = server.client.get("/v1/tasks").await.json();
    let words = json!({"type": "integer", "minimum": 3, "maximum": 60, "default": null});
    let entry = |id: &str| {
        json!({"id": id, "description": format!("Repeats an idea for {id}."), "adapter": null,
            "controls": {"words": words}})
    };
    let data = [entry("image"), entry("music"), entry("video")];
    assert_eq!(list, json!({"object": "list", "data": data}));
}

#[tokio::test]
async fn info_tells_limits_and_state() {
    let server = Server::usual().await;
    let info = server.client.get("/info").await.json();
    assert_eq!(info["model"], BUNDLE);
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(info["state"], "ready");
    assert_eq!(info["dtype"], "f32");
    assert_eq!(info["tasks"], json!(["image", "music", "video"]));
    assert_eq!(info["limits"]["context"], crate::harness::CONTEXT);
    assert_eq!(info["limits"]["max_body_bytes"], Limits::default().max_body_bytes);
    assert_eq!(info["limits"]["max_waiting"]["image"], 1024);
}
