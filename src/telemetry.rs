//! The one clock, and tracing set-up.

use std::time::Instant;

/// The monotonic clock that all deadlines and timings share.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Instant {
    Instant::now()
}
