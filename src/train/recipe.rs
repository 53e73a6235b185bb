//! The recipe: one TOML file that says how a model is made. Everything in it is checked before
//! anything runs, and all faults are reported at once.

use super::data::{hex, sha256_of};
use crate::ids::is_valid_name;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// How a model is made. Its serialised form leaves out what may change between a stop and a resume.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The model's name.
    pub name: String,
    /// Every random choice follows from it.
    pub seed: u64,
    /// What matrix products are rounded to.
    #[serde(default)]
    pub precision: Precision,
    /// The network.
    pub model: Shape,
    /// The vocabulary.
    pub tokenizer: Vocabulary,
    /// A trained task to the other names that data files give it.
    pub tasks: BTreeMap<String, Vec<String>>,
    /// Upside-down RL's controls.
    #[serde(default)]
    pub controls: Controls,
    /// AdamW's constants.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// What is never trained on.
    #[serde(default)]
    pub held_out: HeldOut,
    /// Seconds of training between two checkpoints.
    #[serde(default = "default_checkpoint", skip_serializing)]
    pub checkpoint_seconds: u64,
    /// Files.
    pub data: Vec<DataFile>,
    /// What is trained on what, in order.
    #[serde(rename = "stage")]
    pub stages: Vec<Stage>,
}

fn default_checkpoint() -> u64 {
    240
}

/// The type of matrix products.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bfloat16 inputs, f32 sums and weights, on the CPU; a GPU computes in f32 throughout.
    #[default]
    Bf16,
    /// f32 throughout.
    F32,
}

/// GPT-2's sizes; the inner width is four times the width.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Blocks.
    pub layers: usize,
    /// Attention heads of each block.
    pub heads: usize,
    /// Width of a token's state.
    pub width: usize,
    /// Longest sequence.
    pub context: usize,
}

/// The tokenizer to train.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Vocabulary {
    /// Entries, special ones included.
    pub size: usize,
    /// Names of the data that it is trained on.
    pub data: Vec<String>,
    /// Of each, no more than this.
    pub max_megabytes: usize,
}

/// How control tokens are trained.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Controls {
    /// Probability that a known control is written as `none`.
    pub dropout: f64,
}

impl Default for Controls {
    fn default() -> Self {
        Self { dropout: 0.1 }
    }
}

/// AdamW's constants.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices; biases and norms have none.
    pub weight_decay: f64,
    /// Largest global norm of a gradient.
    pub clip: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

/// The held-out split and how it is measured.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeldOut {
    /// Share of intents (and documents) kept out.
    pub fraction: f64,
    /// Steps between two evaluations.
    #[serde(skip_serializing)]
    pub every: u64,
    /// Tokens of each part of the mix that an evaluation reads.
    #[serde(skip_serializing)]
    pub tokens: usize,
}

impl Default for HeldOut {
    fn default() -> Self {
        Self { fraction: 0.05, every: 200, tokens: 16_384 }
    }
}

/// One data file below the data folder, or below the recipe's own `data/`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// What stages call it; several files may share a name.
    pub name: String,
    /// File name: `.jsonl` or `.jsonl.zst`.
    pub file: String,
    /// Hexadecimal SHA-256 of the file as stored.
    pub sha256: String,
    /// Reads only this many rows from its start.
    pub max_rows: Option<usize>,
    /// Where it comes from, for whoever has not got it.
    #[serde(skip_serializing)]
    pub origin: Option<String>,
}

/// A stretch of training on one mix.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// For logs.
    pub name: String,
    /// Optimiser steps; may be changed between a stop and a resume.
    #[serde(skip_serializing)]
    pub steps: u64,
    /// Tokens of one optimiser step.
    pub batch_tokens: usize,
    /// Tokens of one forward and backward pass; gradients of several add up to a step.
    pub micro_tokens: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// What the cosine ends at, as a share of the peak.
    pub final_rate: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Shares of the tokens.
    pub mix: Vec<Part>,
}

/// One part of a stage's mix.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Name of the data.
    pub data: String,
    /// What sequences are made of it.
    pub form: Form,
    /// Share of tokens, relative to the other parts.
    pub weight: f64,
    /// The task of `keywords`.
    pub task: Option<String>,
    /// For `controlled`: adds outputs cut after a sentence or clause, and evens out the lengths.
    #[serde(default)]
    pub cuts: bool,
    /// For `controlled`: drops outputs that hold a smaller share of the input's content words.
    #[serde(default)]
    pub min_coverage: f64,
}

/// What a part of the mix makes of its rows.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Documents joined by end-of-text, in pieces of the context's length; loss on all.
    Text,
    /// Instruction, input and output as lines of one document; loss on all.
    Instruction,
    /// A passage of a document as the answer to a few of its own words; loss on the passage.
    Keywords,
    /// Control tokens, input and output as in serving; loss on the output.
    Controlled,
}

impl Recipe {
    /// Reads and checks a recipe; the error lists every fault.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the recipe {}", path.display()))?;
        let recipe: Self =
            toml::from_str(&text).with_context(|| format!("{} is not a recipe", path.display()))?;
        let faults = recipe.faults();
        if !faults.is_empty() {
            bail!("{} has {} fault(s):\n  {}", path.display(), faults.len(), faults.join("\n  "));
        }
        Ok(recipe)
    }

    /// Hexadecimal SHA-256 of all that the weights after so many steps depend on.
    pub fn fingerprint(&self) -> Result<String> {
        Ok(hex(&Sha256::digest(serde_json::to_vec(self)?)))
    }

    /// Everything that is wrong with it, files aside.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        self.check_model(&mut faults);
        self.check_constants(&mut faults);
        self.check_data(&mut faults);
        for stage in &self.stages {
            let mut of_stage = Vec::new();
            self.check_stage(stage, &mut of_stage);
            faults.extend(of_stage.iter().map(|f| format!("stage {:?}: {f}", stage.name)));
        }
        faults
    }

    fn check_model(&self, faults: &mut Vec<String>) {
        let mut need = |ok, what| demand(faults, ok, what);
        let (name, m) = (&self.name, &self.model);
        need(is_valid_name(name), format!("name {name:?}: allowed are letters, digits, . _ -"));
        let sized = [
            ("layers", m.layers, 1 << 10),
            ("heads", m.heads, 1 << 16),
            ("width", m.width, 1 << 16),
        ];
        for (what, size, most) in sized {
            let allowed = (1..=most).contains(&size);
            need(allowed, format!("model.{what} is {size}; allowed: 1 to {most}"));
        }
        let even = m.heads == 0 || m.width.is_multiple_of(m.heads);
        let (width, heads, context) = (m.width, m.heads, m.context);
        need(even, format!("model: a width of {width} does not split into {heads} heads"));
        let allowed = (8..=1 << 16).contains(&context);
        need(allowed, format!("model.context is {context}; allowed: 8 to 65536"));
        let size = self.tokenizer.size;
        let least = super::tokenizer::special_tokens(&self.task_names()).len() + 256;
        let allowed = format!("{least} (bytes and special tokens) to 1048576");
        let fits = (least..=1 << 20).contains(&size);
        need(fits, format!("tokenizer.size is {size}; allowed: {allowed}"));
    }

    fn check_constants(&self, faults: &mut Vec<String>) {
        let mut need = |ok, what| demand(faults, ok, what);
        let dropout = self.controls.dropout;
        need(in_unit(dropout), format!("controls.dropout is {dropout}; allowed: 0 to below 1"));
        let HeldOut { fraction, every, tokens } = self.held_out;
        let allowed = (0.0..=0.5).contains(&fraction);
        need(allowed, format!("held_out.fraction is {fraction}; allowed: 0 to 0.5"));
        need(every > 0, "held_out.every must be above 0".into());
        need(tokens > 0, "held_out.tokens must be above 0".into());
        let o = &self.optimizer;
        let decays = in_unit(o.beta1) && in_unit(o.beta2);
        need(decays, "optimizer: beta1 and beta2 must be from 0 to below 1".into());
        let signs = o.eps > 0.0 && o.clip > 0.0 && o.weight_decay >= 0.0;
        need(signs, "optimizer: eps and clip must be above 0, weight_decay 0 or more".into());
    }

    fn check_data(&self, faults: &mut Vec<String>) {
        let mut need = |ok, what| demand(faults, ok, what);
        need(!self.tasks.is_empty(), "tasks: name at least one".into());
        need(!self.stages.is_empty(), "stage: at least one is needed".into());
        let mut seen = BTreeSet::new();
        for name in self.tasks.iter().flat_map(|(task, others)| others.iter().chain([task])) {
            need(is_valid_name(name), format!("tasks: {name:?} is no task name"));
            need(seen.insert(name), format!("tasks: {name:?} is there twice"));
        }
        for name in &self.tokenizer.data {
            let known = self.has_data(name);
            need(known, format!("tokenizer.data: there is no data named {name:?}"));
        }
        for DataFile { name, file, .. } in &self.data {
            let known = file.ends_with(".jsonl") || file.ends_with(".jsonl.zst");
            need(known, format!("data {name:?}: {file:?} is neither .jsonl nor .jsonl.zst"));
        }
    }

    fn check_stage(&self, stage: &Stage, faults: &mut Vec<String>) {
        let mut need = |ok, what| demand(faults, ok, what);
        need(stage.steps > 0, "steps must be above 0".into());
        let rate = stage.learning_rate;
        need(rate > 0.0 && rate < 1.0, "learning_rate must be between 0 and 1".into());
        let share = (0.0..=1.0).contains(&stage.final_rate);
        need(share, "final_rate must be from 0 to 1".into());
        let context = self.model.context;
        let whole = stage.micro_tokens >= context;
        need(whole, format!("micro_tokens must be at least the context, {context}"));
        let parts = stage.batch_tokens >= stage.micro_tokens;
        need(parts, "batch_tokens must be at least micro_tokens".into());
        need(!stage.mix.is_empty(), "mix needs a part".into());
        for part in &stage.mix {
            self.check_part(part, faults);
        }
    }

    fn check_part(&self, part: &Part, faults: &mut Vec<String>) {
        let mut need = |ok, what| demand(faults, ok, what);
        let Part { data, weight, .. } = part;
        need(self.has_data(data), format!("there is no data named {data:?}"));
        let weighs = *weight > 0.0 && weight.is_finite();
        need(weighs, format!("the weight of {data:?} must be above 0"));
        let share = (0.0..=1.0).contains(&part.min_coverage);
        need(share, "min_coverage must be from 0 to 1".into());
        if part.form == Form::Keywords {
            let known = part.task.as_ref().is_some_and(|task| self.tasks.contains_key(task));
            let names = self.task_names();
            need(known, format!("keywords of {data:?} need a task out of {names:?}"));
        } else {
            need(part.task.is_none(), format!("{data:?} takes no task: only keywords do"));
        }
        let plain = part.form == Form::Controlled || (!part.cuts && part.min_coverage == 0.0);
        need(plain, format!("cuts and min_coverage of {data:?} are for controlled data"));
    }

    fn has_data(&self, name: &str) -> bool {
        self.data.iter().any(|d| d.name == name)
    }

    /// The trained tasks, in the order of their tokens.
    pub fn task_names(&self) -> Vec<String> {
        self.tasks.keys().cloned().collect()
    }

    /// The trained task that data call `name`.
    pub fn task_of(&self, name: &str) -> Option<&str> {
        let found = self
            .tasks
            .iter()
            .find(|(task, aliases)| *task == name || aliases.iter().any(|a| a == name));
        found.map(|(task, _)| task.as_str())
    }

    /// Finds the data files below `data` or else in `own`, and checks what they hold; the error lists
    /// every one that is missing or differs.
    pub fn locate(&self, data: Option<&Path>, own: &Path) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut faults = Vec::new();
        for file in &self.data {
            let places = data.into_iter().chain([own]).map(|dir| dir.join(&file.file));
            let Some(path) = places.into_iter().find(|p| p.is_file()) else {
                faults.push(file.missing(data, own));
                continue;
            };
            match sha256_of(&path) {
                Ok(hash) if hash == file.sha256 => found.push(path),
                Ok(hash) => faults.push(format!(
                    "{} has SHA-256 {hash}, not the recipe's {}",
                    path.display(),
                    file.sha256
                )),
                Err(e) => faults.push(format!("{}: {e}", path.display())),
            }
        }
        if !faults.is_empty() {
            let faults = faults.join("\n  ");
            bail!("data files are missing or differ:\n  {faults}\n--data DIR says where they are");
        }
        Ok(found)
    }
}

impl DataFile {
    /// The fault of not being there.
    fn missing(&self, data: Option<&Path>, own: &Path) -> String {
        let (file, own) = (&self.file, own.display());
        let origin = self.origin.as_deref().map_or(String::new(), |o| format!("; made from: {o}"));
        match data {
            Some(data) => format!("{file} is neither in {} nor in {own}{origin}", data.display()),
            None => format!("{file} is not in {own}{origin}"),
        }
    }
}

fn demand(faults: &mut Vec<String>, ok: bool, what: String) {
    if !ok {
        faults.push(what);
    }
}

fn in_unit(x: f64) -> bool {
    (0.0..1.0).contains(&x)
}
