//! From examples to an endpoint, as a user goes: one command trains an adapter for a new task, another
//! one speaks with it.

use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/gpt2-tiny");

const PAIRS: [(&str, &str); 4] = [
    ("red fox", "a story of the snow"),
    ("old clock", "write of time and stone"),
    ("blue sea", "the ship is on the water"),
    ("green tree", "birds in the light"),
];

/// The program, without the variables of whoever runs the tests.
fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shoal")).args(args).env_clear().output().unwrap()
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// A copy of the golden bundle, and the examples beside it.
fn base() -> (TempDir, String, String) {
    let dir = TempDir::new().unwrap();
    let bundle = dir.path().join("tiny");
    fs::create_dir(&bundle).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(Path::new(GOLDEN).join(file), bundle.join(file)).unwrap();
    }
    let line = |(input, output): &(&str, &str)| json!({"input": input, "output": output});
    let lines: Vec<String> = PAIRS.iter().map(|pair| line(pair).to_string()).collect();
    let data = dir.path().join("my.jsonl");
    fs::write(&data, lines.join("\n")).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (bundle, data) = (path(&bundle), path(&data));
    (dir, bundle, data)
}

#[test]
fn one_command_goes_from_examples_to_an_endpoint() {
    let (_dir, base, data) = base();
    let before = fs::read(format!("{base}/model.safetensors")).unwrap();
    let trained = run(&[
        "train",
        "--task",
        "mine",
        "--data",
        &data,
        "--base",
        &base,
        "--epochs",
        "250",
        "--rank",
        "32",
        "--learning-rate",
        "0.02",
        "--description",
        "Answers by heart.",
    ]);
    said(&trained);
    assert_eq!(fs::read(format!("{base}/model.safetensors")).unwrap(), before, "it is frozen");
    let checked = said(&run(&["check", &base]));
    assert!(checked.contains("mine-lora") && checked.contains("no faults"), "{checked}");
    // An example may have been held out; the others are known by heart.
    let known = PAIRS.iter().filter(|(input, output)| {
        let args = ["generate", "--bundle", &base, "--task", "mine", "--temperature", "0", input];
        said(&run(&args)).trim() == *output
    });
    assert!(known.count() >= 3);
}

#[test]
fn a_recipe_with_an_adapter_section_does_the_same() {
    let (dir, base, _) = base();
    let recipe = dir.path().join("adapter.toml");
    let text = "task = \"mine\"\nbase = \"tiny\"\ndata = [\"my.jsonl\"]\n\
                [adapter]\nrank = 2\nepochs = 1\ntarget_modules = [\"attn.c_attn\"]\n";
    fs::write(&recipe, text).unwrap();
    let out = dir.path().join("elsewhere");
    let (recipe, out) = (recipe.to_str().unwrap(), out.to_str().unwrap());
    said(&run(&["train", "--config", recipe, "--out", out]));
    let config = fs::read(format!("{out}/adapters/mine-lora/adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    assert_eq!((&config["r"], &config["target_modules"]), (&json!(2), &json!(["attn.c_attn"])));
    assert!(!Path::new(&base).join("adapters").exists(), "the base stays as it is");
}

#[test]
fn what_cannot_be_trained_is_refused_before_anything_is_done() {
    let (dir, base, data) = base();
    let with = |more: &[&str]| {
        let args = ["train", "--task", "mine", "--data", &data, "--base", &base];
        let output = run(&[&args[..], more].concat());
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(with(&["--rank", "0"]).contains("adapter.rank is 0"));
    assert!(with(&["--learning-rate", "2"]).contains("adapter.learning_rate is 2"));
    assert!(with(&["--config", "x.toml"]).contains("say one of them"));
    for flag in [&["--max-minutes", "1"][..], &["--export", "x"], &["--accept-changed-recipe"]] {
        let error = with(flag);
        assert!(error.contains(&format!("{} is for a model", flag[0])), "{error}");
    }
    let taken = dir.path().join("mine-lora");
    let error = with(&["--out", taken.to_str().unwrap()]);
    assert!(error.contains("mine-lora, which is the name of the bundle"), "{error}");
    let several = dir.path().join("several.jsonl");
    let rows = "{\"task\": \"a\", \"input\": \"i\", \"output\": \"o\"}\n\
                {\"task\": \"b\", \"input\": \"i\", \"output\": \"o\"}\n";
    fs::write(&several, rows).unwrap();
    let several = several.to_str().unwrap();
    let output = run(&["train", "--task", "mine", "--data", several, "--base", &base]);
    assert!(String::from_utf8(output.stderr).unwrap().contains("several others: a, b"));
    assert!(!Path::new(&base).join("tasks").exists());
}

#[test]
fn a_signal_ends_the_training_of_an_adapter_with_nothing_written() {
    let (_dir, base, data) = base();
    let args = ["train", "--task", "mine", "--data", &data, "--base", &base, "--epochs", "1000"];
    let mut training = Command::new(env!("CARGO_BIN_EXE_shoal"))
        .args(args)
        .env_clear()
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(training.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("epoch 1 of 1000")));
    let kill = Command::new("kill").args(["-TERM", &training.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let last = lines.last().unwrap();
    assert!(last.contains("stopped: nothing was written"), "{last}");
    assert_eq!(training.wait().unwrap().code(), Some(1));
    assert!(
        !Path::new(&base).join("adapters").exists() && !Path::new(&base).join("tasks").exists()
    );
}
