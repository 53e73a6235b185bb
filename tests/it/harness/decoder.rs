//! A server over a real decoder, and somebody who may load adapters into it.

use super::client::Reply;
use super::server::{BUNDLE, Server, Setup, bundle};
use serde_json::{Value, json};
use shoal::adapter::registry::{Bounds, Registry};
use shoal::api::Keys;
use shoal::config::Dtype;
use shoal::engine::State;
use shoal::kernels::Precision;
use shoal::metrics::Metrics;
use shoal::model::{self, LoadOptions, Weights};
use shoal::text::Tokenizer;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub const COMPLETIONS: &str = "/v1/completions";
pub const LOAD: &str = "/v1/load_lora_adapter";
const KEY: &str = "0123456789abcdef";
pub const AUTHORISED: (&str, &str) = ("authorization", "Bearer 0123456789abcdef");

pub fn goldens() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// The folder of the golden model.
pub fn golden_model() -> PathBuf {
    goldens().join("gpt2-tiny")
}

/// The reference's entries for one adapter, or `base`.
pub fn prompts(tag: &str) -> Vec<Value> {
    let text = fs::read_to_string(goldens().join("reference.json")).unwrap();
    let reference: Value = serde_json::from_str(&text).unwrap();
    let all = reference["prompts"].as_array().unwrap();
    let tagged: Vec<Value> = all.iter().filter(|p| p["tag"] == tag).cloned().collect();
    assert!(!tagged.is_empty(), "{tag}");
    tagged
}

impl Server {
    /// The model in `folder`, in f32 and with the golden tokenizer, ready to be asked for raw text.
    pub async fn over(folder: &Path, setup: Setup) -> Self {
        let tokenizer = Tokenizer::load(golden_model().join("tokenizer.json")).unwrap();
        let setup = Setup { tasks: vec![bundle()], tokenizer: Arc::new(tokenizer), ..setup };
        let options = LoadOptions { dtype: Dtype::F32, ..LoadOptions::default() };
        let folder = folder.to_owned();
        let server = Self::loading(setup, move || Ok(model::load(&folder, &options)?)).await;
        let mut state = server.engine.watch();
        state.wait_for(|s| *s == State::Ready).await.unwrap();
        server
    }

    /// The golden model with room for `max` adapters, which an administrator loads from below `root`.
    pub async fn with_adapters(root: &Path, max: usize) -> Self {
        let folder = golden_model();
        let metrics = Arc::new(Metrics::new(&[BUNDLE.to_owned()]));
        let weights = Weights::open(&folder).unwrap();
        let shape = model::adapter_shape(weights.spec(), Precision::F32);
        let bounds = Bounds { max_adapters: max, ..Bounds::default() };
        let setup = Setup {
            adapters: Some(Arc::new(Registry::new(shape, bounds, metrics.clone()))),
            metrics: Some(metrics),
            keys: Keys::default().with_admin_key(KEY),
            adapter_root: root.to_owned(),
            ..Setup::default()
        };
        Self::over(&folder, setup).await
    }

    /// Asks as the administrator.
    pub async fn admin(&self, path: &str, body: Value) -> Reply {
        self.client.post_with(path, &[AUTHORISED], &body).await
    }

    /// Loads an adapter, which must succeed.
    pub async fn load(&self, name: &str, path: &str) -> Value {
        let reply = self.admin(LOAD, json!({"lora_name": name, "lora_path": path})).await;
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        reply.json()
    }
}
