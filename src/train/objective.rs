//! What is learnt of an example: its tokens, and which of them count in the loss.
//!
//! An example is laid out as serving lays out a request: `<|task:T|><|words:N|><|rel:R|>` input
//! `<|gen|>` output `<|endoftext|>`, nothing between. The controls say what the output *is*
//! (hindsight), so that a request can say what it shall be.

use super::draws::Draws;
use super::passages::count_words;
use super::tokenizer::{Codec, WORDS};
use crate::kernels::IGNORE;
use anyhow::{Result, ensure};

/// One sequence to train on: each token with the one that must follow, or [`IGNORE`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Inputs.
    pub tokens: Vec<u32>,
    /// Their successors, or [`IGNORE`] where none is learnt.
    pub targets: Vec<u32>,
}

impl Sequence {
    /// All of `ids` is learnt from its second token on; what exceeds the context is left out.
    pub fn plain(ids: &[u32], context: usize) -> Self {
        let last = ids.len().saturating_sub(1).min(context);
        Self { tokens: ids[..last].to_vec(), targets: ids[1..=last].to_vec() }
    }

    /// `output` is learnt, after `prompt`.
    pub fn after(prompt: &[u32], output: &[u32]) -> Self {
        let ids = [prompt, output].concat();
        let mut sequence = Self::plain(&ids, ids.len());
        let given = prompt.len().saturating_sub(1);
        sequence.targets[..given].fill(IGNORE);
        sequence
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is nothing to learn.
    pub fn is_empty(&self) -> bool {
        self.targets.iter().all(|&t| t == IGNORE)
    }
}

/// An input and its output in a trained task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// One of the recipe's tasks.
    pub task: String,
    /// What a user types.
    pub input: String,
    /// What the model shall answer.
    pub output: String,
}

/// The control tokens in front of an example: its own length, unless it has no token or is dropped.
pub fn control_tokens(codec: &Codec, example: &Example, drop_words: bool) -> Result<[u32; 3]> {
    let words = count_words(&example.output);
    let words = match WORDS.contains(&words) && !drop_words {
        true => format!("<|words:{words}|>"),
        false => "<|words:none|>".to_owned(),
    };
    Ok([
        codec.special(&format!("<|task:{}|>", example.task))?,
        codec.special(&words)?,
        codec.special("<|rel:none|>")?,
    ])
}

/// The whole prompt of an example, up to and with `<|gen|>`.
pub fn prompt(codec: &Codec, example: &Example, drop_words: bool) -> Result<Vec<u32>> {
    let mut ids = control_tokens(codec, example, drop_words)?.to_vec();
    ids.extend(codec.encode(example.input.trim())?);
    ids.push(codec.generate);
    Ok(ids)
}

/// The sequence of an example; `None` if it does not fit into the context. `dropout` is the
/// probability of hiding a control.
pub fn controlled(
    codec: &Codec,
    example: &Example,
    context: usize,
    dropout: f64,
    draws: &mut Draws,
) -> Result<Option<Sequence>> {
    let output = example.output.trim();
    ensure!(!output.is_empty(), "the output is empty");
    let asked = prompt(codec, example, draws.unit() < dropout)?;
    let mut answer = codec.encode(output)?;
    answer.push(codec.end_of_text);
    let fits = asked.len() + answer.len() <= context + 1;
    Ok(fits.then(|| Sequence::after(&asked, &answer)))
}
