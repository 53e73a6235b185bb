//! An inference, whichever way it came: tensors and parameters become a [`Request`], texts become
//! tensors.
//!
//! `text_input` is the prompts. Every other tensor is a parameter of its name, so that clients without
//! parameters can give them: one element is a value, several are a list. A control of the task may be
//! given by its own name or in `controls`.

use super::tensor::{Datatype, Tensor};
use super::{Named, VERSION};
use crate::api::http::App;
use crate::api::http::call::Call;
use crate::api::http::fields::{Fields, missing, twice};
use crate::api::http::params::{Asked, request, sampling};
use crate::api::ticket::{Chunk, Reply};
use crate::error::{Error, Result};
use crate::request::{Input, Params, Request};
use crate::task::Task;
use serde_json::{Map, Value, json as value};

/// The tensor of prompts.
pub const INPUT: &str = "text_input";

/// The tensors of an answer: the texts, and why each ended.
pub const OUTPUTS: [&str; 2] = ["text_output", "finish_reason"];

/// What is asked for.
#[derive(Debug, Default)]
pub struct Infer {
    /// The client's name for it.
    pub id: Option<String>,
    /// Its tensors.
    pub inputs: Vec<Tensor>,
    /// What goes for all of it.
    pub parameters: Map<String, Value>,
    /// The tensors that the answer is to have; none are all.
    pub outputs: Vec<String>,
}

/// What the answer's form depends on.
#[derive(Clone, Debug)]
pub struct Form {
    /// The client's name for it.
    pub id: Option<String>,
    /// What was asked.
    pub model: String,
    /// The tensors that the answer is to have, in their order.
    pub outputs: Vec<String>,
    /// Whether the prompts came as a column.
    pub column: bool,
}

/// Understands an inference of `model`.
pub fn understand(app: &App, model: Named, ask: Infer, call: &Call) -> Result<(Request, Form)> {
    let Infer { id, inputs, mut parameters, mut outputs } = ask;
    let mut prompts = None;
    for tensor in inputs {
        let name = tensor.name.clone();
        let before = match name == INPUT {
            true => prompts.replace(texts(tensor)?).is_some(),
            false => parameters.insert(name.clone(), value_of(tensor)).is_some(),
        };
        if before {
            return Err(twice(&name));
        }
    }
    let (prompts, column) = prompts.ok_or_else(|| missing(INPUT))?;
    if let Some(other) = outputs.iter().find(|name| !OUTPUTS.contains(&name.as_str())) {
        let message = format!("no output {other:?}; allowed: {}", OUTPUTS.join(", "));
        return Err(Error::invalid("outputs", message));
    }
    // Each is written whole: twice the same would be twice all texts.
    if let Some((_, name)) = outputs.iter().enumerate().find(|(i, n)| outputs[..*i].contains(n)) {
        return Err(twice(&format!("output {name}")).with_param("outputs"));
    }
    if outputs.is_empty() {
        outputs = OUTPUTS.map(str::to_owned).to_vec();
    }
    let form = Form { id, model: model.0.clone(), outputs, column };
    Ok((generation(app, model, prompts, parameters, call)?, form))
}

/// A request for texts, with the parameters of every route of this wire.
pub fn generation(
    app: &App,
    Named(model): Named,
    prompts: Vec<String>,
    parameters: Map<String, Value>,
    call: &Call,
) -> Result<Request> {
    let (task, _) = app.service.catalog().find(&model)?;
    let mut fields = Fields::of(unfolded(with_controls(parameters, &task)?)?, "");
    // Microseconds, as Triton has it.
    let timeout = fields.take::<u64>("timeout")?.filter(|time| *time > 0);
    if let Some(time) = timeout {
        fields.put("timeout_ms", value!(time as f64 / 1000.0))?;
    }
    fields.refuse("debug")?;
    let params = Params { echo: fields.take("echo")?, ..sampling(&mut fields)? };
    let inputs = prompts.into_iter().map(Input::Text).collect();
    let prompt_field = INPUT;
    request(fields, call, Asked { model, inputs, prompt_field, params, usual_max_tokens: None })
}

/// The request, for an answer with room for one text: a task's own `n` does not hold there.
pub fn single(request: Request) -> Result<Request> {
    let n = request.params.n.unwrap_or(1);
    let texts = request.inputs.len() * n as usize;
    if texts > 1 {
        let field = if n > 1 { "n" } else { INPUT };
        let message = format!("{field}: {texts} texts are asked for; allowed here: one");
        return Err(Error::invalid(field, message));
    }
    Ok(Request { params: Params { n: Some(n), ..request.params }, ..request })
}

/// Parameters that may be texts in JSON.
pub const TEXTS: [&str; 4] = ["adapters", "logit_bias", "json_schema", "response_format"];

/// The parameters, where texts stand for what the protocol's parameters cannot be: JSON, and lists. One
/// text that is no JSON list is the only choice.
fn unfolded(mut given: Map<String, Value>) -> Result<Map<String, Value>> {
    for (name, value) in &mut given {
        let Value::String(text) = value else { continue };
        match name.as_str() {
            name if TEXTS.contains(&name) => {
                *value = serde_json::from_str(text)
                    .map_err(|e| Error::invalid(name, format!("{name} must be JSON: {e}")))?;
            }
            "choice" => {
                let list = serde_json::from_str::<Vec<String>>(text);
                *value = list.unwrap_or_else(|_| vec![text.clone()]).into();
            }
            _ => {}
        }
    }
    Ok(given)
}

/// The parameters with those that are controls of the task in `controls`, an object.
fn with_controls(mut given: Map<String, Value>, task: &Task) -> Result<Map<String, Value>> {
    let wrong = || Error::invalid("controls", "controls must be a JSON object");
    let mut controls: Map<String, Value> = match given.remove("controls") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(controls)) => controls,
        Some(Value::String(json)) => serde_json::from_str(&json).map_err(|_| wrong())?,
        Some(_) => return Err(wrong()),
    };
    for name in task.controls.keys() {
        if let Some(value) = given.remove(name)
            && controls.insert(name.clone(), value).is_some()
        {
            return Err(twice(name));
        }
    }
    controls.values_mut().for_each(make_integer);
    if !controls.is_empty() {
        given.insert("controls".into(), Value::Object(controls));
    }
    Ok(given)
}

/// Makes an integer of a double that is one: controls have no others, and some clients no integers.
fn make_integer(value: &mut Value) {
    match value.as_f64() {
        Some(n) if value.is_f64() && n.fract() == 0.0 && n.abs() < 1e15 => {
            *value = (n as i64).into();
        }
        _ => {}
    }
}

/// The prompts, and whether they are a column.
fn texts(tensor: Tensor) -> Result<(Vec<String>, bool)> {
    let fault = |message| Err(Error::invalid(INPUT, message));
    if tensor.datatype != Datatype::Bytes {
        return fault(format!("{INPUT} is {}; allowed: BYTES", tensor.datatype));
    }
    let column = match tensor.shape[..] {
        [n] if n > 0 => false,
        [n, 1] if n > 0 => true,
        _ => {
            let shape = &tensor.shape;
            return fault(format!("{INPUT} has the shape {shape:?}; allowed: [n] and [n, 1]"));
        }
    };
    let text = |element| match element {
        Value::String(text) => Some(text),
        _ => None,
    };
    Ok((tensor.data.into_iter().filter_map(text).collect(), column))
}

/// What a tensor is as a parameter.
fn value_of(tensor: Tensor) -> Value {
    match <[Value; 1]>::try_from(tensor.data) {
        Ok([one]) => one,
        Err(several) => Value::Array(several),
    }
}

impl Form {
    /// The tensors of these texts.
    pub fn tensors(&self, choices: &[Chunk]) -> Vec<Tensor> {
        let count = choices.len() as u64;
        let shape = if self.column { vec![count, 1] } else { vec![count] };
        let strings = |name: &String| {
            let of = |choice: &Chunk| match name == OUTPUTS[0] {
                true => choice.text.clone(),
                false => choice.end.as_ref().map_or("", |end| end.finish.as_str()).to_owned(),
            };
            Tensor::strings(name, shape.clone(), choices.iter().map(of))
        };
        self.outputs.iter().map(strings).collect()
    }

    /// A whole answer in JSON, but for its tensors.
    pub fn json(&self, reply: &Reply) -> Map<String, Value> {
        let mut json = Map::new();
        if let Some(id) = &self.id {
            json.insert("id".into(), value!(id));
        }
        json.insert("model_name".into(), value!(self.model));
        json.insert("model_version".into(), value!(VERSION));
        json.insert(
            "parameters".into(),
            value!({
                "prompt_tokens": reply.usage.prompt_tokens,
                "completion_tokens": reply.usage.completion_tokens,
            }),
        );
        json
    }
}
