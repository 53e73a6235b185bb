//! What becomes known of one request on its way: the one source of its line in the access log, of its
//! trace and of what its reply says of itself. Never holds a prompt, a text or a key.

use super::now;
use crate::request::{Finish, Timing, Usage};
use opentelemetry::trace::SpanContext;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A request from its arrival to its last byte.
#[derive(Debug)]
pub struct Record {
    /// `x-request-id`, given or made.
    pub id: String,
    /// When its head arrived.
    pub arrived: Instant,
    /// The caller's span.
    pub parent: Option<SpanContext>,
    facts: Mutex<Facts>,
}

/// What was found out so far.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The name of the key that it came with; never the key.
    pub key: Option<Arc<str>>,
    /// The task, the bundle or the adapter that it is for, once that is known to exist.
    pub model: Option<String>,
    /// What is done with it, as OpenTelemetry calls it.
    pub operation: &'static str,
    /// Names of the adapters that it runs with.
    pub adapters: Vec<String>,
    /// How it ended, as the metrics count it.
    pub outcome: Option<&'static str>,
    /// How its texts ended.
    pub finishes: Vec<Finish>,
    /// Its tokens.
    pub usage: Usage,
    /// Where its time went; the slowest choice's.
    pub timing: Timing,
}

impl Record {
    /// The record of a request that has just arrived.
    pub fn new(id: impl Into<String>) -> Arc<Self> {
        Self::with_parent(id, None)
    }

    /// The same, with the caller's span.
    pub fn with_parent(id: impl Into<String>, parent: Option<SpanContext>) -> Arc<Self> {
        Arc::new(Self { id: id.into(), arrived: now(), parent, facts: Mutex::default() })
    }

    /// The record of one of many requests that a call brings, which has just arrived.
    pub fn within(call: &Self) -> Arc<Self> {
        let record = Self::with_parent(call.id.clone(), call.parent.clone());
        record.note(|facts| facts.key = call.facts().key);
        record
    }

    /// Adds to what is known.
    pub fn note(&self, add: impl FnOnce(&mut Facts)) {
        add(&mut self.facts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What is known.
    pub fn facts(&self) -> Facts {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
