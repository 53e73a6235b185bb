//! The program as a user runs it: arguments in; text, exit code and signals out.

use crate::harness::{Client, tokenizer_json};
use serde_json::{Value, json};
use shoal::model::init;
use shoal::model::spec::{Gate, Moe, Spec};
use shoal::text::Tokenizer;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/gpt2-tiny");

const TASK: &str = r#"
description = "Writes a prompt."
template = "{{ controls.words }}{{ input }}<|gen|>"
[controls.words]
kind = "integer"
range = [3, 60]
token = "<|words:{}|>"
[defaults]
max_tokens = 6
"#;

/// The program, without the variables of whoever runs the tests.
/// The program, with an environment of its own.
pub fn shoal(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    // The port for gRPC is a fixed one unless something is said.
    command.args(args).env_clear().env("SHOAL_GRPC_PORT", "0");
    command
}

fn run(args: &[&str]) -> Output {
    shoal(args).output().unwrap()
}

/// A program that runs no longer than its test, even if that fails.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It fails if the program has ended, which is what was wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A bundle with a small fresh model and one task, `image`.
fn bundle() -> TempDir {
    bundle_of(None)
}

/// The same, perhaps with experts.
fn bundle_of(moe: Option<Moe>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        layers: 1,
        heads: 2,
        width: 16,
        inner: 64,
        context: 64,
        vocab: 572,
        eps: 1e-5,
        eos: vec![0],
        tasks: if moe.is_some() { vec!["image".into()] } else { Vec::new() },
        moe,
    };
    init::random_bundle(dir.path(), &spec, 7, candle_core::DType::F32).unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer_json()).unwrap();
    fs::create_dir(dir.path().join("tasks")).unwrap();
    fs::write(dir.path().join("tasks/image.toml"), TASK).unwrap();
    dir
}

fn path(dir: &TempDir) -> &str {
    dir.path().to_str().unwrap()
}

#[test]
fn generate_writes_what_pytorch_wrote() {
    let reference = fs::read(Path::new(GOLDEN).with_file_name("reference.json")).unwrap();
    let reference: Value = serde_json::from_slice(&reference).unwrap();
    let prompt = &reference["prompts"][0];
    let input = prompt["text"].as_str().unwrap();
    let args = ["generate", "--bundle", GOLDEN, input, "--temperature", "0", "--max-tokens", "32"];
    let output = run(&args);
    assert_eq!(text(&output.stdout), format!("{}\n", prompt["greedy_text"].as_str().unwrap()));
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
}

#[test]
fn generate_ends_where_the_config_says() {
    let reference = fs::read(Path::new(GOLDEN).with_file_name("reference.json")).unwrap();
    let reference: Value = serde_json::from_slice(&reference).unwrap();
    let prompt = &reference["prompts"][0];
    let greedy: Vec<u32> = serde_json::from_value(prompt["greedy"].clone()).unwrap();
    let end = greedy[5];
    let before = greedy.iter().position(|&id| id == end).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(Path::new(GOLDEN).join(file), dir.path().join(file)).unwrap();
    }
    let config = dir.path().join("config.json");
    let mut edited: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    edited["eos_token_id"] = json!(end);
    fs::write(&config, edited.to_string()).unwrap();
    let input = prompt["text"].as_str().unwrap();
    let args = ["generate", "--bundle", path(&dir), input, "--temperature", "0"];
    let output = run(&args);
    let tokenizer = Tokenizer::load(Path::new(GOLDEN).join("tokenizer.json")).unwrap();
    let expected = tokenizer.decode(&greedy[..before]);
    assert_eq!(text(&output.stdout), format!("{expected}\n"), "{}", text(&output.stderr));
}

#[test]
fn generate_takes_controls_and_seeds() {
    let dir = bundle();
    let generate = |more: &[&str]| {
        run(&[&["generate", "a fox", "--bundle", path(&dir), "--task", "image"], more].concat())
    };
    let first = generate(&["--words", "20", "--seed", "5"]);
    assert_eq!(first.status.code(), Some(0), "{}", text(&first.stderr));
    assert_eq!(first.stdout, generate(&["--control", "words=20", "--seed", "5"]).stdout);
    let three = text(&generate(&["--n", "3", "--seed", "5", "--max-tokens", "1"]).stdout);
    assert!(three.lines().count() >= 3, "{three}");
    for (args, want) in [
        (["--words", "99"], "controls.words is 99; allowed: an integer 3 to 60"),
        (["--control", "tone=calm"], "controls.tone is unknown to image; allowed: words"),
        (["--temperature", "3"], "temperature is 3; allowed: 0 to 2"),
        (["--task", "video"], "cannot be used multiple times"),
    ] {
        let output = generate(&args);
        assert!(text(&output.stderr).contains(want), "{}", text(&output.stderr));
        let code = if want.contains("multiple") { 64 } else { 1 };
        assert_eq!(output.status.code(), Some(code));
    }
}

#[test]
fn check_says_what_a_bundle_is() {
    let dir = bundle();
    let output = run(&["check", path(&dir)]);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for want in [
        "1 layers of 2 heads, width 16",
        "parameters  13 488",
        "572 tokens, 61 of them special",
        "image     Writes a prompt.",
        "words: an integer 3 to 60 (default none)",
        "no faults",
    ] {
        assert!(said.contains(want), "missing: {want}\nin:\n{said}");
    }
}

#[test]
fn check_describes_experts() {
    let moe = Moe { layers: vec![0], experts: 4, top_k: 2, gate: Gate::TokenTask };
    let said = text(&run(&["check", path(&bundle_of(Some(moe)))]).stdout);
    let expected = "experts     4 in layers 0, top 2, chosen by a token_task gate over image\n";
    assert!(said.contains(expected) && said.contains("no faults"), "{said}");
    assert!(said.contains(" of them active for a token\n"), "{said}");
}

#[test]
fn check_finds_all_faults_at_once() {
    let dir = bundle();
    let config = dir.path().join("config.json");
    let mut edited: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    edited["n_positions"] = json!(65);
    fs::write(&config, edited.to_string()).unwrap();
    let task = TASK.replace("[3, 60]", "[3, 61]").replace("max_tokens = 6", "max_tokens = -6");
    fs::write(dir.path().join("tasks/image.toml"), task).unwrap();
    fs::write(dir.path().join("tasks/video.toml"), "template = \"{{ inptu }}\"").unwrap();
    let output = run(&["check", path(&dir)]);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for want in ["transformer.wpe.weight", "tasks/image.toml: defaults.max_tokens"] {
        assert!(said.contains(want), "missing: {want}\nin:\n{said}");
    }
    fs::write(dir.path().join("tasks/image.toml"), TASK.replace("60", "61")).unwrap();
    let said = text(&run(&["check", path(&dir)]).stdout);
    for want in ["<|words:61|> is no special token", "tasks/video.toml: template: "] {
        assert!(said.contains(want), "missing: {want}\nin:\n{said}");
    }
    assert_eq!(run(&["check", "no/such/folder"]).status.code(), Some(1));
}

#[test]
fn check_lists_adapters_and_their_faults() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |from: &Path, to: &Path| {
        fs::create_dir_all(to).unwrap();
        for file in fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    };
    copy(Path::new(GOLDEN), dir.path());
    let goldens = Path::new(GOLDEN).with_file_name("adapters");
    for name in ["lora-attn", "lora-all"] {
        copy(&goldens.join(name), &dir.path().join("adapters").join(name));
    }
    fs::create_dir(dir.path().join("tasks")).unwrap();
    let task = |adapter: &str| {
        fs::write(dir.path().join("tasks/image.toml"), format!("adapter = \"{adapter}\"")).unwrap();
        let output = run(&["check", path(&dir)]);
        (output.status.code(), text(&output.stdout))
    };
    let (code, said) = task("lora-all");
    assert_eq!(code, Some(0), "{said}");
    for want in [
        "lora-attn lora of rank 4, ",
        "lora-all  lora of rank 8, ",
        "on attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj",
        "adapter: lora-all",
        "no faults",
    ] {
        assert!(said.contains(want), "missing: {want}\nin:\n{said}");
    }
    let config = dir.path().join("adapters/lora-attn/adapter_config.json");
    let edited = fs::read_to_string(&config).unwrap().replace("\"r\": 4", "\"r\": 5");
    fs::write(config, edited).unwrap();
    fs::create_dir(dir.path().join("adapters/image")).unwrap();
    let (code, said) = task("lora-none");
    assert_eq!(code, Some(1), "{said}");
    for want in [
        "tasks/image.toml: adapter is \"lora-none\"; allowed: image, lora-all, lora-attn",
        "adapters/image: the name is a task's",
        "adapters/image/adapter_config.json: ",
        "adapters/lora-attn/adapter_model.safetensors: base_model.model.transformer.h.0.",
        "lora-all  lora of rank 8, ",
    ] {
        assert!(said.contains(want), "missing: {want}\nin:\n{said}");
    }
}

#[test]
fn a_wrong_configuration_ends_with_64_and_all_its_faults() {
    let mut command = shoal(&["serve", "--keep-alive", "0"]);
    let output = command.env("SHOAL_PORT", "x").env("SHOAL_LOG_FORMAT", "xml").output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(64));
    for want in
        ["SHOAL_PORT is x", "SHOAL_LOG_FORMAT is xml: allowed: pretty, json", "--keep-alive"]
    {
        assert!(said.contains(want), "missing: {want}\nin:\n{said}");
    }
    assert_eq!(run(&["sreve"]).status.code(), Some(64));
    let printed = run(&["serve", "--print-config", "--port", "9"]);
    assert_eq!(printed.status.code(), Some(0));
    assert!(text(&printed.stdout).contains("\nport = 9\n"));
    assert_eq!(run(&["--help"]).status.code(), Some(0));
}

#[tokio::test]
async fn serve_says_where_answers_and_leaves_on_sigterm() {
    let dir = bundle();
    let server = shoal(&["serve", path(&dir), "--port", "0", "--served-model-name", "tiny"])
        .env("SHOAL_LOG", "off")
        .stdout(Stdio::piped())
        .spawn();
    let Running(server) = &mut Running(server.unwrap());
    let (line, client) = announced(server);
    assert!(line.starts_with("serving tiny (0.0M parameters, f32; tasks: image)"), "{line}");
    let body = json!({"input": "a fox<|gen|>", "controls": {"words": 20}, "max_tokens": 4,
        "ignore_eos": true});
    let reply = client.post("/v1/tasks/image/generate", &body).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.json()["usage"]["completion_tokens"], 4);
    terminate(server);
}

/// What a server says once it is ready, and a client of it.
pub fn announced(server: &mut Child) -> (String, Client) {
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (_, address) = line.split_once("http://").unwrap();
    let (address, _) = address.split_once(',').unwrap();
    let client = Client(address.parse().unwrap());
    (line, client)
}

/// Ends a server, which must end well.
pub fn terminate(server: &mut Child) {
    let kill = Command::new("kill").args(["-TERM", &server.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(server.wait().unwrap().code(), Some(0));
}

#[tokio::test]
async fn keys_are_asked_for_and_never_said() {
    let dir = bundle();
    let (keys, log) = (dir.path().join("keys"), dir.path().join("log"));
    fs::write(&keys, "# two\nweb: sk-0123456789abcdef\n").unwrap();
    let args = ["serve", path(&dir), "--port", "0", "--api-key-file", keys.to_str().unwrap()];
    let server = shoal(&args)
        .args(["--enable-adapter-admin", "--host", "0.0.0.0"])
        .env("SHOAL_API_KEYS", "sk-second0123456789,ci: sk-third0123456789")
        .env("SHOAL_ADMIN_KEY", "sk-admin0123456789")
        .env("SHOAL_LOG", "trace")
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&log).unwrap())
        .spawn();
    let Running(server) = &mut Running(server.unwrap());
    let (_, client) = announced(server);
    let ask = async |key: &str, path: &str| {
        let value = format!("Bearer {key}");
        client.get_with(path, &[("authorization", &value)]).await.status
    };
    for key in ["sk-0123456789abcdef", "sk-second0123456789", "sk-third0123456789"] {
        assert_eq!((ask(key, "/info").await, ask(key, "/v1/adapters").await), (200, 403));
    }
    assert_eq!(ask("sk-admin0123456789", "/v1/adapters").await, 200);
    assert_eq!(ask("sk-unknown0123456789", "/info").await, 401);
    terminate(server);
    let said = fs::read_to_string(&log).unwrap();
    assert!(said.contains("key=\"ci\"") && !said.contains("sk-"), "{said}");
    assert!(!said.contains("ANYBODY"), "{said}");
}

#[tokio::test]
async fn serving_everybody_is_said_aloud() {
    let dir = bundle();
    for (host, loud) in [("0.0.0.0", true), ("127.0.0.1", false)] {
        let log = dir.path().join("log");
        let server = shoal(&["serve", path(&dir), "--port", "0", "--host", host])
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log).unwrap())
            .spawn();
        let Running(server) = &mut Running(server.unwrap());
        announced(server);
        terminate(server);
        let said = fs::read_to_string(&log).unwrap();
        assert_eq!(said.contains("ANYBODY WHO REACHES 0.0.0.0:"), loud, "{said}");
    }
}

#[test]
fn no_complaint_about_the_configuration_says_a_key() {
    let dir = bundle();
    let file = dir.path().join("shoal.toml");
    let serve = |environment: &[(&str, &str)], more: &[&str]| {
        let mut command = shoal(&["serve", path(&dir), "--port", "0"]);
        command.args(more).envs(environment.iter().copied());
        let output = command.output().unwrap();
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(!said.contains("sk-"), "{said}");
        (output.status.code(), said)
    };
    let config = ["--config", file.to_str().unwrap()];
    for (toml, want) in [
        ("port = 1\nadmin_key = sk-0123456789abcdef\n", "shoal.toml: line 2: "),
        ("admin_key = [\"sk-0123456789abcdef\", \"sk-1\"]", "admin_key is not possible"),
        ("api_keys = { web = \"sk-0123456789abcdef\" }", "api_keys must be a value or a list"),
    ] {
        fs::write(&file, toml).unwrap();
        let (code, said) = serve(&[], &config);
        assert!(code == Some(64) && said.contains(want), "{said}");
    }
    for (environment, want) in [
        (("SHOAL_API_KEYS", "sk-short"), "SHOAL_API_KEYS, key 1; allowed: 16 or more"),
        (("SHOAL_API_KEY", "sk-sho\u{e9}t-and-long-enough"), "SHOAL_API_KEYS, key 1; allowed"),
        (("SHOAL_API_KEYS", " , "), "has no key"),
    ] {
        let (code, said) = serve(&[environment], &[]);
        assert!(code == Some(1) && said.contains(want), "{said}");
    }
    let secrets =
        [("SHOAL_API_KEY", "sk-0123456789abcdef"), ("SHOAL_ADMIN_KEY", "sk-admin0123456789")];
    let (code, printed) = serve(&secrets, &["--print-config", "--cors-allow-origin", "*"]);
    assert!(code == Some(0) && printed.contains("cors_allow_origin = [\"*\"]"), "{printed}");
}

/// A recipe of more steps than anybody waits for, with its data.
fn endless_recipe() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let data = "{\"text\": \"a red fox trots over fresh snow at dawn\"}\n".repeat(20);
    fs::create_dir(dir.path().join("data")).unwrap();
    fs::write(dir.path().join("data/rows.jsonl"), data).unwrap();
    let sha256 = shoal::train::data::sha256_of(&dir.path().join("data/rows.jsonl")).unwrap();
    let recipe = format!(
        r#"
        name = "endless"
        seed = 1
        model = {{ layers = 1, heads = 2, width = 16, context = 16 }}
        tokenizer = {{ size = 400, data = ["rows"], max_megabytes = 1 }}
        held_out = {{ fraction = 0.0 }}
        tasks = {{ image = [] }}
        [[data]]
        name = "rows"
        file = "rows.jsonl"
        sha256 = "{sha256}"
        [[stage]]
        name = "only"
        steps = 1000000000
        batch_tokens = 32
        micro_tokens = 32
        learning_rate = 1e-3
        final_rate = 1.0
        warmup = 2
        mix = [{{ data = "rows", form = "text", weight = 1.0 }}]
        "#
    );
    fs::write(dir.path().join("train.toml"), recipe).unwrap();
    dir
}

#[test]
fn training_stops_with_a_checkpoint_on_either_signal() {
    let dir = endless_recipe();
    let (recipe, out) = (dir.path().join("train.toml"), dir.path().join("out"));
    let args = ["train", "--config", recipe.to_str().unwrap(), "--out", out.to_str().unwrap()];
    for (signal, start) in [("-TERM", "from step 0"), ("-INT", "from step ")] {
        let training = shoal(&args).stderr(Stdio::piped()).spawn();
        let Running(training) = &mut Running(training.unwrap());
        let mut lines = BufReader::new(training.stderr.take().unwrap()).lines().map(Result::unwrap);
        let first = lines.next().unwrap();
        assert!(first.contains(start), "{first}");
        // Ten steps on, so that the second run cannot have started where the first did.
        assert!(lines.any(|line| line.contains("only step")));
        let kill =
            Command::new("kill").args([signal, &training.id().to_string()]).status().unwrap();
        assert!(kill.success());
        let last = lines.last().unwrap();
        assert!(last.contains("the same command goes on from"), "{last}");
        assert_eq!(training.wait().unwrap().code(), Some(0), "{signal}");
        assert!(out.join("checkpoint.safetensors").is_file());
    }
    let log = fs::read_to_string(out.join("log.jsonl")).unwrap();
    let entries = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let steps: Vec<u64> = entries
        .filter(|entry| entry["kind"] == "step")
        .map(|entry| entry["total_steps"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>(), "none lost, none twice");
}

#[test]
fn serve_names_what_it_cannot_do() {
    let dir = bundle();
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let output = run(&["serve", path(&dir), "--port", "0", "--no-grpc"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("tokenizer.json: No such file"));
}
