//! Folders as PEFT would write them, and what is refused by name.

use super::*;
use crate::kernels::{LowRankGroup, Precision, low_rank_add};
use candle_core::{DType, Device, Tensor};
use serde_json::json;
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

const PREFIX: &str = "base_model.model.transformer.";

fn shape() -> Shape {
    Shape { layers: 3, width: 8, inner: 32, moe_layers: Vec::new(), precision: Precision::F32 }
}

/// What PEFT writes, with other values for some keys.
fn config(changes: &Value) -> Value {
    let mut config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2", "bias": "none",
        "base_model_name_or_path": "gpt2", "revision": null, "auto_mapping": null,
        "inference_mode": true, "init_lora_weights": true, "fan_in_fan_out": true,
        "target_modules": ["c_attn"], "r": 4, "lora_alpha": 8, "lora_dropout": 0.1,
        "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": false, "use_dora": false,
        "megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {},
        "modules_to_save": null, "layers_to_transform": null, "layers_pattern": null,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn random(rows: usize, columns: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap()
}

fn ones(rows: usize, columns: usize) -> Tensor {
    Tensor::ones((rows, columns), DType::F32, &Device::Cpu).unwrap()
}

type Tensors = HashMap<String, Tensor>;

/// A and B of one linear layer, B of ones.
fn factors(prefix: &str, layer: usize, module: Module, rank: usize) -> Tensors {
    let (inner, outer) = shape().sizes(module);
    let name = |factor| format!("{prefix}h.{layer}.{}.{factor}.weight", module.name());
    let both = [(name("lora_A"), random(rank, inner)), (name("lora_B"), ones(outer, rank))];
    both.into_iter().collect()
}

fn c_attn() -> Tensors {
    (0..3).flat_map(|layer| factors(PREFIX, layer, Module::Qkv, 4)).collect()
}

fn folder(config: &Value, tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(config::FILE), config.to_string()).unwrap();
    candle_core::safetensors::save(tensors, dir.path().join(files::FILE)).unwrap();
    dir
}

fn load_with(config: &Value, tensors: &Tensors) -> Result<Loaded, Faults> {
    load(folder(config, tensors).path(), &shape(), &Limits::default())
}

/// The only fault of a folder.
fn fault(config: &Value, tensors: &Tensors) -> String {
    let faults = load_with(config, tensors).unwrap_err().0;
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults[0].clone()
}

/// The first row of B, which is its scale again and again.
fn scales(loaded: &Loaded, layer: usize, module: Module) -> Vec<f32> {
    let ids = Tensor::new(&[0u32], &Device::Cpu).unwrap();
    let b = loaded.deltas(None).get(layer, module).unwrap().b.embed(&ids).unwrap();
    b.flatten_all().unwrap().to_vec1().unwrap()
}

/// Layer, module, rank and scale.
type Site = (usize, Module, usize, f32);

fn all_layers(module: Module, rank: usize, scale: f32) -> Vec<Site> {
    (0..3).map(|layer| (layer, module, rank, scale)).collect()
}

/// Configurations, and what PEFT 0.21 made of them on a GPT-2 of three layers.
fn peft_says() -> Vec<(Value, Vec<Site>)> {
    use Module::{AttnProj, FcIn, FcOut, Qkv};
    let every = |modules: &[Module]| -> Vec<Site> {
        modules.iter().flat_map(|&module| all_layers(module, 4, 2.0)).collect()
    };
    let patterns = json!({"target_modules": ["c_proj", "c_attn"],
        "rank_pattern": {"mlp.c_proj": 2, "c_proj": 3},
        "alpha_pattern": {"c_proj": 5, "mlp.c_proj": 7}});
    let by_pattern =
        [all_layers(Qkv, 4, 2.0), all_layers(AttnProj, 3, 5.0 / 3.0), all_layers(FcOut, 2, 2.5)];
    let root = json!({"target_modules": ["c_proj", "c_attn"], "use_rslora": true,
        "rank_pattern": {"h.1.*": 6}, "alpha_pattern": {r"h\.[01]\.attn\.c_(attn|proj)": 3}});
    let by_root = [(0, 4, 1.5, 4.0), (1, 6, 1.224_745, 3.265_986), (2, 4, 4.0, 4.0)];
    let by_root = by_root.into_iter().flat_map(|(layer, rank, attn, mlp)| {
        [(layer, Qkv, rank, attn), (layer, AttnProj, rank, attn), (layer, FcOut, rank, mlp)]
    });
    vec![
        (json!({}), every(&[Qkv])),
        (json!({"target_modules": ["c_proj"]}), every(&[AttnProj, FcOut])),
        (json!({"target_modules": ["attn.c_proj", "mlp.c_fc"]}), every(&[AttnProj, FcIn])),
        (
            json!({"target_modules": ["transformer.h.1.mlp.c_proj", "q_proj"]}),
            vec![(1, FcOut, 4, 2.0)],
        ),
        (json!({"target_modules": "all-linear"}), every(&Module::ALL)),
        (
            json!({"target_modules": r".*\.h\.[02]\.(attn\.c_attn|mlp\.c_fc)"}),
            vec![(0, Qkv, 4, 2.0), (0, FcIn, 4, 2.0), (2, Qkv, 4, 2.0), (2, FcIn, 4, 2.0)],
        ),
        (json!({"target_modules": r"^(?!.*attn).*c_proj$"}), every(&[FcOut])),
        (
            json!({"target_modules": r".*c_(attn|proj)", "exclude_modules": ["mlp.c_proj"]}),
            every(&[Qkv, AttnProj]),
        ),
        (
            json!({"target_modules": ["c_attn", "c_fc"], "exclude_modules": r".*\.1\..*"}),
            vec![(0, Qkv, 4, 2.0), (0, FcIn, 4, 2.0), (2, Qkv, 4, 2.0), (2, FcIn, 4, 2.0)],
        ),
        (
            json!({"target_modules": ["c_attn", "transformer.h.0.mlp.c_fc"],
                "layers_to_transform": [1, 7]}),
            vec![(0, FcIn, 4, 2.0), (1, Qkv, 4, 2.0)],
        ),
        (
            json!({"target_modules": ["c_fc"], "layers_to_transform": 2, "layers_pattern": "h"}),
            vec![(2, FcIn, 4, 2.0)],
        ),
        (
            json!({"target_modules": ["c_fc"], "layers_to_transform": [0, 1],
                "layers_pattern": ["layers", "h"]}),
            vec![(0, FcIn, 4, 2.0), (1, FcIn, 4, 2.0)],
        ),
        (json!({"target_modules": ["c_fc"], "layers_to_transform": []}), every(&[FcIn])),
        (patterns, by_pattern.concat()),
        (root, by_root.collect()),
        (
            json!({"rank_pattern": {"attn": 9, "transformer.h.2.attn.c_attn": 1}}),
            vec![(0, Qkv, 4, 2.0), (1, Qkv, 4, 2.0), (2, Qkv, 1, 8.0)],
        ),
    ]
}

#[test]
fn targets_ranks_and_scales_are_pefts() {
    for (changes, sites) in peft_says() {
        let tensors =
            sites.iter().flat_map(|&(layer, module, rank, _)| factors(PREFIX, layer, module, rank));
        let loaded = load_with(&config(&changes), &tensors.collect());
        let loaded = loaded.unwrap_or_else(|faults| panic!("{changes}: {faults}"));
        let deltas = loaded.deltas(None);
        for (layer, module) in (0..3).flat_map(|layer| Module::ALL.map(|module| (layer, module))) {
            let expected = sites.iter().find(|site| (site.0, site.1) == (layer, module));
            assert_eq!(deltas.get(layer, module).is_some(), expected.is_some(), "{changes}");
            if let Some(&(_, _, rank, scale)) = expected {
                let found = scales(&loaded, layer, module);
                assert_eq!(found.len(), rank, "{changes}");
                assert!(found.iter().all(|s| (s - scale).abs() < 1e-6), "{changes}: {found:?}");
            }
        }
        let rank = sites.iter().map(|site| site.2).max().unwrap();
        assert_eq!((loaded.kind, loaded.rank), (Kind::Lora, rank));
    }
}

#[test]
fn names_may_lack_the_models_prefix_and_types_may_be_mixed() {
    let mut tensors: Tensors =
        (0..3).flat_map(|layer| factors("base_model.model.", layer, Module::Qkv, 4)).collect();
    let types = [DType::F16, DType::BF16, DType::F32];
    for (tensor, dtype) in tensors.values_mut().zip(types.into_iter().cycle()) {
        *tensor = tensor.to_dtype(dtype).unwrap();
    }
    let loaded = load_with(&config(&json!({})), &tensors).unwrap();
    assert_eq!(loaded.modules(), [Module::Qkv]);
    assert_eq!(scales(&loaded, 1, Module::Qkv), [2.0; 4]);
    tensors.extend(factors(PREFIX, 1, Module::Qkv, 4));
    assert!(load_with(&config(&json!({})), &tensors).is_err(), "both prefixes");
}

/// Memory of all that an adapter holds, what tasks share once.
fn held(loaded: &Loaded) -> usize {
    let mut seen = HashMap::new();
    let tasks = loaded.tasks.iter().map(|task| Some(task.as_str())).chain([None]);
    for deltas in tasks.map(|task| loaded.deltas(task)) {
        for (layer, module) in (0..3).flat_map(|layer| Module::ALL.map(|module| (layer, module))) {
            for w in deltas.get(layer, module).into_iter().flat_map(|change| [&change.a, &change.b])
            {
                seen.insert(Arc::as_ptr(w), w.bytes());
            }
        }
    }
    seen.values().sum()
}

#[test]
fn its_size_is_what_it_holds() {
    for precision in [Precision::F32, Precision::Bf16] {
        let shape = Shape { precision, ..shape() };
        for (config, tensors) in [(config(&json!({})), c_attn()), mixture()] {
            let dir = folder(&config, &tensors);
            let loaded = load(dir.path(), &shape, &Limits::default()).unwrap();
            assert_eq!(loaded.bytes, held(&loaded), "{precision:?}");
        }
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let cases = [
        ("peft_type", json!({"peft_type": "IA3"}), "LORA, MTA"),
        ("peft_type", json!({"peft_type": null}), "missing"),
        ("use_dora", json!({"use_dora": true}), "not supported"),
        ("modules_to_save", json!({"modules_to_save": ["lm_head"]}), "not supported"),
        ("bias", json!({"bias": "lora_only"}), "none"),
        ("lora_bias", json!({"lora_bias": true}), "not supported"),
        ("layer_replication", json!({"layer_replication": [[0, 2]]}), "not supported"),
        ("target_parameters", json!({"target_parameters": ["x"]}), "not supported"),
        ("trainable_token_indices", json!({"trainable_token_indices": [1]}), "not supported"),
        ("alora_invocation_tokens", json!({"alora_invocation_tokens": [1]}), "not supported"),
        ("use_bdlora", json!({"use_bdlora": {"nblocks": 2}}), "not supported"),
        ("brand_new", json!({"brand_new": 0}), "not supported"),
        ("init_lora_weights", json!({"init_lora_weights": "pissa"}), "change the base model"),
        ("use_rslora", json!({"use_rslora": 1}), "true, false"),
        ("r is 0", json!({"r": 0}), "1 or more"),
        ("r is 4.5", json!({"r": 4.5}), "1 or more"),
        ("r makes", json!({"r": 257}), "allowed: up to 256"),
        ("r makes", json!({"r": 1_000_000_000_000_000_000u64}), "allowed: up to 256"),
        ("rank_pattern.c_attn", json!({"rank_pattern": {"c_attn": 0}}), "1 or more"),
        ("rank_pattern", json!({"rank_pattern": [1]}), "an object"),
        ("rank_pattern", json!({"rank_pattern": {"(": 2}}), "regular expression"),
        ("alpha_pattern.x", json!({"alpha_pattern": {"x": "1"}}), "a number"),
        ("lora_alpha", json!({"lora_alpha": null}), "missing"),
        ("target_modules", json!({"target_modules": null}), "missing"),
        ("target_modules", json!({"target_modules": ["wte", "c_attn"]}), "transformer.wte"),
        ("target_modules", json!({"target_modules": ["lm_head"]}), "lm_head"),
        ("target_modules", json!({"target_modules": ["attn"]}), "transformer.h.0.attn"),
        ("target_modules", json!({"target_modules": ".*"}), "transformer.ln_f"),
        ("target_modules", json!({"target_modules": ["nothing"]}), "names no layer"),
        ("target_modules", json!({"target_modules": [1]}), "list of strings"),
        ("target_modules", json!({"target_modules": "("}), "regular expression"),
        (
            "target_modules",
            json!({"target_modules": r"(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5x"}),
            "quick to match",
        ),
        ("target_modules", json!({"layers_to_transform": [9]}), "names no layer"),
        ("target_modules", json!({"layers_to_transform": [-1]}), "names no layer"),
        (
            "target_modules",
            json!({"layers_to_transform": [0], "layers_pattern": "layers|h"}),
            "names no layer",
        ),
        ("layers_to_transform", json!({"layers_to_transform": ["0"]}), "integers"),
        ("layers_to_transform", json!({"layers_pattern": "h"}), "missing"),
        (
            "layers_to_transform",
            json!({"target_modules": ".*c_attn", "layers_to_transform": [0]}),
            "a string",
        ),
    ];
    for (key, changes, allowed) in cases {
        let faults = load_with(&config(&changes), &c_attn()).unwrap_err().0;
        let named = faults.iter().find(|f| f.contains(key) && f.contains(allowed));
        let fault = named.unwrap_or_else(|| panic!("{key}, {allowed} not in {faults:?}"));
        assert!(fault.starts_with("adapter_config.json: "), "{fault}");
    }
}

#[test]
fn all_faults_come_at_once() {
    let changes = json!({"use_dora": true, "bias": "all", "modules_to_save": ["wte"]});
    let mut tensors = c_attn();
    tensors.remove(&format!("{PREFIX}h.1.attn.c_attn.lora_B.weight"));
    tensors.insert("other".into(), ones(1, 1));
    let faults = load_with(&config(&changes), &tensors).unwrap_err().0;
    assert_eq!(faults.len(), 5, "{faults:?}");
}

#[test]
fn tensors_must_be_those_that_the_configuration_says() {
    let a = format!("{PREFIX}h.1.attn.c_attn.lora_A.weight");
    let changed = |edit: &dyn Fn(&mut Tensors)| {
        let mut tensors = c_attn();
        edit(&mut tensors);
        fault(&config(&json!({})), &tensors)
    };
    let says = |fault: String, words: &str| {
        assert!(fault.contains(&a) && fault.contains(words), "{fault}, not {words}");
    };
    says(changed(&|t| drop(t.remove(&a))), "[4, 8] is missing");
    says(changed(&|t| drop(t.insert(a.clone(), random(3, 8)))), "shape [3, 8]");
    says(changed(&|t| drop(t.insert(a.clone(), ones(4, 8).to_dtype(DType::F64).unwrap()))), "F64");
    says(changed(&|t| drop(t.insert(a.clone(), (ones(4, 8) / 0.0).unwrap()))), "NaN or infinity");
    let other = format!("{PREFIX}h.3.attn.c_attn.lora_A.weight");
    let unused = changed(&|t| drop(t.insert(other.clone(), random(4, 8))));
    assert!(unused.contains(&other), "{unused}");
    let large = config(&json!({"lora_alpha": 1e40}));
    let faults = load_with(&large, &c_attn()).unwrap_err().0;
    assert!(faults[0].contains("lora_B") && faults[0].contains("infinity"), "{faults:?}");
}

#[test]
fn files_are_checked_before_they_are_believed() {
    let dir = folder(&config(&json!({})), &c_attn());
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let says = |limits: Limits, words: &[&str]| {
        let faults = load(dir.path(), &shape(), &limits).unwrap_err().0;
        assert_eq!(faults.len(), words.len(), "{faults:?}");
        for (fault, words) in faults.iter().zip(words) {
            assert!(fault.contains(words), "{fault}, not {words}");
        }
    };
    let limits = Limits::default();
    says(Limits { max_rank: 3, ..limits }, &["rank of 4"]);
    let needed = load(dir.path(), &shape(), &limits).unwrap().bytes;
    assert!(load(dir.path(), &shape(), &Limits { max_bytes: needed, ..limits }).is_ok());
    says(Limits { max_bytes: needed - 1, ..limits }, &["bytes; allowed"]);

    let good = fs::read(path(files::FILE)).unwrap();
    fs::write(path(files::FILE), &good[..good.len() - 1]).unwrap();
    says(limits, &["adapter_model.safetensors: "]);
    fs::write(path(config::FILE), "[1]").unwrap();
    says(limits, &["not a JSON object", "adapter_model.safetensors: "]);
    fs::write(path(config::FILE), vec![b' '; (1 << 18) + 1]).unwrap();
    fs::rename(path(files::FILE), path("adapter_model.bin")).unwrap();
    says(limits, &["larger than", "pickled weights are not read"]);
    fs::remove_file(path(config::FILE)).unwrap();
    fs::create_dir(path(files::FILE)).unwrap();
    says(limits, &["adapter_config.json: ", "not a regular file"]);
}

#[test]
fn experts_in_place_of_a_network_are_refused_by_name() {
    let shape = Shape { moe_layers: vec![1], ..shape() };
    let tensors = |layers: &[usize]| -> Tensors {
        layers.iter().flat_map(|&layer| factors(PREFIX, layer, Module::FcIn, 4)).collect()
    };
    let targets = json!({"target_modules": ["c_fc"]});
    let dir = folder(&config(&targets), &tensors(&[0, 1, 2]));
    let faults = load(dir.path(), &shape, &Limits::default()).unwrap_err().0;
    assert!(faults[0].contains("h.1.mlp.c_fc") && faults[0].contains("experts"), "{faults:?}");
    let dir = folder(
        &config(&json!({"target_modules": ["c_fc"], "layers_to_transform": [0, 2]})),
        &tensors(&[0, 2]),
    );
    load(dir.path(), &shape, &Limits::default()).unwrap();
}

/// A mixture of three experts of rank 2 for two tasks, on both projections of every layer.
fn mixture() -> (Value, Tensors) {
    let config = json!({"peft_type": "MTA", "r": 2, "num_experts": 3, "lora_alpha": 5, "tau": 0.7,
        "tasks": ["image", "music"], "target_modules": ["c_proj"], "inference_mode": true});
    let mut tensors = Tensors::new();
    for (layer, module) in
        (0..3).flat_map(|layer| [Module::AttnProj, Module::FcOut].map(|module| (layer, module)))
    {
        let (inner, outer) = shape().sizes(module);
        let name = format!("{PREFIX}h.{layer}.{}", module.name());
        tensors.insert(format!("{name}.mta_gate.weight"), random(2, 3));
        for expert in 0..3 {
            tensors.insert(format!("{name}.mta_A.{expert}.weight"), random(2, inner));
            tensors.insert(format!("{name}.mta_B.{expert}.weight"), random(outer, 2));
        }
    }
    (config, tensors)
}

/// `alpha / r · Σ_e softmax(gate / tau)_e · B_e · A_e · x`, in f64; row 2 of the gate is the mean.
fn unfolded(tensors: &Tensors, name: &str, task: usize, x: &Tensor) -> Vec<f64> {
    let wide = |part: &str| tensors[&format!("{name}.{part}.weight")].to_dtype(DType::F64).unwrap();
    let gate: Vec<Vec<f64>> = wide("mta_gate").to_vec2().unwrap();
    let logit = |e: usize| match gate.get(task) {
        Some(row) => row[e],
        None => gate.iter().map(|row| row[e]).sum::<f64>() / gate.len() as f64,
    };
    let powers: Vec<f64> = (0..3).map(|e| (logit(e) / 0.7).exp()).collect();
    let x = x.to_dtype(DType::F64).unwrap().t().unwrap();
    let mut sum = vec![0.0; wide("mta_B.0").dim(0).unwrap()];
    for (e, power) in powers.iter().enumerate() {
        let inner = wide(&format!("mta_A.{e}")).matmul(&x).unwrap();
        let outer = wide(&format!("mta_B.{e}")).matmul(&inner).unwrap();
        let outer: Vec<f64> = outer.flatten_all().unwrap().to_vec1().unwrap();
        let share = power / powers.iter().sum::<f64>() * 5.0 / 2.0;
        sum.iter_mut().zip(outer).for_each(|(sum, y)| *sum += share * y);
    }
    sum
}

#[test]
fn a_folded_mixture_equals_the_unfolded_one() {
    let (config, tensors) = mixture();
    let loaded = load_with(&config, &tensors).unwrap();
    assert_eq!((loaded.kind, loaded.rank), (Kind::Mta, 6));
    assert_eq!(loaded.tasks, ["image", "music"]);
    for (task, named) in [(0, Some("image")), (1, Some("music")), (2, None), (2, Some("other"))] {
        let deltas = loaded.deltas(named);
        for (layer, module) in [(0, Module::AttnProj), (2, Module::FcOut)] {
            let (inner, outer) = shape().sizes(module);
            let x = random(1, inner);
            let change = deltas.get(layer, module).unwrap();
            let group = LowRankGroup { rows: 0..1, a: &change.a, b: &change.b, weight: 1.0 };
            let zeros = Tensor::zeros((1, outer), DType::F32, &Device::Cpu).unwrap();
            let folded = low_rank_add(zeros, &x, &[group]).unwrap();
            let folded: Vec<f32> = folded.flatten_all().unwrap().to_vec1().unwrap();
            let name = format!("{PREFIX}h.{layer}.{}", module.name());
            let expected = unfolded(&tensors, &name, task, &x);
            let largest = expected.iter().fold(1f64, |m, y| m.max(y.abs()));
            for (got, expected) in folded.iter().zip(&expected) {
                assert!((f64::from(*got) - expected).abs() < 1e-5 * largest, "{named:?}");
            }
        }
    }
    let shared = |task| Arc::as_ptr(&loaded.deltas(task).get(0, Module::FcOut).unwrap().a);
    assert_eq!(shared(Some("image")), shared(None), "A is held once");
}

#[test]
fn mixtures_that_are_not_whole_are_refused() {
    for (key, value) in [
        ("tau", json!(null)),
        ("tau", json!(0)),
        ("tau", json!(-1.0)),
        ("num_experts", json!(0)),
        ("num_experts", json!(1u64 << 62)),
        ("tasks", json!([])),
        ("tasks", json!(["a", "a"])),
        ("tasks", json!(["a b", "c"])),
        ("tasks", json!(null)),
        ("use_rslora", json!(true)),
        ("rank_pattern", json!({"c_proj": 3})),
        ("lora_alpha", json!("5")),
    ] {
        let (mut config, tensors) = mixture();
        config[key] = value;
        let fault = fault(&config, &tensors);
        assert!(fault.contains(key) || fault.contains("r makes a rank"), "{fault}, not {key}");
    }
    let (config, mut tensors) = mixture();
    let gate = format!("{PREFIX}h.1.mlp.c_proj.mta_gate.weight");
    tensors.insert(gate.clone(), random(3, 3));
    assert!(fault(&config, &tensors).contains(&gate));
}
