//! Clients of the gRPC port, and messages made of the JSON that says the same.

use super::server::Server;
use serde_json::{Map, Value, json};
use shoal::api::grpc::proto::generate_request::Grammar;
use shoal::api::grpc::proto::shoal_client::ShoalClient;
use shoal::api::grpc::proto::{self, GenerateRequest};
use tonic::Request;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_client::HealthClient;

/// One connection to the gRPC port.
#[derive(Clone)]
pub struct Rpc {
    pub channel: Channel,
    pub shoal: ShoalClient<Channel>,
    pub health: HealthClient<Channel>,
}

impl Server {
    /// Connects to the gRPC port.
    pub async fn rpc(&self) -> Rpc {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.grpc_address)).unwrap();
        let channel = endpoint.connect().await.unwrap();
        let shoal = ShoalClient::new(channel.clone());
        Rpc { health: HealthClient::new(channel.clone()), shoal, channel }
    }
}

/// A call with these metadata.
pub fn called<T>(message: T, headers: &[(&'static str, &str)]) -> Request<T> {
    let mut request = Request::new(message);
    for (name, value) in headers {
        request.metadata_mut().insert(*name, value.parse().unwrap());
    }
    request
}

/// What the JSON body of the native route asks for, as a message.
pub fn message(task: &str, body: &Value) -> GenerateRequest {
    let mut fields = body.as_object().unwrap().clone();
    let mut take = |name: &str| fields.remove(name).unwrap_or(Value::Null);
    let int = |value: Value| value.as_i64();
    let count = |value: Value| value.as_u64().map(|n| n as u32);
    let float = |value: Value| value.as_f64().map(|n| n as f32);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let message = GenerateRequest {
        task: task.into(),
        input: text(&take("input")),
        controls: take("controls").as_object().map(object),
        n: count(take("n")),
        max_tokens: count(take("max_tokens")),
        min_tokens: count(take("min_tokens")),
        temperature: float(take("temperature")),
        top_k: int(take("top_k")),
        top_p: float(take("top_p")),
        min_p: float(take("min_p")),
        repetition_penalty: float(take("repetition_penalty")),
        presence_penalty: float(take("presence_penalty")),
        frequency_penalty: float(take("frequency_penalty")),
        seed: int(take("seed")),
        stop: take("stop").as_array().into_iter().flatten().filter_map(text).collect(),
        logit_bias: take("logit_bias").as_object().into_iter().flatten().map(bias).collect(),
        logprobs: count(take("logprobs")),
        ignore_eos: take("ignore_eos").as_bool(),
        echo: take("echo").as_bool(),
        adapters: take("adapters").as_array().map(|parts| mixture(parts)),
        timeout_ms: take("timeout_ms").as_f64(),
        debug: take("debug")["routing"].as_bool().map(|routing| proto::Debug { routing }),
        as_task: text(&take("task")),
        grammar: [
            take("choice").as_array().map(|texts| choice(texts)),
            text(&take("regex")).map(Grammar::Regex),
            Some(take("json_schema")).filter(|s| !s.is_null()).map(schema),
        ]
        .into_iter()
        .flatten()
        .next(),
    };
    assert_eq!(json!(fields), json!({}), "a field that messages have not");
    message
}

fn choice(texts: &[Value]) -> Grammar {
    let text = |text: &Value| text.as_str().unwrap().to_owned();
    Grammar::Choice(proto::Choices { values: texts.iter().map(text).collect() })
}

fn schema(schema: Value) -> Grammar {
    Grammar::JsonSchema(schema.to_string())
}

fn bias((id, value): (&String, &Value)) -> (u32, f32) {
    (id.parse().unwrap(), value.as_f64().unwrap() as f32)
}

fn mixture(parts: &[Value]) -> proto::AdapterMixture {
    let part = |part: &Value| proto::AdapterWeight {
        name: part["name"].as_str().unwrap().into(),
        weight: part["weight"].as_f64().unwrap() as f32,
    };
    proto::AdapterMixture { adapters: parts.iter().map(part).collect() }
}

fn object(fields: &Map<String, Value>) -> prost_types::Struct {
    let fields = fields.iter().map(|(name, field)| (name.clone(), value(field)));
    prost_types::Struct { fields: fields.collect() }
}

fn value(json: &Value) -> prost_types::Value {
    use prost_types::value::Kind;
    let list =
        |all: &Vec<Value>| prost_types::ListValue { values: all.iter().map(value).collect() };
    let kind = match json {
        Value::Null => Kind::NullValue(0),
        Value::Bool(yes) => Kind::BoolValue(*yes),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(all) => Kind::ListValue(list(all)),
        Value::Object(fields) => Kind::StructValue(object(fields)),
    };
    prost_types::Value { kind: Some(kind) }
}
