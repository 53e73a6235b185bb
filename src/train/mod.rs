//! Training: from a recipe and data to a bundle.
//!
//! Reading order: [`recipe`] (what is wanted), [`data`] and [`sources`] (rows to sequences),
//! [`objective`] (what is learnt of an example), [`learner`] (a step), [`run`] (the loop), [`export`] (the bundle), [`adapter`]
//! (a LoRA for one more task). Training runs the decoder that serves ([`crate::model::Decoder`]) over differentiable operations
//! ([`crate::kernels::Ops`]); nothing here knows requests or sockets.

pub mod adapter;
pub mod batch;
pub mod checkpoint;
pub mod data;
pub mod draws;
pub mod export;
pub mod learner;
pub mod objective;
pub mod params;
pub mod passages;
pub mod recipe;
pub mod report;
pub mod run;
pub mod signals;
pub mod sources;
pub mod tokenizer;

use anyhow::{Result, bail, ensure};
use clap::Args;
use run::{Job, Outcome};
use std::path::PathBuf;
use std::time::Duration;

/// `shoal train`: a model after a recipe, or an adapter for one task.
#[derive(Args, Clone, Debug)]
pub struct TrainArgs {
    /// The recipe (train.toml): of a model, or with an [adapter] section of an adapter
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Train an adapter for this task, from examples, and write its task file
    #[arg(long, value_name = "NAME")]
    pub task: Option<String>,
    /// The bundle whose model the adapter is for; it stays as it is
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// With --task, the examples (JSON Lines); else the folder of the public data that the recipe names
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Folder for the checkpoint, the log, the loss curve and the finished bundle [default: out]; of an
    /// adapter, the bundle that gets it [default: its base]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Rank of the adapter
    #[arg(long)]
    pub rank: Option<usize>,
    /// Times that the adapter's examples are gone through
    #[arg(long)]
    pub epochs: Option<u32>,
    /// The adapter's peak learning rate
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// One line for people about the adapter's task
    #[arg(long)]
    pub description: Option<String>,
    /// Stop with a checkpoint after so many minutes
    #[arg(long, value_name = "N")]
    pub max_minutes: Option<f64>,
    /// Go on from (or export) a checkpoint though the recipe has changed in more than its stages' steps
    #[arg(long)]
    pub accept_changed_recipe: bool,
    /// Do not train: write a bundle from the checkpoint as it stands
    #[arg(long, value_name = "DIR")]
    pub export: Option<PathBuf>,
}

/// Runs the command.
pub fn run_cli(args: TrainArgs) -> Result<()> {
    match (args.adapter()?, args.config.clone()) {
        (Some(recipe), _) => train_adapter(&args, &recipe),
        (None, Some(config)) => train_model(args, config),
        (None, None) => bail!("say what to train: --config FILE or --task NAME"),
    }
}

impl TrainArgs {
    /// The adapter that is asked for, if one is.
    fn adapter(&self) -> Result<Option<adapter::Recipe>> {
        let Some(task) = &self.task else {
            let of_task = [
                ("--base", self.base.is_some()),
                ("--rank", self.rank.is_some()),
                ("--epochs", self.epochs.is_some()),
                ("--learning-rate", self.learning_rate.is_some()),
                ("--description", self.description.is_some()),
            ];
            if let Some((flag, _)) = of_task.iter().find(|(_, given)| *given) {
                bail!("{flag} is for an adapter: it goes with --task");
            }
            return self.config.as_deref().map_or(Ok(None), adapter::Recipe::from_file);
        };
        ensure!(self.config.is_none(), "--task and --config: say one of them");
        let (Some(base), Some(data)) = (&self.base, &self.data) else {
            bail!("--task needs --base, the bundle to add to, and --data, a file of examples");
        };
        let usual = adapter::Settings::default();
        Ok(Some(adapter::Recipe {
            task: task.clone(),
            description: self.description.clone().unwrap_or_default(),
            base: base.clone(),
            data: vec![data.clone()],
            seed: 0,
            adapter: adapter::Settings {
                rank: self.rank.unwrap_or(usual.rank),
                epochs: self.epochs.unwrap_or(usual.epochs),
                learning_rate: self.learning_rate.unwrap_or(usual.learning_rate),
                ..usual
            },
        }))
    }
}

fn train_adapter(args: &TrainArgs, recipe: &adapter::Recipe) -> Result<()> {
    let of_model = [
        ("--max-minutes", args.max_minutes.is_some()),
        ("--accept-changed-recipe", args.accept_changed_recipe),
        ("--export", args.export.is_some()),
    ];
    if let Some((flag, _)) = of_model.iter().find(|(_, given)| *given) {
        bail!("{flag} is for a model: an adapter has no checkpoints");
    }
    let from_file = args.config.is_some() && args.data.is_some();
    ensure!(!from_file, "--data goes with --task: the recipe of an adapter names its data itself");
    let out = args.out.as_ref().unwrap_or(&recipe.base);
    let stop = signals::watch("stopping: nothing is written")?;
    let summary = adapter::run(recipe, out, &stop)?;
    if let (Some(before), Some(after)) = (summary.before, summary.after) {
        eprintln!("held-out loss {before:.3} before, {after:.3} with the adapter");
    }
    eprintln!("wrote {} and {}", summary.adapter.display(), summary.task.display());
    Ok(())
}

fn train_model(args: TrainArgs, recipe: PathBuf) -> Result<()> {
    let max_time = args.max_minutes.map(|minutes| Duration::try_from_secs_f64(minutes * 60.0));
    let job = Job {
        recipe,
        data: args.data,
        out: args.out.unwrap_or_else(|| "out".into()),
        max_time: max_time.transpose()?,
        signals: true,
        accept_changed_recipe: args.accept_changed_recipe,
    };
    if let Some(to) = args.export {
        return run::export_checkpoint(&job, &to);
    }
    let out = job.out.display();
    match run::run(&job)? {
        Outcome::Finished => eprintln!("finished: the bundle is {out}/bundle"),
        Outcome::Stopped => eprintln!("stopped: the same command goes on from {out}"),
    }
    Ok(())
}

#[cfg(test)]
mod tests;
