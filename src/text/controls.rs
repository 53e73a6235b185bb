//! Controls: what a request asks for, as the tokens that tell the model.

use super::Tokenizer;
use crate::error::{Error, Result};
use crate::task::{Control, ControlKind, Task};
use serde_json::Value;
use std::collections::BTreeMap;

/// The value of a control that was not given.
const NONE: &str = "none";

impl Control {
    /// The text of the token that stands for `value`.
    fn token_of(&self, value: &str) -> String {
        self.token.replace("{}", value)
    }

    /// `given` as it stands in the token, if it is allowed: integers are JSON integers, words are
    /// JSON strings.
    fn accept(&self, given: &Value) -> Option<String> {
        match &self.kind {
            ControlKind::Integer { minimum, maximum } => {
                let n = given.as_i64().filter(|n| (minimum..=maximum).contains(&n))?;
                Some(n.to_string())
            }
            ControlKind::Enum(values) => values.iter().find(|v| given == v.as_str()).cloned(),
        }
    }
}

/// The token text of each of the task's controls: the given value, else the task's default, else
/// `none`. Refuses names that the task does not have and values that its model was not trained with.
pub fn resolve_controls(
    task: &Task,
    given: &BTreeMap<String, Value>,
) -> Result<BTreeMap<String, String>> {
    if let Some(name) = given.keys().find(|name| !task.controls.contains_key(*name)) {
        let names: Vec<&str> = task.controls.keys().map(String::as_str).collect();
        let allowed = if names.is_empty() { "no controls".into() } else { names.join(", ") };
        let message = format!("controls.{name} is unknown to {}; allowed: {allowed}", task.name);
        return Err(Error::invalid(format!("controls.{name}"), message));
    }
    let resolve = |(name, control): (&String, &Control)| {
        let value = match given.get(name) {
            Some(given) => control.accept(given).ok_or_else(|| {
                let shown: String = given.to_string().chars().take(40).collect();
                let allowed = control.kind.allowed();
                let message = format!("controls.{name} is {shown}; allowed: {allowed}");
                Error::invalid(format!("controls.{name}"), message)
            })?,
            None => control.default.clone().unwrap_or_else(|| NONE.into()),
        };
        Ok((name.clone(), control.token_of(&value)))
    };
    task.controls.iter().map(resolve).collect()
}

/// Faults of a task's controls against the tokenizer: each value's token must be one special token.
pub(super) fn faults(task: &Task, tokenizer: &Tokenizer) -> Vec<String> {
    let missing =
        |token: &String| !tokenizer.token_id(token).is_some_and(|id| tokenizer.is_special(id));
    let mut faults = Vec::new();
    for (name, control) in &task.controls {
        let values = control.kind.values().into_iter().chain([NONE.into()]);
        let tokens: Vec<String> = values.map(|v| control.token_of(&v)).filter(missing).collect();
        if let Some(first) = tokens.first() {
            faults.push(format!(
                "tasks/{}.toml: controls.{name}.token: {first} is no special token of the tokenizer \
                 ({} such values)",
                task.name,
                tokens.len(),
            ));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::prompt::tests::task;
    use serde_json::json;

    fn given(name: &str, value: Value) -> BTreeMap<String, Value> {
        [(name.to_string(), value)].into()
    }

    #[test]
    fn given_then_default_then_none() {
        let mut task = task("{{ input }}");
        let words = |task: &Task, given| resolve_controls(task, &given).unwrap()["words"].clone();
        assert_eq!(words(&task, given("words", json!(20))), "<|words:20|>");
        assert_eq!(words(&task, BTreeMap::new()), "<|words:none|>");
        task.controls.get_mut("words").unwrap().default = Some("12".into());
        assert_eq!(words(&task, BTreeMap::new()), "<|words:12|>");
    }

    #[test]
    fn everything_else_is_refused_with_its_name_and_what_is_allowed() {
        let task = task("{{ input }}");
        let bad = [
            json!(2),
            json!(61),
            json!(20.0),
            json!("20"),
            json!(true),
            json!(null),
            json!([20]),
            json!(-20),
            json!(u64::MAX),
            json!("none"),
        ];
        for value in bad {
            let error = resolve_controls(&task, &given("words", value.clone())).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("controls.words"), "{value}");
            assert!(error.message.ends_with("allowed: an integer 3 to 60"), "{}", error.message);
        }
        let error = resolve_controls(&task, &given("tone", json!(1))).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("controls.tone"));
        assert_eq!(error.message, "controls.tone is unknown to image; allowed: words");
    }

    #[test]
    fn enums_take_their_words() {
        let mut task = task("{{ input }}");
        let kind = ControlKind::Enum(vec!["calm".into(), "loud".into()]);
        let control = Control { kind, token: "<|tone:{}|>".into(), default: None };
        task.controls.insert("tone".into(), control);
        let tokens = resolve_controls(&task, &given("tone", json!("loud"))).unwrap();
        assert_eq!(tokens["tone"], "<|tone:loud|>");
        let error = resolve_controls(&task, &given("tone", json!("shrill"))).unwrap_err();
        assert_eq!(error.message, "controls.tone is \"shrill\"; allowed: calm, loud");
    }
}
