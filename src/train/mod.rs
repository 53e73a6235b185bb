//! Training: from a recipe and data to a bundle.
//!
//! Reading order: [`recipe`] (what is wanted), [`data`] and [`sources`] (rows to sequences),
//! [`objective`] (what is learnt of an example), [`run`] (the loop), [`export`] (the bundle). Training
//! runs the decoder that serves ([`crate::model::Decoder`]) over differentiable operations
//! ([`crate::kernels::Ops`]); nothing here knows requests or sockets.

pub mod batch;
pub mod checkpoint;
pub mod data;
pub mod draws;
pub mod export;
pub mod objective;
pub mod params;
pub mod passages;
pub mod recipe;
pub mod report;
pub mod run;
pub mod signals;
pub mod sources;
pub mod tokenizer;

use anyhow::Result;
use clap::Args;
use run::{Job, Outcome};
use std::path::PathBuf;
use std::time::Duration;

/// `shoal train`.
#[derive(Args, Clone, Debug)]
pub struct TrainArgs {
    /// The recipe (train.toml)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Folder of the public data files that the recipe names
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Folder for the checkpoint, the log, the loss curve and the finished bundle; a run that was
    /// stopped goes on from its checkpoint
    #[arg(long, value_name = "DIR", default_value = "out")]
    pub out: PathBuf,
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
    let max_time = args.max_minutes.map(|minutes| Duration::try_from_secs_f64(minutes * 60.0));
    let job = Job {
        recipe: args.config,
        data: args.data,
        out: args.out,
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
