//! Adapters of bases with experts, and what is refused of the bundle that gets one.

use super::*;
use crate::adapter::{Limits, load};
use crate::model::init;
use crate::model::spec::{Gate, Moe};
use crate::train::objective::Sequence;
use std::fs;
use tempfile::TempDir;

const TOKENIZER: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/gpt2-tiny/tokenizer.json");

/// A base of three layers, of which these have experts.
fn base(gate: Gate, layers: &[usize]) -> TempDir {
    let moe = Moe { layers: layers.to_vec(), experts: 4, top_k: 1, gate };
    let spec = Spec {
        layers: 3,
        heads: 2,
        width: 32,
        inner: 64,
        context: 32,
        vocab: 512,
        eps: 1e-5,
        eos: vec![0],
        tasks: if gate.knows_tasks() { vec!["a".into(), "b".into()] } else { Vec::new() },
        moe: Some(moe),
    };
    let dir = TempDir::new().unwrap();
    init::random_bundle(dir.path(), &spec, 5, candle_core::DType::F32).unwrap();
    fs::copy(TOKENIZER, dir.path().join("tokenizer.json")).unwrap();
    let rows = "{\"input\": \"red fox\", \"output\": \"a story of the snow\"}\n";
    fs::write(dir.path().join("rows.jsonl"), rows).unwrap();
    dir
}

fn recipe(base: &Path, task: &str, modules: &[&str]) -> Recipe {
    let target_modules = modules.iter().map(|&name| name.into()).collect();
    Recipe {
        task: task.into(),
        description: String::new(),
        base: base.into(),
        data: vec![base.join("rows.jsonl")],
        seed: 0,
        adapter: Settings {
            rank: 2,
            epochs: 1,
            target_modules,
            held_out: 0.0,
            ..Settings::default()
        },
    }
}

fn run(recipe: &Recipe, out: &Path) -> Result<Summary> {
    super::run(recipe, out, &AtomicBool::new(false))
}

/// What is trained is what is saved and loaded, wherever the experts are.
#[test]
fn an_adapter_of_a_base_with_experts_loads_whole() {
    let base = base(Gate::Token, &[0, 2]);
    let spec = Weights::open(base.path()).unwrap().spec().clone();
    let shape = adapter_shape(&spec, Precision::Bf16);
    let all = Module::ALL.map(Module::name);
    for modules in [&all[..], &["mlp.c_fc"], &["attn.c_attn", "mlp.c_proj"]] {
        let recipe = recipe(base.path(), "mine", modules);
        let adapter = run(&recipe, base.path()).unwrap().adapter;
        let loaded = load(&adapter, &shape, &Limits::default()).unwrap();
        let deltas = loaded.deltas(None);
        for layer in 0..spec.layers {
            for module in Module::ALL {
                let want = modules.contains(&module.name()) && shape.has(layer, module);
                assert_eq!(deltas.get(layer, module).is_some(), want, "{layer} {module:?}");
            }
        }
    }
}

#[test]
fn modules_that_are_nowhere_are_refused() {
    let base = base(Gate::Token, &[0, 1, 2]);
    let error = run(&recipe(base.path(), "mine", &["mlp.c_fc"]), base.path()).unwrap_err();
    assert!(error.to_string().contains("the base has experts in place of all"), "{error}");
}

/// What serving does for a row of a task.
struct Served<'a>(CausalPacked<'a>, Vec<Option<u32>>);

impl Pass for Served<'_> {
    fn attend(&mut self, layer: usize, qkv: &Tensor) -> CandleResult<Tensor> {
        self.0.attend(layer, qkv)
    }

    fn gates(&self, _kept: bool) -> &[Option<u32>] {
        &self.1
    }
}

#[test]
fn a_task_that_the_gates_know_is_trained_by_its_own_gate() {
    let base = base(Gate::TokenTask, &[0, 2]);
    let weights = Weights::open(base.path()).unwrap();
    let stop = AtomicBool::new(false);
    let batch = Batch::pack(&[Sequence::after(&[7, 8, 9, 10], &[11, 12, 13, 14, 0])]);
    let mut losses = Vec::new();
    for (task, gate) in [("a", Some(0)), ("b", Some(1)), ("mine", None)] {
        let recipe = recipe(base.path(), task, &["attn.c_attn"]);
        let learner = Apprentice::new(&recipe, &weights, &stop).unwrap();
        let Learner { ops, decoder, device, .. } = &learner.learner;
        let causal = CausalPacked { ops: *ops, seq_starts: &batch.starts, heads: 2 };
        let mut pass = Served(causal, vec![gate; batch.tokens.len()]);
        let rows = |ids: &[u32]| Tensor::new(ids, device).unwrap();
        let (tokens, positions) = (rows(&batch.tokens), rows(&batch.positions));
        let hidden = decoder.hidden(&tokens, &positions, &mut pass).unwrap();
        let head = decoder.head().unwrap();
        let served = ops.cross_entropy(&hidden, head, &batch.targets).unwrap();
        let served = served.to_scalar::<f32>().unwrap();
        // At first B is zero: the adapter adds nothing.
        assert_eq!(learner.loss(&batch).unwrap().to_scalar::<f32>().unwrap(), served, "{task}");
        losses.push(served.to_bits());
    }
    assert!(losses[0] != losses[1] && losses[1] != losses[2], "the gates differ: {losses:?}");
}

#[test]
fn names_that_the_bundle_has_given_are_refused() {
    let dir = TempDir::new().unwrap();
    let refused = |out: &str, task: &str| {
        let out = dir.path().join(out);
        Target::of(&recipe(dir.path(), task, &[]), &out).unwrap_err().to_string()
    };
    assert!(refused("mine", "mine").contains("mine is the name of the bundle itself"));
    let error = refused("mine-lora", "mine");
    assert!(error.contains("mine-lora, which is the name of the bundle"), "{error}");
    fs::create_dir_all(dir.path().join("out/tasks")).unwrap();
    let task = |name: &str, text: &str| {
        fs::write(dir.path().join("out/tasks").join(format!("{name}.toml")), text).unwrap();
    };
    task("mine-lora", "");
    let error = refused("out", "mine");
    assert!(error.contains("mine-lora, which is the name of a task"), "{error}");
    task("image", "description = \"Without one\"\n");
    let error = refused("out", "image");
    assert!(error.contains("write adapter = \"image-lora\" into it"), "{error}");
    task("image", "adapter = 3\n");
    assert!(refused("out", "image").contains("tasks/image.toml: adapter is not possible"));
    task("image", "adapter = \"image-lora\"\n");
    Target::of(&recipe(dir.path(), "image", &[]), &dir.path().join("out")).unwrap();
}

#[test]
fn once_it_is_to_stop_nothing_is_written() {
    let base = base(Gate::Token, &[0, 2]);
    let recipe = recipe(base.path(), "mine", &["attn.c_attn"]);
    let error = super::run(&recipe, base.path(), &AtomicBool::new(true)).unwrap_err();
    assert!(error.to_string().contains("stopped: nothing was written"), "{error}");
    assert!(!base.path().join("adapters").exists() && !base.path().join("tasks").exists());
}
