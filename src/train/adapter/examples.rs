//! A task's examples, laid out as its template will lay out requests.

use super::Recipe;
use crate::model::Spec;
use crate::train::data::{Row, is_held_out, read_rows};
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
        let (codec, context) = (Codec::of_bundle(&recipe.base, spec.eos)?, spec.context);
        let layout = Layout::of(&recipe.task, &codec);
        let (mut training, mut held_out, mut too_long) = (Vec::new(), Vec::new(), 0);
        for (input, output) in pairs(recipe)? {
            let mut tokens = codec.encode(output.trim())?;
            tokens.push(codec.end_of_text);
            let (words, text) = (count_words(&output), input.trim());
            let example = Example { input: codec.encode(text)?, output: tokens, words };
            if example.len() > context {
                too_long += 1;
            } else if is_held_out(&input, recipe.adapter.held_out) {
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

/// Inputs and outputs of the task's rows: those of its name, or all if they have one name or none.
fn pairs(recipe: &Recipe) -> Result<Vec<(String, String)>> {
    let mut all: Vec<(String, String, String)> = Vec::new();
    for path in &recipe.data {
        read_rows(path, None, |row| {
            match row {
                Row::Text { .. } => bail!("an example needs an input and an output"),
                Row::Pair(p) => {
                    let input = if p.input.trim().is_empty() { p.instruction } else { p.input };
                    all.push((p.task, input, p.output));
                }
                Row::Prompts { task, intent, prompts } => {
                    all.extend(prompts.into_iter().map(|p| (task.clone(), intent.clone(), p)));
                }
            }
            Ok(())
        })?;
    }
    let names: BTreeSet<String> = all.iter().map(|(task, ..)| task.clone()).collect();
    let own = names.contains(&recipe.task);
    if !own && names.len() > 1 {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        bail!("the data have no task {:?}, but several others: {}", recipe.task, names.join(", "));
    }
    let wanted = |(task, input, output)| (!own || task == recipe.task).then_some((input, output));
    Ok(all.into_iter().filter_map(wanted).collect())
}
