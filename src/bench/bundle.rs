//! `shoal bench --make-bundle`: a bundle of random weights in a given shape, with a tokenizer, adapters and
//! experts as asked for. What a model of that shape costs does not depend on what it knows.

use crate::adapter::{self, Module};
use crate::kernels::Precision;
use crate::model::init::{fresh, upcycle};
use crate::model::spec::{Gate, Moe};
use crate::model::{Spec, adapter_shape, weights};
use crate::text::END_OF_TEXT;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use clap::{Args, ValueEnum};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The tasks that gates count.
const TASKS: [&str; 4] = ["task-0", "task-1", "task-2", "task-3"];

/// What to make.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Make {
    /// Write a bundle of random weights in this shape, and measure nothing
    #[arg(long, value_enum)]
    pub make_bundle: Option<Shape>,
    /// Folder of that bundle
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// How many LoRA adapters it has, on all linear layers
    #[arg(long, default_value_t = 0)]
    pub adapters: usize,
    /// Rank of those
    #[arg(long, default_value_t = 16)]
    pub adapter_rank: usize,
    /// Experts in every second layer; 0 is none
    #[arg(long, default_value_t = 0)]
    pub experts: usize,
    /// What the choice of experts looks at
    #[arg(long, value_enum, default_value_t)]
    pub gate: GateKind,
}

/// The size of a model.
#[derive(Clone, Copy, Debug, Serialize, ValueEnum)]
pub enum Shape {
    /// GPT-2 small: 12 layers of 768, vocabulary 50257, context 1024
    #[value(name = "gpt2-124m")]
    Gpt2,
    /// 8 layers of 384, vocabulary 16384, context 512
    #[value(name = "gpt2-25m")]
    Small,
    /// The size of models/prompter: 6 layers of 256, vocabulary 8192, context 256
    Prompter,
}

/// The gates of the literature, as `config.json` names them.
#[derive(Clone, Copy, Debug, Default, Serialize, ValueEnum)]
pub enum GateKind {
    /// By the token alone
    #[default]
    Token,
    /// By the task alone
    Task,
}

impl Shape {
    fn spec(self) -> Spec {
        let (layers, heads, width, context, vocab) = match self {
            Self::Gpt2 => (12, 12, 768, 1024, 50_257),
            Self::Small => (8, 6, 384, 512, 16_384),
            Self::Prompter => (6, 8, 256, 256, 8192),
        };
        let (inner, eos) = (4 * width, vec![vocab as u32 - 1]);
        let (tasks, moe) = (Vec::new(), None);
        Spec { layers, heads, width, inner, context, vocab, eps: 1e-5, eos, tasks, moe }
    }
}

/// Writes the bundle.
pub fn make(args: &Make) -> Result<()> {
    let Some(shape) = args.make_bundle else { return Ok(()) };
    let dir = args.out.as_ref().context("--make-bundle needs --out, the folder to write")?;
    ensure!(args.experts != 1, "--experts must be 2 or more");
    let dense = shape.spec();
    let spec = if args.experts == 0 { dense.clone() } else { with_experts(&dense, args) };
    let mut tensors = fresh(&dense, 1)?;
    if spec.moe.is_some() {
        tensors = upcycle(&spec, &tensors, 0.5, 2)?;
        write_tasks(dir)?;
    }
    weights::save(dir, &spec, &tensors, DType::BF16)?;
    write_tokenizer(dir, dense.vocab)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    for i in 0..args.adapters {
        let changes = random_changes(&spec, args.adapter_rank, i as u64)?;
        let folder = dir.join("adapters").join(format!("adapter-{i}"));
        adapter::save(&folder, &name, args.adapter_rank, dense.layers, &changes)?;
    }
    println!("wrote {}", dir.display());
    Ok(())
}

fn with_experts(dense: &Spec, args: &Make) -> Spec {
    let (gate, tasks) = match args.gate {
        GateKind::Token => (Gate::Token, Vec::new()),
        GateKind::Task => (Gate::Task, TASKS.map(str::to_owned).to_vec()),
    };
    let layers = (1..dense.layers).step_by(2).collect();
    let moe = Moe { layers, experts: args.experts, top_k: 1, gate };
    Spec { moe: Some(moe), tasks, ..dense.clone() }
}

fn write_tasks(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("tasks"))?;
    for task in TASKS {
        let text = format!("description = \"Continues a text as {task}.\"\n");
        fs::write(dir.join("tasks").join(format!("{task}.toml")), text)?;
    }
    Ok(())
}

fn random_changes(
    spec: &Spec,
    r: usize,
    seed: u64,
) -> Result<BTreeMap<(usize, Module), adapter::Change>> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut random = |shape: (usize, usize)| {
        let values = (0..shape.0 * shape.1).map(|_| rng.random_range(-0.01..0.01f32)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu)
    };
    let mut changes = BTreeMap::new();
    let shape = adapter_shape(spec, Precision::Bf16);
    for layer in 0..spec.layers {
        for module in Module::ALL.into_iter().filter(|&module| shape.has(layer, module)) {
            let (inputs, outputs) = shape.sizes(module);
            let change = (random((inputs, r))?, random((r, outputs))?);
            changes.insert((layer, module), change);
        }
    }
    Ok(changes)
}

/// Writes a byte-level BPE of `size` entries whose merges spell runs of up to four letters, with and without
/// a space before them: `tokenizer.json`, and the same as `vocab.json` and `merges.txt`.
fn write_tokenizer(dir: &Path, size: usize) -> Result<()> {
    let bytes = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let mut tokens: Vec<String> = bytes.into_iter().map(String::from).collect();
    tokens.sort();
    let wanted = size.checked_sub(tokens.len() + 1).context("the vocabulary is too small")?;
    let merges: Vec<(String, String)> = merges().take(wanted).collect();
    ensure!(merges.len() == wanted, "there are not enough runs of letters for {size} entries");
    tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
    tokens.push(END_OF_TEXT.to_owned());
    let vocab: Map<String, Value> = tokens.into_iter().zip((0u32..).map(Value::from)).collect();
    let lines: Vec<String> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{"id": size - 1, "content": END_OF_TEXT, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": lines},
    });
    fs::write(dir.join("tokenizer.json"), file.to_string())?;
    fs::write(dir.join("vocab.json"), Value::from(vocab).to_string())?;
    fs::write(dir.join("merges.txt"), format!("#version: 0.2\n{}\n", lines.join("\n")))?;
    let about = json!({"tokenizer_class": "GPT2Tokenizer", "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "add_prefix_space": false});
    fs::write(dir.join("tokenizer_config.json"), about.to_string())?;
    Ok(())
}

/// Merges in their order: pairs of letters, a space and a letter, a space and a pair, then longer runs.
fn merges() -> impl Iterator<Item = (String, String)> {
    let letters = || ('a'..='z').map(String::from);
    let pairs = move || letters().flat_map(move |a| letters().map(move |b| (a.clone(), b)));
    // How byte-level BPE writes a space.
    let space = || "\u{120}".to_owned();
    let spaced = letters().map(move |a| (space(), a));
    let spaced_pairs = pairs().map(move |(a, b)| (format!("{}{a}", space()), b));
    let triples = pairs().flat_map(move |(a, b)| letters().map(move |c| (format!("{a}{b}"), c)));
    let spaced_triples =
        pairs().flat_map(move |(a, b)| letters().map(move |c| (format!("{}{a}{b}", space()), c)));
    let quads = pairs()
        .flat_map(move |(a, b)| letters().map(move |c| (format!("{a}{b}{c}"), "a".to_owned())));
    pairs().chain(spaced).chain(spaced_pairs).chain(spaced_triples).chain(triples).chain(quads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;

    #[test]
    fn a_made_bundle_opens_with_all_that_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let args = Make {
            make_bundle: Some(Shape::Prompter),
            out: Some(dir.path().join("made")),
            adapters: 2,
            adapter_rank: 4,
            experts: 3,
            gate: GateKind::Task,
        };
        make(&args).unwrap();
        let bundle = Bundle::open(&dir.path().join("made"), None).unwrap();
        assert_eq!(bundle.spec.moe.as_ref().map(|moe| moe.experts), Some(3));
        let names: Vec<&str> = bundle.adapters.keys().map(String::as_str).collect();
        assert_eq!(names, ["adapter-0", "adapter-1"]);
        let tokenizer = bundle.prompts.tokenizer();
        assert_eq!(tokenizer.vocab_size(), 8192);
        let text = "the cat sat on a mat\n1 2 3";
        let ids = tokenizer.encode_plain(text).unwrap();
        assert!(ids.len() < text.len());
        assert_eq!(tokenizer.decode(&ids), text);
    }

    #[test]
    fn there_are_merges_for_the_vocabulary_of_gpt2() {
        assert!(merges().count() >= 50_257 - 257);
    }
}
