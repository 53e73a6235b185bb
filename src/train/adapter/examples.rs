//! A task's examples, laid out as its template will lay out requests.

use super::Recipe;
use crate::model::Spec;
use crate::train::data::{Row, read_rows};
use crate::train::draws::Draws;
use crate::train::objective::Sequence;
use crate::train::passages::count_words;
use crate::train::tokenizer::{Codec, GENERATE, WORDS};
use anyhow::{Result, bail, ensure};
use std::collections::BTreeSet;

/// The task token of examples whose own task the base has never heard of.
const OTHER_TASK: &str = "general";

/// Probability that an example's length is not told.
const DROPOUT: f64 = 0.1;

/// How prompts of the task look to the base model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The control tokens that the base was trained with, this one first.
    Controls {
        /// Such as `<|task:general|>`.
        task: String,
    },
    /// A base without them: the input, and a line break.
    Plain,
}

/// One example: an input's tokens and its output's.
#[derive(Clone, Debug)]
pub struct Example {
    input: Vec<u32>,
    output: Vec<u32>,
    words: usize,
}

/// All examples of a task that fit the context.
pub struct Examples {
    /// How they are laid out.
    pub layout: Layout,
    /// To learn from.
    pub training: Vec<Example>,
    /// To measure by, with their lengths told.
    pub held_out: Vec<Sequence>,
    codec: Codec,
}

impl Example {
    /// Tokens, about.
    pub fn len(&self) -> usize {
        self.input.len() + self.output.len() + 4
    }
}

impl Layout {
    /// The layout for a base with this tokenizer.
    fn of(task: &str, codec: &Codec) -> Self {
        let has = |token: &str| codec.special(token).is_ok();
        let named = |task: &str| format!("<|task:{task}|>");
        let known = [named(task), named(OTHER_TASK)].into_iter().find(|token| has(token));
        match known {
            Some(task) if [GENERATE, "<|words:none|>", "<|rel:none|>"].iter().all(|t| has(t)) => {
                Self::Controls { task }
            }
            _ => Self::Plain,
        }
    }

    /// The task file's template.
    pub fn template(&self) -> String {
        match self {
            Self::Controls { task } => {
                format!("{task}{{{{ controls.words }}}}<|rel:none|>{{{{ input|trim }}}}{GENERATE}")
            }
            Self::Plain => "{{ input|trim }}\n".to_owned(),
        }
    }

    /// Whether requests may say how long the text shall be.
    pub fn has_words(&self) -> bool {
        matches!(self, Self::Controls { .. })
    }

    /// The sequence of an example. Its loss counts from the output on.
    fn sequence(&self, codec: &Codec, example: &Example, tell_length: bool) -> Result<Sequence> {
        let mut ids = Vec::new();
        if let Self::Controls { task } = self {
            let told = tell_length && WORDS.contains(&example.words);
            let words = if told { example.words.to_string() } else { "none".to_owned() };
            for token in [task.clone(), format!("<|words:{words}|>"), "<|rel:none|>".into()] {
                ids.push(codec.special(&token)?);
            }
        }
        ids.extend(&example.input);
        match self {
            Self::Controls { .. } => ids.push(codec.special(GENERATE)?),
            Self::Plain => ids.extend(codec.encode("\n")?),
        }
        Ok(Sequence::after(&ids, &example.output))
    }
}

impl Examples {
    /// Reads the recipe's files. Examples that do not fit the context are left out, and counted aloud.
    pub fn read(recipe: &Recipe, spec: &Spec) -> Result<Self> {
        let (codec, context) =
            (Codec::of_bundle(&recipe.base, spec.eos.first().copied())?, spec.context);
        let layout = Layout::of(&recipe.task, &codec);
        let (mut training, mut held_out, mut too_long) = (Vec::new(), Vec::new(), 0);
        for pair in pairs(recipe)? {
            let mut tokens = codec.encode(pair.output.trim())?;
            tokens.push(codec.end_of_text);
            let (input, words) = (codec.encode(pair.input.trim())?, count_words(&pair.output));
            let example = Example { input, output: tokens, words };
            if example.len() > context {
                too_long += 1;
            } else if pair.held_out {
                held_out.push(layout.sequence(&codec, &example, true)?);
            } else {
                training.push(example);
            }
        }
        if too_long > 0 {
            eprintln!(
                "{too_long} examples are longer than the context of {context} tokens: left out"
            );
        }
        ensure!(!training.is_empty(), "there is no example of {} to train on", recipe.task);
        Ok(Self { layout, training, held_out, codec })
    }

    /// An epoch's steps: all examples in a new order, about `batch_tokens` at a time.
    pub fn epoch(&self, batch_tokens: usize, draws: &mut Draws) -> Result<Vec<Vec<Sequence>>> {
        let mut order: Vec<usize> = (0..self.training.len()).collect();
        draws.shuffle(&mut order);
        let (mut steps, mut held) = (vec![Vec::new()], 0);
        for i in order {
            let tell = draws.unit() >= DROPOUT;
            let sequence = self.layout.sequence(&self.codec, &self.training[i], tell)?;
            if held > 0 && held + sequence.len() > batch_tokens {
                steps.push(Vec::new());
                held = 0;
            }
            held += sequence.len();
            steps.last_mut().expect("there is a first").push(sequence);
        }
        Ok(steps)
    }
}

/// What a request would say and what should come back.
#[derive(Debug, PartialEq, Eq)]
struct Pair {
    input: String,
    output: String,
    held_out: bool,
}

/// The pairs of the task's rows: those of its name, or all if they have one name or none.
fn pairs(recipe: &Recipe) -> Result<Vec<Pair>> {
    let mut all: Vec<(String, Pair)> = Vec::new();
    for path in &recipe.data {
        read_rows(path, None, |row| {
            let held_out = row.is_held_out(recipe.adapter.held_out);
            match row {
                Row::Text { .. } => bail!("an example needs an input and an output"),
                Row::Pair(p) => {
                    let input = joined(&p.instruction, &p.input);
                    all.push((p.task, Pair { input, output: p.output, held_out }));
                }
                Row::Prompts { task, intent, prompts } => {
                    let pair = |output| Pair { input: intent.clone(), output, held_out };
                    all.extend(prompts.into_iter().map(|p| (task.clone(), pair(p))));
                }
            }
            Ok(())
        })?;
    }
    let names: BTreeSet<String> = all.iter().map(|(task, _)| task.clone()).collect();
    let own = names.contains(&recipe.task);
    if !own && names.len() > 1 {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        bail!("the data have no task {:?}, but several others: {}", recipe.task, names.join(", "));
    }
    let wanted = |(task, pair)| (!own || task == recipe.task).then_some(pair);
    Ok(all.into_iter().filter_map(wanted).collect())
}

/// An instruction and what it is about, as one input: either may be empty.
fn joined(instruction: &str, input: &str) -> String {
    let filled = [instruction.trim(), input.trim()].into_iter().filter(|part| !part.is_empty());
    filled.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::adapter::Settings;

    fn pairs_of(rows: &str, held_out: f64) -> Vec<Pair> {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("rows.jsonl");
        std::fs::write(&data, rows).unwrap();
        let adapter = Settings { held_out, ..Settings::default() };
        let (task, description) = ("mine".into(), String::new());
        let base = dir.path().into();
        pairs(&Recipe { task, description, base, data: vec![data], seed: 0, adapter }).unwrap()
    }

    #[test]
    fn a_row_says_itself_on_which_side_it_is() {
        let rows = r#"{"input": "a", "output": "o", "split": "test"}
{"input": "b", "output": "o", "split": "valid"}
{"input": "c", "output": "o", "split": "train"}
{"input": "d", "output": "o"}
"#;
        let sides = |share| pairs_of(rows, share).iter().map(|p| p.held_out).collect::<Vec<_>>();
        assert_eq!(sides(0.0), [true, true, false, false]);
        assert_eq!(sides(1.0), [true, true, false, true]);
    }

    #[test]
    fn an_instruction_and_an_input_are_one_input() {
        let rows = r#"{"instruction": "Shorten.", "input": "A long text.\n", "output": "o"}
{"instruction": "Shorten.", "input": " ", "output": "o"}
{"input": "A long text.", "output": "o"}
"#;
        let inputs: Vec<String> = pairs_of(rows, 0.0).into_iter().map(|p| p.input).collect();
        assert_eq!(inputs, ["Shorten.\nA long text.", "Shorten.", "A long text."]);
    }
}
