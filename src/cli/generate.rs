//! `shoal generate`: one request, run in this process by the path that serves all requests.

use super::{Outcome, set_threads};
use anyhow::{Context, Result, anyhow};
use serde_json::Value;
use shoal::adapter::registry::Bounds;
use shoal::api::Service;
use shoal::bundle::Bundle;
use shoal::config::{Compute, DEFAULT_BUNDLE};
use shoal::engine::{Settings, State};
use shoal::metrics::Metrics;
use shoal::model::LoadOptions;
use shoal::request::{Input, MAX_N, Params, Request};
use shoal::task::{ControlKind, Task};
use shoal::telemetry::{self, Record};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::sync::Arc;

/// Tokens of one KV block.
const BLOCK_SIZE: usize = 16;

/// What `shoal generate` can be told.
#[derive(clap::Args, Clone, Debug)]
pub struct Generate {
    /// What the text is about, or how it begins
    pub input: String,
    /// Folder of the bundle
    #[arg(long, default_value = DEFAULT_BUNDLE)]
    pub bundle: PathBuf,
    /// Task; without one the input is continued as it stands
    #[arg(long)]
    pub task: Option<String>,
    /// How many words to write: short for --control words=N
    #[arg(long, allow_hyphen_values = true)]
    pub words: Option<i64>,
    /// A control of the task; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = control)]
    pub control: Vec<(String, String)>,
    /// Most new tokens
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// 0 always takes the likeliest token; up to 2
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Keep the smallest set of tokens whose probability reaches this
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Keep the k likeliest tokens
    #[arg(long)]
    pub top_k: Option<i64>,
    /// Drop tokens below this share of the likeliest one's probability
    #[arg(long)]
    pub min_p: Option<f32>,
    /// Same seed, same text
    #[arg(long)]
    pub seed: Option<i64>,
    /// End before this text; may be repeated
    #[arg(long)]
    pub stop: Vec<String>,
    /// How many texts, each on lines of its own
    #[arg(long)]
    pub n: Option<u32>,
    /// What computes
    #[command(flatten)]
    pub compute: Compute,
}

fn control(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("allowed: NAME=VALUE")?;
    Ok((name.into(), value.into()))
}

impl Generate {
    fn request(&self, task: &Task) -> Request {
        let mut controls: BTreeMap<String, Value> = BTreeMap::new();
        for (name, text) in &self.control {
            controls.insert(name.clone(), typed(task, name, text));
        }
        controls.extend(self.words.map(|words| ("words".into(), words.into())));
        let params = Params {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            seed: self.seed,
            stop: (!self.stop.is_empty()).then(|| self.stop.clone()),
            n: self.n,
            ..Params::default()
        };
        Request {
            record: Record::new("generate"),
            model: task.name.clone(),
            adapters: None,
            task: None,
            debug: false,
            inputs: vec![Input::Text(self.input.clone())],
            prompt_field: "input",
            controls,
            params,
            labels: Vec::new(),
            grammar: None,
            usual_max_tokens: None,
            deadline: None,
            first_token_deadline: None,
        }
    }
}

/// A control's value as a request's JSON would have it.
fn typed(task: &Task, name: &str, text: &str) -> Value {
    let integer = matches!(
        task.controls.get(name).map(|control| &control.kind),
        Some(ControlKind::Integer { .. })
    );
    match text.parse::<i64>() {
        Ok(n) if integer => n.into(),
        _ => text.into(),
    }
}

/// Writes the text to standard output as it comes.
pub fn run(args: &Generate) -> Result<Outcome> {
    telemetry::init("warn", false).map_err(anyhow::Error::msg)?;
    set_threads(&args.compute)?;
    let mut bundle = Bundle::open(&args.bundle, None)?;
    let metrics = Arc::new(Metrics::new(&bundle.tasks.names()));
    let texts = args.n.unwrap_or(1).clamp(1, MAX_N) as usize;
    let kv_tokens = bundle.spec.context.next_multiple_of(BLOCK_SIZE) * texts;
    let options = LoadOptions { dtype: args.compute.dtype, kv_tokens, block_size: BLOCK_SIZE };
    let (engine, _) = bundle.start(options, Settings::default(), metrics.clone());
    let request = {
        let name = args.task.as_ref().unwrap_or(&bundle.id);
        let task = bundle.tasks.find(name).with_context(|| {
            format!("no task {name:?}; allowed: {}", bundle.tasks.names().join(", "))
        })?;
        args.request(task)
    };
    let ends = bundle.ends();
    let adapters = bundle.registry(args.compute.dtype, Bounds::NONE, metrics.clone())?;
    let adapters = Some(Arc::new(adapters));
    let service = Service::new(bundle.tasks, bundle.prompts, adapters, ends, engine, metrics);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(write(&service, request))
}

async fn write(service: &Service, request: Request) -> Result<Outcome> {
    let mut state = service.engine().watch();
    let state = *state.wait_for(|state| *state != State::Loading).await?;
    if state != State::Ready {
        return Ok(Outcome::EngineFailed);
    }
    let streams = request.params.n.unwrap_or(1) == 1;
    let mut ticket = service.submit(request).await.map_err(refused)?;
    if streams {
        while let Some(chunk) = ticket.next().await {
            if say(&chunk.map_err(refused)?.text)? == Reader::Gone {
                return Ok(Outcome::Done);
            }
        }
        say("\n")?;
    } else {
        for choice in ticket.collect().await.map_err(refused)?.choices {
            say(&format!("{}\n", choice.text))?;
        }
    }
    Ok(Outcome::Done)
}

fn refused(error: shoal::error::Error) -> anyhow::Error {
    anyhow!("{error}")
}

#[derive(PartialEq)]
enum Reader {
    Listens,
    Gone,
}

fn say(text: &str) -> Result<Reader> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::Listens),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error.into()),
    }
}
