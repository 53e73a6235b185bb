//! `shoal eval BUNDLE`: what a bundle is worth, measured on intents that it was not trained on.
//!
//! Owns the figures of a model card: loss of the teacher's prompts, length control, coverage of the
//! intent, variety, and samples that nobody chose. Runs the model through the engine that serves it,
//! with each task's own defaults. Invariant: the same bundle, data and options give the same requests
//! (lengths and seeds follow from the intent alone), so two bundles are asked the same.

pub mod intents;
pub mod metrics;
pub mod model;
pub mod report;

#[cfg(test)]
mod tests;

use crate::config::DEFAULT_BUNDLE;
use crate::task::Task;
use crate::telemetry;
use crate::train::draws::Draws;
use crate::train::passages::{count_words, coverage};
use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use intents::Intent;
use model::{Model, Outcome};
use report::{Loss, Measured, Report, Samples, Text};
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// Lengths that are asked for, each as often as the others.
const LENGTHS: RangeInclusive<usize> = 5..=40;

/// Which intents are measured on.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Those that training never saw
    HeldOut,
    /// Those that it did, for comparison
    Train,
}

/// What to measure.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The bundle's folder
    #[arg(default_value = DEFAULT_BUNDLE)]
    pub bundle: PathBuf,
    /// Which intents to measure on
    #[arg(long, value_enum, default_value = "held-out")]
    pub split: Split,
    /// Measure on these data only, of those that the bundle's train.toml names [default: all with intents]
    #[arg(long, value_name = "NAME")]
    pub set: Option<String>,
    /// Folder of the data files that the bundle's train.toml names [default: the bundle's data/]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Measure on so many intents per task [default: all]
    #[arg(long, value_name = "N")]
    pub intents: Option<usize>,
    /// Generate so many prompts per intent, each of another length
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub lengths: usize,
    /// Show so many samples per task
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub samples: usize,
    /// Seed of lengths and sampling
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Write the report here as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Put the figures into this model card, between its two `<!-- figures -->` lines
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
}

/// Measures as `args` say, prints the table and writes the files.
pub fn run(args: &Args) -> Result<Report> {
    telemetry::init("warn", false).map_err(anyhow::Error::msg)?;
    let report = measure(args)?;
    println!("{report}");
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.markdown {
        report.write_markdown(path)?;
    }
    Ok(report)
}

/// Measures as `args` say.
pub fn measure(args: &Args) -> Result<Report> {
    ensure!(args.lengths > 0, "--lengths must be above 0");
    ensure!(args.intents != Some(0), "--intents must be above 0");
    let held_out = args.split == Split::HeldOut;
    let (data, set) = (args.data.as_deref(), args.set.as_deref());
    let intents = intents::read(&args.bundle, data, set, held_out)?;
    let model = Model::load(&args.bundle)?;
    let (mut rows, mut samples, mut all) = (Vec::new(), Vec::new(), Measured::default());
    for (name, list) in &intents.by_task {
        let task = model.tasks.find(name);
        let task = task.with_context(|| format!("the bundle has no task {name}"))?;
        let list = &list[..args.intents.unwrap_or(list.len()).min(list.len())];
        let measured = measure_task(&model, task, list, args)?;
        rows.push(measured.figures(name));
        let first = measured.texts.iter().step_by(args.lengths).take(args.samples);
        samples.push(Samples { task: name.clone(), texts: first.cloned().collect() });
        all.extend(&measured);
    }
    rows.push(all.figures("all"));
    Ok(Report {
        shoal: env!("CARGO_PKG_VERSION"),
        bundle: args.bundle.display().to_string(),
        split: if held_out { "held-out" } else { "train" },
        held_out_fraction: intents.held_out_fraction,
        parameters: model.parameters,
        seed: args.seed,
        rows,
        samples,
    })
}

fn measure_task(model: &Model, task: &Task, intents: &[Intent], args: &Args) -> Result<Measured> {
    let mut measured = Measured { intents: intents.len(), ..Measured::default() };
    score(model, task, intents, &mut measured)?;
    generate(model, task, intents, args, &mut measured)?;
    Ok(measured)
}

/// The loss of the teacher's prompts in the layout that training used: each is asked for with its own
/// length. Those that do not fit into the context are left out, as in training.
fn score(model: &Model, task: &Task, intents: &[Intent], measured: &mut Measured) -> Result<()> {
    let (mut jobs, mut outputs_from) = (Vec::new(), Vec::new());
    for intent in intents {
        for output in &intent.prompts {
            measured.teacher.push(coverage(&intent.text, output));
            let words = Some(count_words(output)).filter(|&n| accepts(task, n));
            let prompt = model.prompt(task, &intent.text, words)?;
            let from = prompt.len();
            if let Some(job) = model.scoring(task, prompt, output)? {
                jobs.push(job);
                outputs_from.push(from);
            }
        }
    }
    let bar = progress(&format!("{}: loss", task.name), jobs.len());
    model.run(jobs, |i, outcome| {
        let scores = outcome.prompt.iter().skip(outputs_from[i]).flatten();
        let nats: f64 = scores.clone().map(|s| -f64::from(s.logprob)).sum();
        let Loss { nats: sum, tokens } = measured.loss;
        measured.loss = Loss { nats: sum + nats, tokens: tokens + scores.count() };
        bar.inc(1);
    })
}

/// Prompts of random lengths for every intent.
fn generate(
    model: &Model,
    task: &Task,
    intents: &[Intent],
    args: &Args,
    measured: &mut Measured,
) -> Result<()> {
    let (mut jobs, mut asked) = (Vec::new(), Vec::new());
    for intent in intents {
        for turn in 0..args.lengths as u64 {
            let mut draws = Draws::at(&[args.seed, intent.hash, turn]);
            let words = LENGTHS.start() + draws.below(LENGTHS.count());
            let words = Some(words).filter(|&n| accepts(task, n));
            let prompt = model.prompt(task, &intent.text, words)?;
            jobs.push(model.job(task, prompt, draws.next_u64())?);
            asked.push((&intent.text, words));
        }
    }
    let bar = progress(&format!("{}: prompts", task.name), jobs.len());
    model.run(jobs, |i, Outcome { text, cut, .. }| {
        let (intent, asked) = asked[i];
        measured.texts.push(Text {
            intent: intent.clone(),
            asked,
            words: count_words(&text),
            coverage: coverage(intent, &text),
            cut,
            text,
        });
        bar.inc(1);
    })
}

/// Whether the task can be asked for this many words.
fn accepts(task: &Task, words: usize) -> bool {
    let control = task.controls.get("words");
    control.is_some_and(|c| c.kind.values().contains(&words.to_string()))
}

fn progress(what: &str, jobs: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:20} {bar:30} {pos}/{len} {eta}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(jobs as u64).with_style(style).with_message(what.to_owned())
}
