//! A bundle from its folder, as far as it can be read, with all its faults; and an engine that runs it.
//!
//! Every command that takes a bundle opens it here, so that all of them accept and refuse the same.

mod adapters;

use crate::adapter::registry::{Bounds, Registry, Wanted};
use crate::adapter::{self, Loaded};
use crate::config::{Dtype, bundle_id};
use crate::engine::{self, EngineHandle, Job, Settings};
use crate::kernels::{Format, Precision};
use crate::metrics::Metrics;
use crate::model::{self, LoadOptions, Spec, Weights};
use crate::task::{Task, TaskTable};
use crate::telemetry;
use crate::text::{ChatSettings, END_OF_TEXT, Prompts, Tokenizer};
use anyhow::{Result, anyhow, bail};
use candle_core::DType;
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// What could be read of a bundle.
pub struct Parts {
    /// What clients call it.
    pub id: String,
    /// Its weights, mapped.
    pub weights: Option<Weights>,
    /// Its tokenizer.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Its tasks.
    pub tasks: Option<TaskTable>,
    /// Its compiled prompts.
    pub prompts: Option<Prompts>,
    /// The tokens that `generation_config.json` says end a text.
    pub generation_ends: Vec<u32>,
    /// Its adapters by name, for the weights as they are stored.
    pub adapters: BTreeMap<String, Loaded>,
    /// Everything that is wrong with it.
    pub faults: Vec<String>,
}

/// A bundle without faults.
pub struct Bundle {
    /// Its folder.
    pub path: PathBuf,
    /// What clients call it.
    pub id: String,
    /// Its model's shape.
    pub spec: Spec,
    /// What its file holds.
    pub stored: DType,
    /// Its tasks; the last is the bundle itself.
    pub tasks: TaskTable,
    /// Its compiled prompts.
    pub prompts: Prompts,
    /// The tokens that `generation_config.json` says end a text.
    pub generation_ends: Vec<u32>,
    /// Its adapters by name, for the weights as they are stored.
    pub adapters: BTreeMap<String, Loaded>,
}

impl Parts {
    /// Reads whatever is readable in the folder `path`; `name` is what clients call the bundle.
    pub fn read(path: &Path, name: Option<&str>) -> Self {
        let id = bundle_id(path, name);
        let mut faults = Vec::new();
        let mut keep = |more: Vec<String>| faults.extend(more);
        let weights = Weights::open(path).map_err(|f| keep(f.0)).ok();
        let tokenizer = Tokenizer::load(path.join("tokenizer.json"));
        let tokenizer = tokenizer.map_err(|e| keep(vec![e.to_string()])).ok().map(Arc::new);
        let tasks = TaskTable::load(path, &id).map_err(&mut keep).ok();
        let prompts = match (&tasks, &tokenizer) {
            (Some(tasks), Some(tokenizer)) => {
                Prompts::new(tasks, tokenizer.clone()).map_err(&mut keep).ok()
            }
            _ => None,
        };
        let chat = ChatSettings::load(path).map_err(&mut keep).ok();
        let prompts = match (prompts, chat) {
            (Some(prompts), Some(chat)) => prompts.with_chat(chat).map_err(&mut keep).ok(),
            _ => None,
        };
        let vocab = weights.as_ref().map_or(usize::MAX, |weights| weights.spec().vocab);
        let generation_ends =
            generation_ends(path, vocab).map_err(|f| keep(vec![f])).unwrap_or_default();
        if let (Some(weights), Some(tokenizer)) = (&weights, &tokenizer) {
            keep(mismatches(weights.spec(), tokenizer));
        }
        let mut adapters = BTreeMap::new();
        if let Some(weights) = &weights {
            let precision = model::precision(Dtype::Auto, weights.dtype());
            let shape = model::adapter_shape(weights.spec(), precision);
            let (found, more) = adapters::read(path, &shape);
            adapters = found;
            keep(more);
        }
        if let Some(tasks) = &tasks {
            keep(adapters::clashes(path, tasks));
        }
        Self { id, weights, tokenizer, tasks, prompts, generation_ends, adapters, faults }
    }
}

/// Refuses to begin without an adapter that is there, because others took its room.
pub fn check_all(registry: &Registry, names: &[String]) -> Result<()> {
    match names.iter().find(|name| !registry.contains(name)) {
        Some(name) => bail!(
            "there is no room for the adapter {name} beside the others: allow more with \
             --max-adapters or --max-adapter-bytes"
        ),
        None => Ok(()),
    }
}

/// A job for `task` with its own sampling, adapter and gate, for commands that ask the engine themselves.
pub fn job_of(
    task: &Task,
    prompt: Vec<u32>,
    max_new: u32,
    adapters: &Registry,
    engine: &EngineHandle,
) -> Result<Job> {
    let one = |name: &String| adapters.one(name, Some(&task.name));
    let chosen = task.adapter.as_ref().map(one).transpose()?;
    let sampling = Arc::new(task.defaults.sampling());
    Ok(Job {
        adapters: chosen.map(|chosen| chosen.mix),
        gate: engine.gate(&task.name),
        ..Job::new(task.id, prompt, sampling, max_new, telemetry::now())
    })
}

/// The tokens that a folder's `generation_config.json` says end a text; none if there is no such file.
fn generation_ends(folder: &Path, vocab: usize) -> Result<Vec<u32>, String> {
    let text = match fs::read_to_string(folder.join("generation_config.json")) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|e| e.to_string()),
    };
    let config = text.and_then(|text| {
        serde_json::from_str::<serde_json::Value>(&text).map_err(|e| e.to_string())
    });
    let ids = config.and_then(|config| model::end_ids(&config["eos_token_id"], vocab));
    ids.map_err(|fault| format!("generation_config.json: {fault}"))
}

/// Where model and tokenizer do not fit together.
fn mismatches(spec: &Spec, tokenizer: &Tokenizer) -> Vec<String> {
    let mut faults = Vec::new();
    if tokenizer.vocab_size() > spec.vocab {
        faults.push(format!(
            "tokenizer.json: ids up to {}, but config.json: vocab_size is {}",
            tokenizer.vocab_size() - 1,
            spec.vocab
        ));
    }
    faults
}

impl Bundle {
    /// Reads the bundle in the folder `path`; the error lists all its faults.
    pub fn open(path: &Path, name: Option<&str>) -> Result<Self> {
        if !path.is_dir() {
            bail!("{}: no such folder", path.display());
        }
        match Parts::read(path, name) {
            Parts {
                id,
                weights: Some(weights),
                tasks: Some(tasks),
                prompts: Some(prompts),
                generation_ends,
                adapters,
                faults,
                ..
            } if faults.is_empty() => {
                let (spec, stored) = (weights.spec().clone(), weights.dtype());
                let path = path.into();
                Ok(Self { path, id, spec, stored, tasks, prompts, generation_ends, adapters })
            }
            parts => bail!("{} cannot be used:\n  {}", path.display(), parts.faults.join("\n  ")),
        }
    }

    /// The token that ends its texts, the first of [`Bundle::ends`].
    pub fn end_of_text(&self) -> Option<u32> {
        self.ends().first().copied()
    }

    /// The tokens that end its texts: what `config.json` says, what `generation_config.json` says, and
    /// what ends a turn of a chat; if nothing is said, what GPT-2 calls it.
    pub fn ends(&self) -> Vec<u32> {
        let said = self.spec.eos.iter().chain(&self.generation_ends).copied();
        let mut ends: Vec<u32> = Vec::new();
        for id in said.chain(self.prompts.end_of_turn()) {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        if ends.is_empty() {
            ends.extend(self.prompts.tokenizer().token_id(END_OF_TEXT));
        }
        ends
    }

    /// Starts an engine for it.
    pub fn start(
        &self,
        options: LoadOptions,
        settings: Settings,
        metrics: Arc<Metrics>,
    ) -> (EngineHandle, JoinHandle<()>) {
        let path = self.path.clone();
        let build = move || model::load(&path, &options).map_err(|faults| faults.into());
        engine::start(build, &self.tasks, settings, metrics)
    }

    /// Its adapters for requests; those that its tasks need are pinned.
    ///
    /// # Errors
    /// What they exceed of these bounds.
    pub fn registry(
        &mut self,
        dtype: Dtype,
        bounds: Bounds,
        metrics: Arc<Metrics>,
    ) -> Result<Registry> {
        let shape = self.adapter_shape(dtype);
        let registry = Registry::new(shape.clone(), bounds, metrics);
        let needed: Vec<&str> =
            self.tasks.iter().filter_map(|task| task.adapter.as_deref()).collect();
        let read = std::mem::take(&mut self.adapters);
        let names: Vec<String> = read.keys().cloned().collect();
        for (name, loaded) in read {
            let pinned = needed.contains(&name.as_str());
            let folder = self.path.join(adapters::FOLDER).join(&name);
            let wanted = Wanted { pinned, ..Wanted::new(&name, &folder) };
            // As it was read it may be of another precision than the one that is wanted.
            let admitted = match loaded.deltas(None).shape() == &shape {
                true => registry.admit(&wanted, loaded),
                false => registry.load(&wanted),
            };
            admitted.map_err(|e| anyhow!("{}/{name}: {e}", adapters::FOLDER))?;
        }
        check_all(&registry, &names)?;
        Ok(registry)
    }

    /// What the weights are held in, in a word.
    pub fn held_as(&self, dtype: Dtype) -> &'static str {
        match model::format(dtype, self.stored) {
            Format::Float(Precision::F32) => "f32",
            Format::Float(Precision::Bf16) => "bf16",
            Format::Int8 => "int8",
        }
    }

    /// Bytes of keys and values that one token takes.
    pub fn kv_bytes_per_token(&self, dtype: Dtype, block_size: usize) -> usize {
        model::kv_shape(&self.spec, block_size, self.precision(dtype)).bytes_per_position()
    }

    /// What its adapters must be made for when the weights are held as `dtype`.
    pub fn adapter_shape(&self, dtype: Dtype) -> adapter::Shape {
        model::adapter_shape(&self.spec, self.precision(dtype))
    }

    fn precision(&self, dtype: Dtype) -> Precision {
        model::precision(dtype, self.stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// The golden model with another end of text in its config.json.
    fn bundle(eos: Value) -> Result<Bundle> {
        bundle_with(eos, &[])
    }

    /// The same and these files.
    fn bundle_with(eos: Value, files: &[(&str, Value)]) -> Result<Bundle> {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gpt2-tiny");
        let dir = tempfile::tempdir()?;
        for file in ["model.safetensors", "tokenizer.json"] {
            fs::copy(golden.join(file), dir.path().join(file))?;
        }
        let config = fs::read(golden.join("config.json"))?;
        let mut config: Value = serde_json::from_slice(&config)?;
        config["eos_token_id"] = eos;
        fs::write(dir.path().join("config.json"), config.to_string())?;
        for (name, value) in files {
            fs::write(dir.path().join(name), value.to_string())?;
        }
        Bundle::open(dir.path(), None)
    }

    #[test]
    fn the_end_of_text_is_what_the_config_says_else_what_gpt2_calls_it() {
        for (eos, id) in [(json!(7), 7), (json!([9, 0]), 9), (Value::Null, 0)] {
            assert_eq!(bundle(eos).unwrap().end_of_text(), Some(id));
        }
        assert!(bundle(json!(512)).is_err());
    }

    #[test]
    fn texts_end_as_any_of_its_files_says() {
        let generation = |ids: Value| ("generation_config.json", json!({"eos_token_id": ids}));
        let settings = |token: &str| ("tokenizer_config.json", json!({"eos_token": token}));
        for (eos, files, ends) in [
            (json!([9, 0]), vec![], vec![9, 0]),
            (json!(7), vec![generation(json!([8, 7])), settings("<|endoftext|>")], vec![7, 8, 0]),
            (Value::Null, vec![generation(json!(5))], vec![5]),
            (Value::Null, vec![settings("!")], vec![1]),
            (Value::Null, vec![generation(Value::Null)], vec![0]),
        ] {
            assert_eq!(bundle_with(eos, &files).unwrap().ends(), ends);
        }
        for (file, want) in [
            (
                generation(json!(512)),
                "generation_config.json: eos_token_id is 512; allowed: a token id below 512",
            ),
            (settings("<|im_end|>"), "tokenizer_config.json: eos_token: <|im_end|> is no token"),
        ] {
            let error = bundle_with(json!(0), &[file]).err().unwrap().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn keys_and_values_take_what_they_are_held_in() {
        let bundle = bundle(Value::Null).unwrap();
        // 3 layers of 64 numbers, twice.
        assert_eq!(bundle.kv_bytes_per_token(Dtype::Auto, 16), 2 * 3 * 64 * 4);
        assert_eq!(bundle.kv_bytes_per_token(Dtype::Bf16, 16), 2 * 3 * 64 * 2);
    }
}
