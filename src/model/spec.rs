//! What a model is, as `config.json` says it: sizes, and the refusal of whatever the decoder would not
//! honour. A configuration that is accepted is computed exactly as PyTorch would compute it.

mod moe;

pub use moe::{Gate, Moe};

use super::Faults;
use crate::ids::is_valid_name;
use serde_json::{Map, Value, json};

/// The shape of a GPT-2 decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Transformer blocks.
    pub layers: usize,
    /// Attention heads; they divide `width`.
    pub heads: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Width inside the feed-forward network.
    pub inner: usize,
    /// Longest sequence.
    pub context: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Added to the variance in layer normalisation.
    pub eps: f64,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
    /// `shoal.tasks`: the order in which task-indexed tensors count tasks.
    pub tasks: Vec<String>,
    /// `shoal.moe`: the blocks that have experts.
    pub moe: Option<Moe>,
}

/// The largest sizes that are believed, so that a hostile file cannot ask for all memory.
const MAX_LAYERS: usize = 1 << 10;
const MAX_WIDTH: usize = 1 << 16;
const MAX_INNER: usize = 1 << 18;
const MAX_CONTEXT: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 22;

impl Spec {
    /// Reads the text of a `config.json`, listing every fault at once.
    pub fn from_config(text: &str) -> Result<Self, Faults> {
        let value: Value = serde_json::from_str(text)
            .map_err(|e| Faults(vec![format!("config.json: not JSON: {e}")]))?;
        let Value::Object(config) = value else {
            return Err(Faults(vec!["config.json: not a JSON object".into()]));
        };
        let mut reader = Reader { config: &config, faults: Vec::new() };
        let spec = reader.spec();
        if reader.faults.is_empty() { Ok(spec) } else { Err(Faults(reader.faults)) }
    }

    /// The `config.json` of this shape, as Hugging Face reads it.
    pub fn to_config(&self) -> Value {
        let mut config = json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "vocab_size": self.vocab,
            "n_positions": self.context,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.inner,
            "layer_norm_epsilon": self.eps,
            "bos_token_id": self.eos.first(),
            "eos_token_id": end_value(&self.eos),
            "tie_word_embeddings": true,
        });
        if !self.tasks.is_empty() {
            config["shoal"]["tasks"] = json!(self.tasks);
        }
        if let Some(moe) = &self.moe {
            config["shoal"]["moe"] = moe.to_config();
        }
        config
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// The experts of a block, if it has any.
    pub fn moe_of(&self, layer: usize) -> Option<&Moe> {
        self.moe.as_ref().filter(|moe| moe.layers.contains(&layer))
    }

    /// Every tensor of the model with its shape, in order of use. Matrices are Conv1D: `[in, out]`.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let d = self.width;
        let mut tensors = vec![
            ("transformer.wte.weight".to_owned(), vec![self.vocab, d]),
            ("transformer.wpe.weight".to_owned(), vec![self.context, d]),
        ];
        for layer in 0..self.layers {
            let attention = [
                ("ln_1.weight", vec![d]),
                ("ln_1.bias", vec![d]),
                ("attn.c_attn.weight", vec![d, 3 * d]),
                ("attn.c_attn.bias", vec![3 * d]),
                ("attn.c_proj.weight", vec![d, d]),
                ("attn.c_proj.bias", vec![d]),
                ("ln_2.weight", vec![d]),
                ("ln_2.bias", vec![d]),
            ];
            let named = |(name, shape)| (format!("transformer.h.{layer}.{name}"), shape);
            tensors.extend(attention.map(|(name, shape)| named((name.to_owned(), shape))));
            tensors.extend(self.feed_forward(layer).into_iter().map(named));
        }
        tensors.push(("transformer.ln_f.weight".to_owned(), vec![d]));
        tensors.push(("transformer.ln_f.bias".to_owned(), vec![d]));
        tensors
    }

    /// The tensors of a block's feed-forward network, below the block.
    fn feed_forward(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let (d, inner) = (self.width, self.inner);
        if let Some(moe) = self.moe_of(layer) {
            return moe.tensors(self.tasks.len(), d, inner);
        }
        vec![
            ("mlp.c_fc.weight".to_owned(), vec![d, inner]),
            ("mlp.c_fc.bias".to_owned(), vec![inner]),
            ("mlp.c_proj.weight".to_owned(), vec![inner, d]),
            ("mlp.c_proj.bias".to_owned(), vec![d]),
        ]
    }

    /// Number of parameters; the head is the embedding table and counts once.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Number of parameters without the experts that a token is not sent to.
    pub fn active_parameters(&self) -> usize {
        let expert = 2 * self.width * self.inner + self.inner + self.width;
        let idle = |moe: &Moe| moe.layers.len() * (moe.experts - moe.top_k) * expert;
        self.parameters() - self.moe.as_ref().map_or(0, idle)
    }
}

/// Reads keys, noting what is wrong and going on with a harmless value.
struct Reader<'a> {
    config: &'a Map<String, Value>,
    faults: Vec<String>,
}

impl Reader<'_> {
    fn spec(&mut self) -> Spec {
        self.architecture();
        self.refusals();
        let width = self.size("n_embd", MAX_WIDTH);
        let heads = self.size("n_head", MAX_WIDTH);
        if let (Some(width), Some(heads)) = (width, heads)
            && width % heads != 0
        {
            self.fault(format!("n_embd {width} is not divisible by n_head {heads}"));
        }
        let width = width.unwrap_or(1);
        let inner = match self.get("n_inner") {
            Some(_) => self.size("n_inner", MAX_INNER),
            None => Some(4 * width),
        };
        let context_key = if self.get("n_positions").is_some() { "n_positions" } else { "n_ctx" };
        let vocab = self.size("vocab_size", MAX_VOCAB);
        let layers = self.size("n_layer", MAX_LAYERS);
        let (tasks, moe) = self.shoal(layers);
        Spec {
            layers: layers.unwrap_or(1),
            heads: heads.unwrap_or(1),
            width,
            inner: inner.unwrap_or(1),
            context: self.size(context_key, MAX_CONTEXT).unwrap_or(1),
            vocab: vocab.unwrap_or(1),
            eps: self.eps(),
            eos: self.eos(vocab),
            tasks,
            moe,
        }
    }

    fn fault(&mut self, message: String) {
        self.faults.push(format!("config.json: {message}"));
    }

    /// The value of a key; null is absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.config.get(key).filter(|v| !v.is_null())
    }

    /// A size in `1..=max`; `None` is a fault, already noted.
    fn size(&mut self, key: &str, max: usize) -> Option<usize> {
        let Some(value) = self.get(key) else {
            self.fault(format!("{key} is missing"));
            return None;
        };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
        let size = size.filter(|n| (1..=max).contains(n));
        if size.is_none() {
            let message = format!("{key} is {value}; allowed: 1 to {max}");
            self.fault(message);
        }
        size
    }

    fn eps(&mut self) -> f64 {
        const DEFAULT: f64 = 1e-5;
        let Some(value) = self.get("layer_norm_epsilon") else { return DEFAULT };
        match value.as_f64() {
            Some(eps) if eps > 0.0 && eps < 1.0 => eps,
            _ => {
                let value = value.clone();
                self.fault(format!("layer_norm_epsilon is {value}; allowed: between 0 and 1"));
                DEFAULT
            }
        }
    }

    fn eos(&mut self, vocab: Option<usize>) -> Vec<u32> {
        let value = self.get("eos_token_id").cloned().unwrap_or_default();
        end_ids(&value, vocab.unwrap_or(MAX_VOCAB)).unwrap_or_else(|fault| {
            self.fault(fault);
            Vec::new()
        })
    }

    fn architecture(&mut self) {
        match self.get("model_type").cloned() {
            Some(Value::String(kind)) if kind == "gpt2" => {}
            Some(kind) => self.fault(format!("model_type is {kind}; allowed: \"gpt2\"")),
            None => self.fault("model_type is missing; allowed: \"gpt2\"".into()),
        }
        let known = [json!(["GPT2LMHeadModel"]), json!(["GPT2Model"])];
        if let Some(value) = self.get("architectures").filter(|v| !known.contains(v)) {
            let message = format!(
                "architectures is {value}; allowed: [\"GPT2LMHeadModel\"], [\"GPT2Model\"]"
            );
            self.fault(message);
        }
    }

    /// Refuses what changes the result and is not computed. `reorder_and_upcast_attn` is not among
    /// them: it asks for attention in f32, which is how it is always done here.
    fn refusals(&mut self) {
        let allowed = [
            ("activation_function", &["gelu_new", "gelu_pytorch_tanh"].map(Value::from)[..]),
            ("scale_attn_weights", &[Value::from(true)]),
            ("scale_attn_by_inverse_layer_idx", &[Value::from(false)]),
            ("add_cross_attention", &[Value::from(false)]),
            ("is_encoder_decoder", &[Value::from(false)]),
            ("pruned_heads", &[json!({})]),
            ("quantization_config", &[]),
        ];
        for (key, allowed) in allowed {
            let Some(value) = self.get(key).filter(|v| !allowed.contains(v)) else { continue };
            let message = match allowed {
                [] => format!("{key} is not supported"),
                _ => {
                    let allowed: Vec<_> = allowed.iter().map(Value::to_string).collect();
                    format!("{key} is {value}; allowed: {}", allowed.join(", "))
                }
            };
            self.fault(message);
        }
    }

    /// Reads `shoal`, the part that Hugging Face has no word for: its tasks and its experts.
    fn shoal(&mut self, layers: Option<usize>) -> (Vec<String>, Option<Moe>) {
        let shoal = match self.get("shoal").cloned() {
            Some(Value::Object(shoal)) => shoal,
            Some(_) => {
                self.fault("shoal is not an object".into());
                return Default::default();
            }
            None => return Default::default(),
        };
        for key in shoal.keys().filter(|key| !["tasks", "moe"].contains(&key.as_str())) {
            self.fault(format!("shoal.{key} is not supported; allowed: tasks, moe"));
        }
        let tasks = self.tasks(shoal.get("tasks").cloned());
        let mut faults = Vec::new();
        let moe = shoal.get("moe").filter(|moe| !moe.is_null());
        let moe = moe.and_then(|moe| Moe::from_config(moe, layers, tasks.len(), &mut faults));
        faults.into_iter().for_each(|fault| self.fault(fault));
        (tasks, moe)
    }

    fn tasks(&mut self, value: Option<Value>) -> Vec<String> {
        let tasks = value.unwrap_or_else(|| json!([]));
        let tasks: Vec<String> = match serde_json::from_value(tasks) {
            Ok(tasks) => tasks,
            Err(_) => {
                self.fault("shoal.tasks is not a list of task names".into());
                return Vec::new();
            }
        };
        for (i, name) in tasks.iter().enumerate() {
            if !is_valid_name(name) {
                self.fault(format!("shoal.tasks holds {name:?}; allowed: [A-Za-z0-9._-]{{1,64}}"));
            }
            if tasks[..i].contains(name) {
                self.fault(format!("shoal.tasks holds {name:?} twice"));
            }
        }
        tasks
    }
}

/// The ids of an `eos_token_id`, as a `config.json` or `generation_config.json` has it: one, several
/// or null.
pub fn end_ids(value: &Value, vocab: usize) -> Result<Vec<u32>, String> {
    let listed = match value {
        Value::Null => &[][..],
        Value::Array(ids) => ids,
        one => std::slice::from_ref(one),
    };
    let id = |value: &Value| value.as_u64().filter(|&id| id < vocab as u64).map(|id| id as u32);
    let ids: Option<Vec<u32>> = listed.iter().map(id).collect();
    ids.ok_or_else(|| {
        format!("eos_token_id is {value}; allowed: a token id below {vocab}, or a list of such")
    })
}

/// What [`end_ids`] reads.
fn end_value(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => (*one).into(),
        several => several.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/goldens/gpt2-tiny/config.json")).unwrap()
    }

    #[test]
    fn reads_a_hugging_face_config() {
        let spec = Spec::from_config(&golden().to_string()).unwrap();
        assert_eq!((spec.layers, spec.heads, spec.width, spec.inner), (3, 4, 64, 256));
        assert_eq!((spec.context, spec.vocab, spec.eos.as_slice()), (128, 512, &[0][..]));
        assert_eq!(spec.head_dim(), 16);
        assert_eq!(spec.parameters(), 191_040);
    }

    #[test]
    fn what_it_writes_it_reads() {
        let mut spec = Spec::from_config(&golden().to_string()).unwrap();
        spec.tasks = vec!["image".into(), "video".into()];
        spec.inner = 100;
        for eos in [vec![], vec![3], vec![3, 5]] {
            spec.eos = eos;
            assert_eq!(Spec::from_config(&spec.to_config().to_string()).unwrap(), spec);
        }
    }

    #[test]
    fn every_unhonoured_key_is_refused_by_name() {
        let cases = [
            ("model_type", json!("llama")),
            ("architectures", json!(["GPT2ForSequenceClassification"])),
            ("activation_function", json!("relu")),
            ("scale_attn_weights", json!(false)),
            ("scale_attn_by_inverse_layer_idx", json!(true)),
            ("add_cross_attention", json!(true)),
            ("quantization_config", json!({"bits": 4})),
            ("n_embd", json!(63)),
            ("n_embd", json!("64")),
            ("n_layer", json!(0)),
            ("n_layer", json!(u64::MAX)),
            ("n_positions", json!(-1)),
            ("n_inner", json!(1.5)),
            ("vocab_size", json!([])),
            ("layer_norm_epsilon", json!(0)),
            ("eos_token_id", json!(512)),
            ("eos_token_id", json!([0, -1])),
            ("shoal", json!({"router": {}})),
            ("shoal", json!({"moe": []})),
            ("shoal", json!({"tasks": ["a b"]})),
            ("shoal", json!({"tasks": ["a", "a"]})),
            ("shoal", json!({"tasks": 1})),
        ];
        for (key, value) in cases {
            let mut config = golden();
            config[key] = value.clone();
            let faults = Spec::from_config(&config.to_string()).unwrap_err().0;
            assert_eq!(faults.len(), 1, "{key} {value}: {faults:?}");
            assert!(faults[0].contains(key), "{key} {value}: {faults:?}");
        }
    }

    #[test]
    fn all_faults_come_at_once() {
        let faults = Spec::from_config(r#"{"model_type": "gpt2", "n_head": 0}"#).unwrap_err().0;
        for key in ["n_head", "n_embd", "n_layer", "n_ctx", "vocab_size"] {
            assert!(faults.iter().any(|f| f.contains(key)), "{key}: {faults:?}");
        }
        assert!(Spec::from_config("[").is_err());
        assert!(Spec::from_config("[]").is_err());
    }

    #[test]
    fn harmless_flags_pass() {
        let mut config = golden();
        config["reorder_and_upcast_attn"] = json!(true);
        config["activation_function"] = json!("gelu_pytorch_tanh");
        config["eos_token_id"] = json!([7, 9]);
        assert_eq!(Spec::from_config(&config.to_string()).unwrap().eos, [7, 9]);
        config["shoal"] = json!({"tasks": ["image"]});
        assert_eq!(Spec::from_config(&config.to_string()).unwrap().tasks, ["image"]);
    }
}
