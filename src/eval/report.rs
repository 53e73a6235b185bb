//! What `shoal eval` says: a table for people, JSON for programs, and the figures of a model card.

use super::metrics::{LengthControl, distinct, mean};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::fmt::{self, Write as _};
use std::path::Path;

/// What stands before and after the figures in a model card.
const MARKS: [&str; 2] = ["<!-- figures: begin -->", "<!-- figures: end -->"];

/// One evaluation.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of Shoal.
    pub shoal: &'static str,
    /// The bundle's folder.
    pub bundle: String,
    /// `held-out` or `train`.
    pub split: &'static str,
    /// Share of intents that the recipe holds out.
    pub held_out_fraction: f64,
    /// Parameters of the model.
    pub parameters: usize,
    /// Seed of wanted lengths and of sampling.
    pub seed: u64,
    /// One row per task, then `all`: the same figures over everything together.
    pub rows: Vec<Figures>,
    /// Samples by task, in the order of the rows; nobody chose them.
    pub samples: Vec<Samples>,
}

/// Samples of one task.
#[derive(Clone, Debug, Serialize)]
pub struct Samples {
    /// The task.
    pub task: String,
    /// Of its first intents, in the order of their hashes.
    pub texts: Vec<Text>,
}

/// One generated prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Text {
    /// What it was asked for.
    pub intent: String,
    /// Words asked for; `None` if the task has no such control.
    pub asked: Option<usize>,
    /// Words given.
    pub words: usize,
    /// Share of the intent's content words in it.
    pub coverage: f64,
    /// Whether it ran into `max_tokens` or the context.
    pub cut: bool,
    /// The prompt.
    pub text: String,
}

/// The loss over some prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Summed negative log-likelihood, in nats.
    pub nats: f64,
    /// Tokens that count.
    pub tokens: usize,
}

/// What was measured of one task.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Number of intents.
    pub intents: usize,
    /// Of the teacher's prompts.
    pub loss: Loss,
    /// Coverage of each of the teacher's prompts.
    pub teacher: Vec<f64>,
    /// Everything that was generated.
    pub texts: Vec<Text>,
}

/// Figures of one task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// The task, or `all`.
    pub task: String,
    /// Intents measured on.
    pub intents: usize,
    /// Mean negative log-likelihood, in nats per token, of the teacher's prompts (what follows `<|gen|>`,
    /// end of text included), given their true length.
    pub loss: Option<f64>,
    /// Tokens that the loss counts.
    pub loss_tokens: usize,
    /// Prompts generated.
    pub generated: usize,
    /// Share of them that ran into a limit.
    pub cut: Option<f64>,
    /// Distinct-2 of them.
    pub distinct_2: Option<f64>,
    /// How well they keep the asked-for length.
    pub length: Option<LengthControl>,
    /// Mean share of the intent's content words in them.
    pub coverage: Option<f64>,
    /// The same for the teacher's prompts.
    pub teacher_coverage: Option<f64>,
}

impl Measured {
    /// Adds what was measured of another task.
    pub fn extend(&mut self, other: &Measured) {
        self.intents += other.intents;
        self.loss.nats += other.loss.nats;
        self.loss.tokens += other.loss.tokens;
        self.teacher.extend(&other.teacher);
        self.texts.extend(other.texts.iter().cloned());
    }

    /// The figures.
    pub fn figures(&self, task: &str) -> Figures {
        let lengths: Vec<_> = self.texts.iter().filter_map(|t| Some((t.asked?, t.words))).collect();
        let loss = &self.loss;
        Figures {
            task: task.to_owned(),
            intents: self.intents,
            loss: (loss.tokens > 0).then(|| loss.nats / loss.tokens as f64),
            loss_tokens: loss.tokens,
            generated: self.texts.len(),
            cut: mean(self.texts.iter().map(|t| f64::from(u8::from(t.cut)))),
            distinct_2: distinct(self.texts.iter().map(|t| t.text.as_str()), 2),
            length: LengthControl::of(&lengths),
            coverage: mean(self.texts.iter().map(|t| t.coverage)),
            teacher_coverage: mean(self.teacher.iter().copied()),
        }
    }
}

const HEAD: [&str; 10] = [
    "task",
    "intents",
    "loss",
    "generated",
    "distinct-2",
    "length MAE",
    "within 2",
    "Spearman",
    "coverage",
    "teacher's",
];

impl Figures {
    fn cells(&self) -> [String; 10] {
        let number = |value: Option<f64>, decimals: usize| {
            value.map_or_else(|| "-".to_owned(), |v| format!("{v:.decimals$}"))
        };
        let share = |value: Option<f64>| {
            value.map_or_else(|| "-".to_owned(), |v| format!("{:.1}%", v * 100.0))
        };
        [
            self.task.clone(),
            self.intents.to_string(),
            number(self.loss, 3),
            self.generated.to_string(),
            number(self.distinct_2, 3),
            number(self.length.map(|l| l.mean_absolute_error), 2),
            share(self.length.map(|l| l.within_2)),
            number(self.length.and_then(|l| l.spearman), 3),
            share(self.coverage),
            share(self.teacher_coverage),
        ]
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bundle, parameters, split, held_out_fraction, .. } = self;
        writeln!(f, "{bundle}: {:.1}M parameters, {split} intents", *parameters as f64 / 1e6)?;
        writeln!(f, "(the recipe holds out {}% of intents)\n", held_out_fraction * 100.0)?;
        let rows: Vec<_> = self.rows.iter().map(Figures::cells).collect();
        let head = HEAD.map(str::to_owned);
        for row in [&head].into_iter().chain(&rows) {
            write!(f, "{:10}", row[0])?;
            row[1..].iter().try_for_each(|cell| write!(f, " {cell:>10}"))?;
            writeln!(f)?;
        }
        for samples in &self.samples {
            writeln!(f, "\n{}", samples.task)?;
            for text in &samples.texts {
                writeln!(f, "  {} [{}]", text.intent, text.lengths())?;
                writeln!(f, "    {}", text.text.replace('\n', "\n    "))?;
            }
        }
        Ok(())
    }
}

impl Text {
    /// `20 -> 21 words`.
    fn lengths(&self) -> String {
        let cut = if self.cut { ", cut" } else { "" };
        match self.asked {
            Some(asked) => format!("{asked} -> {} words{cut}", self.words),
            None => format!("{} words{cut}", self.words),
        }
    }
}

impl Report {
    /// The figures and samples as Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut out = line(&HEAD.map(str::to_owned));
        out += "|---|";
        out += &"---:|".repeat(HEAD.len() - 1);
        out += "\n";
        self.rows.iter().for_each(|row| out += &line(&row.cells()));
        for samples in &self.samples {
            let _ = write!(out, "\n#### {}\n\n", samples.task);
            for text in &samples.texts {
                let shown = text.text.split_whitespace().collect::<Vec<_>>().join(" ");
                let (intent, lengths) = (escape(&text.intent), text.lengths());
                let _ = writeln!(out, "- *{intent}* ({lengths}): {}", escape(&shown));
            }
        }
        out
    }

    /// Writes the Markdown into the model card at `path`, between its two marks.
    pub fn write_markdown(&self, path: &Path) -> Result<()> {
        let place = path.display();
        let card = std::fs::read_to_string(path).with_context(|| format!("cannot read {place}"))?;
        let [begin, end] = MARKS;
        let ends = card.find(begin).zip(card.find(end)).filter(|(b, e)| b < e);
        let Some((at, after)) = ends else { bail!("{place} has no lines {begin} and {end}") };
        let (head, tail) = (&card[..at + begin.len()], &card[after..]);
        std::fs::write(path, format!("{head}\n\n{}\n{tail}", self.markdown()))
            .with_context(|| format!("cannot write {place}"))
    }
}

/// Keeps a generated text from being read as Markdown or HTML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\\' | '*' | '_' | '`' | '<' | '[' | ']' | '|' | '#') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
