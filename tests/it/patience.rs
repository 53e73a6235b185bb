//! Clients of gRPC that stand still: connections without a call, answers that nobody takes.

use crate::harness::{BUNDLE, Server, Setup, message, repeater};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use serde_json::json;
use shoal::api::Limits;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// Long enough for a call to be sent on a new connection.
const SOON: Duration = Duration::from_millis(200);

/// A connection of HTTP/2 whose streams have so much room for answers, and its end.
async fn connect(server: &Server, room: u32) -> (SendRequest<Full<Bytes>>, JoinHandle<()>) {
    let socket = TcpStream::connect(server.grpc_address).await.unwrap();
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.initial_stream_window_size(room);
    let (sender, connection) = builder.handshake(TokioIo::new(socket)).await.unwrap();
    (sender, tokio::spawn(async move { connection.await.unwrap_or(()) }))
}

/// Waits for a connection's end.
async fn closed(connection: JoinHandle<()>) {
    let end = tokio::time::timeout(Duration::from_secs(30), connection).await;
    end.expect("the server closes it").unwrap();
}

/// Asks for a text that goes on until it is full.
async fn generate(sender: &mut SendRequest<Full<Bytes>>) -> hyper::Response<Incoming> {
    let message = message(BUNDLE, &json!({"input": "~ab|", "max_tokens": 100})).encode_to_vec();
    let body = [&[0], &(message.len() as u32).to_be_bytes()[..], &message].concat();
    let request = hyper::Request::post("http://shoal/shoal.v1.Shoal/Generate")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(body)));
    sender.send_request(request.unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_connection_without_a_call_is_closed() {
    let limits = Limits { idle_timeout: SOON, ..Limits::default() };
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup { limits, ..Setup::default() }, runner).await;
    let (mut sender, working) = connect(&server, 1 << 16).await;
    let answer = generate(&mut sender).await;
    for _ in 0..2 {
        let (_sender, unused) = connect(&server, 1 << 16).await;
        closed(unused).await;
    }
    drop(gate);
    let answer = answer.into_body().collect().await.unwrap();
    assert_eq!(answer.trailers().unwrap()["grpc-status"], "0", "a call is not idle");
    closed(working).await;
}

#[tokio::test]
async fn an_answer_that_nobody_takes_is_given_up() {
    let limits = Limits { idle_timeout: SOON, write_timeout: SOON, ..Limits::default() };
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup { limits, ..Setup::default() }, runner).await;
    let (mut sender, connection) = connect(&server, 0).await;
    let _unread = generate(&mut sender).await;
    // A message to stand still with.
    gate.pass(1);
    let cancelled = format!("shoal_requests_total{{outcome=\"cancelled\",task=\"{BUNDLE}\"}}");
    server.until(&cancelled, 1.0).await;
    closed(connection).await;
    drop(gate);
    server.until("shoal_requests_running", 0.0).await;
}
