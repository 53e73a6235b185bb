//! `/openapi.json` and `/docs`: every route is there, every example works, every answer is as described.

use crate::harness::{AUTHORISED, Server, Setup, repeater, routes};
use hyper::Method;
use serde_json::{Map, Value, json};
use shoal::api::Keys;
use std::collections::{BTreeMap, BTreeSet};

const OPENAPI: &str = "/openapi.json";

/// What may be wrong with an answer, by `path` within it.
fn check(document: &Value, schema: &Value, value: &Value, path: &str) -> Result<(), String> {
    let fault = |what: &str| Err(format!("{path}: {what}: {value}"));
    if let Some(reference) = schema["$ref"].as_str() {
        return check(document, document.pointer(&reference[1..]).unwrap(), value, path);
    }
    for forms in ["anyOf", "oneOf"] {
        let Some(forms) = schema[forms].as_array() else { continue };
        let faults = forms.iter().map(|form| check(document, form, value, path).err());
        let faults: Option<Vec<String>> = faults.collect();
        if let Some(faults) = faults {
            return Err(faults.join("; "));
        }
    }
    let listed = schema["enum"].as_array().is_none_or(|all| all.contains(value));
    if !listed || schema.get("const").is_some_and(|only| only != value) {
        return fault("not one of those allowed");
    }
    let types = match &schema["type"] {
        Value::Array(types) => types.clone(),
        Value::Null => Vec::new(),
        one => vec![one.clone()],
    };
    let is = |kind: &str| match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("no type {other}"),
    };
    if !types.is_empty() && !types.iter().any(|kind| is(kind.as_str().unwrap())) {
        return fault("wrong type");
    }
    if schema["minimum"].as_f64().zip(value.as_f64()).is_some_and(|(least, v)| v < least) {
        return fault("too small");
    }
    for (i, item) in value.as_array().into_iter().flatten().enumerate() {
        check(document, &schema["items"], item, &format!("{path}[{i}]"))?;
    }
    match (value.as_object(), schema["type"].is_null()) {
        (Some(fields), false) => check_fields(document, schema, fields, path),
        _ => Ok(()),
    }
}

/// The same for an object, which has no fields but those of its schema unless that is said.
fn check_fields(
    document: &Value,
    schema: &Value,
    fields: &Map<String, Value>,
    path: &str,
) -> Result<(), String> {
    let required = schema["required"].as_array().into_iter().flatten();
    for name in required.map(|name| name.as_str().unwrap()) {
        if !fields.contains_key(name) {
            return Err(format!("{path}: no {name}"));
        }
    }
    for (name, value) in fields {
        let path = format!("{path}.{name}");
        match (&schema["properties"][name], &schema["additionalProperties"]) {
            (Value::Null, Value::Null) if schema["properties"].is_null() => {}
            (Value::Null, Value::Null | Value::Bool(false)) => {
                return Err(format!("{path} is new"));
            }
            (Value::Null, more) => check(document, more, value, &path)?,
            (property, _) => check(document, property, value, &path)?,
        }
    }
    Ok(())
}

async fn server(keys: Keys) -> Server {
    Server::with(Setup { keys, ..Setup::default() }, repeater()).await
}

fn administered() -> Keys {
    Keys::default().with_admin_key(AUTHORISED.1.strip_prefix("Bearer ").unwrap())
}

/// Every path with its methods, in upper case, and operations.
fn operations(document: &Value) -> BTreeMap<&String, Vec<(Method, &Value)>> {
    let method = |name: &str| name.to_ascii_uppercase().parse().unwrap();
    let all = |methods: &'_ Value| methods.as_object().unwrap().clone();
    let paths = document["paths"].as_object().unwrap();
    let of = |path| {
        let names = all(&paths[path]);
        names.keys().map(|name| (method(name), &paths[path][name.as_str()])).collect()
    };
    paths.keys().map(|path| (path, of(path))).collect()
}

/// A path with the examples of its parameters.
fn example_path(path: &str, operation: &Value) -> String {
    let parameters = operation["parameters"].as_array().into_iter().flatten();
    let in_path = parameters.filter(|parameter| parameter["in"] == "path");
    in_path.fold(path.to_owned(), |path, parameter| {
        let name = parameter["name"].as_str().unwrap();
        path.replace(&format!("{{{name}}}"), parameter["example"].as_str().unwrap())
    })
}

#[tokio::test]
async fn every_route_is_described_and_what_is_described_is_there() {
    let server = server(administered()).await;
    let document = server.client.get(OPENAPI).await.json();
    let described = operations(&document);
    for route in routes::all() {
        assert!(described.contains_key(&route), "{route} is not described");
    }
    for (path, operations) in &described {
        let path = example_path(path, operations[0].1);
        for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS] {
            let reply = server.client.call(method.clone(), &path, &[AUTHORISED], "").await;
            let known = operations.iter().any(|(other, _)| *other == method);
            assert_eq!(reply.status != 405, known, "{method} {path}: {}", reply.status);
            if !known {
                let allowed: BTreeSet<&str> = reply.header("allow").split(',').collect();
                let mut methods: BTreeSet<&str> =
                    operations.iter().map(|(m, _)| m.as_str()).collect();
                if methods.contains("GET") {
                    methods.insert("HEAD");
                }
                assert_eq!(allowed, methods, "{path}");
            } else if reply.status == 404 {
                let body = String::from_utf8(reply.body).unwrap();
                assert!(!body.contains("no such route"), "{method} {path}");
            }
        }
    }
}

#[tokio::test]
async fn examples_work_and_answers_are_as_described() {
    let server = server(administered()).await;
    let document = server.client.get(OPENAPI).await.json();
    let mut answered = 0;
    for (path, operations) in operations(&document) {
        for (method, operation) in operations {
            let path = example_path(path, operation);
            let content = &operation["requestBody"]["content"]["application/json"];
            let mut bodies = vec![String::new()];
            if let Some(examples) = content["examples"].as_object() {
                bodies = examples.values().map(|example| example["value"].to_string()).collect();
            }
            for body in bodies {
                let headers = [AUTHORISED, ("content-type", "application/json")];
                let reply = server.client.call(method.clone(), &path, &headers, body.clone()).await;
                // There are no adapters here.
                let fine = reply.status < 400 || path.ends_with("lora_adapter");
                assert!(fine, "{path} {body}: {:?}", String::from_utf8_lossy(&reply.body));
                let response = &operation["responses"][reply.status.to_string()];
                assert!(response.is_object(), "{path}: {}", reply.status);
                check_reply(&document, response, &reply.body, reply.header("content-type"))
                    .unwrap_or_else(|fault| panic!("{path} {body}: {fault}"));
                answered += 1;
            }
        }
    }
    assert!(answered > 40, "{answered}");
}

fn check_reply(document: &Value, response: &Value, body: &[u8], media: &str) -> Result<(), String> {
    let media = media.split(';').next().unwrap();
    let schema = &response["content"][media]["schema"];
    match media {
        "application/json" => check(document, schema, &serde_json::from_slice(body).unwrap(), ""),
        "text/event-stream" => {
            let text = std::str::from_utf8(body).unwrap();
            let frame = &schema["properties"]["data"]["anyOf"][0]["contentSchema"];
            assert!(frame.is_object());
            let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
            let mut frames = data.filter(|data| *data != "[DONE]").peekable();
            assert!(frames.peek().is_some());
            frames.try_for_each(|data| {
                check(document, frame, &serde_json::from_str(data).unwrap(), "")
            })
        }
        _ => Ok(()),
    }
}

#[tokio::test]
async fn errors_are_as_described() {
    let server = server(Keys::default().with_api_key(None, &AUTHORISED.1[7..])).await;
    let document = server.client.get_with(OPENAPI, &[AUTHORISED]).await.json();
    for (path, operations) in operations(&document) {
        for (method, operation) in operations {
            let path = example_path(path, operation);
            for (headers, body) in [
                (vec![], ""),
                (vec![AUTHORISED], "{"),
                (vec![AUTHORISED, ("content-type", "application/json")], r#"{"nothing": 1}"#),
                (vec![AUTHORISED, ("content-encoding", "br")], "{}"),
            ] {
                let reply = server.client.call(method.clone(), &path, &headers, body).await;
                let response = &operation["responses"][reply.status.to_string()];
                assert!(response.is_object(), "{method} {path}: {}", reply.status);
                if reply.status >= 400 {
                    check_reply(&document, response, &reply.body, reply.header("content-type"))
                        .unwrap_or_else(|fault| panic!("{path} {body}: {fault}"));
                }
            }
        }
    }
}

#[tokio::test]
async fn the_document_says_whether_a_key_is_needed_and_needs_one_itself() {
    let open = server(Keys::default()).await;
    assert_eq!(open.client.get(OPENAPI).await.json()["security"], json!([]));
    let closed = server(Keys::default().with_api_key(None, &AUTHORISED.1[7..])).await;
    let document = closed.client.get_with(OPENAPI, &[AUTHORISED]).await.json();
    assert_eq!(document["security"], json!([{"key": []}]));
    assert_eq!(document["paths"]["/livez"]["get"]["security"], json!([]));
    for path in [OPENAPI, "/docs", "/docs/"] {
        assert_eq!(closed.client.get(path).await.status, 401, "{path}");
    }
}

#[tokio::test]
async fn the_page_asks_nobody_else() {
    let server = Server::usual().await;
    let reply = server.client.get("/docs").await;
    assert_eq!((reply.status, reply.header("location")), (308, "docs/"));
    assert_eq!(server.client.get("/docs/").await.header("content-type"), "text/html");
    let settings = server.client.get("/docs/swagger-initializer.js").await;
    let settings = String::from_utf8(settings.body).unwrap();
    assert!(settings.contains("../openapi.json") && !settings.contains("://"), "{settings}");
    for file in ["swagger-ui.css", "swagger-ui-bundle.js", "swagger-ui-standalone-preset.js"] {
        assert_eq!(server.client.get(&format!("/docs/{file}")).await.status, 200, "{file}");
    }
    assert_eq!(server.client.get("/docs/nothing.js").await.error().0, 404);
}
