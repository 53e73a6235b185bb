//! What a bundle is measured on: the intents of its own recipe's distilled data, on the side of the
//! split that training never saw. Split, task names and file checks are training's own.

use crate::train::data::{Row, read_rows, sha256_of};
use crate::train::recipe::{Form, Recipe};
use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One intent with the prompts that the teacher wrote for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intent {
    /// What a user would type.
    pub text: String,
    /// The teacher's prompts, of several lengths.
    pub prompts: Vec<String>,
    /// Orders intents in a way that nobody chose, and seeds their draws.
    pub hash: u64,
}

/// The intents of one side of the split.
#[derive(Debug)]
pub struct Intents {
    /// By task, each in the order of its hash.
    pub by_task: BTreeMap<String, Vec<Intent>>,
    /// Share of intents that the recipe holds out.
    pub held_out_fraction: f64,
}

/// Reads the held-out intents of `bundle` (or, if not `held_out`, the trained ones). The files are those
/// that its `train.toml` trains tasks on (of these the ones that it calls `set`), below `data` or in the
/// bundle's own `data/`.
pub fn read(
    bundle: &Path,
    data: Option<&Path>,
    set: Option<&str>,
    held_out: bool,
) -> Result<Intents> {
    let recipe = Recipe::load(&bundle.join("train.toml"))?;
    let controlled =
        recipe.stages.iter().flat_map(|s| &s.mix).filter(|p| p.form == Form::Controlled);
    let names = controlled.map(|p| p.data.as_str());
    let names: BTreeSet<&str> = names.filter(|name| set.is_none_or(|set| set == *name)).collect();
    let own = bundle.join("data");
    let mut by_task: BTreeMap<String, Vec<Intent>> = BTreeMap::new();
    for file in recipe.data.iter().filter(|d| names.contains(d.name.as_str())) {
        let mut places = data.into_iter().chain([own.as_path()]).map(|dir| dir.join(&file.file));
        let Some(path) = places.find(|p| p.is_file()) else { continue };
        let hash = sha256_of(&path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(hash == file.sha256, "{} is not the file that train.toml names", path.display());
        read_rows(&path, file.max_rows, |row| {
            let is_wanted = row.is_held_out(recipe.held_out.fraction) == held_out;
            if let (true, Row::Prompts { task, intent, prompts }) = (is_wanted, row) {
                let task = recipe.task_of(&task).with_context(|| format!("no task {task}"))?;
                let hash = hash_of(&intent);
                let intent = Intent { text: intent, prompts, hash };
                by_task.entry(task.to_owned()).or_default().push(intent);
            }
            Ok(())
        })?;
    }
    if by_task.is_empty() {
        let name = bundle.display();
        bail!("found no intents of {name} to measure on; --data DIR says where its data files are");
    }
    for list in by_task.values_mut() {
        list.sort_by_key(|intent| intent.hash);
        // A stage may have read the beginning of a file under a name of its own.
        list.dedup();
    }
    Ok(Intents { by_task, held_out_fraction: recipe.held_out.fraction })
}

fn hash_of(intent: &str) -> u64 {
    let digest = Sha256::digest(intent.as_bytes());
    digest.iter().take(8).fold(0, |hash, &byte| hash << 8 | u64::from(byte))
}
