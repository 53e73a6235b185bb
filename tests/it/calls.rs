//! What gRPC alone has: a call's deadline and its end, limits of HTTP/2, health, reflection.

use crate::harness::{Server, Setup, called, message, repeater};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use serde_json::{Value, json};
use shoal::api::grpc::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use shoal::api::{Ended, Limits};
use shoal::engine::State;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus::{NotServing, ServiceUnknown, Serving};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

/// The version of reflection that came before.
mod alpha {
    pub use tonic_reflection::pb::v1alpha::ServerReflectionRequest as Request;
    pub use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient as Client;
    pub use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest as Asked;
    pub use tonic_reflection::pb::v1alpha::server_reflection_response::MessageResponse as Said;
}

/// A request that goes on until it is full.
fn endless() -> Value {
    json!({"input": "~ab", "max_tokens": 100})
}

const ONCE: &str = "/shoal.v1.Shoal/GenerateOnce";
const MANY: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

fn short() -> Value {
    json!({"input": "ab"})
}

/// Calls a method with these bytes as its body: the status, by headers or trailers.
async fn raw(server: &Server, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Status {
    let socket = TcpStream::connect(server.grpc_address).await.unwrap();
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await.unwrap();
    tokio::spawn(connection);
    let mut request = hyper::Request::post(format!("http://shoal{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("x-request-id", "mine");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::copy_from_slice(body))).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["x-request-id"], "mine");
    let headers = response.headers().clone();
    let trailers = response.into_body().collect().await.unwrap().trailers().cloned();
    let status = Status::from_header_map(&headers);
    status.or_else(|| Status::from_header_map(&trailers?)).expect("a status")
}

/// Requests that ended so, over all tasks and none.
async fn outcomes(server: &Server, outcome: &str) -> f64 {
    let text = String::from_utf8(server.client.get("/metrics").await.body).unwrap();
    let series = format!("shoal_requests_total{{outcome=\"{outcome}\"");
    let counts = text.lines().filter(|line| line.starts_with(&series));
    counts.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

#[tokio::test]
async fn a_call_that_is_dropped_frees_its_row_within_a_step() {
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup::default(), runner).await;
    let mut rpc = server.rpc().await.shoal;
    let mut stream = rpc.generate(message("image", &endless())).await.unwrap().into_inner();
    let mut other = rpc.clone();
    let once = tokio::spawn(async move { other.generate_once(message("music", &endless())).await });
    let mut stays = rpc.generate(message("video", &endless())).await.unwrap().into_inner();
    server.until("shoal_requests_waiting", 0.0).await;
    gate.pass(3);
    stream.message().await.unwrap();
    stays.message().await.unwrap();
    server.until("shoal_requests_running", 3.0).await;
    drop(stream);
    once.abort();
    while outcomes(&server, "cancelled").await != 2.0 {
        tokio::task::yield_now().await;
    }
    // One step may stand at the gate with the rows of those that are gone; the next is without them.
    gate.pass(1);
    server.until("shoal_requests_running", 1.0).await;
    drop(gate);
    while let Some(message) = stays.message().await.unwrap() {
        assert!(message.choices[0].index == 0);
    }
    server.until("shoal_requests_running", 0.0).await;
}

#[tokio::test]
async fn the_deadline_of_a_client_library_counts() {
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup::default(), runner).await;
    let asked = message("image", &short()).encode_to_vec();
    let asked = [&[0], &(asked.len() as u32).to_be_bytes()[..], &asked].concat();
    for (given, code, param) in [
        ("0n", Code::DeadlineExceeded, None),
        ("1n", Code::DeadlineExceeded, None),
        ("20m", Code::DeadlineExceeded, None),
        ("soon", Code::InvalidArgument, Some("grpc-timeout")),
    ] {
        // As raw bytes: tonic's client would end the call itself.
        let headers = [("grpc-timeout", given), ("x-request-timeout-ms", "60000")];
        for method in ["Generate", "GenerateOnce"] {
            let path = format!("/shoal.v1.Shoal/{method}");
            let late = raw(&server, &path, &headers, &asked).await;
            assert_eq!(late.code(), code, "{given}: {late}");
            let said = late.metadata().get("shoal-param").map(|v| v.to_str().unwrap());
            assert_eq!(said, param);
        }
    }
    assert_eq!(outcomes(&server, "deadline").await, 6.0);
    assert_eq!(outcomes(&server, "invalid").await, 2.0);
    drop(gate);
    let good = raw(&server, ONCE, &[("grpc-timeout", "1H")], &asked).await;
    assert_eq!(good.code(), Code::Ok, "{good}");
}

#[tokio::test]
async fn what_is_no_message_is_refused_in_our_words() {
    let limits = Limits { max_body_bytes: 1000, ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }, repeater()).await;
    let large = [&[0, 0, 0, 8, 0][..], &[b' '; 2048]].concat();
    for (path, body, code, said) in [
        (ONCE, &large[..], Code::OutOfRange, "more than 1000 bytes"),
        (ONCE, &[0, 0, 0, 0, 2, 0xff, 0xff], Code::InvalidArgument, "cannot be read"),
        (ONCE, &[0, 0, 0, 0, 9, 1], Code::InvalidArgument, "cannot be read"),
        (ONCE, &[1, 0, 0, 0, 0], Code::InvalidArgument, "cannot be read"),
        (ONCE, &[], Code::InvalidArgument, "cannot be read"),
        (MANY, &[0, 0, 0, 0, 2, 0xff, 0xff], Code::InvalidArgument, "cannot be read"),
        (MANY, &[0, 0, 0, 8, 0], Code::OutOfRange, "cannot be read"),
        ("/shoal.v1.Shoal/Nothing", &[], Code::Unimplemented, "no such service or method"),
        ("/none", &[], Code::Unimplemented, "no such service or method"),
    ] {
        let status = raw(&server, path, &[], body).await;
        assert_eq!(status.code(), code, "{path}: {status}");
        assert!(status.message().contains(said), "{status}");
    }
    assert_eq!(outcomes(&server, "too_large").await, 2.0);
    assert_eq!(outcomes(&server, "invalid").await, 5.0);
}

#[tokio::test]
async fn replies_say_who_they_are_and_where_the_time_went() {
    let server = Server::usual().await;
    let call = called(message("image", &short()), &[("x-request-id", "abc")]);
    let reply = server.rpc().await.shoal.generate_once(call).await.unwrap();
    assert_eq!(reply.metadata().get("x-request-id").unwrap(), "abc");
    let timing = reply.metadata().get("server-timing").unwrap().to_str().unwrap();
    assert!(timing.contains("prefill;dur="), "{timing}");
    let reply = reply.into_inner();
    assert_eq!((reply.id.as_str(), reply.task.as_str()), ("gen-abc", "image"));
    assert!(reply.created > 0);
}

#[tokio::test]
async fn draining_cuts_no_stream_and_takes_no_call() {
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup::default(), runner).await;
    let mut rpc = server.rpc().await.shoal;
    let mut stream = rpc.generate(message("image", &endless())).await.unwrap().into_inner();
    gate.pass(1);
    stream.message().await.unwrap();
    server.signals.send(()).await.unwrap();
    server.engine.watch().wait_for(|s| *s == State::Draining).await.unwrap();
    let refused = rpc.generate_once(message("image", &short())).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.metadata().contains_key("retry-after"));
    drop(gate);
    let mut left = 0;
    while stream.message().await.unwrap().is_some() {
        left += 1;
    }
    assert_eq!(left, 99, "every token that was left");
    let address = server.grpc_address;
    assert_eq!(server.ended().await, Ended::Drained);
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn a_call_that_waits_for_messages_does_not_hold_up_the_end() {
    let limits = Limits { closing_grace: Duration::from_secs(3600), ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }, repeater()).await;
    let channel = server.rpc().await.channel;
    let mut reflection = ServerReflectionClient::new(channel.clone());
    let asked = reflection.server_reflection_info(futures::stream::pending()).await;
    let mut reflected = asked.unwrap().into_inner();
    let mut inference = GrpcInferenceServiceClient::new(channel);
    let asked = inference.model_stream_infer(futures::stream::pending()).await;
    let mut inferred = asked.unwrap().into_inner();
    server.signals.send(()).await.unwrap();
    assert_eq!(reflected.message().await.unwrap(), None);
    assert_eq!(inferred.message().await.unwrap(), None);
    assert_eq!(server.ended().await, Ended::Drained);
}

#[tokio::test]
async fn both_ports_share_the_limit_of_connections() {
    let limits = Limits { max_connections: 1, ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }, repeater()).await;
    let mut holder = TcpStream::connect(server.client.0).await.unwrap();
    holder.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(holder.read(&mut [0; 64]).await.unwrap() > 0, "it has the one place");
    let full = server.rpc().await.shoal.generate_once(message("image", &short())).await;
    let full = full.unwrap_err();
    assert_eq!((full.code(), full.message()), (Code::Unavailable, "too many connections"));
    assert!(full.metadata().contains_key("retry-after"));
    assert_eq!(server.client.get("/v1/models").await.status, 503);
}

#[tokio::test]
async fn who_does_not_begin_is_given_up() {
    let limits = Limits { body_timeout: Duration::from_millis(20), ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }, repeater()).await;
    for begun in ["", "PRI * HT"] {
        let mut socket = TcpStream::connect(server.grpc_address).await.unwrap();
        socket.write_all(begun.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        // The server's settings may come first; then the connection ends, by an end or a reset.
        let _ = socket.read_to_end(&mut rest).await;
    }
}

#[tokio::test]
async fn reflection_knows_all_services() {
    let server = Server::usual().await;
    let channel = server.rpc().await.channel;
    let ask =
        |request| ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let services = |names: Vec<String>| {
        for name in ["shoal.v1.Shoal", "grpc.health.v1.Health"] {
            assert!(names.iter().any(|n| n == name), "{name} in {names:?}");
        }
    };
    let mut client = ServerReflectionClient::new(channel.clone());
    let asked = [
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol("shoal.v1.GenerateRequest".into())),
        ask(MessageRequest::FileByFilename("google/protobuf/struct.proto".into())),
    ];
    let replies = client.server_reflection_info(futures::stream::iter(asked)).await.unwrap();
    let mut replies = replies.into_inner();
    let mut next = async || replies.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = next().await else { panic!("no list") };
    services(list.service.into_iter().map(|service| service.name).collect());
    for _ in 0..2 {
        let reply = next().await;
        assert!(matches!(reply, MessageResponse::FileDescriptorResponse(_)), "{reply:?}");
    }
    // Older clients, Python's among them, speak this version alone.
    let mut client = alpha::Client::new(channel);
    let request = alpha::Request {
        host: String::new(),
        message_request: Some(alpha::Asked::ListServices(String::new())),
    };
    let replies = client.server_reflection_info(futures::stream::iter([request])).await.unwrap();
    let reply = replies.into_inner().message().await.unwrap().unwrap().message_response;
    let Some(alpha::Said::ListServicesResponse(list)) = reply else { panic!("{reply:?}") };
    services(list.service.into_iter().map(|service| service.name).collect());
}

#[tokio::test]
async fn health_follows_the_engine() {
    let (finish, wait) = std::sync::mpsc::channel::<()>();
    let server = Server::loading(Setup::default(), move || {
        wait.recv()?;
        Ok(repeater())
    })
    .await;
    let mut health = server.rpc().await.health;
    let asked = |service: &str| HealthCheckRequest { service: service.into() };
    let mut watched = Vec::new();
    for service in ["", "shoal.v1.Shoal"] {
        let mut changes = health.watch(asked(service)).await.unwrap().into_inner();
        assert_eq!(changes.message().await.unwrap().unwrap().status(), NotServing);
        let now = health.check(asked(service)).await.unwrap().into_inner();
        assert_eq!(now.status(), NotServing, "{service}");
        watched.push(changes);
    }
    let unknown = health.check(asked("shoal.v1.None")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    let mut never = health.watch(asked("none")).await.unwrap().into_inner();
    assert_eq!(never.message().await.unwrap().unwrap().status(), ServiceUnknown);
    finish.send(()).unwrap();
    for changes in &mut watched {
        assert_eq!(changes.message().await.unwrap().unwrap().status(), Serving);
    }
    assert_eq!(health.check(asked("")).await.unwrap().into_inner().status(), Serving);
    server.signals.send(()).await.unwrap();
    for changes in &mut watched {
        assert_eq!(changes.message().await.unwrap().unwrap().status(), NotServing);
        assert_eq!(changes.message().await.unwrap(), None, "a watch does not hold up the end");
    }
    assert_eq!(never.message().await.unwrap(), None);
    assert_eq!(server.ended().await, Ended::Drained);
}
