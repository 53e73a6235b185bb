//! How long a connection may say nothing, and how long it may take to say what it wants. hyper's own
//! limit for heads cannot tell the two apart: it begins when a connection falls idle. A head that began
//! to come before the last answer was out has the time of an idle connection.
//!
//! Over HTTP/2, where requests come side by side, only their number counts: nobody tells of bytes.

use super::http::Limits;
use std::time::Duration;
use tokio::sync::watch;

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing was asked since the last answer.
    Idle,
    /// A request has begun to come, but its head is not whole.
    Head,
    /// So many requests are being answered.
    Busy(usize),
}

/// What was waited for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expired {
    /// A request.
    Idle,
    /// The rest of a head.
    Head,
}

/// Follows one connection: its socket says when bytes come, its service when it is asked.
#[derive(Clone, Debug)]
pub struct Pulse(watch::Sender<Phase>);

/// A request that is being answered, until dropped.
#[derive(Debug)]
pub struct Busy(Pulse);

impl Pulse {
    /// A connection that was just opened.
    pub fn new() -> Self {
        Self(watch::Sender::new(Phase::Idle))
    }

    /// Bytes came.
    pub fn bytes(&self) {
        self.0.send_if_modified(|phase| {
            let begins = *phase == Phase::Idle;
            if begins {
                *phase = Phase::Head;
            }
            begins
        });
    }

    /// A request's head is there; it is answered when what is returned is dropped.
    pub fn busy(&self) -> Busy {
        self.0.send_modify(|phase| {
            *phase = match phase {
                Phase::Busy(others) => Phase::Busy(*others + 1),
                Phase::Idle | Phase::Head => Phase::Busy(1),
            }
        });
        Busy(self.clone())
    }

    /// Returns when a connection has gone beyond the limits.
    pub async fn expired(&self, limits: &Limits) -> Expired {
        let mut phases = self.0.subscribe();
        loop {
            let phase = *phases.borrow_and_update();
            let (limit, expired) = match phase {
                Phase::Idle => (limits.idle_timeout, Expired::Idle),
                Phase::Head => (limits.body_timeout, Expired::Head),
                // Bodies and answers have limits of their own.
                Phase::Busy(_) => (Duration::MAX, Expired::Idle),
            };
            // The sender is ours, so that a change is one.
            if tokio::time::timeout(limit, phases.changed()).await.is_err() {
                return expired;
            }
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.0.send_modify(|phase| {
            *phase = match phase {
                Phase::Busy(all @ 2..) => Phase::Busy(*all - 1),
                _ => Phase::Idle,
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(1);
    const NEVER: Duration = Duration::MAX;

    async fn expired(pulse: &Pulse, idle_timeout: Duration, body_timeout: Duration) -> Expired {
        pulse.expired(&Limits { idle_timeout, body_timeout, ..Limits::default() }).await
    }

    #[tokio::test]
    async fn idling_and_a_slow_head_have_limits_of_their_own() {
        let pulse = Pulse::new();
        assert_eq!(expired(&pulse, SOON, NEVER).await, Expired::Idle);
        pulse.bytes();
        assert_eq!(expired(&pulse, NEVER, SOON).await, Expired::Head);
    }

    #[tokio::test]
    async fn a_request_takes_what_it_takes_and_then_the_connection_is_idle() {
        let pulse = Pulse::new();
        pulse.bytes();
        let busy = pulse.busy();
        pulse.bytes();
        let another = pulse.busy();
        for busy in [busy, another] {
            let waited = tokio::time::timeout(SOON * 20, expired(&pulse, SOON, SOON)).await;
            assert!(waited.is_err(), "{waited:?}");
            drop(busy);
        }
        assert_eq!(expired(&pulse, SOON, NEVER).await, Expired::Idle);
    }

    #[test]
    fn bytes_that_trickle_do_not_prolong_a_head() {
        let pulse = Pulse::new();
        pulse.bytes();
        let phases = pulse.0.subscribe();
        pulse.bytes();
        assert!(!phases.has_changed().unwrap());
    }
}
