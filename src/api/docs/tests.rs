//! That readers take what the document says they take, and nothing else.

use super::*;
use crate::api::Limits;
use crate::api::http::fields::asked;
use crate::api::service::tests::service;
use axum::body::Body;
use axum::http::Request;
use std::collections::BTreeSet;
use tower::ServiceExt;

const ADMIN: &str = "admin-0123456789";

/// What has fields that are read only where it is given: a property, and what to give.
fn given() -> Vec<(&'static str, Value)> {
    let schema = json!({"type": "json_schema", "json_schema": {"schema": {}}});
    vec![
        ("debug", json!({})),
        ("response_format", schema),
        ("stream_options", json!({})),
        ("grammar", json!({"type": "regex", "value": "a"})),
        ("adapters", json!([{"name": "a", "weight": 1}])),
        ("messages", json!([{"role": "user", "content": [{"type": "text", "text": "a"}]}])),
        ("outputs", json!([{"name": "text_output", "parameters": {}}])),
        ("parameters", json!({"grammar": {"type": "regex", "value": "a"}})),
        (
            "inputs",
            json!([{"name": "text_input", "datatype": "BYTES", "shape": [1],
            "parameters": {"binary_data_size": 9}}]),
        ),
    ]
}

/// The names of all properties of a schema.
fn names(document: &Value, schema: &Value, found: &mut BTreeSet<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        return names(document, document.pointer(&reference[1..]).unwrap(), found);
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        found.insert(name.clone());
        names(document, property, found);
    }
    names_within(document, schema, found);
}

fn names_within(document: &Value, schema: &Value, found: &mut BTreeSet<String>) {
    for form in schema["anyOf"].as_array().into_iter().flatten() {
        names(document, form, found);
    }
    if let Some(items) = schema.get("items") {
        names(document, items, found);
    }
}

#[tokio::test]
async fn readers_take_the_properties_of_their_schemas() {
    let keys = Keys::default().with_admin_key(ADMIN);
    let app = App::new(service(vec![0]).await, Limits::default(), "f32");
    let router = Arc::new(app.with_keys(keys, "/nowhere".into())).router();
    let post = async |path: &str, body: &Value| {
        let path = path.replace("{task}", "image").replace("{model}", "image");
        let request = Request::post(path.replace("{version}", "1"))
            .header("authorization", format!("Bearer {ADMIN}"))
            .header("content-type", "application/json")
            .body(Body::from(body.to_string()));
        router.clone().oneshot(request.unwrap()).await.unwrap();
    };
    let document = document(&Keys::default());
    let mut bodies = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let content = &methods["post"]["requestBody"]["content"]["application/json"];
        let Some(examples) = content["examples"].as_object() else { continue };
        let mut declared = BTreeSet::new();
        names(&document, &content["schema"], &mut declared);
        asked::names();
        for example in examples.values() {
            let body = &example["value"];
            post(path, body).await;
            for (name, value) in given() {
                if declared.contains(name) {
                    let mut more = body.clone();
                    more[name] = value.clone();
                    if name == "stream_options" {
                        more["stream"] = json!(true);
                    }
                    if name == "messages" {
                        more.as_object_mut().unwrap().shift_remove("prompt");
                    }
                    post(path, &more).await;
                }
                if declared.contains(name) && declared.contains("parameters") {
                    let mut more = body.clone();
                    more["parameters"][name] = value;
                    post(path, &more).await;
                }
            }
        }
        assert_eq!(asked::names(), declared, "{path}");
        bodies += 1;
    }
    assert!(bodies > 10);
}

#[test]
fn what_is_referred_to_is_there() {
    fn check(document: &Value, part: &Value) {
        if let Some(reference) = part["$ref"].as_str() {
            assert!(document.pointer(&reference[1..]).is_some(), "{reference}");
        }
        let parts = part.as_array().into_iter().flatten();
        for part in parts.chain(part.as_object().into_iter().flat_map(Map::values)) {
            check(document, part);
        }
    }
    let document = document(&Keys::default());
    check(&document, &document);
}

#[test]
fn no_two_operations_have_one_id() {
    let document = document(&Keys::default());
    let methods = document["paths"].as_object().unwrap().values();
    let operations = methods.flat_map(|methods| methods.as_object().unwrap().values());
    let ids: Vec<&str> = operations.map(|o| o["operationId"].as_str().unwrap()).collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "{ids:?}");
}
