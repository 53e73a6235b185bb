//! What the README tells people to type, sent to the shipped model.

use crate::cli::{Running, announced, shoal, terminate};
use crate::harness::{Client, called, message};
use hyper::Method;
use serde_json::Value;
use shoal::api::grpc::proto::shoal_client::ShoalClient;
use std::process::Stdio;
use tonic::transport::Endpoint;

const README: &str = include_str!("../../README.md");

/// The shell commands that begin with `program`, each in its words; quotes are single ones.
fn commands(program: &str) -> Vec<Vec<String>> {
    let blocks = README.split("```sh\n").skip(1).filter_map(|block| block.split("```").next());
    let text: String = blocks.collect::<String>().replace("\\\n", " ");
    let words = |line: &str| {
        let mut words = Vec::new();
        for (i, part) in line.split('\'').enumerate() {
            match i % 2 {
                0 => words.extend(part.split_whitespace().map(str::to_owned)),
                _ => words.push(part.to_owned()),
            }
        }
        words
    };
    let lines = text.lines().map(words);
    lines.filter(|words| words.first().is_some_and(|first| first == program)).collect()
}

/// The words that follow each `flag`.
fn values<'a>(words: &'a [String], flag: &str) -> Vec<&'a str> {
    let pairs = words.windows(2).filter(|pair| pair[0] == flag);
    pairs.map(|pair| pair[1].as_str()).collect()
}

async fn curl(client: &Client, words: &[String]) {
    let url = words.iter().find_map(|word| word.strip_prefix("http://127.0.0.1:8000")).unwrap();
    let headers: Vec<(&str, &str)> =
        values(words, "-H").iter().map(|header| header.split_once(": ").unwrap()).collect();
    let body = values(words, "-d").concat();
    let method = if body.is_empty() { Method::GET } else { Method::POST };
    let reply = client.call(method, url, &headers, body.clone()).await;
    let text = String::from_utf8(reply.body).unwrap();
    assert_eq!(reply.status, 200, "{words:?}: {text}");
    if body.contains("\"stream\": true") {
        assert!(text.ends_with("data: [DONE]\n\n"), "{words:?}: {text}");
    }
}

#[tokio::test]
async fn what_the_readme_sends_is_answered() {
    let bundle = concat!(env!("CARGO_MANIFEST_DIR"), "/models/prompter");
    let server = shoal(&["serve", bundle, "--port", "0"])
        .env("SHOAL_LOG", "off")
        .stdout(Stdio::piped())
        .spawn();
    let Running(server) = &mut Running(server.unwrap());
    let (line, client) = announced(server);
    // What needs a key is about servers that were started otherwise.
    let asks = |words: &Vec<String>| !words.concat().contains("authorization");
    let curls: Vec<_> = commands("curl").into_iter().filter(asks).collect();
    assert!(curls.len() > 6, "{curls:?}");
    for words in &curls {
        curl(&client, words).await;
    }
    let grpc = line.split_once("gRPC on ").unwrap().1.split([',', ' ', '\n']).next().unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{grpc}")).unwrap();
    let mut rpc = ShoalClient::new(endpoint.connect().await.unwrap());
    for words in &commands("grpcurl") {
        let mut body: Value = serde_json::from_str(values(words, "-d")[0]).unwrap();
        let task = body.as_object_mut().unwrap().remove("task").unwrap();
        let request = called(message(task.as_str().unwrap(), &body), &[]);
        let mut stream = rpc.generate(request).await.unwrap().into_inner();
        let mut text = String::new();
        while let Some(part) = stream.message().await.unwrap() {
            text.extend(part.choices.into_iter().map(|choice| choice.text));
        }
        assert!(!text.is_empty());
    }
    terminate(server);
}
