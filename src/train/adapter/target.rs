//! The bundle that gets an adapter: what may not stand there already, and the task file that serves it.

use super::Recipe;
use super::examples::Layout;
use crate::adapter::{Change, Module, save};
use crate::config::bundle_id;
use crate::task::Task;
use crate::train::checkpoint::replace;
use crate::train::tokenizer::WORDS;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the results of a recipe go.
#[derive(Debug)]
pub struct Target {
    /// The adapter's folder.
    pub adapter: PathBuf,
    /// The task's file.
    pub task: PathBuf,
}

impl Target {
    /// In the bundle `out`, which need not be there. Refuses names that the bundle has given already, and
    /// a file of the task that would leave the adapter unused.
    pub fn of(recipe: &Recipe, out: &Path) -> Result<Self> {
        let (task, adapter, id) = (&recipe.task, recipe.adapter_name(), bundle_id(out, None));
        let file = |name: &str| out.join("tasks").join(format!("{name}.toml"));
        ensure!(*task != id, "{task} is the name of the bundle itself; choose another task's name");
        ensure!(
            adapter != id && !file(&adapter).exists(),
            "the adapter would be {adapter}, which is the name of {}; choose another task's name",
            if adapter == id { "the bundle" } else { "a task" }
        );
        let target = Self { task: file(task), adapter: out.join("adapters").join(&adapter) };
        if target.task.exists() {
            target.check_task(task, &adapter)?;
        }
        Ok(target)
    }

    /// Whether the task's file, which stays as it is, uses the adapter.
    fn check_task(&self, name: &str, adapter: &str) -> Result<()> {
        let path = self.task.display();
        let text = fs::read_to_string(&self.task).with_context(|| format!("cannot read {path}"))?;
        let task = Task::parse(name, &text).map_err(|faults| anyhow::anyhow!(faults.join("\n")))?;
        if task.adapter.as_deref() != Some(adapter) {
            bail!(
                "{path} is there already and does not use the adapter: write adapter = {adapter:?} into \
                 it, remove it, or choose another task's name"
            );
        }
        Ok(())
    }

    /// Writes the adapter, and its task file unless there is one.
    pub fn write(
        &self,
        recipe: &Recipe,
        layers: usize,
        changes: &BTreeMap<(usize, Module), Change>,
        layout: &Layout,
    ) -> Result<()> {
        let base = recipe.base.file_name().unwrap_or_default().to_string_lossy();
        save(&self.adapter, &base, recipe.adapter.rank, layers, changes)
            .with_context(|| format!("cannot write {}", self.adapter.display()))?;
        if self.task.exists() {
            // Whoever edited it wants to keep it.
            eprintln!("{} is there already and stays as it is", self.task.display());
            return Ok(());
        }
        fs::create_dir_all(self.task.parent().unwrap_or(Path::new(".")))?;
        replace(&self.task, task_text(recipe, layout).as_bytes())
    }
}

fn task_text(recipe: &Recipe, layout: &Layout) -> String {
    let mut task = toml::Table::new();
    task.insert("description".into(), recipe.description.clone().into());
    task.insert("template".into(), layout.template().into());
    task.insert("adapter".into(), recipe.adapter_name().into());
    let mut text = task.to_string();
    if layout.has_words() {
        text += "\n# How long the text shall be, in words; without it the model chooses.\n\
                 [controls.words]\nkind = \"integer\"\n";
        text += &format!("range = [{}, {}]\n", WORDS.start(), WORDS.end());
        text += "token = \"<|words:{}|>\"\n";
    }
    text + "\n[defaults]\ntemperature = 0.7\ntop_p = 0.9\nmax_tokens = 128\n"
}
