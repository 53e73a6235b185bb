//! Configuration: every knob of `serve`, and those that commands share, declared once with its
//! documentation, default and check.
//!
//! A knob is a clap argument. `layers` gives each argument of each command its other sources, by
//! name: flag `--max-running`, environment `SHOAL_MAX_RUNNING`, key `max_running` of the file that
//! `--config` names, default; the first that is there counts. All faults are reported at once.
//!
//! This is the only place that reads the environment.

mod keys;
mod layers;

pub use keys::{Keys, NamedKey, Secret};
pub use layers::{Environment, Stop, environment, resolve};

use crate::ids::is_valid_name;
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The bundle that commands take when none is named.
pub const DEFAULT_BUNDLE: &str = "models/prompter";

/// Bytes of keys and values that the KV pool takes at most, unless `kv_tokens` is given.
const KV_BYTES: usize = 1 << 30;

/// The soft limit of open files on most systems.
const USUAL_OPEN_FILES: usize = 1024;

/// Files that are no connections: weights, logs, sockets that are being refused.
const OTHER_FILES: usize = 128;

/// Connections that nobody needs more of without saying so.
const MAX_CONNECTIONS: usize = 4096;

/// What `shoal serve` can be told.
#[derive(Args, Clone, Debug)]
pub struct Serve {
    /// Folder of the bundle: config.json, model.safetensors, tokenizer.json, tasks/
    #[arg(default_value = DEFAULT_BUNDLE)]
    pub bundle: PathBuf,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 takes a free one [environment also: PORT]
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Port to listen on for gRPC; 0 takes a free one
    #[arg(long, default_value_t = 8001)]
    pub grpc_port: u16,
    /// Listen for HTTP alone
    #[arg(long)]
    pub no_grpc: bool,
    /// What clients call the bundle [default: its folder's name]
    #[arg(long, value_parser = name)]
    pub served_model_name: Option<String>,
    /// What computes
    #[command(flatten)]
    pub compute: Compute,
    /// How much at once
    #[command(flatten)]
    pub batching: Batching,
    /// Which adapters
    #[command(flatten)]
    pub adapters: Adapters,
    /// Who may ask
    #[command(flatten)]
    pub keys: Keys,
    /// Largest request body, in bytes
    #[arg(long, default_value_t = 2 << 20, value_parser = count(1..=1 << 30))]
    pub max_body_bytes: usize,
    /// Largest head of a request (its first line and headers), in bytes
    #[arg(long, default_value_t = 32 << 10, value_parser = count(1024..=1 << 16))]
    pub max_header_bytes: usize,
    /// Most headers of a request over HTTP/1
    #[arg(long, default_value_t = 100, value_parser = count(8..=1000))]
    pub max_headers: usize,
    /// Longest prompt, in tokens, template and all; a task's own limit may be shorter [default: what
    /// the model's context holds]
    #[arg(long, value_parser = count(1..=1 << 24))]
    pub max_input_tokens: Option<usize>,
    /// Requests at once, on all ports together; those beyond it are refused as overloaded [default:
    /// as many as may wait and run]
    #[arg(long, value_parser = count(1..=1 << 20))]
    pub max_concurrent_requests: Option<usize>,
    /// Seconds that a request's head, and again its body, may take to arrive
    #[arg(long, default_value = "30", value_parser = seconds)]
    pub body_timeout: Duration,
    /// Seconds that a connection may stay open without a request or a call
    #[arg(long, default_value = "120", value_parser = seconds)]
    pub idle_timeout: Duration,
    /// Seconds of silence after which a comment is sent on a stream, or a ping on a connection of gRPC
    #[arg(long, default_value = "10", value_parser = seconds)]
    pub keep_alive: Duration,
    /// Seconds that a client may take nothing of what is written to it; over gRPC of any one call
    #[arg(long, default_value = "30", value_parser = seconds)]
    pub write_timeout: Duration,
    /// Connections at once [default: as many as open files are allowed, less 128, at most 4096]
    #[arg(long, value_parser = count(1..=1 << 20))]
    pub max_connections: Option<usize>,
    /// Calls at once on one connection of gRPC; those beyond it wait at the client
    #[arg(long, default_value_t = 128, value_parser = RangedU64ValueParser::<u32>::new().range(1..=1 << 20))]
    pub max_streams: u32,
    /// Seconds that running requests get to finish after SIGTERM
    #[arg(long, default_value = "30", value_parser = seconds)]
    pub shutdown_timeout: Duration,
    /// What is logged
    #[command(flatten)]
    pub logging: Logging,
    /// Collector of traces, such as http://127.0.0.1:4318: OTLP over HTTP [environment also: OTEL_EXPORTER_OTLP_ENDPOINT]
    #[arg(long)]
    pub otlp_endpoint: Option<String>,
    /// What this server is called in traces [environment also: OTEL_SERVICE_NAME]
    #[arg(long, default_value = "shoal")]
    pub otlp_service_name: String,
}

/// What a command that runs the model can be told.
#[derive(Args, Clone, Debug)]
pub struct Compute {
    /// What weights are held in; auto: as the file does
    #[arg(long, value_enum, default_value_t)]
    pub dtype: Dtype,
    /// Compute threads [default: what the cgroup and the affinity allow]
    #[arg(long, value_parser = count(1..=1024))]
    pub threads: Option<usize>,
}

/// How much a server does at once, and with how much memory.
#[derive(Args, Clone, Debug)]
pub struct Batching {
    /// Sequences that wait, over all tasks; beyond it requests are refused as overloaded
    #[arg(long, default_value_t = 2048, value_parser = count(1..=1 << 20))]
    pub max_waiting: usize,
    /// Sequences that run in one batch; at most max_rows
    #[arg(long, default_value_t = 256, value_parser = count(1..=1 << 14))]
    pub max_running: usize,
    /// Tokens that one step computes, over all sequences
    #[arg(long, default_value_t = 512, value_parser = count(1..=1 << 16))]
    pub max_rows: usize,
    /// Tokens of one prompt that one step computes
    #[arg(long, default_value_t = 256, value_parser = count(1..=1 << 16))]
    pub prefill_chunk: usize,
    /// Tokens that the KV pool holds [default: max_running full contexts, within 1 GiB]
    #[arg(long, value_parser = count(1..=1 << 30))]
    pub kv_tokens: Option<usize>,
    /// Tokens of one KV block
    #[arg(long, default_value_t = 16, value_parser = count(1..=1024))]
    pub block_size: usize,
    /// Compute each prompt anew, even where another one began alike
    #[arg(long)]
    pub no_prefix_cache: bool,
}

/// Which adapters there are beside the bundle's own, and how many may come while serving.
#[derive(Args, Clone, Debug)]
pub struct Adapters {
    /// An adapter's name and folder, as NAME=FOLDER; may be given several times
    #[arg(long = "adapter", id = "adapter", value_parser = named_folder)]
    pub extra: Vec<(String, PathBuf)>,
    /// Adapters at once
    #[arg(long, default_value_t = 128, value_parser = count(1..=1 << 14))]
    pub max_adapters: usize,
    /// Largest rank of an adapter
    #[arg(long, default_value_t = 256, value_parser = count(1..=1 << 12))]
    pub max_lora_rank: usize,
    /// Bytes of all adapters in memory
    #[arg(long, default_value_t = 1 << 30, value_parser = count(1..=1 << 40))]
    pub max_adapter_bytes: usize,
    /// The only folder that adapters are loaded from while serving [default: the bundle's adapters/]
    #[arg(long)]
    pub adapter_root: Option<PathBuf>,
}

/// What is logged, and how; to standard error.
#[derive(Args, Clone, Debug)]
pub struct Logging {
    /// Least level, or a filter such as info,shoal::api=debug [environment also: RUST_LOG]
    #[arg(long, default_value = "info", value_parser = filter)]
    pub log: String,
    /// How a line is written
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

/// What weights are held in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// As the file holds them
    #[default]
    Auto,
    /// 32 bits, exact for every file
    F32,
    /// 16 bits, half the bytes
    Bf16,
    /// 8 bits with a scale for each output, a quarter of the bytes; keys and values in bf16
    Int8,
}

/// How a log line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    #[default]
    Pretty,
    /// One JSON object a line
    Json,
}

impl Serve {
    /// Connections at once: as asked for, else what this process's limit of open files leaves.
    pub fn max_connections(&self) -> usize {
        self.max_connections.unwrap_or_else(|| {
            let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
            let files = open_files(&limits).unwrap_or(USUAL_OPEN_FILES);
            files.saturating_sub(OTHER_FILES).clamp(1, MAX_CONNECTIONS)
        })
    }
}

/// The soft limit of open files in the text of `/proc/self/limits`.
fn open_files(limits: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(usize::MAX),
        number => number.parse().ok(),
    }
}

impl Batching {
    /// Tokens of the KV pool for a model with this context and so many bytes of keys and values per
    /// token: as asked for, else enough for `max_running` full contexts within 1 GiB, but never less
    /// than one.
    pub fn kv_tokens(&self, context: usize, bytes_per_token: usize) -> usize {
        self.kv_tokens.unwrap_or_else(|| {
            let affordable = KV_BYTES / bytes_per_token.max(1);
            let wanted = self.max_running.saturating_mul(context);
            wanted.min(affordable).max(context.next_multiple_of(self.block_size))
        })
    }
}

/// The id of a bundle: as given, else its folder's name.
pub fn bundle_id(bundle: &Path, served_model_name: Option<&str>) -> String {
    let folder = || {
        let full = bundle.canonicalize().unwrap_or_else(|_| bundle.to_path_buf());
        full.file_name().unwrap_or_default().to_string_lossy().into_owned()
    };
    served_model_name.map_or_else(folder, str::to_string)
}

fn count(range: RangeInclusive<u64>) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(range)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let duration = text.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
    let allowed = |d: &Duration| !d.is_zero() && *d <= Duration::from_secs(24 * 60 * 60);
    duration.filter(allowed).ok_or_else(|| "allowed: seconds, above 0, up to 86400".into())
}

fn name(text: &str) -> Result<String, String> {
    let allowed = "allowed: 1 to 64 of A-Z a-z 0-9 . _ -";
    if is_valid_name(text) { Ok(text.into()) } else { Err(allowed.into()) }
}

fn named_folder(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((given, folder)) if !folder.is_empty() => Ok((name(given)?, folder.into())),
        _ => Err("allowed: NAME=FOLDER".into()),
    }
}

fn filter(text: &str) -> Result<String, String> {
    let parsed = tracing_subscriber::EnvFilter::try_new(text);
    parsed.map(|_| text.to_string()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kv_pool_is_sized_within_bounds() {
        let batching = Batching {
            max_waiting: 1,
            max_running: 64,
            max_rows: 512,
            prefill_chunk: 128,
            kv_tokens: None,
            block_size: 16,
            no_prefix_cache: false,
        };
        assert_eq!(batching.kv_tokens(256, 1024), 64 * 256);
        assert_eq!(batching.kv_tokens(1024, 1 << 16), KV_BYTES >> 16);
        assert_eq!(batching.kv_tokens(1000, 1 << 29), 1008);
        let asked = Batching { kv_tokens: Some(7), ..batching };
        assert_eq!(asked.kv_tokens(1000, 1), 7);
    }

    #[test]
    fn the_limit_of_open_files_is_the_soft_one() {
        let text = "Limit         Soft Limit  Hard Limit  Units\n\
                    Max processes 7           8           processes\n\
                    Max open files            1024        524288      files\n";
        assert_eq!(open_files(text), Some(1024));
        assert_eq!(open_files("Max open files unlimited unlimited files"), Some(usize::MAX));
        assert_eq!(open_files(""), None);
    }

    #[test]
    fn a_bundle_is_called_by_its_folder() {
        assert_eq!(bundle_id(Path::new("models/none-such"), None), "none-such");
        assert_eq!(bundle_id(Path::new("models/none-such"), Some("x")), "x");
        let here = bundle_id(Path::new("."), None);
        assert!(!here.is_empty() && here != ".");
    }
}
