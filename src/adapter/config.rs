//! The keys of an `adapter_config.json`.
//!
//! Invariant: a key that nobody reads is a fault, unless it says nothing (`null`, `false`, empty) or has
//! no say in what is computed ([`INERT`]).

use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// The file that describes an adapter.
pub const FILE: &str = "adapter_config.json";

/// Keys that PEFT writes and that change nothing of what a loaded adapter computes: where it comes
/// from, how it was trained, and settings of features that other keys turn on.
const INERT: [&str; 12] = [
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    // How the base layer stores its weight: A and B are the same either way.
    "fan_in_fan_out",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
];

/// Ways to begin training that leave the base model as it is, beside `true` and `false`.
const PLAIN_INIT: [&str; 3] = ["eva", "gaussian", "orthogonal"];

/// Reads keys and remembers which, and what was wrong with them.
#[derive(Debug)]
pub struct Keys<'a> {
    config: &'a Map<String, Value>,
    read: BTreeSet<&'a str>,
    /// What was wrong so far.
    pub faults: Vec<String>,
}

impl<'a> Keys<'a> {
    /// Of a whole file.
    pub fn new(config: &'a Map<String, Value>) -> Self {
        Self { config, read: BTreeSet::new(), faults: Vec::new() }
    }

    /// The value of a key; `None` if it is missing or null.
    pub fn get(&mut self, key: &str) -> Option<&'a Value> {
        let (key, value) = self.config.get_key_value(key)?;
        self.read.insert(key);
        Some(value).filter(|v| !v.is_null())
    }

    /// Notes that a key's value is none of those allowed.
    pub fn fault(&mut self, key: &str, value: Option<&Value>, allowed: &str) {
        let found = value.map_or("missing".to_owned(), |v| format!("{}", Brief(v)));
        self.faults.push(format!("{FILE}: {key} is {found}; allowed: {allowed}"));
    }

    /// A positive integer, which must be there.
    pub fn count(&mut self, key: &str) -> Option<usize> {
        let value = self.get(key);
        let count = value.and_then(as_count);
        if count.is_none() {
            self.fault(key, value, "an integer of 1 or more");
        }
        count
    }

    /// A finite number, which must be there.
    pub fn number(&mut self, key: &str) -> Option<f64> {
        let value = self.get(key);
        let number = value.and_then(Value::as_f64);
        if number.is_none() {
            self.fault(key, value, "a number");
        }
        number
    }

    /// A truth value; false if it is missing.
    pub fn flag(&mut self, key: &str) -> bool {
        match self.get(key) {
            None => false,
            Some(Value::Bool(flag)) => *flag,
            other => {
                self.fault(key, other, "true, false");
                false
            }
        }
    }

    /// One string or a list of strings.
    pub fn strings(&mut self, key: &str) -> Option<Vec<&'a str>> {
        let value = self.get(key)?;
        let list = match value {
            Value::String(one) => Some(vec![one.as_str()]),
            Value::Array(list) => list.iter().map(Value::as_str).collect(),
            _ => None,
        };
        if list.is_none() {
            self.fault(key, Some(value), "a string, a list of strings");
        }
        list
    }

    /// What is wrong, the keys that nobody read among it.
    pub fn finish(mut self) -> Vec<String> {
        if let Some(init) = self.get("init_lora_weights")
            && !init.is_boolean()
            && !init.as_str().is_some_and(|init| PLAIN_INIT.contains(&init))
        {
            let allowed = "true, false, eva, gaussian, orthogonal (others change the base model)";
            self.fault("init_lora_weights", Some(init), allowed);
        }
        if let Some(bias) = self.get("bias")
            && bias != "none"
        {
            self.fault("bias", Some(bias), "none");
        }
        for (key, value) in self.config {
            if !self.read.contains(key.as_str()) && !INERT.contains(&key.as_str()) && says(value) {
                self.fault(key, Some(value), "absent, null, false or empty: it is not supported");
            }
        }
        self.faults
    }
}

/// An integer of 1 or more.
pub fn as_count(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0)
}

/// Whether a value says anything.
fn says(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

/// A value as a fault shows it: cut if it is long.
struct Brief<'a>(&'a Value);

impl std::fmt::Display for Brief<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.0.to_string();
        match text.char_indices().nth(60) {
            Some((end, _)) => write!(f, "{}...", &text[..end]),
            None => f.write_str(&text),
        }
    }
}
