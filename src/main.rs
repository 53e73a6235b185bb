//! The command line: arguments to a configuration, to one of the commands, to an exit code.
//!
//! The only exit codes: 0 done, 1 failed, 64 the arguments or the configuration are wrong, 70 the
//! engine failed.

mod cli;

use clap::{CommandFactory, FromArgMatches, Parser};
use cli::{Outcome, check, generate, inspect, serve};
use shoal::config::{self, Stop};
use shoal::{bench, eval, train};
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 64;
const ENGINE_FAILED: u8 = 70;

/// Makes, serves and measures small multitask language models.
#[derive(Parser)]
#[command(name = "shoal", version)]
enum Cli {
    /// Serve a bundle over HTTP
    Serve(Box<config::Serve>),
    /// Write a text to the terminal
    Generate(generate::Generate),
    /// Make a model
    Train(train::TrainArgs),
    /// Say what a bundle is, and everything that is wrong with it
    Check(check::Check),
    /// Show which experts and adapters work for which task
    Inspect(inspect::Inspect),
    /// Measure what a bundle is worth
    Eval(eval::Args),
    /// Measure a server under load
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    let parsed = config::resolve(Cli::command(), &argv, &config::environment());
    let cli = parsed.and_then(|matches| {
        Cli::from_arg_matches(&matches).map_err(|e| Stop::Faults(vec![e.to_string()]))
    });
    let code = match cli {
        Ok(cli) => match run(cli) {
            Ok(Outcome::Done) => DONE,
            Ok(Outcome::Failed) => FAILED,
            Ok(Outcome::EngineFailed) => ENGINE_FAILED,
            Err(error) => {
                eprintln!("shoal: {error:#}");
                FAILED
            }
        },
        Err(Stop::Say(text)) => {
            // Whoever closed the pipe has read enough.
            let _ = std::io::stdout().write_all(text.as_bytes());
            DONE
        }
        Err(Stop::Faults(faults)) => {
            for fault in faults {
                eprintln!("shoal: {fault}");
            }
            USAGE
        }
    };
    ExitCode::from(code)
}

fn run(cli: Cli) -> anyhow::Result<Outcome> {
    match cli {
        Cli::Serve(args) => serve::run(&args),
        Cli::Generate(args) => generate::run(&args),
        Cli::Train(args) => train::run_cli(args).map(|()| Outcome::Done),
        Cli::Check(args) => check::run(&args),
        Cli::Inspect(args) => inspect::run(&args),
        Cli::Eval(args) => eval::run(&args).map(|_| Outcome::Done),
        Cli::Bench(args) if args.make.make_bundle.is_some() => {
            bench::bundle::make(&args.make)?;
            Ok(Outcome::Done)
        }
        Cli::Bench(args) => {
            let report = bench::run(&args)?;
            let mut totals = report.runs.iter().filter_map(|run| run.total());
            let unanswered = totals.any(|all| all.failed() == all.requests);
            Ok(if unanswered { Outcome::Failed } else { Outcome::Done })
        }
    }
}
