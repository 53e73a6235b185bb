//! What a run says of itself: a progress bar (plain lines where there is no terminal), a JSONL log of
//! losses, and a picture of their curve.

use super::checkpoint::replace;
use anyhow::{Context, Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

/// File name of the log in the output folder.
pub const LOG: &str = "log.jsonl";
/// File name of the loss curve in the output folder.
pub const CURVE: &str = "loss.svg";

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Entry {
    /// An optimiser step.
    Step {
        /// Steps done in all stages.
        total_steps: u64,
        /// Name of the stage.
        stage: String,
        /// Steps done in it.
        step: u64,
        /// Mean training loss of the step, in nats a token.
        loss: f64,
        /// Learning rate.
        lr: f64,
        /// Norm of the gradient before clipping.
        grad_norm: f64,
        /// Tokens seen in all stages.
        total_tokens: u64,
        /// Speed of this step.
        tokens_per_second: f64,
    },
    /// An evaluation on held-out data.
    HeldOut {
        /// Steps done in all stages.
        total_steps: u64,
        /// Name of the stage.
        stage: String,
        /// Mean loss of each part of the mix, in nats a token.
        losses: BTreeMap<String, f64>,
    },
}

impl Entry {
    fn total_steps(&self) -> u64 {
        match self {
            Self::Step { total_steps, .. } | Self::HeldOut { total_steps, .. } => *total_steps,
        }
    }
}

/// Writes the log, the bar and the curve of one run.
pub struct Report {
    dir: PathBuf,
    log: File,
    entries: Vec<Entry>,
    bar: ProgressBar,
    plain: bool,
}

impl Report {
    /// Goes on with the log in `dir` after `total_steps`; later lines are of a run that was lost.
    pub fn open(dir: &Path, total_steps: u64, total_tokens: u64) -> Result<Self> {
        let path = dir.join(LOG);
        let mut entries = if total_steps > 0 && path.exists() { read(&path)? } else { Vec::new() };
        entries.retain(|e| e.total_steps() <= total_steps);
        let lines: Result<Vec<_>, _> = entries.iter().map(serde_json::to_string).collect();
        let kept: String = lines?.into_iter().map(|line| line + "\n").collect();
        replace(&path, kept.as_bytes())?;
        let log = OpenOptions::new().append(true).open(&path);
        let log = log.with_context(|| format!("cannot write {}", path.display()))?;
        let bar = ProgressBar::new(total_tokens);
        bar.set_style(ProgressStyle::with_template(
            "{msg} {wide_bar} {pos}/{len} tokens, {per_sec}, {eta} left",
        )?);
        let plain = !std::io::stderr().is_terminal();
        Ok(Self { dir: dir.to_owned(), log, entries, bar, plain })
    }

    /// Says something above the bar.
    pub fn say(&self, line: &str) {
        if self.plain {
            eprintln!("{line}");
        } else {
            self.bar.println(line);
        }
    }

    /// Notes a step or an evaluation.
    pub fn note(&mut self, entry: Entry) -> Result<()> {
        writeln!(self.log, "{}", serde_json::to_string(&entry)?)?;
        match &entry {
            Entry::Step {
                total_steps,
                stage,
                loss,
                lr,
                total_tokens,
                tokens_per_second,
                step,
                ..
            } => {
                self.bar.set_position(*total_tokens);
                self.bar.set_message(format!("{stage} {step} loss {loss:.3}"));
                if self.plain && total_steps % 10 == 0 {
                    let left = self.bar.length().unwrap_or(0).saturating_sub(*total_tokens) as f64;
                    let minutes = left / tokens_per_second / 60.0;
                    eprintln!(
                        "{stage} step {step}: loss {loss:.3}, lr {lr:.2e}, {tokens_per_second:.0} tokens/s, {minutes:.0} min left"
                    );
                }
            }
            Entry::HeldOut { stage, losses, .. } => {
                let parts: Vec<_> = losses.iter().map(|(n, l)| format!("{n} {l:.3}")).collect();
                self.say(&format!("{stage} held out: {}", parts.join(", ")));
            }
        }
        self.entries.push(entry);
        Ok(())
    }

    /// Draws the curve of everything noted so far.
    pub fn draw(&self) -> Result<()> {
        draw(&self.entries, &self.dir.join(CURVE)).map_err(|e| anyhow!("loss curve: {e}"))
    }

    /// Ends the bar.
    pub fn finish(&self) {
        self.bar.finish();
    }
}

/// The entries of a log. Its last line may be cut short, by a crash after the last checkpoint.
fn read(path: &Path) -> Result<Vec<Entry>> {
    let at = || format!("cannot read {}", path.display());
    let bytes = fs::read(path).with_context(at)?;
    let lines: Vec<&[u8]> = bytes.split(|&b| b == b'\n').filter(|l| !l.is_empty()).collect();
    let mut entries = Vec::with_capacity(lines.len());
    for (i, line) in lines.iter().enumerate() {
        match serde_json::from_slice(line) {
            Ok(entry) => entries.push(entry),
            Err(_) if i + 1 == lines.len() => {}
            Err(e) => {
                return Err(e).with_context(|| format!("line {}", i + 1)).with_context(at);
            }
        }
    }
    Ok(entries)
}

type Curve = Vec<(f64, f64)>;

/// Training loss (smoothed) and the held-out losses by name, over steps.
fn curves(entries: &[Entry]) -> BTreeMap<String, Curve> {
    let mut curves: BTreeMap<String, Curve> = BTreeMap::new();
    let mut smooth: Option<(String, f64)> = None;
    for entry in entries {
        let x = entry.total_steps() as f64;
        match entry {
            Entry::Step { stage, loss, .. } => {
                let mean = match &smooth {
                    Some((of, mean)) if of == stage => 0.95 * mean + 0.05 * loss,
                    _ => *loss,
                };
                smooth = Some((stage.clone(), mean));
                curves.entry(format!("{stage}: training")).or_default().push((x, mean));
            }
            Entry::HeldOut { losses, .. } => {
                for (name, loss) in losses {
                    curves.entry(format!("held out: {name}")).or_default().push((x, *loss));
                }
            }
        }
    }
    curves
}

fn draw(entries: &[Entry], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let curves = curves(entries);
    let points = || curves.values().flatten();
    let right = points().map(|p| p.0).fold(1.0, f64::max);
    let top = points().map(|p| p.1).fold(1.0, f64::max);
    let area = SVGBackend::new(path, (960, 540)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..right, 0.0..top)?;
    chart.configure_mesh().x_desc("steps").y_desc("loss, nats a token").draw()?;
    for (i, (name, curve)) in curves.into_iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(curve, &colour))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}
