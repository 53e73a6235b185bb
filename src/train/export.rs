//! The bundle: what training leaves behind, in the form that serving and Hugging Face's transformers
//! read.

use super::checkpoint::replace;
use super::params::Params;
use crate::model::{Spec, weights};
use crate::text::END_OF_TEXT;
use anyhow::{Context, Result};
use candle_core::DType;
use serde_json::json;
use std::fs;
use std::path::Path;

/// File name of the tokenizer in a bundle and in the output folder.
pub const TOKENIZER: &str = "tokenizer.json";

/// Writes a bundle into `dir`: weights in bf16, and what stands beside the recipe (its own file, `tasks/`
/// and `data/`). Files of an earlier bundle are replaced; a bundle may be written over its own recipe.
pub fn export(
    dir: &Path,
    spec: &Spec,
    params: &Params,
    tokenizer: &Path,
    recipe: &Path,
) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    weights::save(dir, spec, &params.values(), DType::BF16)?;
    let about = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": false,
        "model_max_length": spec.context,
    });
    write_json(&dir.join("tokenizer_config.json"), &about)?;
    replace(&dir.join(TOKENIZER), &fs::read(tokenizer)?)?;
    let home = recipe.parent().unwrap_or(Path::new("."));
    copy(recipe, &dir.join("train.toml"))?;
    for folder in ["tasks", "data"] {
        copy_folder(&home.join(folder), &dir.join(folder))?;
    }
    Ok(())
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    replace(path, format!("{value:#}\n").as_bytes())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    let is_itself =
        fs::canonicalize(to).ok().is_some_and(|to| fs::canonicalize(from).ok() == Some(to));
    if is_itself { Ok(()) } else { replace(to, &bytes) }
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
