//! KServe's Open Inference Protocol over gRPC, as Triton's clients speak it.

use crate::harness::{BUNDLE, Server, Setup, repeater};
use shoal::api::grpc::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use shoal::api::grpc::inference::infer_parameter::ParameterChoice;
use shoal::api::grpc::inference::model_infer_request::{
    InferInputTensor, InferRequestedOutputTensor,
};
use shoal::api::grpc::inference::*;
use std::collections::HashMap;
use tokio::sync::mpsc;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

async fn connect(server: &Server) -> GrpcInferenceServiceClient<Channel> {
    GrpcInferenceServiceClient::new(server.rpc().await.channel)
}

/// The elements of `BYTES`.
fn bytes(texts: &[&str]) -> Vec<u8> {
    let one = |text: &&str| [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    texts.iter().flat_map(one).collect()
}

/// A request with its prompts as bytes, as Triton's client sends it.
fn raw(id: &str, prompts: &[&str], parameters: &[(&str, ParameterChoice)]) -> ModelInferRequest {
    let parameter = |(name, value): &(&str, ParameterChoice)| {
        ((*name).to_owned(), InferParameter { parameter_choice: Some(value.clone()) })
    };
    ModelInferRequest {
        model_name: BUNDLE.into(),
        id: id.into(),
        parameters: parameters.iter().map(parameter).collect(),
        inputs: vec![InferInputTensor {
            name: "text_input".into(),
            datatype: "BYTES".into(),
            shape: vec![prompts.len() as i64],
            ..Default::default()
        }],
        raw_input_contents: vec![bytes(prompts)],
        ..Default::default()
    }
}

fn choice(parameters: &HashMap<String, InferParameter>, name: &str) -> ParameterChoice {
    parameters[name].parameter_choice.clone().unwrap()
}

/// The one text of a response, whose elements are bytes.
fn text(response: &ModelInferResponse) -> String {
    let bytes = &response.raw_output_contents[0];
    String::from_utf8(bytes[4..].to_vec()).unwrap()
}

/// An output to be named in a request.
fn asked(name: &str) -> InferRequestedOutputTensor {
    InferRequestedOutputTensor { name: name.into(), ..Default::default() }
}

/// All responses until the stream ends, which it must do well.
async fn rest(mut stream: Streaming<ModelStreamInferResponse>) -> Vec<ModelStreamInferResponse> {
    let mut all = Vec::new();
    while let Some(response) = stream.message().await.unwrap() {
        all.push(response);
    }
    all
}

#[tokio::test]
async fn the_server_and_its_models() {
    let server = Server::usual().await;
    let mut client = connect(&server).await;
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let about = client.server_metadata(ServerMetadataRequest {}).await.unwrap().into_inner();
    assert_eq!((about.name.as_str(), about.version.as_str()), ("shoal", env!("CARGO_PKG_VERSION")));
    for (name, version, want) in
        [(BUNDLE, "", true), ("image", "1", true), ("image", "2", false), ("nobody", "", false)]
    {
        let (name, version) = (name.to_owned(), version.to_owned());
        let ask = ModelReadyRequest { name: name.clone(), version: version.clone() };
        assert_eq!(client.model_ready(ask).await.unwrap().into_inner().ready, want, "{name}");
        let about = client.model_metadata(ModelMetadataRequest { name, version }).await;
        match about {
            Ok(about) => {
                let about = about.into_inner();
                assert_eq!(
                    (about.versions, about.inputs[0].shape.clone()),
                    (vec!["1".into()], vec![-1])
                );
                assert_eq!(about.outputs[0].name, "text_output");
            }
            Err(status) => assert_eq!((status.code(), want), (Code::NotFound, false)),
        }
    }
}

#[tokio::test]
async fn health_is_the_truth() {
    let (finish, wait) = std::sync::mpsc::channel::<()>();
    let server = Server::loading(Setup::default(), move || {
        wait.recv()?;
        Ok(repeater())
    })
    .await;
    let mut client = connect(&server).await;
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(!client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let ask = ModelReadyRequest { name: BUNDLE.into(), ..Default::default() };
    assert!(!client.model_ready(ask).await.unwrap().into_inner().ready);
    let refused = client.model_infer(raw("", &["a|"], &[])).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    finish.send(()).unwrap();
}

#[tokio::test]
async fn elements_come_back_as_they_went_in() {
    let server = Server::usual().await;
    let mut client = connect(&server).await;
    let parameters = [
        ("max_tokens", ParameterChoice::Int64Param(9)),
        ("temperature", ParameterChoice::Int64Param(0)),
        ("top_p", ParameterChoice::DoubleParam(0.5)),
        ("timeout", ParameterChoice::Int64Param(60_000_000)),
    ];
    let reply = client.model_infer(raw("r1", &["a fox|", "é|"], &parameters)).await.unwrap();
    let reply = reply.into_inner();
    assert_eq!((reply.id.as_str(), reply.model_name.as_str()), ("r1", BUNDLE));
    assert_eq!(reply.model_version, "1");
    assert_eq!(reply.raw_output_contents, [bytes(&["a fox", "é"]), bytes(&["stop", "stop"])]);
    let shapes: Vec<_> = reply.outputs.iter().map(|o| (o.name.as_str(), &o.shape[..])).collect();
    assert_eq!(shapes, [("text_output", &[2][..]), ("finish_reason", &[2])]);
    assert!(reply.outputs.iter().all(|output| output.contents.is_none()));
    let ParameterChoice::Int64Param(tokens) = choice(&reply.parameters, "prompt_tokens") else {
        panic!("{reply:?}");
    };
    assert!(tokens > 3);
    let mut typed = raw("", &["a fox"], &[("words", ParameterChoice::Int64Param(9))]);
    typed.model_name = "image".into();
    typed.raw_input_contents.clear();
    typed.inputs[0].shape = vec![1, 1];
    typed.inputs[0].contents =
        Some(InferTensorContents { bytes_contents: vec![b"a fox".to_vec()], ..Default::default() });
    typed.outputs = vec![asked("text_output")];
    let reply = client.model_infer(typed).await.unwrap().into_inner();
    assert!(reply.raw_output_contents.is_empty());
    assert_eq!((reply.outputs.len(), &reply.outputs[0].shape), (1, &vec![1, 1]));
    let contents = reply.outputs[0].contents.as_ref().unwrap();
    assert_eq!(contents.bytes_contents, [b"a fox"]);
}

#[tokio::test]
async fn refusals_name_what_is_wrong() {
    let server = Server::usual().await;
    let mut client = connect(&server).await;
    let good = || raw("", &["a|"], &[]);
    let with = |change: fn(&mut ModelInferRequest)| {
        let mut message = good();
        change(&mut message);
        message
    };
    let beams = [("beams", ParameterChoice::Int64Param(2))];
    for (message, code, reason) in [
        (with(|m| m.model_name = "nobody".into()), Code::NotFound, "nobody"),
        (with(|m| m.model_version = "2".into()), Code::NotFound, "the only one is"),
        (with(|m| m.inputs.clear()), Code::InvalidArgument, "raw contents"),
        (with(|m| m.raw_input_contents.clear()), Code::InvalidArgument, "has 0 elements"),
        (with(|m| m.inputs[0].datatype = "TEXT".into()), Code::InvalidArgument, "datatype"),
        (with(|m| m.inputs[0].shape = vec![-1]), Code::InvalidArgument, "shape"),
        (with(|m| m.inputs[0].name = "text".into()), Code::InvalidArgument, "text_input"),
        (
            with(|m| m.inputs[0].contents = Some(InferTensorContents::default())),
            Code::InvalidArgument,
            "both contents and raw",
        ),
        (raw("", &["a|"], &beams), Code::InvalidArgument, "unknown field beams"),
        (
            with(|m| m.outputs = vec![asked("text_output"), asked("text_output")]),
            Code::InvalidArgument,
            "text_output is given twice",
        ),
        (raw("", &[&"a".repeat(2000)], &[]), Code::OutOfRange, "context"),
    ] {
        let status = client.model_infer(message).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(reason), "{status}: {reason}");
    }
}

#[tokio::test]
async fn what_parameters_cannot_hold_comes_as_text() {
    let server = Server::usual().await;
    let mut client = connect(&server).await;
    let mut first = async |name: &str, value: &str| {
        let value = ParameterChoice::StringParam(value.into());
        let reply = client.model_infer(raw("", &["a fox|"], &[(name, value)])).await;
        reply.map(|reply| text(&reply.into_inner()))
    };
    let schema = r#"{"type": "object", "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"], "additionalProperties": false}"#;
    let format = format!(r#"{{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}"#);
    for (name, value) in [("json_schema", schema), ("response_format", &format)] {
        let answer = first(name, value).await.unwrap();
        assert!(answer.contains("\"yes\""), "{answer}");
    }
    assert_eq!(first("choice", r#"["no"]"#).await.unwrap(), "no");
    assert_eq!(first("choice", "yes").await.unwrap(), "yes");
    assert_eq!(first("regex", "(ab|cd){2}").await.unwrap().len(), 4);
    for (name, value) in [("regex", "("), ("json_schema", "{"), ("adapters", "a")] {
        let status = first(name, value).await.unwrap_err();
        assert_eq!(status.metadata().get("shoal-param").unwrap(), name, "{status}");
    }
    let long = client.model_infer(raw("", &[&"a".repeat(2000)], &[])).await.unwrap_err();
    assert_eq!(long.metadata().get("shoal-param").unwrap(), "text_input");
}

#[tokio::test]
async fn one_stream_takes_many_requests_and_survives_their_errors() {
    let server = Server::usual().await;
    let mut client = connect(&server).await;
    let final_flag = [("triton_enable_empty_final_response", ParameterChoice::BoolParam(true))];
    let requests = vec![
        raw("a", &["a red fox|"], &final_flag),
        raw("bad", &["b|"], &[("beams", ParameterChoice::Int64Param(2))]),
        raw("two", &["c|", "d|"], &[]),
        raw("e", &["é🙂|"], &[]),
    ];
    let stream = client.model_stream_infer(futures::stream::iter(requests)).await.unwrap();
    let mut texts: HashMap<String, String> = HashMap::new();
    let mut ended = Vec::new();
    for response in rest(stream.into_inner()).await {
        let part = response.infer_response.unwrap();
        assert!(!ended.contains(&part.id), "nothing follows the last response");
        let last = choice(&part.parameters, "triton_final_response");
        if last == ParameterChoice::BoolParam(true) {
            ended.push(part.id.clone());
        }
        match response.error_message.as_str() {
            "" => texts.entry(part.id.clone()).or_default().push_str(&text(&part)),
            message => {
                assert!(message.contains("beams") || message.contains("2 texts"), "{message}");
                assert!(["bad", "two"].contains(&part.id.as_str()));
            }
        }
    }
    ended.sort();
    assert_eq!(ended, ["a", "bad", "e", "two"]);
    let want = [("a".to_owned(), "a red fox".to_owned()), ("e".to_owned(), "é🙂".to_owned())];
    assert_eq!(texts, HashMap::from(want));
}

#[tokio::test]
async fn a_stream_that_is_dropped_frees_its_rows() {
    let (runner, gate) = repeater().gated();
    let server = Server::with(Setup::default(), runner).await;
    let mut client = connect(&server).await;
    let (send, requests) = mpsc::channel(4);
    let requests = futures::stream::unfold(requests, |mut requests| async move {
        requests.recv().await.map(|request| (request, requests))
    });
    for id in ["a", "b"] {
        send.send(raw(id, &["~ab|"], &[])).await.unwrap();
    }
    let mut stream = client.model_stream_infer(requests).await.unwrap().into_inner();
    gate.pass(2);
    stream.message().await.unwrap().unwrap();
    drop((send, stream));
    let cancelled = format!("shoal_requests_total{{outcome=\"cancelled\",task=\"{BUNDLE}\"}}");
    server.until(&cancelled, 2.0).await;
    drop(gate);
    server.until("shoal_requests_running", 0.0).await;
    assert_eq!(server.metric("shoal_kv_cache_usage_ratio").await, 0.0);
}
