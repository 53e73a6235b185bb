//! The loop: stages of steps over packed batches, held-out evaluations, checkpoints.
//!
//! Invariant: what a run computes depends on the recipe, the data, the number of steps and the
//! processor's instruction set (which sets the order of sums) alone. Where it was stopped and resumed
//! leaves no trace.

use super::checkpoint::{self, Checkpoint, Position};
use super::data::{self, Row};
use super::export;
use super::learner::{Learn, Learner};
use super::objective::Sequence;
use super::params::{Params, learning_rate};
use super::recipe::{Recipe, Stage};
use super::report::{Entry, Report};
use super::signals;
use super::sources::{Maker, Mixer, Source, texts_of};
use super::tokenizer::{self, Codec};
use crate::model::Spec;
use crate::telemetry;
use anyhow::{Context, Result, ensure};
use candle_core::Device;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What to run and where.
#[derive(Clone, Debug)]
pub struct Job {
    /// The recipe's file; its folder's `data/` and `tasks/` belong to it.
    pub recipe: PathBuf,
    /// Where public data files are.
    pub data: Option<PathBuf>,
    /// Where the checkpoint, the log and, at the end, the bundle go.
    pub out: PathBuf,
    /// Stops with a checkpoint after this time.
    pub max_time: Option<Duration>,
    /// Whether SIGINT and SIGTERM stop it with a checkpoint.
    pub signals: bool,
    /// Goes on from a checkpoint of another recipe.
    pub accept_changed_recipe: bool,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All stages are done and the bundle is written.
    Finished,
    /// Time was up or a signal came: the same command goes on from here.
    Stopped,
}

/// One name's rows on both sides of the split.
#[derive(Default)]
struct Sides {
    training: Vec<Row>,
    held_out: Vec<Row>,
}

/// Data by name.
type Rows = BTreeMap<String, Sides>;

/// Runs a recipe from its start or from the checkpoint in the output folder.
pub fn run(job: &Job) -> Result<Outcome> {
    let recipe = Recipe::load(&job.recipe)?;
    let home = job.recipe.parent().unwrap_or(Path::new("."));
    let files = recipe.locate(job.data.as_deref(), &home.join("data"))?;
    std::fs::create_dir_all(&job.out)
        .with_context(|| format!("cannot create {}", job.out.display()))?;
    let rows = read_all(&recipe, &files)?;
    let resumed = load_checkpoint(job, &recipe)?;
    let tokenizer = job.out.join(export::TOKENIZER);
    if resumed.is_none() {
        make_tokenizer(&recipe, &rows, &tokenizer)?;
    }
    let codec = Codec::load(&tokenizer)?;
    let spec = spec_of(&recipe, &codec);
    let device = device()?;
    let (params, position) = match resumed {
        Some((tensors, position)) => {
            (Params::from_tensors(&spec.tensors(), &tensors, &device)?, position)
        }
        None => (Params::initial(&spec, recipe.seed, &device)?, Position::default()),
    };
    let position = Position { recipe: Some(recipe.fingerprint()?), ..position };
    let total: u64 = recipe.stages.iter().map(|s| s.steps * s.batch_tokens as u64).sum();
    let mut report = Report::open(&job.out, position.total_steps, total)?;
    // Only now is there something to save; before, a signal may end the process at once.
    let stop = match job.signals {
        true => signals::watch("stopping with a checkpoint after this step")?,
        false => Arc::default(),
    };
    report.say(&format!(
        "{}: {} parameters, {} entries in the vocabulary, about {total} tokens, from step {}",
        recipe.name,
        params.count(),
        spec.vocab,
        position.total_steps
    ));
    let learner = Learner::new(&spec, params, recipe.precision, &device)?;
    let mut run = Run { job, recipe: &recipe, rows, codec, learner, position, until: None, stop };
    run.until = job.max_time.map(|limit| telemetry::now() + limit);
    let outcome = run.stages(&mut report)?;
    report.draw()?;
    report.finish();
    if outcome == Outcome::Finished {
        export::export(
            &job.out.join("bundle"),
            &spec,
            &run.learner.params,
            &tokenizer,
            &job.recipe,
        )?;
    }
    Ok(outcome)
}

/// Writes a bundle from the checkpoint as it stands, without training.
pub fn export_checkpoint(job: &Job, to: &Path) -> Result<()> {
    let recipe = Recipe::load(&job.recipe)?;
    let (tensors, _) = load_checkpoint(job, &recipe)?
        .with_context(|| format!("there is no checkpoint in {}", job.out.display()))?;
    let tokenizer = job.out.join(export::TOKENIZER);
    let spec = spec_of(&recipe, &Codec::load(&tokenizer)?);
    let params = Params::from_tensors(&spec.tensors(), &tensors, &Device::Cpu)?;
    export::export(to, &spec, &params, &tokenizer, &job.recipe)
}

/// The checkpoint in the output folder, if there is one; it must be of this recipe.
fn load_checkpoint(job: &Job, recipe: &Recipe) -> Result<Option<Checkpoint>> {
    let resumed = checkpoint::load(&job.out)?;
    let own = recipe.fingerprint()?;
    let trained_by = resumed.as_ref().and_then(|(_, position)| position.recipe.as_ref());
    let same = trained_by.is_none_or(|trained_by| *trained_by == own);
    ensure!(
        same || job.accept_changed_recipe,
        "{} has changed since the checkpoint in {} in more than the steps of its stages: take the old \
         recipe or another --out, or go on all the same with --accept-changed-recipe",
        job.recipe.display(),
        job.out.display()
    );
    Ok(resumed)
}

#[cfg(feature = "cuda")]
pub(super) fn device() -> Result<Device> {
    Ok(Device::cuda_if_available(0)?)
}

#[cfg(not(feature = "cuda"))]
pub(super) fn device() -> Result<Device> {
    Ok(Device::Cpu)
}

fn spec_of(recipe: &Recipe, codec: &Codec) -> Spec {
    Spec {
        layers: recipe.model.layers,
        heads: recipe.model.heads,
        width: recipe.model.width,
        inner: 4 * recipe.model.width,
        context: recipe.model.context,
        vocab: codec.size(),
        eps: 1e-5,
        eos: vec![codec.end_of_text],
        tasks: recipe.task_names(),
        moe: None,
    }
}

fn read_all(recipe: &Recipe, files: &[PathBuf]) -> Result<Rows> {
    let mut rows = Rows::new();
    for (data, path) in recipe.data.iter().zip(files) {
        let held = rows.entry(data.name.clone()).or_default();
        data::read_rows(path, data.max_rows, |row| {
            let kept_out = row.is_held_out(recipe.held_out.fraction);
            if kept_out {
                held.held_out.push(row)
            } else {
                held.training.push(row)
            }
            Ok(())
        })?;
    }
    Ok(rows)
}

fn make_tokenizer(recipe: &Recipe, rows: &Rows, path: &Path) -> Result<()> {
    let limit = recipe.tokenizer.max_megabytes << 20;
    let texts = recipe.tokenizer.data.iter().flat_map(|name| {
        let mut bytes = 0;
        rows[name].training.iter().flat_map(texts_of).take_while(move |text| {
            bytes += text.len();
            bytes <= limit
        })
    });
    let trained = tokenizer::train(texts, &recipe.task_names(), recipe.tokenizer.size)?;
    tokenizer::save(&trained, path)
}

struct Run<'a> {
    job: &'a Job,
    recipe: &'a Recipe,
    rows: Rows,
    codec: Codec,
    learner: Learner,
    position: Position,
    until: Option<Instant>,
    stop: Arc<AtomicBool>,
}

impl Run<'_> {
    fn stages(&mut self, report: &mut Report) -> Result<Outcome> {
        let recipe = self.recipe;
        while let Some(stage) = recipe.stages.get(self.position.stage) {
            if self.stage(stage, report)? == Outcome::Stopped {
                return Ok(Outcome::Stopped);
            }
            let next = self.position.stage + 1;
            let done = std::mem::take(&mut self.position);
            self.position = Position { stage: next, step: 0, cursors: Vec::new(), ..done };
            self.save()?;
        }
        Ok(Outcome::Finished)
    }

    fn stage(&mut self, stage: &Stage, report: &mut Report) -> Result<Outcome> {
        let (mut mixer, held_out) = self.mix(stage)?;
        let mut saved = telemetry::now();
        while self.position.step < stage.steps {
            self.step(stage, &mut mixer, report)?;
            let last = self.position.step == stage.steps;
            if last || self.position.step.is_multiple_of(self.recipe.held_out.every) {
                self.evaluate(stage, &held_out, report)?;
            }
            if !last && self.must_stop() {
                self.save()?;
                return Ok(Outcome::Stopped);
            }
            if saved.elapsed().as_secs() >= self.recipe.checkpoint_seconds {
                self.save()?;
                saved = telemetry::now();
            }
        }
        Ok(Outcome::Finished)
    }

    fn must_stop(&self) -> bool {
        let late = self.until.is_some_and(|until| telemetry::now() >= until);
        late || self.stop.load(Ordering::Relaxed)
    }

    /// The stage's data: what it trains on, at the position, and the sequences it is measured on.
    fn mix(&self, stage: &Stage) -> Result<(Mixer, BTreeMap<String, Vec<Sequence>>)> {
        let mut training = Vec::new();
        let mut held_out = BTreeMap::new();
        let maker = Maker { dropout: 0.0, ..self.maker() };
        for part in &stage.mix {
            let sides = &self.rows[&part.data];
            training.push(Source::training(part, self.recipe, &sides.training, &self.codec)?);
            let kept = Source::held_out(part, self.recipe, &sides.held_out, &self.codec)?;
            let sample = kept.sample(&maker, self.recipe.held_out.tokens)?;
            if !sample.is_empty() {
                held_out.insert(kept.name, sample);
            }
        }
        let seed = self.recipe.seed.wrapping_add(1 + self.position.stage as u64);
        let cursors = self.position.cursors.clone();
        Ok((Mixer::new(training, cursors, self.recipe.model.context, seed)?, held_out))
    }

    fn maker(&self) -> Maker<'_> {
        Maker {
            codec: &self.codec,
            context: self.recipe.model.context,
            dropout: self.recipe.controls.dropout,
        }
    }

    fn step(&mut self, stage: &Stage, mixer: &mut Mixer, report: &mut Report) -> Result<()> {
        let started = telemetry::now();
        let sequences = mixer.take(&self.maker(), stage.batch_tokens)?;
        let tokens: usize = sequences.iter().map(Sequence::len).sum();
        let lr = learning_rate(stage, self.position.step);
        let number = self.position.total_steps as usize + 1;
        let constants = &self.recipe.optimizer;
        let (loss, grad_norm) =
            self.learner.step(&sequences, stage.micro_tokens, constants, lr, number)?;
        let seconds = started.elapsed().as_secs_f64();
        self.position.step += 1;
        self.position.total_steps += 1;
        self.position.total_tokens += tokens as u64;
        self.position.seconds += seconds;
        self.position.cursors = mixer.cursors().to_vec();
        report.note(Entry::Step {
            total_steps: self.position.total_steps,
            stage: stage.name.clone(),
            step: self.position.step,
            loss,
            lr,
            grad_norm,
            total_tokens: self.position.total_tokens,
            tokens_per_second: tokens as f64 / seconds,
        })
    }

    fn evaluate(
        &self,
        stage: &Stage,
        held_out: &BTreeMap<String, Vec<Sequence>>,
        report: &mut Report,
    ) -> Result<()> {
        let mut losses = BTreeMap::new();
        for (name, sequences) in held_out {
            losses.insert(name.clone(), self.learner.evaluate(sequences, stage.micro_tokens)?);
        }
        let total_steps = self.position.total_steps;
        report.note(Entry::HeldOut { total_steps, stage: stage.name.clone(), losses })?;
        report.draw()
    }

    fn save(&self) -> Result<()> {
        checkpoint::save(&self.job.out, &self.learner.params.state(), &self.position)
    }
}
