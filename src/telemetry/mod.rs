//! The one clock, what is logged and how, and the record of each request.

mod record;
pub mod traces;

pub use record::{Facts, Record};

use std::io::IsTerminal;
use std::time::Instant;
use tracing_subscriber::{EnvFilter, fmt};

/// The monotonic clock that all deadlines and timings share.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Instant {
    Instant::now()
}

/// Starts logging to standard error: what `filter` lets through, as text or as JSON lines. Only the
/// first call of a process counts. An unreadable filter is an error.
pub fn init(filter: &str, json: bool) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| e.to_string())?;
    let colours = std::io::stderr().is_terminal();
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    // An error means that somebody logs already, which is as good.
    let _ = if json { builder.json().try_init() } else { builder.try_init() };
    Ok(())
}
