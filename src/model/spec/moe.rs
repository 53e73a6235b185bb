//! `shoal.moe` of a `config.json`: which feed-forward networks are mixtures of experts, and how their
//! gates choose.

use serde_json::{Map, Value, json};

/// Experts in a layer that are believed.
const MAX_EXPERTS: usize = 64;

/// The sparse part of a model: these blocks have experts in place of one feed-forward network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moe {
    /// Transformer blocks, ascending, at least one.
    pub layers: Vec<usize>,
    /// Experts in each of them, 1 to 64.
    pub experts: usize,
    /// Experts that a row is sent to, 1 to `experts`.
    pub top_k: usize,
    /// What the choice looks at.
    pub gate: Gate,
}

/// How a gate makes logits of a row `h` of task `t`. Without a task they are the mean over the tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `W h`.
    Token,
    /// `W h + b_t`.
    TokenTask,
    /// `W_t h`.
    PerTask,
    /// `b_t`.
    Task,
}

impl Gate {
    const ALL: [Self; 4] = [Self::Token, Self::TokenTask, Self::PerTask, Self::Task];

    /// Its name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::TokenTask => "token_task",
            Self::PerTask => "per_task",
            Self::Task => "task",
        }
    }

    /// Whether it has rows for tasks.
    pub fn knows_tasks(self) -> bool {
        self != Self::Token
    }

    /// Shape of its `gate.weight`, where it has one.
    pub fn weight_shape(self, tasks: usize, experts: usize, width: usize) -> Option<Vec<usize>> {
        match self {
            Self::Token | Self::TokenTask => Some(vec![experts, width]),
            Self::PerTask => Some(vec![tasks, experts, width]),
            Self::Task => None,
        }
    }

    /// Shape of its `gate.task_bias`, where it has one.
    pub fn bias_shape(self, tasks: usize, experts: usize) -> Option<Vec<usize>> {
        matches!(self, Self::TokenTask | Self::Task).then(|| vec![tasks, experts])
    }
}

impl Moe {
    /// The tensors of one of its layers, below the block.
    pub fn tensors(&self, tasks: usize, width: usize, inner: usize) -> Vec<(String, Vec<usize>)> {
        let weight = self.gate.weight_shape(tasks, self.experts, width);
        let bias = self.gate.bias_shape(tasks, self.experts);
        let mut tensors = Vec::new();
        tensors.extend(weight.map(|shape| ("moe.gate.weight".to_owned(), shape)));
        tensors.extend(bias.map(|shape| ("moe.gate.task_bias".to_owned(), shape)));
        for expert in 0..self.experts {
            let parts = [
                ("c_fc.weight", vec![width, inner]),
                ("c_fc.bias", vec![inner]),
                ("c_proj.weight", vec![inner, width]),
                ("c_proj.bias", vec![width]),
            ];
            let named = |(name, shape)| (format!("moe.experts.{expert}.{name}"), shape);
            tensors.extend(parts.map(named));
        }
        tensors
    }

    /// As it stands in `config.json`.
    pub fn to_config(&self) -> Value {
        json!({
            "layers": self.layers,
            "num_experts": self.experts,
            "top_k": self.top_k,
            "gate": self.gate.name(),
        })
    }

    /// Reads `shoal.moe` of a model of `layers` blocks (`None`: unknown, for a fault of its own) that
    /// counts `tasks` tasks. `None` if there was a fault.
    pub fn from_config(
        value: &Value,
        layers: Option<usize>,
        tasks: usize,
        faults: &mut Vec<String>,
    ) -> Option<Self> {
        let Value::Object(moe) = value else {
            faults.push("shoal.moe is not an object".into());
            return None;
        };
        let known = ["layers", "num_experts", "top_k", "gate"];
        for key in moe.keys().filter(|key| !known.contains(&key.as_str())) {
            let allowed = known.join(", ");
            faults.push(format!("shoal.moe.{key} is not supported; allowed: {allowed}"));
        }
        let blocks = read_layers(moe, layers, faults);
        let experts = read_size(moe, "num_experts", MAX_EXPERTS, faults);
        let top_k = read_size(moe, "top_k", experts.unwrap_or(MAX_EXPERTS), faults);
        let gate = read_gate(moe, tasks, faults);
        Some(Self { layers: blocks?, experts: experts?, top_k: top_k?, gate: gate? })
    }
}

fn read_layers(
    moe: &Map<String, Value>,
    layers: Option<usize>,
    faults: &mut Vec<String>,
) -> Option<Vec<usize>> {
    let value = moe.get("layers").cloned().unwrap_or_default();
    let Ok(mut read) = serde_json::from_value::<Vec<usize>>(value) else {
        faults.push("shoal.moe.layers is not a list of layer numbers".into());
        return None;
    };
    let layers = layers?;
    read.sort_unstable();
    let before = faults.len();
    if read.is_empty() {
        faults.push("shoal.moe.layers is empty; allowed: at least one layer".into());
    }
    if let Some(layer) = read.iter().find(|&&layer| layer >= layers) {
        let last = layers.saturating_sub(1);
        faults.push(format!("shoal.moe.layers holds {layer}; allowed: 0 to {last}"));
    }
    if let Some(pair) = read.windows(2).find(|pair| pair[0] == pair[1]) {
        faults.push(format!("shoal.moe.layers holds {} twice", pair[0]));
    }
    (faults.len() == before).then_some(read)
}

fn read_size(
    moe: &Map<String, Value>,
    key: &str,
    max: usize,
    faults: &mut Vec<String>,
) -> Option<usize> {
    let value = moe.get(key).unwrap_or(&Value::Null);
    let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
    let size = size.filter(|n| (1..=max).contains(n));
    if size.is_none() {
        faults.push(format!("shoal.moe.{key} is {value}; allowed: 1 to {max}"));
    }
    size
}

fn read_gate(moe: &Map<String, Value>, tasks: usize, faults: &mut Vec<String>) -> Option<Gate> {
    let value = moe.get("gate").unwrap_or(&Value::Null);
    let Some(gate) = Gate::ALL.into_iter().find(|gate| value == gate.name()) else {
        let allowed = Gate::ALL.map(|gate| format!("{:?}", gate.name())).join(", ");
        faults.push(format!("shoal.moe.gate is {value}; allowed: {allowed}"));
        return None;
    };
    if gate.knows_tasks() && tasks == 0 {
        faults.push(format!("shoal.moe.gate is {value}, which needs names in shoal.tasks"));
        return None;
    }
    Some(gate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Spec;

    fn config() -> Value {
        let text = include_str!("../../../tests/goldens/gpt2-tiny/config.json");
        let mut config: Value = serde_json::from_str(text).unwrap();
        config["shoal"] = json!({
            "tasks": ["image", "video"],
            "moe": {"layers": [2, 0], "num_experts": 4, "top_k": 2, "gate": "token_task"},
        });
        config
    }

    #[test]
    fn what_it_writes_it_reads() {
        for gate in Gate::ALL {
            let mut config = config();
            config["shoal"]["moe"]["gate"] = gate.name().into();
            let spec = Spec::from_config(&config.to_string()).unwrap();
            let moe = spec.moe.clone().unwrap();
            assert_eq!((moe.layers.as_slice(), moe.experts, moe.top_k), (&[0, 2][..], 4, 2));
            assert_eq!(moe.gate, gate);
            assert_eq!(Spec::from_config(&spec.to_config().to_string()).unwrap(), spec);
        }
    }

    #[test]
    fn every_fault_is_named() {
        let cases = [
            ("layers", json!([])),
            ("layers", json!([3])),
            ("layers", json!([1, 0, 1])),
            ("layers", json!([-1])),
            ("layers", json!("0")),
            ("layers", Value::Null),
            ("num_experts", json!(0)),
            ("num_experts", json!(65)),
            ("num_experts", json!(1)),
            ("num_experts", Value::Null),
            ("top_k", json!(0)),
            ("top_k", json!(5)),
            ("top_k", json!(1.5)),
            ("gate", json!("hash")),
            ("gate", json!(1)),
            ("capacity_factor", json!(1.25)),
        ];
        for (key, value) in cases {
            let mut config = config();
            config["shoal"]["moe"][key] = value.clone();
            let faults = Spec::from_config(&config.to_string()).unwrap_err().0;
            // With one expert a top_k of 2 is too much.
            let named = if value == 1 && key == "num_experts" { "top_k" } else { key };
            assert_eq!(faults.len(), 1, "{key} {value}: {faults:?}");
            assert!(faults[0].contains(&format!("shoal.moe.{named}")), "{key} {value}: {faults:?}");
        }
        let mut config = config();
        config["shoal"]["moe"] = json!({});
        assert_eq!(Spec::from_config(&config.to_string()).unwrap_err().0.len(), 4);
    }

    #[test]
    fn gates_of_tasks_need_tasks() {
        for gate in Gate::ALL {
            let mut config = config();
            config["shoal"]["moe"]["gate"] = gate.name().into();
            config["shoal"]["tasks"] = json!([]);
            let read = Spec::from_config(&config.to_string());
            match gate {
                Gate::Token => assert!(read.is_ok()),
                _ => assert!(read.unwrap_err().0[0].contains("shoal.tasks")),
            }
        }
    }

    #[test]
    fn tensors_are_the_designs() {
        let spec = Spec::from_config(&config().to_string()).unwrap();
        let tensors = spec.tensors();
        let shape = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, s)| s.as_slice());
        assert_eq!(shape("transformer.h.0.moe.gate.weight"), Some(&[4, 64][..]));
        assert_eq!(shape("transformer.h.2.moe.gate.task_bias"), Some(&[2, 4][..]));
        assert_eq!(shape("transformer.h.2.moe.experts.3.c_fc.weight"), Some(&[64, 256][..]));
        assert_eq!(shape("transformer.h.0.moe.experts.0.c_proj.bias"), Some(&[64][..]));
        assert_eq!(shape("transformer.h.0.mlp.c_fc.weight"), None);
        assert_eq!(shape("transformer.h.1.mlp.c_fc.weight"), Some(&[64, 256][..]));
        assert_eq!(shape("transformer.h.1.moe.gate.weight"), None);
        let (dense, ffn) = (191_040, 64 * 256 + 256 + 256 * 64 + 64);
        let gates = 2 * (4 * 64 + 2 * 4);
        assert_eq!(spec.parameters(), dense + 2 * 3 * ffn + gates);
        assert_eq!(spec.active_parameters(), dense + 2 * ffn + gates);
        let gates = |gate| {
            let moe = Moe { gate, ..spec.moe.clone().unwrap() };
            let mut tensors = moe.tensors(2, 64, 256);
            tensors.retain(|(name, _)| name.contains("gate"));
            tensors
        };
        assert_eq!(gates(Gate::PerTask), [("moe.gate.weight".to_owned(), vec![2, 4, 64])]);
        assert_eq!(gates(Gate::Task), [("moe.gate.task_bias".to_owned(), vec![2, 4])]);
    }
}
