//! The adapters of a bundle: `adapters/<name>/`, each in PEFT's layout.

use crate::adapter::{self, Limits, Loaded, Shape};
use crate::ids::is_valid_name;
use crate::task::TaskTable;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirEntry};
use std::path::Path;

/// Where they are, in the bundle.
pub const FOLDER: &str = "adapters";

/// Who serves them says what they may cost.
const ANY: Limits = Limits { max_rank: 1 << 12, max_bytes: 1 << 40 };

/// Reads all of them for a base model of this shape; and what is wrong with the others.
pub fn read(bundle: &Path, shape: &Shape) -> (BTreeMap<String, Loaded>, Vec<String>) {
    let mut found = BTreeMap::new();
    let mut faults = Vec::new();
    let names = names(bundle).unwrap_or_else(|fault| {
        faults.push(fault);
        BTreeSet::new()
    });
    for name in names {
        if !is_valid_name(&name) {
            let allowed = "1 to 64 of A-Z a-z 0-9 . _ -";
            faults.push(format!("{FOLDER}/{name}: the name; allowed: {allowed}"));
            continue;
        }
        let dir = bundle.join(FOLDER).join(&name);
        match adapter::load(&dir, shape, &ANY) {
            Ok(loaded) => drop(found.insert(name, loaded)),
            Err(more) => {
                faults.extend(more.0.iter().map(|fault| format!("{FOLDER}/{name}/{fault}")));
            }
        }
    }
    (found, faults)
}

/// Where tasks and adapters do not fit together.
pub fn clashes(bundle: &Path, tasks: &TaskTable) -> Vec<String> {
    let names = names(bundle).unwrap_or_default();
    let taken = names.iter().filter(|name| tasks.find(name).is_some());
    let mut faults: Vec<String> = taken
        .map(|name| {
            format!("{FOLDER}/{name}: the name is a task's or the bundle's; choose another")
        })
        .collect();
    for task in tasks.iter() {
        if let Some(adapter) = task.adapter.as_deref().filter(|&name| !names.contains(name)) {
            let allowed: Vec<&str> = names.iter().map(String::as_str).collect();
            let allowed =
                if names.is_empty() { "none is there".into() } else { allowed.join(", ") };
            faults.push(format!(
                "tasks/{}.toml: adapter is {adapter:?}; allowed: {allowed}",
                task.name
            ));
        }
    }
    faults
}

/// The folders in it, but for hidden ones; nothing if there is no such folder.
fn names(bundle: &Path) -> Result<BTreeSet<String>, String> {
    let folder = bundle.join(FOLDER);
    if !folder.exists() {
        return Ok(BTreeSet::new());
    }
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<DirEntry>, _>>);
    let entries = entries.map_err(|e| format!("{FOLDER}: {e}"))?;
    let folders = entries.iter().filter(|entry| entry.path().is_dir());
    let names = folders.map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.filter(|name| !name.starts_with('.')).collect())
}
