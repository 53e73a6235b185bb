//! What a text must look like, in the words of clients: `choice`, `regex`, `json_schema`, and OpenAI's
//! `response_format` with the forms that text-generation-inference's users know.

use super::fields::Fields;
use crate::error::{Error, Result};
use crate::request::Grammar;
use serde_json::Value;

/// The grammar that a body asks for, with the name of the field that did.
pub fn grammar(body: &mut Fields) -> Result<Option<(&'static str, Grammar)>> {
    let choice = body.take("choice")?.map(|list| ("choice", Grammar::Choice(list)));
    let regex = body.take("regex")?.map(|regex| ("regex", Grammar::Regex(regex)));
    let schema = body.take_value("json_schema");
    let schema = schema.map(|schema| ("json_schema", Grammar::JsonSchema(schema)));
    let format = match body.take_object("response_format", "response_format.")? {
        Some(format) => response_format(format)?.map(|grammar| ("response_format", grammar)),
        None => None,
    };
    let mut given = [choice, regex, schema, format].into_iter().flatten();
    match (given.next(), given.next()) {
        (Some((first, _)), Some((second, _))) => {
            let message = format!("{second} is given beside {first}; allowed: one of them");
            Err(Error::invalid(second, message))
        }
        (one, _) => Ok(one),
    }
}

/// `{"type": "text"}`, `{"type": "json_object"}`, `{"type": "json_schema", "json_schema": {"schema"}}`, or
/// a type with its `value`.
fn response_format(mut format: Fields) -> Result<Option<Grammar>> {
    let kind: String = format.take("type")?.ok_or_else(|| format.missing("type"))?;
    let value = format.take_value("value");
    let schema = format.take_object("json_schema", "response_format.json_schema.")?;
    format.finish()?;
    match (kind.as_str(), value, schema) {
        ("text", None, None) => Ok(None),
        ("json_object", None, None) => Ok(Some(Grammar::Json)),
        ("json_schema", None, Some(mut schema)) => {
            let grammar = schema.take_value("schema").map(Grammar::JsonSchema);
            // Names and describes the schema for models that read it; here the grammar is what counts.
            schema.take::<String>("name")?;
            schema.take::<String>("description")?;
            schema.take::<bool>("strict")?;
            let missing = schema.missing("schema");
            schema.finish()?;
            grammar.map(Some).ok_or(missing)
        }
        // What huggingface_hub makes of a schema.
        ("json_object", Some(schema), None) => Ok(Some(Grammar::JsonSchema(schema))),
        (kind, Some(value), None) => typed("response_format", kind, value).map(Some),
        _ => Err(unknown("response_format")),
    }
}

/// Text-generation-inference's grammars: `json` or `json_schema` with a schema, perhaps as a text, and
/// `regex`.
pub fn typed(field: &str, kind: &str, value: Value) -> Result<Grammar> {
    let bad = |allowed: &str| {
        Error::invalid(field, format!("{field}.value of type {kind} must be {allowed}"))
    };
    match (kind, value) {
        ("regex", Value::String(regex)) => Ok(Grammar::Regex(regex)),
        ("regex", _) => Err(bad("a text")),
        ("json" | "json_schema", Value::String(text)) => {
            let schema = serde_json::from_str(&text).map_err(|_| bad("a JSON schema"))?;
            Ok(Grammar::JsonSchema(schema))
        }
        ("json" | "json_schema", schema) => Ok(Grammar::JsonSchema(schema)),
        _ => Err(unknown(field)),
    }
}

fn unknown(field: &str) -> Error {
    let message = format!(
        "{field}.type; allowed: text, json_object, json_schema with its json_schema, or json, \
         json_schema or regex with its value"
    );
    Error::invalid(field, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: Value) -> Result<Option<Grammar>> {
        let mut fields = Fields::parse(body.to_string().as_bytes())?;
        let found = grammar(&mut fields)?;
        fields.finish()?;
        Ok(found.map(|(_, grammar)| grammar))
    }

    #[test]
    fn every_form_is_understood() {
        let schema = json!({"type": "object"});
        let from_schema = Some(Grammar::JsonSchema(schema.clone()));
        for (body, want) in [
            (json!({}), None),
            (json!({"choice": ["a", "b"]}), Some(Grammar::Choice(vec!["a".into(), "b".into()]))),
            (json!({"regex": "a+"}), Some(Grammar::Regex("a+".into()))),
            (json!({"json_schema": schema}), from_schema.clone()),
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(Grammar::Json)),
            (
                json!({"response_format": {"type": "json_schema",
                    "json_schema": {"name": "n", "strict": true, "schema": schema}}}),
                from_schema.clone(),
            ),
            (json!({"response_format": {"type": "json_object", "value": schema}}), from_schema),
            (
                json!({"response_format": {"type": "regex", "value": "a"}}),
                Some(Grammar::Regex("a".into())),
            ),
        ] {
            assert_eq!(read(body.clone()).unwrap(), want, "{body}");
        }
    }

    #[test]
    fn what_is_refused_is_named() {
        for (body, param) in [
            (json!({"choice": "a"}), "choice"),
            (json!({"choice": ["a"], "regex": "a"}), "regex"),
            (json!({"response_format": {}}), "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), "response_format"),
            (json!({"response_format": {"type": "regex", "value": 3}}), "response_format"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"response_format": {"type": "text", "x": 1}}), "response_format.x"),
        ] {
            assert_eq!(read(body.clone()).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }
}
