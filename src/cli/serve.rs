//! `shoal serve`: from a configuration to a listening server, and to its end.

use super::{Outcome, set_threads};
use anyhow::{Context, Result, anyhow, bail};
use shoal::adapter::registry::{Bounds, Registry, Wanted};
use shoal::api::{self, App, Caps, Ended, Keys, Limits, Listeners, Service};
use shoal::bundle::{Bundle, check_all};
use shoal::config::{self, LogFormat, Serve};
use shoal::engine::{EngineHandle, Settings, State};
use shoal::metrics::Metrics;
use shoal::model::LoadOptions;
use shoal::telemetry::{self, traces::Traces};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;

/// Threads for sockets and text; the rest of the machine computes.
const SOCKET_THREADS: usize = 2;

/// How long the engine's thread gets to end once it has nothing left to do.
const CORE_END: Duration = Duration::from_secs(1);

/// How long a collector gets to take the last spans.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// Serves until a signal or the engine ends it.
pub fn run(args: &Serve) -> Result<Outcome> {
    let started = telemetry::now();
    let logging = &args.logging;
    let json = logging.log_format == LogFormat::Json;
    telemetry::init(&logging.log, json).map_err(anyhow::Error::msg)?;
    set_threads(&args.compute)?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(SOCKET_THREADS).enable_all().build()?;
    let outcome = runtime.block_on(serve(args, started));
    // Nothing that still runs has anybody who waits for it.
    runtime.shutdown_background();
    outcome
}

async fn serve(args: &Serve, started: Instant) -> Result<Outcome> {
    let stop = api::signals().context("cannot listen for signals")?;
    let listeners = listen(args).await?;
    let mut bundle = Bundle::open(&args.bundle, args.served_model_name.as_deref())?;
    let metrics = Arc::new(Metrics::new(&bundle.tasks.names()));
    metrics.startup("bundle", started.elapsed().as_secs_f64());
    let keys = keys(&args.keys, listeners.http.local_addr()?)?;
    let adapters = adapters(args, &mut bundle, &metrics)?;
    let (engine, core) = start_engine(args, &bundle, &metrics);
    let announcement = announcement(args, &bundle, &listeners)?;
    let dtype = bundle.held_as(args.compute.dtype);
    let ends = bundle.ends();
    let root = args.adapters.adapter_root.clone();
    if let Some(missing) = root.as_ref().filter(|root| !root.is_dir()) {
        bail!("--adapter-root {}: no such folder", missing.display());
    }
    let root = root.unwrap_or_else(|| args.bundle.join("adapters"));
    let service = Service::new(
        bundle.tasks,
        bundle.prompts,
        Some(adapters),
        ends,
        engine.clone(),
        metrics.clone(),
    )
    .with_caps(Caps {
        requests: args.max_concurrent_requests,
        input_tokens: args.max_input_tokens,
    });
    let traces = traces(args)?;
    let app = App::new(service, limits(args), dtype)
        .with_keys(keys, root)
        .with_origins(&args.keys.cors_allow_origin)
        .with_traces(traces.clone());
    tokio::spawn(announce(engine, metrics, announcement, started));
    let ended = api::serve(listeners, Arc::new(app), args.shutdown_timeout, stop).await;
    if let Some(traces) = traces {
        let sent = tokio::task::spawn_blocking(move || traces.finish());
        let _ = tokio::time::timeout(LAST_SPANS, sent).await;
    }
    Ok(match ended {
        Ended::Failed => Outcome::EngineFailed,
        Ended::TimedOut | Ended::Interrupted => Outcome::Failed,
        Ended::Drained => {
            // Everything has an answer; what is left is the thread's own end, which a model that is
            // still loading would put off.
            let end = tokio::task::spawn_blocking(|| core.join());
            let _ = tokio::time::timeout(CORE_END, end).await;
            Outcome::Done
        }
    })
}

/// What clients may cost.
fn limits(args: &Serve) -> Limits {
    Limits {
        max_body_bytes: args.max_body_bytes,
        max_header_bytes: args.max_header_bytes,
        max_headers: args.max_headers,
        body_timeout: args.body_timeout,
        idle_timeout: args.idle_timeout,
        keep_alive: args.keep_alive,
        write_timeout: args.write_timeout,
        max_connections: args.max_connections(),
        max_streams: args.max_streams,
        ..Limits::default()
    }
}

/// Where traces go, if anywhere.
fn traces(args: &Serve) -> Result<Option<Arc<Traces>>> {
    let Some(endpoint) = &args.otlp_endpoint else { return Ok(None) };
    let traces = Traces::start(endpoint, &args.otlp_service_name)
        .map_err(|error| anyhow!("--otlp-endpoint {endpoint}: {error}"))?;
    Ok(Some(Arc::new(traces)))
}

/// Binds the sockets.
async fn listen(args: &Serve) -> Result<Listeners> {
    let host = args.host.as_str();
    let bind = async |port: u16, flags: &str| {
        let bound = TcpListener::bind((host, port)).await;
        bound.with_context(|| format!("cannot listen on {host}:{port} ({flags})"))
    };
    let http = bind(args.port, "--port").await?;
    let grpc = match args.no_grpc {
        true => None,
        false => Some(bind(args.grpc_port, "--grpc-port, --no-grpc").await?),
    };
    Ok(Listeners { http, grpc })
}

/// The keys of those who may ask and administer; a server that all who reach it may use says so.
fn keys(args: &config::Keys, address: SocketAddr) -> Result<Keys> {
    let mut keys = Keys::default().with_metrics_public(args.metrics_public);
    for named in args.api().map_err(anyhow::Error::msg)? {
        keys = keys.with_api_key(named.name.as_deref(), named.key.reveal());
    }
    if let Some(key) = args.admin().map_err(anyhow::Error::msg)? {
        keys = keys.with_admin_key(key.reveal());
    }
    if keys.are_open() && !address.ip().is_loopback() {
        tracing::warn!(
            "ANYBODY WHO REACHES {address} MAY USE THIS SERVER: it listens beyond this machine and \
             has no API keys; see --api-key-file"
        );
    }
    Ok(keys)
}

/// The bundle's adapters and those that were named; what a task needs is never given up.
fn adapters(args: &Serve, bundle: &mut Bundle, metrics: &Arc<Metrics>) -> Result<Arc<Registry>> {
    let options = &args.adapters;
    let bounds = Bounds {
        max_adapters: options.max_adapters,
        max_rank: options.max_lora_rank,
        max_bytes: options.max_adapter_bytes,
    };
    let registry = bundle.registry(args.compute.dtype, bounds, metrics.clone())?;
    let mut names: Vec<String> = registry.list().into_iter().map(|info| info.name).collect();
    for (name, path) in &options.extra {
        if bundle.tasks.find(name).is_some() {
            bail!("--adapter {name}: this is the name of a task or the bundle");
        }
        registry
            .load(&Wanted::new(name, path))
            .map_err(|e| anyhow!("--adapter {name}={}: {e}", path.display()))?;
        names.push(name.clone());
    }
    check_all(&registry, &names)?;
    Ok(Arc::new(registry))
}

fn start_engine(
    args: &Serve,
    bundle: &Bundle,
    metrics: &Arc<Metrics>,
) -> (EngineHandle, std::thread::JoinHandle<()>) {
    let batching = &args.batching;
    let settings = Settings {
        max_rows: batching.max_rows,
        max_running: batching.max_running.min(batching.max_rows),
        max_waiting: batching.max_waiting,
        prefill_chunk: batching.prefill_chunk,
        prefix_cache: !batching.no_prefix_cache,
    };
    let (dtype, block_size) = (args.compute.dtype, batching.block_size);
    let bytes_per_token = bundle.kv_bytes_per_token(dtype, block_size);
    let kv_tokens = batching.kv_tokens(bundle.spec.context, bytes_per_token);
    bundle.start(LoadOptions { dtype, kv_tokens, block_size }, settings, metrics.clone())
}

/// What is served, and where.
fn announcement(args: &Serve, bundle: &Bundle, listeners: &Listeners) -> Result<String> {
    let tasks: Vec<&str> = bundle.tasks.named().map(|task| task.name.as_str()).collect();
    let tasks = tasks.join(", ");
    let http = listeners.http.local_addr()?;
    let grpc = match &listeners.grpc {
        Some(listener) => format!(", gRPC on {}", listener.local_addr()?),
        None => String::new(),
    };
    Ok(format!(
        "serving {} ({:.1}M parameters, {}; tasks: {tasks}) on http://{http}{grpc}",
        bundle.id,
        bundle.spec.parameters() as f64 / 1e6,
        bundle.held_as(args.compute.dtype),
    ))
}

/// Says that the model is ready, once it is: on standard output, whatever is logged.
async fn announce(engine: EngineHandle, metrics: Arc<Metrics>, text: String, started: Instant) {
    let mut state = engine.watch();
    if let Ok(state) = state.wait_for(|state| *state != State::Loading).await
        && *state == State::Ready
    {
        let seconds = started.elapsed().as_secs_f64();
        metrics.startup("total", seconds);
        tracing::info!(seconds, "ready");
        // Whoever closed the pipe does not want to know.
        let _ = writeln!(std::io::stdout(), "{text}, ready after {seconds:.2} s");
    }
}
