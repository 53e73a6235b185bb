//! What an adapter is to be: a few flags, or a TOML file with an `[adapter]` section.

use crate::adapter::Module;
use crate::ids::is_valid_name;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// How an adapter is made.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The task that it is for.
    pub task: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// The bundle that it adds to; in a file, from the file's folder.
    pub base: PathBuf,
    /// JSON Lines of examples; in a file, from the file's folder.
    pub data: Vec<PathBuf>,
    /// Every random choice follows from it.
    #[serde(default)]
    pub seed: u64,
    /// The adapter itself.
    #[serde(default)]
    pub adapter: Settings,
}

/// An adapter's shape and how it learns.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Rank of each change.
    pub rank: usize,
    /// The linear layers of every block that change, as GPT-2 calls them.
    pub target_modules: Vec<String>,
    /// Times that the examples are gone through.
    pub epochs: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Tokens of one optimiser step.
    pub batch_tokens: usize,
    /// Share of the inputs that are held out to measure by, among rows that name no split themselves.
    pub held_out: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rank: 16,
            target_modules: Module::ALL.iter().map(|module| module.name().to_owned()).collect(),
            epochs: 8,
            learning_rate: 2e-3,
            batch_tokens: 1024,
            held_out: 0.1,
        }
    }
}

impl Recipe {
    /// The recipe in a file; `None` if the file has no `[adapter]` section, and so is about something
    /// else.
    pub fn from_file(path: &Path) -> Result<Option<Self>> {
        let read = || format!("cannot read the recipe {}", path.display());
        let text = std::fs::read_to_string(path).with_context(read)?;
        let table = text.parse::<toml::Table>();
        if !table.is_ok_and(|table| table.contains_key("adapter")) {
            return Ok(None);
        }
        let recipe: Self = toml::from_str(&text)
            .with_context(|| format!("{} is not the recipe of an adapter", path.display()))?;
        let home = path.parent().unwrap_or(Path::new("."));
        Ok(Some(Self {
            base: home.join(&recipe.base),
            data: recipe.data.iter().map(|file| home.join(file)).collect(),
            ..recipe
        }))
    }

    /// What the adapter is called: no task may have its name.
    pub fn adapter_name(&self) -> String {
        format!("{}-lora", self.task)
    }

    /// Refuses what is out of range, all of it at once.
    pub fn check(&self) -> Result<()> {
        let s = &self.adapter;
        let mut faults = Vec::new();
        let mut need = |ok: bool, fault: String| {
            if !ok {
                faults.push(fault);
            }
        };
        let named = is_valid_name(&self.adapter_name());
        need(named, format!("task {:?}; allowed: 1 to 59 of A-Z a-z 0-9 . _ -", self.task));
        need(!self.data.is_empty(), "data: name at least one file".into());
        need((1..=256).contains(&s.rank), format!("adapter.rank is {}; allowed: 1 to 256", s.rank));
        need(
            (1..=1000).contains(&s.epochs),
            format!("adapter.epochs is {}; allowed: 1 to 1000", s.epochs),
        );
        let rate = s.learning_rate;
        need(
            rate > 0.0 && rate < 1.0,
            format!("adapter.learning_rate is {rate}; allowed: above 0, below 1"),
        );
        need(
            (64..=1 << 20).contains(&s.batch_tokens),
            format!("adapter.batch_tokens is {}; allowed: 64 to 1048576", s.batch_tokens),
        );
        let share = (0.0..=0.5).contains(&s.held_out);
        need(share, format!("adapter.held_out is {}; allowed: 0 to 0.5", s.held_out));
        need(!s.target_modules.is_empty(), "adapter.target_modules: name at least one".into());
        let known: Vec<&str> = Module::ALL.iter().map(|module| module.name()).collect();
        for name in s.target_modules.iter().filter(|name| !known.contains(&name.as_str())) {
            let allowed = known.join(", ");
            need(false, format!("adapter.target_modules: {name:?}; allowed: {allowed}"));
        }
        if faults.is_empty() { Ok(()) } else { bail!("{}", faults.join("\n")) }
    }
}

impl Settings {
    /// The layers that change, in the order of a block.
    pub fn modules(&self) -> Vec<Module> {
        let named = |module: &Module| self.target_modules.iter().any(|name| name == module.name());
        Module::ALL.into_iter().filter(named).collect()
    }
}
