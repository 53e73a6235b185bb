//! Tests of training as a whole; what is small is tested here by module.

mod data;
mod learning;
mod passages;
mod recipes;
mod runs;

use super::data::sha256_of;
use super::objective::Example;
use super::tokenizer::{self, Codec};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Intents and prompts small enough to be learnt by heart.
const PAIRS: [(&str, &str, &str); 6] = [
    ("image", "a fox in the snow", "Red fox in fresh snow at dawn, soft light."),
    ("image", "harbor at night", "Quiet harbor at night, lamps on black water."),
    ("image", "an old clock", "Macro photo of an old brass clock."),
    ("music", "rain on a tin roof", "Slow piano over rain on a tin roof."),
    ("music", "a march for ants", "Tiny drums and clicks, a march for ants."),
    ("music", "harbor at night", "Low accordion for a harbor at night."),
];

fn example(task: &str, input: &str, output: &str) -> Example {
    Example { task: task.into(), input: input.into(), output: output.into() }
}

fn tasks() -> Vec<String> {
    ["image", "music"].map(String::from).to_vec()
}

fn codec() -> Codec {
    let texts = PAIRS.iter().flat_map(|p| [p.1.to_owned(), p.2.to_owned()]);
    Codec::new(tokenizer::train(texts.collect::<Vec<_>>().into_iter(), &tasks(), 400).unwrap())
        .unwrap()
}

/// A recipe with its data, in a folder of its own.
struct Kitchen {
    dir: TempDir,
}

impl Kitchen {
    fn new(steps: u64, learning_rate: f64) -> Self {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("data")).unwrap();
        let line = |(task, input, output): &(&str, &str, &str)| {
            format!("{}\n", serde_json::json!({"task": task, "input": input, "output": output}))
        };
        let data = dir.path().join("data/pairs.jsonl");
        fs::write(&data, PAIRS.iter().map(line).collect::<String>()).unwrap();
        let sha256 = sha256_of(&data).unwrap();
        let recipe = format!(
            r#"
            name = "tiny"
            seed = 3
            precision = "f32"
            checkpoint_seconds = 3600
            model = {{ layers = 2, heads = 2, width = 64, context = 48 }}
            tokenizer = {{ size = 400, data = ["pairs"], max_megabytes = 1 }}
            controls = {{ dropout = 0.0 }}
            optimizer = {{ weight_decay = 0.0 }}
            held_out = {{ fraction = 0.0, every = 1000, tokens = 100 }}
            [tasks]
            image = []
            music = []
            [[data]]
            name = "pairs"
            file = "pairs.jsonl"
            sha256 = "{sha256}"
            [[stage]]
            name = "first"
            steps = 2
            batch_tokens = 96
            micro_tokens = 48
            learning_rate = 1e-3
            final_rate = 1.0
            warmup = 2
            mix = [
                {{ data = "pairs", form = "instruction", weight = 1.0 }},
                {{ data = "pairs", form = "text", weight = 2.0 }},
            ]
            [[stage]]
            name = "second"
            steps = {steps}
            batch_tokens = 240
            micro_tokens = 240
            learning_rate = {learning_rate}
            final_rate = 0.1
            warmup = 5
            mix = [{{ data = "pairs", form = "controlled", weight = 1.0 }}]
            "#
        );
        fs::write(dir.path().join("train.toml"), recipe).unwrap();
        Self { dir }
    }

    fn recipe(&self) -> PathBuf {
        self.dir.path().join("train.toml")
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Rewrites a part of the recipe.
    fn change(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.recipe()).unwrap();
        assert!(text.contains(from), "{from}");
        fs::write(self.recipe(), text.replace(from, to)).unwrap();
    }
}
