//! Readers of training data: JSON Lines, plain or zstd-compressed, in the three row shapes that
//! Shoal knows. Owns the held-out split, which goes by intent or by document and never by row.

use super::passages::count_words;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// One row of a data file.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// `{"text"}`: a document, or a piece of one.
    Text {
        /// The text.
        text: String,
        /// The book or article that it is of.
        source: Option<String>,
    },
    /// `{"task", "input", "output"}`, optionally with an instruction.
    Pair(Pair),
    /// `{"task", "intent", "prompts"}`: one intent and several outputs for it.
    Prompts {
        /// As the file calls it.
        task: String,
        /// What a user would type.
        intent: String,
        /// What the task makes of it.
        prompts: Vec<String>,
    },
}

/// An example of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// As the file calls it; empty if it does not.
    pub task: String,
    /// What is to be done, in words; may be empty.
    pub instruction: String,
    /// What it is to be done with; may be empty.
    pub input: String,
    /// The result.
    pub output: String,
    /// The split that the file itself names.
    pub split: Option<Split>,
    /// The source of the text that it was made from by rule.
    pub derived_from: Option<String>,
}

/// Ends the `source` of a row that was made from another's text.
const DERIVED: &str = " (derived)";

/// Which side of the split a row is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Trained on.
    Train,
    /// Held out.
    #[serde(alias = "validation")]
    Valid,
    /// Held out.
    Test,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    task: Option<String>,
    #[serde(default)]
    instruction: String,
    #[serde(default)]
    input: String,
    output: Option<String>,
    intent: Option<String>,
    prompts: Option<Vec<String>>,
    text: Option<String>,
    split: Option<Split>,
    #[serde(default)]
    controls: BTreeMap<String, serde_json::Value>,
    #[serde(rename = "topic")]
    _topic: Option<String>,
    #[serde(rename = "title")]
    _title: Option<String>,
    source: Option<String>,
    #[serde(rename = "licence")]
    _licence: Option<String>,
}

impl Row {
    fn from_json(line: &str) -> Result<Self> {
        let raw: Raw = serde_json::from_str(line)?;
        let filled = |name: &str, value: &str| {
            if value.trim().is_empty() { bail!("{name} is empty") } else { Ok(()) }
        };
        honour(&raw.controls, raw.output.as_deref())?;
        Ok(match (raw.text, raw.task, raw.output, raw.intent, raw.prompts) {
            (Some(text), None, None, None, None) => {
                filled("text", &text)?;
                Self::Text { text, source: raw.source }
            }
            (None, task, Some(output), None, None) => {
                filled("output", &output)?;
                let task = task.unwrap_or_default();
                let (instruction, input, split) = (raw.instruction, raw.input, raw.split);
                let source = raw.source.as_deref().and_then(|s| s.strip_suffix(DERIVED));
                let derived_from = source.map(str::to_owned);
                Self::Pair(Pair { task, instruction, input, output, split, derived_from })
            }
            (None, Some(task), None, Some(intent), Some(prompts)) => {
                filled("intent", &intent)?;
                for prompt in &prompts {
                    filled("a prompt", prompt)?;
                }
                Self::Prompts { task, intent, prompts }
            }
            _ => bail!(
                "a row is {{\"text\"}}, {{\"task\", \"input\", \"output\"}} or {{\"task\", \"intent\", \"prompts\"}}"
            ),
        })
    }

    /// What the split goes by: rows of one key are on one side. A document and what was made from it
    /// have its source as their key.
    pub fn key(&self) -> &str {
        match self {
            Self::Text { source: Some(source), .. } => source,
            Self::Text { text, .. } => text,
            Self::Pair(Pair { derived_from: Some(source), .. }) => source,
            Self::Pair(p) if p.input.trim().is_empty() => &p.instruction,
            Self::Pair(p) => &p.input,
            Self::Prompts { intent, .. } => intent,
        }
    }

    /// Whether this row is never trained on.
    pub fn is_held_out(&self, fraction: f64) -> bool {
        match self {
            Self::Pair(Pair { split: Some(split), .. }) => *split != Split::Train,
            _ => is_held_out(self.key(), fraction),
        }
    }
}

/// Refuses controls that are not what training measures of the output itself.
fn honour(controls: &BTreeMap<String, serde_json::Value>, output: Option<&str>) -> Result<()> {
    let words = output.map(count_words);
    for (name, value) in controls {
        match (name.as_str(), words) {
            ("words", Some(words)) if *value == words => {}
            ("words", Some(words)) => bail!("controls.words is {value}; the output has {words}"),
            ("words", None) => bail!("controls.words is for a row with an output"),
            _ => bail!("controls.{name} is not trained; allowed: words"),
        }
    }
    Ok(())
}

/// Whether what belongs to `key` (an intent, whatever its case and spacing) is held out. The same for
/// all time: it depends on nothing but the two arguments.
pub fn is_held_out(key: &str, fraction: f64) -> bool {
    let words: Vec<String> = key.split_whitespace().map(str::to_lowercase).collect();
    let digest = Sha256::digest(words.join(" ").as_bytes());
    let mut head = [0; 8];
    head.copy_from_slice(&digest[..8]);
    (u64::from_be_bytes(head) as f64) < fraction * 2f64.powi(64)
}

/// Calls `each` with the rows of a file, at most `max_rows`; an error names the file and the line.
pub fn read_rows(
    path: &Path,
    max_rows: Option<usize>,
    mut each: impl FnMut(Row) -> Result<()>,
) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let bytes: Box<dyn Read> = if path.extension().is_some_and(|e| e == "zst") {
        let decoder = ruzstd::decoding::StreamingDecoder::new(BufReader::new(file));
        Box::new(decoder.with_context(|| format!("{} is not zstd", path.display()))?)
    } else {
        Box::new(file)
    };
    let lines = BufReader::with_capacity(1 << 20, bytes).lines();
    for (i, line) in lines.take(max_rows.unwrap_or(usize::MAX)).enumerate() {
        let at = || format!("{}, line {}", path.display(), i + 1);
        let line = line.with_context(at)?;
        Row::from_json(&line).and_then(&mut each).with_context(at)?;
    }
    Ok(())
}

/// Hexadecimal SHA-256 of a file.
pub fn sha256_of(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hex(&hash.finalize()))
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
