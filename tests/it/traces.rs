//! Traces, as a collector receives them.

use crate::harness::{Server, Setup, called, message, repeater};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::json;
use shoal::api::grpc::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use shoal::api::grpc::inference::model_infer_request::InferInputTensor;
use shoal::api::grpc::inference::{InferTensorContents, ModelInferRequest};
use shoal::telemetry::traces::Traces;
use std::convert::Infallible;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// A collector: everything that it is sent, in order, with the path that it was sent to.
async fn collector() -> (String, mpsc::UnboundedReceiver<(String, ExportTraceServiceRequest)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let sender = sender.clone();
            let take = move |request: Request<Incoming>| {
                let sender = sender.clone();
                async move {
                    let path = request.uri().path().to_owned();
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let _ = sender.send((path, ExportTraceServiceRequest::decode(body).unwrap()));
                    Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
                }
            };
            let connection = http1::Builder::new();
            tokio::spawn(connection.serve_connection(TokioIo::new(socket), service_fn(take)));
        }
    });
    (endpoint, receiver)
}

fn attribute(span: &Span, name: &str) -> Option<String> {
    let found = span.attributes.iter().find(|attribute| attribute.key == name)?;
    Some(match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    })
}

#[tokio::test]
async fn a_request_is_a_span_below_its_caller_with_its_phases_inside() {
    let (endpoint, mut received) = collector().await;
    let traces = Arc::new(Traces::start(&endpoint, "test-service").unwrap());
    let setup = Setup { traces: Some(traces.clone()), ..Setup::default() };
    let server = Server::with(setup, repeater()).await;
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let body = json!({"model": "image", "prompt": "a fox runs", "max_tokens": 3});
    let headers = [("traceparent", parent), ("x-request-id", "mine")];
    let reply = server.client.post_with("/v1/completions", &headers, &body).await;
    assert_eq!(reply.status, 200);
    assert_eq!(server.client.get("/v1/models/none").await.status, 404);
    assert_eq!(server.client.post("/v1/chat/completions", &json!({})).await.status, 400);

    let finishing = traces.clone();
    tokio::task::spawn_blocking(move || finishing.finish()).await.unwrap();
    let (path, sent) = received.recv().await.unwrap();
    assert_eq!(path, "/v1/traces");
    let resource = &sent.resource_spans[0];
    let service = &resource.resource.as_ref().unwrap().attributes;
    assert!(service.iter().any(|a| a.key == "service.name"), "{service:?}");
    let spans = &resource.scope_spans[0].spans;
    let named = |name: &str| spans.iter().find(|span| span.name == name).expect(name);

    let root = named("POST /v1/completions");
    assert_eq!(hex(&root.trace_id), "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(hex(&root.parent_span_id), "00f067aa0ba902b7");
    for (name, value) in [
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.request.model", "image"),
        ("gen_ai.usage.output_tokens", "3"),
        ("http.response.status_code", "200"),
        ("http.route", "/v1/completions"),
        ("shoal.request.id", "mine"),
    ] {
        assert_eq!(attribute(root, name).as_deref(), Some(value), "{name}");
    }
    let finishes = attribute(root, "gen_ai.response.finish_reasons").unwrap();
    assert!(finishes.contains("length"), "{finishes}");
    for phase in ["queue", "prefill", "decode"] {
        let span = named(phase);
        assert_eq!(span.parent_span_id, root.span_id, "{phase}");
        assert!(span.start_time_unix_nano >= root.start_time_unix_nano);
        assert!(span.end_time_unix_nano <= root.end_time_unix_nano);
    }
    let lost = named("GET /v1/models/{id}");
    assert!(lost.parent_span_id.is_empty(), "it has no caller");
    assert_eq!(attribute(lost, "http.response.status_code").as_deref(), Some("404"));
    assert_eq!(attribute(lost, "gen_ai.request.model"), None);
    let refused = named("POST /v1/chat/completions");
    assert_eq!(attribute(refused, "error.type").as_deref(), Some("invalid"));
}

#[tokio::test]
async fn a_call_is_a_span_with_the_code_that_it_ended_with() {
    let (endpoint, mut received) = collector().await;
    let traces = Arc::new(Traces::start(&endpoint, "test-service").unwrap());
    let setup = Setup { traces: Some(traces.clone()), ..Setup::default() };
    let server = Server::with(setup, repeater()).await;
    let mut rpc = server.rpc().await.shoal;
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let call = called(message("image", &json!({"input": "a fox"})), &[("traceparent", parent)]);
    let mut stream = rpc.generate(call).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}
    rpc.generate_once(message("none", &json!({"input": "a fox"}))).await.unwrap_err();

    let finishing = traces.clone();
    tokio::task::spawn_blocking(move || finishing.finish()).await.unwrap();
    let (_, sent) = received.recv().await.unwrap();
    let spans = &sent.resource_spans[0].scope_spans[0].spans;
    let named = |name: &str| spans.iter().find(|span| span.name == name).expect(name);
    let good = named("POST /shoal.v1.Shoal/Generate");
    assert_eq!(hex(&good.trace_id), "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(attribute(good, "gen_ai.request.model").as_deref(), Some("image"));
    let bad = named("POST /shoal.v1.Shoal/GenerateOnce");
    for (span, code) in [(good, "0"), (bad, "5")] {
        assert_eq!(attribute(span, "rpc.grpc.status_code").as_deref(), Some(code));
        assert_eq!(attribute(span, "http.response.status_code").as_deref(), Some("200"));
    }
}

#[tokio::test]
async fn each_request_of_a_stream_is_a_span_of_its_own() {
    let (endpoint, mut received) = collector().await;
    let traces = Arc::new(Traces::start(&endpoint, "test-service").unwrap());
    let setup = Setup { traces: Some(traces.clone()), ..Setup::default() };
    let server = Server::with(setup, repeater()).await;
    let mut client = GrpcInferenceServiceClient::new(server.rpc().await.channel);
    let asked = |model: &str| ModelInferRequest {
        model_name: model.into(),
        inputs: vec![InferInputTensor {
            name: "text_input".into(),
            datatype: "BYTES".into(),
            shape: vec![1],
            contents: Some(InferTensorContents {
                bytes_contents: vec![b"a fox".to_vec()],
                ..Default::default()
            }),
            ..Default::default()
        }],
        ..Default::default()
    };
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let asked = futures::stream::iter([asked("image"), asked("none"), asked("music")]);
    let mut call = tonic::Request::new(asked);
    call.metadata_mut().insert("traceparent", parent.parse().unwrap());
    let mut stream = client.model_stream_infer(call).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}

    let finishing = traces.clone();
    tokio::task::spawn_blocking(move || finishing.finish()).await.unwrap();
    let (_, sent) = received.recv().await.unwrap();
    let spans = sent.resource_spans[0].scope_spans[0].spans.iter();
    let spans = spans.filter(|span| span.name.ends_with("/ModelStreamInfer"));
    let mut said: Vec<_> = spans
        .map(|span| {
            assert_eq!(hex(&span.parent_span_id), "00f067aa0ba902b7");
            let of = |name| attribute(span, name).unwrap_or_default();
            let (model, code) = (of("gen_ai.request.model"), of("rpc.grpc.status_code"));
            (model, code, of("gen_ai.usage.output_tokens"))
        })
        .collect();
    said.sort();
    let said: Vec<_> = said.iter().map(|(a, b, c)| [a.as_str(), b, c]).collect();
    let whole_call = ["", "0", ""];
    assert_eq!(said, [whole_call, ["", "5", ""], ["image", "0", "3"], ["music", "0", "3"]]);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
