//! Adapters over the real decoder: what each request gets is what its adapter, of its generation, gives
//! alone; whatever is loaded meanwhile. And who may change what.

use crate::harness::{
    AUTHORISED, BUNDLE, COMPLETIONS, LOAD, Reply, Server, goldens, prompts, texts,
};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use shoal::adapter::registry::{Bounds, Registry, Wanted};
use shoal::adapter::{self, Module, Shape};
use shoal::engine::State;
use shoal::ids::TaskId;
use shoal::kernels::Precision;
use shoal::metrics::Metrics;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

const UNLOAD: &str = "/v1/unload_lora_adapter";

/// A folder that adapters are loaded from, with the two golden ones in it.
fn root() -> TempDir {
    let root = TempDir::new().unwrap();
    for name in ["lora-attn", "lora-all"] {
        copy(&goldens().join("adapters").join(name), &root.path().join(name));
    }
    root
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

/// The names of the adapters that are loaded.
async fn listed(server: &Server) -> Vec<String> {
    let reply = server.client.get_with("/v1/adapters", &[AUTHORISED]).await.json();
    let names = reply["data"].as_array().unwrap().iter();
    names.map(|adapter| adapter["id"].as_str().unwrap().to_owned()).collect()
}

fn greedy(model: &str, prompt: &Value) -> Value {
    json!({"model": model, "prompt": prompt["text"], "max_tokens": 32, "temperature": 0,
        "ignore_eos": true, "debug": {"routing": true}})
}

async fn text(server: &Server, body: &Value) -> String {
    let reply = server.client.post(COMPLETIONS, body).await.json();
    reply["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{reply}")).to_owned()
}

#[tokio::test]
async fn each_adapter_in_one_batch_gives_what_pytorch_gives() {
    let root = root();
    let server = Server::with_adapters(root.path(), 8).await;
    for name in ["lora-attn", "lora-all"] {
        let info = server.load(name, name).await;
        assert_eq!((&info["generation"], &info["kind"]), (&json!(1), &json!("lora")));
    }
    let mut streams = Vec::new();
    for (tag, model) in [("base", BUNDLE), ("lora-attn", "lora-attn"), ("lora-all", "lora-all")] {
        for prompt in prompts(tag) {
            let mut body = greedy(model, &prompt);
            body["stream"] = json!(true);
            let stream = server.client.stream(COMPLETIONS, &body).await;
            streams.push((stream, prompt["greedy_text"].clone()));
        }
    }
    for (mut stream, want) in streams {
        let frames = stream.rest().await;
        assert_eq!(json!(texts(&frames)[0]), want);
    }
    let models = server.client.get("/v1/models").await.json();
    let adapter = models["data"].as_array().unwrap().iter().find(|m| m["id"] == "lora-all");
    assert_eq!(adapter.unwrap()["parent"], BUNDLE);
    assert_eq!(server.client.get("/v1/models/lora-all").await.json()["id"], "lora-all");
}

/// The leak that other servers had: state of one adapter used for another of the same name. All prompts
/// begin alike, so that every reply could use what another one left in the cache.
#[tokio::test]
async fn a_swapped_adapter_never_sees_its_predecessors_state() {
    let root = root();
    let server = Arc::new(Server::with_adapters(root.path(), 8).await);
    server.load("a", "lora-attn").await;
    let by_generation = |generation: u64| ["lora-all", "lora-attn"][(generation % 2) as usize];
    let mut clients = Vec::new();
    for client in 0..6 {
        let server = server.clone();
        clients.push(tokio::spawn(async move {
            let mut seen = BTreeSet::new();
            let mut round = 0;
            // Long enough to meet several.
            while round < 12 || seen.len() < 3 {
                let nth = (client + round) % 4;
                let body = greedy("a", &prompts("base")[nth]);
                let reply = server.client.post(COMPLETIONS, &body).await;
                assert_eq!(reply.status, 200);
                let choice = &reply.json()["choices"][0];
                let part = &choice["debug"]["adapters"][0];
                assert_eq!((&part["name"], &part["weight"]), (&json!("a"), &json!(1.0)));
                let generation = part["generation"].as_u64().unwrap();
                let want = &prompts(by_generation(generation))[nth]["greedy_text"];
                assert_eq!(&choice["text"], want, "generation {generation}, prompt {nth}");
                seen.insert(generation);
                round += 1;
            }
        }));
    }
    let mut expected = 1;
    while clients.iter().any(|client| !client.is_finished()) {
        let path = by_generation(expected + 1);
        let body = json!({"lora_name": "a", "lora_path": path, "load_inplace": true,
            "expected_generation": expected});
        assert_eq!(server.admin(LOAD, body).await.status, 200);
        expected += 1;
    }
    for client in clients {
        client.await.unwrap();
    }
    // Between two swaps there may have been no time to share anything; now there is.
    let hits = server.metric("shoal_prefix_cache_hits_tokens_total").await;
    for prompt in prompts(by_generation(expected)).iter().cycle().take(8) {
        assert_eq!(json!(text(&server, &greedy("a", prompt)).await), prompt["greedy_text"]);
    }
    assert!(server.metric("shoal_prefix_cache_hits_tokens_total").await > hits);
    let info = format!(
        "shoal_adapters_info{{adapter=\"a\",generation=\"{expected}\",kind=\"lora\",rank=\"{}\"}}",
        if expected % 2 == 1 { 4 } else { 8 }
    );
    assert_eq!(server.metric(&info).await, 1.0);
    assert_eq!(server.metric("shoal_adapters_resident").await, 1.0);
    let loads = server.metric("shoal_adapter_loads_total{outcome=\"ok\"}").await;
    assert_eq!(loads, expected as f64);
}

#[tokio::test]
async fn mixtures_are_weighted_sums() {
    let root = root();
    let server = Server::with_adapters(root.path(), 8).await;
    for name in ["lora-attn", "lora-all"] {
        server.load(name, name).await;
    }
    let prompt = &prompts("base")[0];
    let alone = |tag: &str| prompts(tag)[0]["greedy_text"].as_str().unwrap().to_owned();
    let mixed = |parts: Value| {
        let mut body = greedy(BUNDLE, prompt);
        body["adapters"] = parts;
        body
    };
    let part = |name: &str, weight: f64| json!({"name": name, "weight": weight});
    for (parts, want) in [
        (json!([]), alone("base")),
        (json!([part("lora-attn", 1.0)]), alone("lora-attn")),
        (json!([part("lora-attn", 0.0), part("lora-all", 1.0)]), alone("lora-all")),
        (json!([part("lora-all", 0.5), part("lora-all", 0.5)]), alone("lora-all")),
        (json!([part("lora-all", 2.0), part("lora-all", -2.0)]), alone("base")),
    ] {
        assert_eq!(text(&server, &mixed(parts.clone())).await, want, "{parts}");
    }
    let mut body = mixed(json!([]));
    body["model"] = json!("lora-all");
    assert_eq!(text(&server, &body).await, alone("base"), "it takes the place of the model's own");
    let many = vec![part("lora-all", 0.1); 9];
    for (parts, status) in [
        (json!(many), 400),
        (json!([part("lora-all", 4.1)]), 400),
        (json!([part("none", 1.0)]), 404),
    ] {
        let reply = server.client.post(COMPLETIONS, &mixed(parts.clone())).await;
        assert_eq!((reply.status, reply.error().2.as_deref()), (status, Some("adapters")));
    }
}

/// Finite weights may overflow; what they spoil is nobody else's.
#[tokio::test]
async fn an_adapter_that_overflows_fails_its_own_requests_only() {
    let root = root();
    let huge = |rows, columns| Tensor::full(1e30f32, (rows, columns), &Device::Cpu).unwrap();
    let change = |layer| ((layer, Module::Qkv), (huge(64, 2), huge(2, 192)));
    adapter::save(&root.path().join("huge"), BUNDLE, 2, 3, &(0..3).map(change).collect()).unwrap();
    let server = Server::with_adapters(root.path(), 8).await;
    server.load("huge", "huge").await;
    let mut streams = Vec::new();
    for prompt in prompts("base") {
        let mut body = greedy(BUNDLE, &prompt);
        body["stream"] = json!(true);
        let stream = server.client.stream(COMPLETIONS, &body).await;
        streams.push((stream, prompt["greedy_text"].clone()));
        let reply = server.client.post(COMPLETIONS, &greedy("huge", &prompt)).await;
        assert_eq!((reply.status, reply.error().1.as_str()), (500, "server_error"));
    }
    for (mut stream, want) in streams {
        assert_eq!(json!(texts(&stream.rest().await)[0]), want);
    }
    assert_eq!(server.metric("shoal_step_failures_total").await, 0.0);
    assert_eq!(server.engine.state(), State::Ready);
}

#[tokio::test]
async fn only_the_holder_of_the_key_may_change_anything() {
    let root = root();
    let server = Server::with_adapters(root.path(), 8).await;
    let body = json!({"lora_name": "a", "lora_path": "lora-all"});
    for path in [LOAD, UNLOAD, "/v1/tasks"] {
        for headers in [
            &[][..],
            &[("authorization", "Bearer 0123456789abcdeg")],
            &[("authorization", "Bearer ")],
            &[("authorization", "0123456789abcdef")],
        ] {
            let reply = server.client.post_with(path, headers, &body).await;
            assert_eq!(reply.status, 401, "{path} {headers:?}");
        }
    }
    assert_eq!(server.client.get("/v1/adapters").await.status, 401);
    assert_eq!(listed(&server).await, [""; 0]);
    let closed = Server::usual().await;
    assert_eq!(closed.client.get("/v1/adapters").await.status, 403);
    for path in [LOAD, UNLOAD, "/v1/tasks"] {
        assert_eq!(closed.client.post_with(path, &[AUTHORISED], &body).await.status, 403);
    }
}

#[tokio::test]
async fn adapters_are_read_from_below_the_root_only() {
    let (root, outside) = (root(), root());
    let outside_path = outside.path().join("lora-all");
    std::os::unix::fs::symlink(&outside_path, root.path().join("link")).unwrap();
    copy(&outside_path, &root.path().join("linked-file"));
    let file = root.path().join("linked-file/adapter_model.safetensors");
    fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink(outside_path.join("adapter_model.safetensors"), &file).unwrap();
    let server = Server::with_adapters(root.path(), 8).await;
    let absolute = outside_path.to_str().unwrap();
    let dotted = format!("../{}/lora-all", outside.path().file_name().unwrap().to_str().unwrap());
    for (path, status) in [
        (absolute, 403),
        (dotted.as_str(), 403),
        ("link", 403),
        ("linked-file", 403),
        ("..", 403),
        ("none", 404),
    ] {
        let body = json!({"lora_name": "a", "lora_path": path});
        let reply = server.admin(LOAD, body).await;
        assert_eq!(
            (reply.status, reply.error().2.as_deref()),
            (status, Some("lora_path")),
            "{path}"
        );
    }
    let inside = root.path().join("lora-all");
    server.load("a", inside.to_str().unwrap()).await;
    server.load("b", "lora-attn/../lora-all").await;
}

#[tokio::test]
async fn generations_and_names_are_checked() {
    let root = root();
    let server = Server::with_adapters(root.path(), 8).await;
    server.load("a", "lora-all").await;
    let code = |reply: Reply| (reply.status, reply.error().3.unwrap_or_default());
    let conflict = |code: &str| (409, code.to_owned());
    for (path, body, want) in [
        (LOAD, json!({"lora_name": "a", "lora_path": "lora-all"}), "lora_adapter_already_loaded"),
        (
            LOAD,
            json!({"lora_name": "a", "lora_path": "lora-all", "load_inplace": true,
            "expected_generation": 2}),
            "lora_generation_mismatch",
        ),
        (
            LOAD,
            json!({"lora_name": "b", "lora_path": "lora-all", "expected_generation": 1}),
            "lora_generation_mismatch",
        ),
        (LOAD, json!({"lora_name": BUNDLE, "lora_path": "lora-all"}), "name_taken"),
        (UNLOAD, json!({"lora_name": "a", "expected_generation": 3}), "lora_generation_mismatch"),
    ] {
        assert_eq!(code(server.admin(path, body.clone()).await), conflict(want), "{body}");
    }
    for (body, param) in [
        (json!({"lora_path": "lora-all"}), "lora_name"),
        (json!({"lora_name": "b"}), "lora_path"),
        (json!({"lora_name": "a b", "lora_path": "lora-all"}), "lora_name"),
        (json!({"lora_name": "b", "lora_path": "lora-all", "rank": 3}), "rank"),
        (
            json!({"lora_name": "b", "lora_path": "lora-all", "base_model_name": "x"}),
            "base_model_name",
        ),
    ] {
        let reply = server.admin(LOAD, body.clone()).await;
        assert_eq!((reply.status, reply.error().2.as_deref()), (400, Some(param)), "{body}");
    }
    assert_eq!(server.admin(UNLOAD, json!({"lora_name": "a"})).await.status, 200);
    assert_eq!(server.admin(UNLOAD, json!({"lora_name": "a"})).await.status, 404);
    let gone = server.client.post(COMPLETIONS, &greedy("a", &prompts("base")[0])).await;
    assert_eq!(gone.error().2.as_deref(), Some("model"));
    assert_eq!(server.load("a", "lora-all").await["generation"], 2);
}

#[tokio::test]
async fn what_was_not_used_for_longest_makes_room_unless_it_is_pinned() {
    let root = root();
    let server = Server::with_adapters(root.path(), 2).await;
    let pinned = json!({"lora_name": "first", "lora_path": "lora-all", "pinned": true});
    assert_eq!(server.admin(LOAD, pinned).await.status, 200);
    server.load("second", "lora-attn").await;
    server.load("third", "lora-attn").await;
    assert_eq!(listed(&server).await, ["first", "third"]);
    assert_eq!(server.metric("shoal_adapter_evictions_total").await, 1.0);
    let pinned = json!({"lora_name": "third", "lora_path": "lora-all", "pinned": true,
        "load_inplace": true});
    assert_eq!(server.admin(LOAD, pinned).await.status, 200);
    // Replaced without a word on pins, it stays pinned.
    let replaced = json!({"lora_name": "third", "lora_path": "lora-attn", "load_inplace": true});
    assert_eq!(server.admin(LOAD, replaced).await.json()["pinned"], true);
    let one_more = json!({"lora_name": "fourth", "lora_path": "lora-all"});
    let refused = server.admin(LOAD, one_more).await;
    assert_eq!((refused.status, refused.error().3.as_deref()), (409, Some("lora_limit_exceeded")));
    assert_eq!(listed(&server).await, ["first", "third"]);
    assert_eq!(server.metric("shoal_adapters_resident").await, 2.0);
    assert_eq!(server.metric("shoal_adapter_loads_total{outcome=\"error\"}").await, 1.0);
}

#[tokio::test]
async fn a_task_may_be_added_with_its_adapter() {
    let root = root();
    let server = Server::with_adapters(root.path(), 4).await;
    let toml = "description = \"Speaks.\"\nadapter = \"a\"\n[defaults]\nmax_tokens = 32\n\
                temperature = 0.0\nignore_eos = true\n";
    let body = json!({"name": "speak", "toml": toml});
    let early = server.admin("/v1/tasks", body.clone()).await;
    assert_eq!((early.status, early.error().2.as_deref()), (400, Some("toml")));
    server.load("a", "lora-all").await;
    let added = server.admin("/v1/tasks", body.clone()).await;
    assert_eq!((added.status, added.json()["adapter"].as_str()), (201, Some("a")));
    assert_eq!(server.admin("/v1/tasks", body).await.status, 409);
    let wanted = &prompts("lora-all")[1];
    let body = json!({"input": wanted["text"]});
    let reply = server.client.post("/v1/tasks/speak/generate", &body).await.json();
    assert_eq!(reply["choices"][0]["text"], wanted["greedy_text"]);
    let listed = server.client.get("/v1/tasks").await.json();
    assert_eq!(listed["data"][0]["id"], "speak");
    let in_use = server.admin(UNLOAD, json!({"lora_name": "a"})).await;
    assert_eq!((in_use.status, in_use.error().3.as_deref()), (409, Some("lora_adapter_in_use")));
    for toml in ["template = \"{{ nothing }}\"", "temperature = 3", "[slo]\nweight = -1"] {
        let body = json!({"name": "bad", "toml": toml});
        let reply = server.admin("/v1/tasks", body).await;
        assert_eq!((reply.status, reply.error().2.as_deref()), (400, Some("toml")), "{toml}");
    }
    let series = "shoal_requests_total{outcome=\"ok\",task=\"speak\"}";
    assert_eq!(server.metric(series).await, 1.0);
}

/// The registry alone: a mixture is the same one while it is used, and no key is given twice.
#[test]
fn mixes_are_told_apart() {
    let root = root();
    let metrics = Arc::new(Metrics::new(&[BUNDLE.to_owned()]));
    let shape = Shape {
        layers: 3,
        width: 64,
        inner: 256,
        moe_layers: Vec::new(),
        precision: Precision::F32,
    };
    let registry = Registry::new(shape, Bounds::default(), metrics.clone());
    let wanted = |name: &str| Wanted::new(name, &root.path().join("lora-all"));
    registry.load(&wanted("a")).unwrap();
    registry.load(&wanted("b")).unwrap();
    let half = [("a".to_owned(), 0.5), ("b".to_owned(), 0.5)];
    let first = registry.mixture(&half, None).unwrap().unwrap();
    let again = registry.mixture(&half, None).unwrap().unwrap();
    assert_eq!(first.mix.key, again.mix.key);
    let old = registry.one("a", None).unwrap().mix.key;
    assert_eq!(registry.one("a", Some("image")).unwrap().mix.key, old, "a LoRA knows no tasks");
    registry.load(&Wanted { in_place: true, ..wanted("a") }).unwrap();
    let new = registry.one("a", None).unwrap();
    assert_ne!(new.mix.key, old);
    assert_ne!(registry.mixture(&half, None).unwrap().unwrap().mix.key, first.mix.key);
    assert_eq!(new.parts, [("a".to_owned(), 2, 1.0)]);
    assert_eq!(metrics.task(TaskId(0)).name, BUNDLE);
}
