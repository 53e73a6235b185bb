//! Which linear layers a configuration means, by PEFT's rules (`check_target_module_exists` and
//! `get_pattern_key`), over the module names of Hugging Face's GPT-2.

use super::config::{FILE, Keys};
use super::{Module, Shape};
use fancy_regex::{Regex, RegexBuilder};
use serde_json::Value;

/// Steps that a pattern may go back for one name, so that a hostile one cannot keep a thread.
const BACKTRACK_LIMIT: usize = 100_000;
const PATTERN: &str = "a regular expression that is quick to match";

/// Module names, or a pattern for whole names.
#[derive(Debug)]
enum Names<'a> {
    /// Whole names, or their ends after a dot.
    List(Vec<&'a str>),
    Pattern(Regex),
    AllLinear,
}

/// What `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern` choose.
#[derive(Debug)]
struct Targets<'a> {
    chosen: Names<'a>,
    excluded: Option<Names<'a>>,
    /// The layers that are meant, if not all, and the patterns that find a name's layer.
    layers: Option<(Vec<u64>, Vec<Regex>)>,
}

/// The linear layers that the configuration targets; `prefix` is what names of the base model begin with.
pub fn read(keys: &mut Keys<'_>, shape: &Shape, prefix: &str) -> Vec<(usize, Module)> {
    let before = keys.faults.len();
    let targets = Targets::read(keys);
    let Some(targets) = targets.filter(|_| keys.faults.len() == before) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut others = Vec::new();
    for (name, linear) in module_names(shape, prefix) {
        match (targets.include(&name, linear.is_some()), linear) {
            (Ok(false), _) => {}
            (Ok(true), Some(linear)) => found.push(linear),
            (Ok(true), None) => others.push(name),
            (Err(_), _) => {
                keys.faults
                    .push(format!("{FILE}: target_modules or exclude_modules: not {PATTERN}"));
                return Vec::new();
            }
        }
    }
    refuse(keys, shape, &found, &others);
    found
}

/// Notes what is targeted beside the linear layers that have one weight each.
fn refuse(keys: &mut Keys<'_>, shape: &Shape, found: &[(usize, Module)], others: &[String]) {
    let allowed = Module::ALL.map(Module::name).join(", ");
    if !others.is_empty() {
        let others = others.join(", ");
        keys.faults.push(format!("{FILE}: target_modules names {others}; allowed: {allowed}"));
    } else if found.is_empty() {
        keys.faults.push(format!("{FILE}: target_modules names no layer; allowed: {allowed}"));
    }
    for &(layer, module) in found {
        if !shape.has(layer, module) {
            let name = module.name();
            keys.faults.push(format!(
                "{FILE}: target_modules names h.{layer}.{name}, but layer {layer} has experts in its place"
            ));
        }
    }
}

/// All modules of the base model that have a name, with the linear layers among them.
fn module_names(
    shape: &Shape,
    prefix: &str,
) -> impl Iterator<Item = (String, Option<(usize, Module)>)> {
    let outer = ["wte", "wpe", "drop", "h", "ln_f"].map(|name| format!("{prefix}{name}"));
    let root = prefix.strip_suffix('.').into_iter().chain(["lm_head"]).map(str::to_owned);
    let outer = outer.into_iter().chain(root.collect::<Vec<_>>()).map(|name| (name, None));
    let inner =
        ["", ".ln_1", ".ln_2", ".attn", ".mlp", ".attn.attn_dropout", ".attn.resid_dropout"];
    let inner = inner.into_iter().chain([".mlp.act", ".mlp.dropout"]);
    let blocks = (0..shape.layers).flat_map(move |layer| {
        let linear = Module::ALL
            .map(|module| (format!("{prefix}h.{layer}.{}", module.name()), Some((layer, module))));
        let others = inner.clone().map(move |name| (format!("{prefix}h.{layer}{name}"), None));
        linear.into_iter().chain(others.collect::<Vec<_>>())
    });
    outer.chain(blocks)
}

impl<'a> Targets<'a> {
    fn read(keys: &mut Keys<'a>) -> Option<Self> {
        let Some(chosen) = Names::read(keys, "target_modules") else {
            if keys.get("target_modules").is_none() {
                keys.fault("target_modules", None, "module names, a pattern, all-linear");
            }
            return None;
        };
        let excluded = Names::read(keys, "exclude_modules");
        let layers = layer_list(keys);
        // An empty string is as none, as PEFT has it.
        let patterns = keys
            .strings("layers_pattern")
            .map(|all| all.into_iter().filter(|pattern| !pattern.is_empty()).collect::<Vec<_>>());
        let patterns = patterns.filter(|patterns| !patterns.is_empty());
        let listed = matches!(chosen, Names::List(_));
        if (layers.is_some() || patterns.is_some()) && !listed {
            let why = "cannot be given when target_modules is a string";
            keys.faults.push(format!("{FILE}: layers_to_transform or layers_pattern {why}"));
        }
        if patterns.is_some() && layers.is_none() {
            keys.fault("layers_to_transform", None, "layer numbers, where layers_pattern is given");
        }
        let patterns: Option<Vec<Regex>> = match patterns {
            None => {
                compile(keys, "layers_pattern", r"\A.*?\.[^.]*\.(?P<idx>\d+)\.").map(|p| vec![p])
            }
            Some(patterns) => patterns
                .into_iter()
                .map(|p| format!(r"\A(?:(?:|.*?\.){p}\.(?P<idx>\d+)\.)"))
                .map(|pattern| compile(keys, "layers_pattern", &pattern))
                .collect(),
        };
        let layers = layers.filter(|layers| !layers.is_empty()).zip(patterns);
        Some(Self { chosen, excluded, layers })
    }

    /// Whether it means the module of this name.
    fn include(&self, name: &str, linear: bool) -> Result<bool, Box<fancy_regex::Error>> {
        if let Some(excluded) = &self.excluded
            && excluded.include(name, linear)?
        {
            return Ok(false);
        }
        let (Names::List(list), Some((layers, patterns))) = (&self.chosen, &self.layers) else {
            return self.chosen.include(name, linear);
        };
        // A whole name is meant whatever its layer.
        if list.contains(&name) || !self.chosen.include(name, linear)? {
            return Ok(list.contains(&name));
        }
        for pattern in patterns {
            if let Some(found) = pattern.captures(name)? {
                let layer = found.name("idx").and_then(|layer| layer.as_str().parse().ok());
                return Ok(layer.is_some_and(|layer| layers.contains(&layer)));
            }
        }
        Ok(false)
    }
}

impl<'a> Names<'a> {
    /// `None` if there are none, or none that can be read.
    fn read(keys: &mut Keys<'a>, key: &str) -> Option<Self> {
        match keys.get(key) {
            Some(Value::String(name))
                if key == "target_modules" && name.eq_ignore_ascii_case("all-linear") =>
            {
                Some(Self::AllLinear)
            }
            Some(Value::String(pattern)) if !pattern.is_empty() => {
                compile(keys, key, &format!(r"\A(?:{pattern})\z")).map(Self::Pattern)
            }
            _ => keys.strings(key).map(Self::List),
        }
    }

    fn include(&self, name: &str, linear: bool) -> Result<bool, Box<fancy_regex::Error>> {
        Ok(match self {
            Self::AllLinear => linear,
            Self::Pattern(pattern) => pattern.is_match(name)?,
            Self::List(list) => list.iter().any(|&end| {
                name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }),
        })
    }
}

/// One layer number or a list of them; negative ones mean no layer.
fn layer_list(keys: &mut Keys<'_>) -> Option<Vec<u64>> {
    let value = keys.get("layers_to_transform")?;
    let list = match value {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    if !list.iter().all(|layer| layer.is_i64() || layer.is_u64()) {
        keys.fault("layers_to_transform", Some(value), "an integer, a list of integers");
        return None;
    }
    // None of a list that is there must not become all layers.
    let known: Vec<u64> = list.iter().filter_map(Value::as_u64).collect();
    Some(if known.is_empty() && !list.is_empty() { vec![u64::MAX] } else { known })
}

fn compile(keys: &mut Keys<'_>, key: &str, pattern: &str) -> Option<Regex> {
    match RegexBuilder::new(pattern).backtrack_limit(BACKTRACK_LIMIT).build() {
        Ok(regex) => Some(regex),
        Err(e) => {
            keys.faults.push(format!("{FILE}: {key} is not {PATTERN}: {e}"));
            None
        }
    }
}

/// Values for the modules that a pattern names, as in `rank_pattern`: the first that matches counts.
#[derive(Debug)]
pub struct Overrides<T>(Vec<(Regex, T)>);

impl<T: Copy> Overrides<T> {
    /// Reads the object under `key`, whose values `value` reads.
    pub fn read(
        keys: &mut Keys<'_>,
        key: &str,
        value: impl Fn(&Value) -> Option<T>,
        allowed: &str,
    ) -> Self {
        let mut entries = Vec::new();
        match keys.get(key) {
            None => {}
            Some(Value::Object(map)) => {
                for (pattern, found) in map {
                    let regex = compile(keys, key, &format!(r"\A(?:.*\.)?(?:{pattern})\z"));
                    match value(found) {
                        Some(value) => entries.extend(regex.map(|regex| (regex, value))),
                        None => keys.fault(&format!("{key}.{pattern}"), Some(found), allowed),
                    }
                }
            }
            other => keys.fault(key, other, "an object"),
        }
        Self(entries)
    }

    /// The value for a module, if there is one; an error if a pattern takes too long.
    pub fn get(&self, name: &str) -> Result<Option<T>, Box<fancy_regex::Error>> {
        for (pattern, value) in &self.0 {
            if pattern.is_match(name)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }
}
