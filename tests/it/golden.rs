//! The whole server over the real decoder: what comes out of the socket is what PyTorch computes.

use crate::harness::{BUNDLE, COMPLETIONS, Server, Setup, golden_model, goldens, prompts, texts};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const TOLERANCE: f64 = 1e-4;

async fn server() -> Server {
    Server::over(&golden_model(), Setup::default()).await
}

fn greedy(prompt: &Value) -> Value {
    json!({"model": BUNDLE, "prompt": prompt, "max_tokens": 32, "temperature": 0,
        "ignore_eos": true})
}

#[tokio::test]
async fn greedy_text_is_pytorchs() {
    let server = server().await;
    for prompt in prompts("base") {
        for form in ["text", "ids"] {
            let reply = server.client.post(COMPLETIONS, &greedy(&prompt[form])).await.json();
            assert_eq!(reply["choices"][0]["text"], prompt["greedy_text"]);
            assert_eq!(reply["usage"]["prompt_tokens"], prompt["ids"].as_array().unwrap().len());
        }
    }
    let all: Vec<Value> = prompts("base").iter().map(|p| p["text"].clone()).collect();
    let mut body = greedy(&json!(all));
    body["stream"] = json!(true);
    let frames = server.client.stream(COMPLETIONS, &body).await.rest().await;
    let want: Vec<Value> = prompts("base").iter().map(|p| p["greedy_text"].clone()).collect();
    assert_eq!(json!(texts(&frames)), json!(want), "all at once, as a stream");
}

#[tokio::test]
async fn scores_are_the_log_softmax_of_pytorchs_logits() {
    let file = std::fs::read(goldens().join("reference.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let server = server().await;
    for prompt in prompts("base") {
        let logits = tensors.tensor(&format!("base.{}.logits", prompt["i"])).unwrap();
        let vocab = logits.shape()[1];
        let rows: Vec<f64> = logits
            .data()
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
            .collect();
        let body = json!({"model": BUNDLE, "prompt": prompt["ids"], "echo": true, "logprobs": 3,
            "max_tokens": 0, "temperature": 0.3, "logit_bias": {"5": 50}});
        let reply = server.client.post(COMPLETIONS, &body).await.json();
        let logprobs = &reply["choices"][0]["logprobs"];
        assert_eq!(logprobs["token_logprobs"][0], Value::Null);
        let ids = prompt["ids"].as_array().unwrap();
        for (i, row) in rows.chunks_exact(vocab).take(ids.len() - 1).enumerate() {
            let most = row.iter().copied().fold(f64::MIN, f64::max);
            let sum = row.iter().map(|x| (x - most).exp()).sum::<f64>();
            let want = row[ids[i + 1].as_u64().unwrap() as usize] - most - sum.ln();
            let got = logprobs["token_logprobs"][i + 1].as_f64().unwrap();
            assert!((got - want).abs() < TOLERANCE, "token {i}: {got}, not {want}");
            let top = logprobs["top_logprobs"][i + 1].as_object().unwrap();
            let best = top.values().next().unwrap().as_f64().unwrap();
            assert!((best + sum.ln()).abs() < TOLERANCE, "the best of token {i}");
        }
    }
}

#[tokio::test]
async fn a_seed_gives_the_same_text_alone_and_in_a_crowd() {
    let server = server().await;
    let body = |seed: u64, stream: bool| {
        json!({"model": BUNDLE, "prompt": "write a short story", "max_tokens": 24, "seed": seed,
            "temperature": 1.0, "top_p": 0.95, "frequency_penalty": 0.5, "stream": stream})
    };
    let text = async |body: Value| {
        let reply = server.client.post(COMPLETIONS, &body).await.json();
        reply["choices"][0]["text"].as_str().unwrap().to_string()
    };
    let alone = [text(body(1, false)).await, text(body(2, false)).await];
    assert_ne!(alone[0], alone[1]);
    assert_eq!(text(body(1, false)).await, alone[0]);
    let mut crowd = Vec::new();
    for i in 0..16 {
        crowd.push(server.client.stream(COMPLETIONS, &body(i % 4, true)).await);
    }
    for (i, stream) in crowd.iter_mut().enumerate() {
        let got = texts(&stream.rest().await).remove(0);
        match i % 4 {
            1 => assert_eq!(got, alone[0]),
            2 => assert_eq!(got, alone[1]),
            _ => assert!(!alone.contains(&got)),
        }
    }
    let mut several = body(1, false);
    several["n"] = json!(3);
    let reply = server.client.post(COMPLETIONS, &several).await.json();
    let choice = |i: usize| reply["choices"][i]["text"].as_str().unwrap();
    assert_eq!(choice(0), alone[0], "the first of several is that of one");
    assert!(choice(1) != choice(0) && choice(2) != choice(1));
    several["seed"] = Value::Null;
    assert_ne!(text(several.clone()).await, text(several).await, "no seed, no repetition");
}
