//! What a request's `task` decides over the real decoder: the shares of an MTA adapter's experts, and
//! where a model's gates send its rows.

use crate::harness::{BUNDLE, COMPLETIONS, Server, Setup, golden_model, prompts};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use shoal::adapter::{self, Module};
use shoal::engine::Settings;
use shoal::ids::mix;
use shoal::model::init::upcycle;
use shoal::model::spec::Gate;
use shoal::model::{Moe, Spec, Weights, weights};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const TASKS: [&str; 2] = ["image", "music"];

/// Numbers between -0.5 and 0.5.
fn random(rows: usize, columns: usize, seed: usize) -> Tensor {
    let draw = |i: usize| (mix((seed << 20 | i) as u64) >> 40) as f32 / (1 << 24) as f32 - 0.5;
    let values: Vec<f32> = (0..rows * columns).map(draw).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

/// Writes an MTA adapter of all attention inputs to `mta`, and what it comes to as LoRAs: to `image` and
/// `music` with these tasks, to `mean` with none.
fn write_mixture(root: &Path) {
    const RANK: usize = 2;
    const EXPERTS: usize = 3;
    const ALPHA: f64 = 5.0;
    const TAU: f64 = 0.7;
    let mut tensors = HashMap::new();
    let mut folds = [const { BTreeMap::new() }; 3];
    for layer in 0..3 {
        let name = |part: &str| {
            format!("base_model.model.transformer.h.{layer}.attn.c_attn.{part}.weight")
        };
        let gate = (random(TASKS.len(), EXPERTS, 100 + layer) * 6.0).unwrap();
        let mut rows: Vec<Vec<f64>> = gate.to_dtype(DType::F64).unwrap().to_vec2().unwrap();
        rows.push((0..EXPERTS).map(|e| (rows[0][e] + rows[1][e]) / 2.0).collect());
        tensors.insert(name("mta_gate"), gate);
        let a: Vec<Tensor> = (0..EXPERTS).map(|e| random(RANK, 64, 10 * layer + e)).collect();
        let b: Vec<Tensor> = (0..EXPERTS).map(|e| random(192, RANK, 50 + 10 * layer + e)).collect();
        for e in 0..EXPERTS {
            tensors.insert(name(&format!("mta_A.{e}")), a[e].clone());
            tensors.insert(name(&format!("mta_B.{e}")), b[e].clone());
        }
        for (fold, row) in folds.iter_mut().zip(&rows) {
            let powers: Vec<f64> = row.iter().map(|x| (x / TAU).exp()).collect();
            let scale = ALPHA / RANK as f64 / powers.iter().sum::<f64>();
            let b = b.iter().zip(powers).map(|(b, power)| (b * (scale * power)).unwrap());
            let b = Tensor::cat(&b.collect::<Vec<_>>(), 1).unwrap();
            let change = (Tensor::cat(&a, 0).unwrap().t().unwrap(), b.t().unwrap());
            fold.insert((layer, Module::Qkv), change);
        }
    }
    let config = json!({"peft_type": "MTA", "r": RANK, "num_experts": EXPERTS, "tau": TAU,
        "lora_alpha": ALPHA, "tasks": TASKS, "target_modules": ["c_attn"]});
    let dir = root.join("mta");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join(adapter::CONFIG_FILE), config.to_string()).unwrap();
    candle_core::safetensors::save(&tensors, dir.join(adapter::WEIGHTS_FILE)).unwrap();
    for (name, fold) in ["image", "music", "mean"].iter().zip(&folds) {
        adapter::save(&root.join(name), BUNDLE, EXPERTS * RANK, 3, fold).unwrap();
    }
}

/// Writes the golden model with four experts in its first and last block, each scaled in its own way, and
/// gates that look at token and task.
fn write_sparse_model(dir: &Path) {
    let golden = Weights::open(&golden_model()).unwrap();
    let vb = golden.var_builder(&Device::Cpu);
    let read = |(name, shape): (String, Vec<usize>)| (name.clone(), vb.get(shape, &name).unwrap());
    let dense = golden.spec().tensors().into_iter().map(read).collect();
    let moe = Moe { layers: vec![0, 2], experts: 4, top_k: 2, gate: Gate::TokenTask };
    let tasks = TASKS.map(str::to_owned).into();
    let spec = Spec { moe: Some(moe), tasks, ..golden.spec().clone() };
    let mut tensors = upcycle(&spec, &dense, 1.0, 7).unwrap();
    for expert in 0..4 {
        // Experts that are alike would not show who was asked.
        let name = format!("moe.experts.{expert}.c_proj.weight");
        for (_, tensor) in tensors.iter_mut().filter(|(full, _)| full.ends_with(&name)) {
            *tensor = (&*tensor * (0.5 + f64::from(expert))).unwrap();
        }
    }
    weights::save(dir, &spec, &tensors, DType::F32).unwrap();
}

fn greedy(model: &str, prompt: &Value, task: Option<&str>) -> Value {
    let mut body = json!({"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0,
        "ignore_eos": true, "logprobs": 1, "debug": {"routing": true}});
    if let Some(task) = task {
        body["task"] = json!(task);
    }
    body
}

/// The only choice.
async fn choice(server: &Server, body: &Value) -> Value {
    let reply = server.client.post(COMPLETIONS, body).await;
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    reply.json()["choices"][0].take()
}

fn logprobs(choice: &Value) -> Vec<f64> {
    let all = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    all.iter().map(|logprob| logprob.as_f64().unwrap()).collect()
}

async fn refuses_task(server: &Server, body: &Value, allowed: &str) {
    let reply = server.client.post(COMPLETIONS, body).await;
    assert_eq!((reply.status, reply.error().2.as_deref()), (400, Some("task")));
    let message = reply.json()["error"]["message"].to_string();
    assert!(message.contains(allowed), "{message}, not {allowed}");
}

#[tokio::test]
async fn a_mixture_is_for_each_task_the_lora_that_it_folds_to() {
    let root = TempDir::new().unwrap();
    write_mixture(root.path());
    let server = Server::with_adapters(root.path(), 8).await;
    assert_eq!(server.load("mta", "mta").await["kind"], "mta");
    for name in ["image", "music", "mean"] {
        server.load(&format!("as-{name}"), name).await;
    }
    // Longer than a block: what one task left in the cache must not serve another.
    let prompt = &prompts("base")[1]["ids"];
    let mut seen = Vec::new();
    for (task, fold) in [(Some("image"), "image"), (Some("music"), "music"), (None, "mean")] {
        let want = choice(&server, &greedy(&format!("as-{fold}"), prompt, None)).await;
        let asked = greedy("mta", prompt, task);
        let mut mixed = greedy(BUNDLE, prompt, task);
        mixed["adapters"] = json!([{"name": "mta", "weight": 1.0}]);
        for body in [&asked, &mixed, &asked] {
            let got = choice(&server, body).await;
            assert_eq!(got["text"], want["text"], "{body}");
            let pairs = logprobs(&got).into_iter().zip(logprobs(&want));
            let off = pairs.map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);
            assert!(off < 1e-4, "{body}: off by {off}");
        }
        seen.push(logprobs(&want));
    }
    let far = |i: usize, j: usize| seen[i].iter().zip(&seen[j]).any(|(a, b)| (a - b).abs() > 0.01);
    assert!(far(0, 1) && far(0, 2) && far(1, 2), "the tasks are alike: {seen:?}");
    refuses_task(&server, &greedy("mta", prompt, Some("video")), "image, music").await;
    refuses_task(&server, &greedy("as-image", prompt, Some("image")), "none here").await;
    refuses_task(&server, &greedy(BUNDLE, prompt, Some("image")), "none here").await;
}

/// Layer and sum over its experts.
fn routed(choice: &Value) -> Vec<(u64, u64)> {
    let layers = choice["debug"]["routing"].as_array().unwrap().iter();
    let sum = |layer: &Value| {
        let rows = layer["rows_per_expert"].as_array().unwrap();
        assert_eq!(rows.len(), 4);
        rows.iter().map(|n| n.as_u64().unwrap()).sum()
    };
    layers.map(|layer| (layer["layer"].as_u64().unwrap(), sum(layer))).collect()
}

#[tokio::test]
async fn gates_choose_by_task_whatever_is_cached() {
    let dir = TempDir::new().unwrap();
    write_sparse_model(dir.path());
    let server = Server::over(dir.path(), Setup::default()).await;
    let settings = Settings { prefix_cache: false, ..Settings::default() };
    let forgetful = Server::over(dir.path(), Setup { settings, ..Setup::default() }).await;
    let prompt = json!((0..40).map(|i| i * 37 % 512).collect::<Vec<u32>>());
    let body = |task| greedy(BUNDLE, &prompt, task);
    let plain = |task| {
        let mut body = body(task);
        body.as_object_mut().unwrap().remove("debug");
        body
    };
    let (mut seen, mut sums) = (Vec::new(), [0, 0]);
    for round in 0..2 {
        for task in [Some("image"), Some("music"), None] {
            let alone = choice(&forgetful, &body(task)).await;
            // The second time the prompt's two whole blocks are there.
            let got = choice(&server, &plain(task)).await;
            assert_eq!((&got["text"], &got["logprobs"]), (&alone["text"], &alone["logprobs"]));
            let cached = 32 * round;
            // Whoever asks where rows went hears of all of them: nothing is taken from the cache.
            let told = choice(&server, &body(task)).await;
            assert_eq!(told["debug"]["routing"], alone["debug"]["routing"]);
            // All but the last token run; behind the last attention only those that a token follows.
            assert_eq!(routed(&told), [(0, 2 * 47), (2, 2 * 8)], "{task:?}");
            sums[0] += 2 * (47 - cached) + 2 * 47;
            sums[1] += 2 * 2 * 8;
            seen.push(told);
        }
    }
    let hits = server.metric("shoal_prefix_cache_hits_tokens_total").await;
    assert_eq!(hits, 3.0 * 32.0, "each task found what it had computed itself");
    for (i, j) in [(0, 1), (0, 2), (1, 2)] {
        assert_ne!(seen[i]["logprobs"], seen[j]["logprobs"], "the tasks are alike");
        assert_ne!(seen[i]["debug"]["routing"], seen[j]["debug"]["routing"]);
    }
    let page = String::from_utf8(server.client.get("/metrics").await.body).unwrap();
    for (group, sum) in ["first", "middle"].iter().zip(sums) {
        let group = format!("layer_group=\"{group}\",task=\"{BUNDLE}\"}} ");
        let lines = page.lines().filter(|l| l.starts_with("shoal_router_expert_tokens_total{"));
        let counts =
            lines.filter_map(|line| Some(line.split_once(&group)?.1.parse::<u64>().unwrap()));
        assert_eq!(counts.sum::<u64>(), sum, "{group}");
    }
    refuses_task(&server, &body(Some("video")), "image, music").await;
}

#[tokio::test]
async fn tasks_in_one_batch_are_what_they_are_alone() {
    let dir = TempDir::new().unwrap();
    write_sparse_model(dir.path());
    let server = Server::over(dir.path(), Setup::default()).await;
    let tasks = [Some("image"), None, Some("music"), Some("image")];
    let prompt = &prompts("base")[2]["ids"];
    let [a, b, c, d] = tasks.map(|task| greedy(BUNDLE, prompt, task));
    let alone = [choice(&server, &a).await, choice(&server, &b).await, choice(&server, &c).await];
    let ask = |body| choice(&server, body);
    let (a, b, c, d) = tokio::join!(ask(&a), ask(&b), ask(&c), ask(&d));
    for (got, want) in [(a, 0), (b, 1), (c, 2), (d, 0)] {
        assert_eq!(
            (&got["text"], &got["logprobs"]),
            (&alone[want]["text"], &alone[want]["logprobs"])
        );
    }
}
