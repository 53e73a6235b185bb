//! A server on a port of its own, over a pretend model that repeats its prompt.

use super::client::Client;
use serde_json::{Value, json};
use shoal::adapter::registry::Registry;
use shoal::api::{App, Caps, Ended, Keys, Limits, Listeners, Service, serve};
use shoal::engine::fake::FakeRunner;
use shoal::engine::{EngineHandle, Settings, State, start};
use shoal::ids::TaskId;
use shoal::metrics::Metrics;
use shoal::model::step::{Capacity, Runner, StepError};
use shoal::request::Params;
use shoal::task::{Control, ControlKind, Slo, Task, TaskTable};
use shoal::telemetry::traces::Traces;
use shoal::text::{Prompts, Tokenizer};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

const TOKENIZER: &[u8] = include_bytes!("../../goldens/gpt2-tiny/tokenizer.json");

/// The bundle's id.
pub const BUNDLE: &str = "tiny";

/// Longest sequence of the pretend model.
pub const CONTEXT: usize = 256;

/// The golden tokenizer's file with the control tokens `<|gen|>` (512), `<|words:none|>` and
/// `<|words:N|>`.
pub fn tokenizer_json() -> Vec<u8> {
    let mut file: Value = serde_json::from_slice(TOKENIZER).unwrap();
    let added = file["added_tokens"].as_array_mut().unwrap();
    let words = (3..=60).map(|n| format!("words:{n}"));
    let names = ["gen", "words:none"].map(String::from).into_iter().chain(words);
    for (i, name) in names.enumerate() {
        added.push(json!({"id": 512 + i, "content": format!("<|{name}|>"), "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}));
    }
    file.to_string().into_bytes()
}

/// The tokenizer of [`tokenizer_json`].
pub fn tokenizer() -> Arc<Tokenizer> {
    static TOKENS: LazyLock<Arc<Tokenizer>> =
        LazyLock::new(|| Arc::new(Tokenizer::from_json(&tokenizer_json()).unwrap()));
    TOKENS.clone()
}

/// A task with the control `words`, whose prompt is `<|words:N|>` + input + `<|gen|>`.
pub fn task(name: &str) -> Task {
    let kind = ControlKind::Integer { minimum: 3, maximum: 60 };
    let words = Control { kind, token: "<|words:{}|>".into(), default: None };
    Task {
        id: TaskId(0),
        name: name.into(),
        description: format!("Repeats an idea for {name}."),
        template: "{{ controls.words }}{{ input }}<|gen|>".into(),
        chat_template: None,
        adapter: None,
        controls: [("words".to_string(), words)].into(),
        defaults: Params { max_tokens: Some(64), ..Params::default() },
        limits: shoal::task::Limits::default(),
        slo: Slo { ttft_ms: Some(60_000.0), ..Slo::default() },
    }
}

/// The bundle itself.
pub fn bundle() -> Task {
    Task {
        name: BUNDLE.into(),
        template: "{{ input }}".into(),
        controls: Default::default(),
        defaults: Params::default(),
        slo: Slo::default(),
        ..task("raw")
    }
}

/// The pretend model: what stands before the first `|` or `<|gen|>` is repeated after it, then the text
/// ends. What begins with `~` is repeated for ever, without the `~`.
pub fn repeat(tokens: &[u32]) -> u32 {
    static MARKS: LazyLock<[u32; 2]> =
        LazyLock::new(|| ["|", "~"].map(|c| tokenizer().token_id(c).unwrap()));
    let [bar, tilde] = *MARKS;
    let Some(end) = tokens.iter().position(|&t| t == bar || t == 512) else { return bar };
    let start = usize::from(tokens[0] > 512);
    let endless = tokens[start] == tilde;
    let words = &tokens[start + usize::from(endless)..end];
    let done = tokens.len() - end - 1;
    match words.get(if endless { done % words.len() } else { done }) {
        Some(&token) => token,
        None => 0,
    }
}

/// A pretend model that repeats, with room for 64 sequences of [`CONTEXT`] tokens.
pub fn repeater() -> FakeRunner {
    let capacity = Capacity { blocks: 1024, block_size: 16, context: CONTEXT, vocab: 572 };
    FakeRunner::new(capacity).with_model(repeat)
}

/// What a test's server is made of.
pub struct Setup {
    pub tasks: Vec<Task>,
    pub tokenizer: Arc<Tokenizer>,
    pub settings: Settings,
    pub limits: Limits,
    pub shutdown_timeout: Duration,
    pub adapters: Option<Arc<Registry>>,
    pub metrics: Option<Arc<Metrics>>,
    pub keys: Keys,
    pub adapter_root: PathBuf,
    pub origins: Vec<String>,
    pub caps: Caps,
    pub traces: Option<Arc<Traces>>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            tasks: vec![task("image"), task("music"), task("video"), bundle()],
            tokenizer: tokenizer(),
            settings: Settings::default(),
            limits: Limits::default(),
            shutdown_timeout: Duration::from_secs(60),
            adapters: None,
            metrics: None,
            keys: Keys::default(),
            adapter_root: PathBuf::new(),
            origins: Vec::new(),
            caps: Caps::default(),
            traces: None,
        }
    }
}

/// A running server. Dropping it ends its tasks; the engine's thread ends with its last handle.
pub struct Server {
    pub client: Client,
    pub grpc_address: SocketAddr,
    pub engine: EngineHandle,
    pub signals: mpsc::Sender<()>,
    pub thread: Option<JoinHandle<()>>,
    serving: tokio::task::JoinHandle<Ended>,
}

impl Server {
    /// A server with everything as usual, ready to be asked.
    pub async fn usual() -> Self {
        Self::with(Setup::default(), repeater()).await
    }

    /// A server of `setup` over `runner`, ready to be asked.
    pub async fn with<R: Runner + Send + 'static>(setup: Setup, runner: R) -> Self {
        let server = Self::loading(setup, move || Ok(runner)).await;
        let mut state = server.engine.watch();
        state.wait_for(|s| *s == State::Ready).await.unwrap();
        server
    }

    /// A server whose model `build` makes, answering probes meanwhile.
    pub async fn loading<R: Runner>(
        setup: Setup,
        build: impl FnOnce() -> Result<R, StepError> + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Client(listener.local_addr().unwrap());
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let grpc_address = grpc.local_addr().unwrap();
        let listeners = Listeners { http: listener, grpc: Some(grpc) };
        let tasks = TaskTable::new(setup.tasks);
        let metrics = setup.metrics.unwrap_or_else(|| Arc::new(Metrics::new(&tasks.names())));
        let (engine, thread) = start(build, &tasks, setup.settings, metrics.clone());
        let prompts = Prompts::new(&tasks, setup.tokenizer).unwrap();
        let ends = prompts.tokenizer().token_id("<|endoftext|>").into_iter().collect();
        let service = Service::new(tasks, prompts, setup.adapters, ends, engine.clone(), metrics)
            .with_caps(setup.caps);
        let app = App::new(service, setup.limits, "f32")
            .with_keys(setup.keys, setup.adapter_root)
            .with_origins(&setup.origins)
            .with_traces(setup.traces);
        let app = Arc::new(app);
        let (signals, stop) = mpsc::channel(2);
        let serving = tokio::spawn(serve(listeners, app, setup.shutdown_timeout, stop));
        Self { client, grpc_address, engine, signals, thread: Some(thread), serving }
    }

    /// How serving ended.
    pub async fn ended(self) -> Ended {
        self.serving.await.unwrap()
    }

    /// The value of a series in `/metrics`, such as `shoal_requests_total{outcome="ok",task="image"}`.
    pub async fn metric(&self, series: &str) -> f64 {
        let text = String::from_utf8(self.client.get("/metrics").await.body).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a series has this value; the test's runner ends a wait that is in vain.
    pub async fn until(&self, series: &str, value: f64) {
        while self.metric(series).await != value {
            tokio::task::yield_now().await;
        }
    }
}
