//! `shoal inspect` as a user runs it: tables that agree with the weights, and a picture.

use crate::harness::tokenizer_json;
use candle_core::{DType, Device, Tensor, safetensors};
use serde_json::json;
use shoal::model::init;
use shoal::model::spec::{Gate, Moe, Spec};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const TASKS: [&str; 2] = ["image", "music"];

/// What the program says of this bundle, with its exit code.
fn inspect(bundle: &Path, picture: &Path) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    command.arg("inspect").arg(bundle).arg("--out").arg(picture).args(["--tokens", "2"]);
    let output = command.env_clear().output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// The numbers below this title, by the name of their row.
fn table<'a>(said: &'a str, title: &str) -> BTreeMap<&'a str, Vec<f64>> {
    let mut lines = said.lines().skip_while(|line| *line != title).skip(2).peekable();
    assert!(lines.peek().is_some(), "no {title} in\n{said}");
    let row = |line: &'a str| {
        let (name, numbers) = line.trim_start().split_once("  ").unwrap();
        (name, numbers.split_whitespace().map(|number| number.parse().unwrap()).collect())
    };
    lines.take_while(|line| !line.is_empty()).map(row).collect()
}

/// Each tag of the picture is closed in its turn, and each of `names` stands in a text of its own.
fn check_picture(path: &Path, names: &[&str]) {
    let picture = fs::read_to_string(path).unwrap();
    let mut open = Vec::new();
    for tag in picture.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').unwrap();
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "{picture}"),
            None if tag.ends_with('/') => {}
            None => open.push(tag.split_whitespace().next().unwrap()),
        }
    }
    assert!(picture.starts_with("<svg") && open.is_empty(), "{open:?} in {picture}");
    let texts: Vec<&str> = picture.lines().map(str::trim).collect();
    for name in names {
        assert!(texts.contains(name), "no {name} in {picture}");
    }
}

/// A small fresh model whose gates, in both layers, see the task alone and choose one expert.
fn bundle_of_experts() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        layers: 2,
        heads: 2,
        width: 16,
        inner: 32,
        context: 64,
        vocab: 572,
        eps: 1e-5,
        eos: vec![0],
        tasks: TASKS.map(str::to_owned).into(),
        moe: Some(Moe { layers: vec![0, 1], experts: 3, top_k: 1, gate: Gate::Task }),
    };
    init::random_bundle(dir.path(), &spec, 7, DType::F32).unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer_json()).unwrap();
    fs::create_dir(dir.path().join("tasks")).unwrap();
    for task in TASKS {
        fs::write(dir.path().join(format!("tasks/{task}.toml")), "").unwrap();
    }
    dir
}

#[test]
fn experts_are_where_the_gates_send_a_tasks_rows() {
    let dir = bundle_of_experts();
    let picture = dir.path().join("picture.svg");
    let (code, said, errors) = inspect(dir.path(), &picture);
    assert_eq!((code, errors.as_str()), (Some(0), ""), "{said}");
    let tensors = safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let mut chosen = Vec::new();
    for layer in 0..2 {
        let bias = &tensors[&format!("transformer.h.{layer}.moe.gate.task_bias")];
        let rows = table(&said, &format!("experts, layer {layer}"));
        for (task, expert) in TASKS.iter().zip(bias.argmax(1).unwrap().to_vec1::<u32>().unwrap()) {
            let mut expected = vec![0.0; 4];
            expected[expert as usize] = 1.0;
            assert_eq!(rows[task], expected, "{task} in layer {layer} of\n{said}");
            chosen.push((*task, expert as usize));
        }
    }
    let all = table(&said, "experts, all layers");
    assert_eq!(all.keys().copied().collect::<Vec<_>>(), ["all tasks", "image", "music"]);
    for (name, row) in &all {
        let (entropy, shares) = row.split_last().unwrap();
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 2e-3, "{name} in\n{said}");
        assert!((0.0..=1.0).contains(entropy), "{name} in\n{said}");
    }
    // As many rows in each layer: none is left out of the last.
    for (task, expert) in chosen {
        let layers = all[task][..3].iter().filter(|share| **share > 0.0).count() as f64;
        assert_eq!(all[task][expert], 1.0 / layers, "{task} in\n{said}");
    }
    check_picture(&picture, &["image", "music", "experts, layer 1", "2"]);
}

/// The golden model with the adapters `lora-all` and, a mixture of task adapters, `mix`.
fn bundle_of_adapters() -> TempDir {
    let goldens = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let dir = tempfile::tempdir().unwrap();
    let adapters = dir.path().join("adapters");
    let copy = |from: PathBuf, to: &Path| {
        fs::create_dir_all(to).unwrap();
        for file in fs::read_dir(from).unwrap().map(Result::unwrap) {
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    };
    copy(goldens.join("gpt2-tiny"), dir.path());
    copy(goldens.join("adapters/lora-all"), &adapters.join("lora-all"));
    write_mixture(&adapters.join("mix"));
    fs::create_dir(dir.path().join("tasks")).unwrap();
    for (task, adapter) in TASKS.iter().zip(["mix", "lora-all"]) {
        let text = format!("adapter = \"{adapter}\"");
        fs::write(dir.path().join(format!("tasks/{task}.toml")), text).unwrap();
    }
    dir
}

/// Two experts on `c_attn` of all three layers: `image` takes 1/4 and 3/4 of them in the first, `music`
/// 9/10 and 1/10; both take halves in the others.
fn write_mixture(dir: &Path) {
    fs::create_dir(dir).unwrap();
    let tau = 0.5f32;
    let config = json!({"peft_type": "MTA", "r": 2, "num_experts": 2, "lora_alpha": 4, "tau": tau,
        "tasks": TASKS, "target_modules": ["c_attn"]});
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let mut tensors = HashMap::new();
    for layer in 0..3 {
        let module = format!("base_model.model.transformer.h.{layer}.attn.c_attn");
        let name = |part: &str| format!("{module}.{part}.weight");
        let gate = match layer {
            0 => [[0.0, tau * 3f32.ln()], [tau * 9f32.ln(), 0.0]],
            _ => [[0.5, 0.5], [-1.0, -1.0]],
        };
        tensors.insert(name("mta_gate"), Tensor::new(&gate, &Device::Cpu).unwrap());
        let ones = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        for expert in ["0", "1"] {
            tensors.insert(name(&format!("mta_A.{expert}")), ones((2, 64)));
            tensors.insert(name(&format!("mta_B.{expert}")), ones((192, 2)));
        }
    }
    safetensors::save(&tensors, dir.join("adapter_model.safetensors")).unwrap();
}

#[test]
fn adapters_are_shown_by_task() {
    let dir = bundle_of_adapters();
    let picture = dir.path().join("picture.svg");
    let (code, said, errors) = inspect(dir.path(), &picture);
    assert_eq!((code, errors.as_str()), (Some(0), ""), "{said}");
    let used = table(&said, "adapters");
    assert_eq!((&used["image"], &used["music"]), (&vec![0.0, 1.0], &vec![1.0, 0.0]), "{said}");
    let mixed = table(&said, "adapter mix, its experts");
    // The mean of the first layer's gates, over tau, is (ln 9 / 2, ln 3 / 2).
    let other = 3.0 / (3.0 + 3f64.sqrt());
    for (task, first) in [("image", 0.25), ("music", 0.9), ("any other", other)] {
        let mean = (first + 0.5 + 0.5) / 3.0;
        assert!((mixed[task][0] - mean).abs() < 1e-3, "{task}, not {mean}, in\n{said}");
        assert!((mixed[task][1] - (1.0 - mean)).abs() < 1e-3, "{task} in\n{said}");
    }
    check_picture(&picture, &["image", "music", "any other", "lora-all", "mix"]);
}

#[test]
fn what_has_nothing_to_show_or_is_broken_says_so() {
    let dir = bundle_of_adapters();
    let picture = dir.path().join("picture.svg");
    fs::remove_file(dir.path().join("adapters/mix/adapter_config.json")).unwrap();
    let (code, _, errors) = inspect(dir.path(), &picture);
    assert_eq!(code, Some(1));
    assert!(errors.contains("adapters/mix/adapter_config.json: "), "{errors}");
    for folder in ["adapters", "tasks"] {
        fs::remove_dir_all(dir.path().join(folder)).unwrap();
    }
    let (code, said, errors) = inspect(dir.path(), &picture);
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    assert!(said.ends_with(" has neither experts nor adapters\n") && said.lines().count() == 1);
    assert!(!picture.exists());
}
