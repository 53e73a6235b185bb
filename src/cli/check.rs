//! `shoal check`: what a bundle is, and everything that is wrong with it.

use super::Outcome;
use anyhow::{Result, bail};
use shoal::adapter::{Loaded, Module};
use shoal::bundle::Parts;
use shoal::config::DEFAULT_BUNDLE;
use shoal::model::Weights;
use shoal::task::Task;
use shoal::text::Tokenizer;
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::path::PathBuf;

/// What `shoal check` can be told.
#[derive(clap::Args, Clone, Debug)]
pub struct Check {
    /// Folder of the bundle
    #[arg(default_value = DEFAULT_BUNDLE)]
    pub bundle: PathBuf,
}

/// Prints what was found.
pub fn run(args: &Check) -> Result<Outcome> {
    if !args.bundle.is_dir() {
        bail!("{}: no such folder", args.bundle.display());
    }
    let mut parts = Parts::read(&args.bundle, None);
    if let Some(Err(faults)) = parts.weights.as_ref().map(Weights::check_values) {
        parts.faults.extend(faults.0);
    }
    std::io::stdout().write_all(describe(&parts)?.as_bytes())?;
    Ok(if parts.faults.is_empty() { Outcome::Done } else { Outcome::Failed })
}

fn describe(parts: &Parts) -> Result<String, fmt::Error> {
    let mut text = String::new();
    writeln!(text, "bundle      {}", parts.id)?;
    if let Some(weights) = &parts.weights {
        describe_weights(&mut text, weights)?;
    }
    if let Some(tokenizer) = &parts.tokenizer {
        describe_tokenizer(&mut text, tokenizer)?;
    }
    if let Some(tasks) = &parts.tasks {
        writeln!(text, "tasks")?;
        for task in tasks.iter() {
            describe_task(&mut text, task)?;
        }
    }
    if !parts.adapters.is_empty() {
        writeln!(text, "adapters")?;
        for (name, adapter) in &parts.adapters {
            describe_adapter(&mut text, name, adapter)?;
        }
    }
    match parts.faults.len() {
        0 => writeln!(text, "no faults")?,
        n => writeln!(text, "{n} {}", if n == 1 { "fault" } else { "faults" })?,
    }
    for fault in &parts.faults {
        writeln!(text, "  {}", fault.replace('\n', "\n    "))?;
    }
    Ok(text)
}

fn describe_weights(text: &mut String, weights: &Weights) -> fmt::Result {
    let spec = weights.spec();
    writeln!(
        text,
        "model       gpt2: {} layers of {} heads, width {}, inner width {}, context {}, vocabulary {}",
        spec.layers, spec.heads, spec.width, spec.inner, spec.context, spec.vocab
    )?;
    write!(text, "parameters  {}", grouped(spec.parameters()))?;
    if let Some(moe) = &spec.moe {
        writeln!(text, ", {} of them active for a token", grouped(spec.active_parameters()))?;
        let layers: Vec<String> = moe.layers.iter().map(usize::to_string).collect();
        let (count, top_k, gate) = (moe.experts, moe.top_k, moe.gate.name());
        write!(text, "experts     {count} in layers {}, top {top_k}", layers.join(", "))?;
        write!(text, ", chosen by a {gate} gate")?;
        if moe.gate.knows_tasks() {
            write!(text, " over {}", spec.tasks.join(", "))?;
        }
    }
    writeln!(text)?;
    let (dtype, bytes) = (weights.dtype().as_str(), grouped(weights.bytes()));
    writeln!(text, "weights     {bytes} bytes, {dtype}")
}

fn describe_tokenizer(text: &mut String, tokenizer: &Tokenizer) -> fmt::Result {
    let size = tokenizer.vocab_size();
    let special = (0..size as u32).filter(|&id| tokenizer.is_special(id)).count();
    writeln!(text, "tokenizer   {size} tokens, {special} of them special")
}

fn describe_task(text: &mut String, task: &Task) -> fmt::Result {
    writeln!(text, "  {:<9} {}", task.name, task.description)?;
    for (name, control) in &task.controls {
        let default = control.default.as_deref().unwrap_or("none");
        writeln!(text, "  {:<9} {name}: {} (default {default})", "", control.kind.allowed())?;
    }
    if let Some(adapter) = &task.adapter {
        writeln!(text, "  {:<9} adapter: {adapter}", "")?;
    }
    Ok(())
}

fn describe_adapter(text: &mut String, name: &str, adapter: &Loaded) -> fmt::Result {
    let modules: Vec<&str> = adapter.modules().into_iter().map(Module::name).collect();
    let (kind, bytes) = (adapter.kind.name(), grouped(adapter.bytes));
    let modules = modules.join(", ");
    writeln!(text, "  {name:<9} {kind} of rank {}, {bytes} bytes, on {modules}", adapter.rank)?;
    if !adapter.tasks.is_empty() {
        writeln!(text, "  {:<9} tasks: {}", "", adapter.tasks.join(", "))?;
    }
    Ok(())
}

/// 1234567 as 1 234 567.
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).unwrap_or_default())
        .collect();
    groups.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1 234 567");
    }
}
