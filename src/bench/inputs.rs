//! What the load asks for: one short intent per request, from a file or from the lists here.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Intents of one task, or of any task under [`ANY`].
pub type Inputs = BTreeMap<String, Vec<String>>;

/// The key of inputs that fit every task.
pub const ANY: &str = "";

/// Lengths vary as people's do, so that prompts do too.
const BUILT_IN: [(&str, &[&str]); 7] = [
    (
        "image",
        &[
            "a fox in snow",
            "old lighthouse at dusk, oil painting",
            "street market in the rain, neon lights",
            "portrait of a beekeeper",
            "a paper boat crossing a puddle, macro photo, soft morning light",
            "mountain hut in winter",
        ],
    ),
    (
        "template",
        &[
            "bakery opening flyer",
            "wedding invitation with olive branches",
            "menu for a small noodle bar, one page, two colours",
            "yoga class poster",
            "business card for a piano tuner",
            "garden fair banner",
        ],
    ),
    (
        "video",
        &[
            "a kite over a beach",
            "train leaving a snowy station at night",
            "time lapse of bread rising in an oven, warm light",
            "surfer under a wave",
            "drone flight along a river canyon",
            "a cat watching rain",
        ],
    ),
    (
        "writing",
        &[
            "a letter to my future self",
            "short story about a lost umbrella",
            "toast for a retiring teacher, funny but kind, two minutes",
            "haiku about first frost",
            "product text for a wooden desk lamp",
            "apology to a neighbour",
        ],
    ),
    (
        "music",
        &[
            "calm piano for reading",
            "upbeat funk for a cooking show",
            "lullaby with harp and soft choir, slow, in three four time",
            "dark synth for a chase",
            "acoustic guitar by a campfire",
            "festive brass march",
        ],
    ),
    (
        "assistant",
        &[
            "plan a week of dinners",
            "explain compound interest",
            "compare three bicycles for commuting in a hilly town, cheap and light",
            "learn to whistle",
            "write a polite reminder",
            "pack for a weekend hike",
        ],
    ),
    (
        ANY,
        &[
            "The best thing about autumn is",
            "On the first morning of the journey",
            "To repair a bicycle tyre you need",
            "The old house at the end of the street had always",
        ],
    ),
];

/// The lists that come with Shoal.
pub fn built_in() -> Inputs {
    let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect();
    BUILT_IN.iter().map(|(task, list)| ((*task).to_owned(), owned(list))).collect()
}

/// One line of a `.jsonl` file: Shoal's training data fits, and so does a plain string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Text(String),
    Example {
        #[serde(default)]
        task: String,
        #[serde(alias = "intent", alias = "prompt", alias = "text")]
        input: String,
    },
}

/// Reads inputs, one a line: plain text, or in a `.jsonl` file a JSON string or an object with
/// `input` (or `intent`, `prompt`, `text`) and perhaps `task`.
pub fn read(path: &Path) -> Result<Inputs> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the inputs {}", path.display()))?;
    let is_json = path.extension().is_some_and(|e| e == "jsonl");
    let mut inputs = Inputs::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let (task, input) = if is_json {
            let parsed = serde_json::from_str(line);
            match parsed.with_context(|| format!("{} line {}", path.display(), i + 1))? {
                Line::Text(input) => (ANY.to_owned(), input),
                Line::Example { task, input } => (task, input),
            }
        } else {
            (ANY.to_owned(), line.to_owned())
        };
        inputs.entry(task).or_default().push(input);
    }
    if inputs.is_empty() {
        bail!("{} has no inputs", path.display());
    }
    Ok(inputs)
}

/// The inputs for `task`: its own, else those that fit every task.
pub fn of_task<'a>(inputs: &'a Inputs, task: &str) -> Result<&'a [String]> {
    let found = inputs.get(task).or_else(|| inputs.get(ANY));
    found.map(Vec::as_slice).with_context(|| format!("no inputs for the task {task}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &str) -> Result<Inputs> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn lines_are_inputs_for_every_task() {
        let inputs = file("a.txt", "a fox\n\n{\"not\": \"json\"}\n").unwrap();
        assert_eq!(of_task(&inputs, "image").unwrap(), ["a fox", "{\"not\": \"json\"}"]);
    }

    #[test]
    fn jsonl_takes_strings_and_training_examples() {
        let text = "\"plain\"\n{\"task\": \"image\", \"intent\": \"a fox\", \"prompts\": []}\n";
        let inputs = file("a.jsonl", text).unwrap();
        assert_eq!(of_task(&inputs, "image").unwrap(), ["a fox"]);
        assert_eq!(of_task(&inputs, "video").unwrap(), ["plain"]);
    }

    #[test]
    fn faults_name_the_line() {
        let fault = file("a.jsonl", "\"fine\"\n{\"task\": 1}\n").unwrap_err();
        assert!(fault.to_string().ends_with("a.jsonl line 2"), "{fault}");
        assert!(file("a.txt", "\n").unwrap_err().to_string().ends_with("has no inputs"));
        let only_image = file("a.jsonl", "{\"task\": \"image\", \"input\": \"x\"}").unwrap();
        assert!(of_task(&only_image, "music").is_err());
    }
}
