//! SIGINT and SIGTERM as a flag that the loop looks at between two steps.

use anyhow::{Context, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use tokio::signal::unix::{SignalKind, signal};

/// A flag that the first SIGINT or SIGTERM sets, saying `answer` aloud. From here on neither ends the
/// process by itself.
pub fn watch(answer: &'static str) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut term, mut int) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let body = move || {
        runtime.block_on(async {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        });
        seen.store(true, Ordering::Relaxed);
        eprintln!("{answer}");
    };
    let thread = thread::Builder::new().name("signals".to_owned()).spawn(body);
    thread.context("cannot watch for signals")?;
    Ok(stop)
}
