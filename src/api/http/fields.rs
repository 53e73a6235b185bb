//! A JSON object that is read field by field, so that every complaint names its field: what is
//! missing, what has the wrong type, and what nobody asked for. `null` counts as absent.

use crate::error::{Error, Kind, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The fields of an object that have not been taken yet.
#[derive(Debug, Default)]
pub struct Fields {
    left: Map<String, Value>,
    /// What stands before a field's name in messages, such as `stream_options.`.
    prefix: &'static str,
}

impl Fields {
    /// These fields; `prefix` stands before their names in messages.
    pub fn of(left: Map<String, Value>, prefix: &'static str) -> Self {
        Self { left, prefix }
    }

    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(body)
            .map_err(|e| Error::new(Kind::Invalid, format!("the body is not valid JSON: {e}")))?;
        match value {
            Value::Object(left) => Ok(Self { left, prefix: "" }),
            _ => Err(Error::new(Kind::Invalid, "the body must be a JSON object")),
        }
    }

    /// Takes the field `name`, an object with fields of its own.
    pub fn take_object(&mut self, name: &str, prefix: &'static str) -> Result<Option<Self>> {
        Ok(self.take(name)?.map(|left| Self { left, prefix }))
    }

    /// Takes the field `name` as a `T`.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        let Some(value) = self.take_value(name) else { return Ok(None) };
        serde_json::from_value(value).map(Some).map_err(|e| {
            let name = format!("{}{name}", self.prefix);
            let message = format!("{name}: {e}");
            Error::invalid(name, message)
        })
    }

    /// Takes the field `name` as it stands.
    pub fn take_value(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        asked::note(name, true);
        self.left.shift_remove(name).filter(|value| !value.is_null())
    }

    /// The complaint about a field that must be there.
    pub fn missing(&self, name: &str) -> Error {
        missing(&format!("{}{name}", self.prefix))
    }

    /// Adds a field that was said in another way, unless it is there.
    pub fn put(&mut self, name: &str, value: Value) -> Result<()> {
        if value.is_null() && self.left.contains_key(name) {
            return Ok(());
        }
        match self.left.insert(name.to_owned(), value) {
            None | Some(Value::Null) => Ok(()),
            Some(_) => Err(twice(&format!("{}{name}", self.prefix))),
        }
    }

    /// Refuses the field `name`, which other wires have.
    pub fn refuse(&self, name: &str) -> Result<()> {
        #[cfg(test)]
        asked::note(name, false);
        match self.left.contains_key(name) {
            true => Err(self.unknown(name)),
            false => Ok(()),
        }
    }

    /// Refuses what is left.
    pub fn finish(self) -> Result<()> {
        self.left.keys().next().map_or(Ok(()), |name| Err(self.unknown(name)))
    }

    /// What is left.
    pub fn rest(self) -> Map<String, Value> {
        self.left
    }

    fn unknown(&self, name: &str) -> Error {
        let name = format!("{}{name}", self.prefix);
        let message = format!("unknown field {name}");
        Error::invalid(name, message).with_code("unknown_field")
    }
}

/// The complaint about a field that must be there.
pub fn missing(name: &str) -> Error {
    Error::invalid(name, format!("missing field {name}")).with_code("missing_field")
}

/// The complaint about what was said in two ways.
pub fn twice(name: &str) -> Error {
    Error::invalid(name, format!("{name} is given twice"))
}

/// Which names were asked for on this thread, for tests that compare them with the document.
#[cfg(test)]
pub mod asked {
    use std::cell::RefCell;
    use std::collections::{BTreeMap, BTreeSet};

    thread_local! {
        static NAMES: RefCell<BTreeMap<String, bool>> = RefCell::default();
    }

    /// A name that was asked for, to be taken or to be refused.
    pub fn note(name: &str, taken: bool) {
        NAMES.with_borrow_mut(|names| *names.entry(name.to_owned()).or_insert(true) &= taken);
    }

    /// The names that were taken since this was called last.
    pub fn names() -> BTreeSet<String> {
        let names = NAMES.take();
        names.into_iter().filter(|(_, taken)| *taken).map(|(name, _)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(error: Error) -> String {
        error.param.unwrap()
    }

    #[test]
    fn complaints_name_the_field() {
        let mut fields = Fields::parse(br#"{"a": "x", "b": null, "c": 1, "o": {"d": 2}}"#).unwrap();
        assert_eq!(param(fields.take::<u32>("a").unwrap_err()), "a");
        assert_eq!(fields.take::<u32>("b").unwrap(), None);
        let inner = fields.take_object("o", "o.").unwrap().unwrap();
        assert_eq!(param(inner.finish().unwrap_err()), "o.d");
        assert_eq!(param(fields.finish().unwrap_err()), "c");
        assert_eq!(param(missing("prompt")), "prompt");
    }

    #[test]
    fn only_objects() {
        for bad in ["", "[]", "{", "3", "\"\u{1}\""] {
            assert_eq!(Fields::parse(bad.as_bytes()).unwrap_err().kind, Kind::Invalid, "{bad}");
        }
    }

    #[test]
    fn null_is_not_unknown_but_unknown_null_is() {
        let fields = Fields::parse(br#"{"best": null}"#).unwrap();
        assert_eq!(param(fields.finish().unwrap_err()), "best");
    }
}
