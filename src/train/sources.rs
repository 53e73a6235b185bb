//! From rows to sequences: what each part of a stage's mix holds, in which order an epoch visits it,
//! and how much of each part a batch takes. The position in all of it is a few counters.

use super::data::Row;
use super::draws::Draws;
use super::objective::{self, Example, Sequence};
use super::passages::{self, Enders};
use super::recipe::{Form, Part, Recipe};
use super::tokenizer::{Codec, WORDS};
use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// What one part of a mix holds: its training side or its held-out side.
pub struct Source {
    /// `data/form`, for logs.
    pub name: String,
    weight: f64,
    items: Items,
}

enum Items {
    /// One run of tokens; item `i` is its `i`-th piece of the context's length.
    Stream(Vec<u32>),
    /// Documents, learnt whole.
    Documents(Vec<String>),
    /// Paragraphs that passages are taken from.
    Paragraphs { task: String, texts: Vec<String>, enders: Enders },
    /// Examples, each with how often an epoch visits it.
    Examples(Vec<(Example, f64)>),
}

/// What turns a source's items into sequences.
pub struct Maker<'a> {
    /// The tokenizer.
    pub codec: &'a Codec,
    /// Longest sequence.
    pub context: usize,
    /// Probability of hiding a control.
    pub dropout: f64,
}

impl Source {
    /// What `part` makes of rows to train on.
    pub fn training(part: &Part, recipe: &Recipe, rows: &[Row], codec: &Codec) -> Result<Self> {
        Self::new(part, recipe, rows, codec, |examples| weighted(part, examples))
    }

    /// What `part` makes of rows to be measured on: nothing cut, dropped or repeated.
    pub fn held_out(part: &Part, recipe: &Recipe, rows: &[Row], codec: &Codec) -> Result<Self> {
        Self::new(part, recipe, rows, codec, |all| all.into_iter().map(|e| (e, 1.0)).collect())
    }

    fn new(
        part: &Part,
        recipe: &Recipe,
        rows: &[Row],
        codec: &Codec,
        weigh: impl Fn(Vec<Example>) -> Vec<(Example, f64)>,
    ) -> Result<Self> {
        let items = match part.form {
            Form::Text => Items::Stream(stream(&documents(rows), codec)?),
            Form::Instruction => Items::Documents(documents(rows)),
            Form::Keywords => {
                let task = part.task.clone().context("keywords need a task")?;
                paragraphs(task, rows)
            }
            Form::Controlled => Items::Examples(weigh(examples(rows, recipe)?)),
        };
        let form = format!("{:?}", part.form).to_lowercase();
        Ok(Self { name: format!("{}/{form}", part.data), weight: part.weight, items })
    }

    /// Number of items.
    pub fn len(&self, context: usize) -> usize {
        match &self.items {
            Items::Stream(ids) => ids.len().saturating_sub(1) / context,
            Items::Documents(texts) | Items::Paragraphs { texts, .. } => texts.len(),
            Items::Examples(examples) => examples.len(),
        }
    }

    /// The items that an epoch visits, in its order.
    fn order(&self, context: usize, mut draws: Draws) -> Vec<u32> {
        let mut order: Vec<u32> = match &self.items {
            Items::Examples(examples) => {
                let times = |often: f64, draws: &mut Draws| (often + draws.unit()) as usize;
                let visits = (0..)
                    .zip(examples)
                    .flat_map(|(i, (_, often))| std::iter::repeat_n(i, times(*often, &mut draws)));
                visits.collect()
            }
            _ => (0..self.len(context) as u32).collect(),
        };
        draws.shuffle(&mut order);
        order
    }

    /// The sequence of an item; `None` where nothing of use fits into the context.
    fn sequence(&self, item: usize, maker: &Maker, draws: &mut Draws) -> Result<Option<Sequence>> {
        let Maker { codec, context, dropout } = *maker;
        match &self.items {
            Items::Stream(ids) => {
                let piece = &ids[item * context..=(item + 1) * context];
                Ok(Some(Sequence::plain(piece, context)))
            }
            Items::Documents(texts) => {
                let mut ids = codec.encode(&texts[item])?;
                ids.push(codec.end_of_text);
                Ok(Some(Sequence::plain(&ids, context)).filter(|s| !s.is_empty()))
            }
            Items::Paragraphs { task, texts, enders } => {
                let Some((input, output)) = passage(&texts[item], enders, draws) else {
                    return Ok(None);
                };
                let example = Example { task: task.clone(), input, output };
                objective::controlled(codec, &example, context, dropout, draws)
            }
            Items::Examples(examples) => {
                objective::controlled(codec, &examples[item].0, context, dropout, draws)
            }
        }
    }

    /// Its first sequences, about `tokens` of them, in an order that never changes.
    pub fn sample(&self, maker: &Maker, tokens: usize) -> Result<Vec<Sequence>> {
        let mut taken = Vec::new();
        let mut held = 0;
        for item in self.order(maker.context, Draws::at(&[0])) {
            if held >= tokens {
                break;
            }
            let mut draws = Draws::at(&[0, u64::from(item)]);
            if let Some(sequence) = self.sequence(item as usize, maker, &mut draws)? {
                held += sequence.len();
                taken.push(sequence);
            }
        }
        Ok(taken)
    }
}

/// Texts for the tokenizer to learn from: what a row contributes in any form.
pub fn texts_of(row: &Row) -> Vec<String> {
    match row {
        Row::Text { text, .. } => vec![text.clone()],
        Row::Pair(p) => [&p.instruction, &p.input, &p.output].into_iter().cloned().collect(),
        Row::Prompts { intent, prompts, .. } => {
            std::iter::once(intent).chain(prompts).cloned().collect()
        }
    }
}

fn documents(rows: &[Row]) -> Vec<String> {
    let one = |row: &Row| {
        let parts = texts_of(row);
        let filled = parts.iter().map(|p| p.trim()).filter(|p| !p.is_empty());
        filled.collect::<Vec<_>>().join("\n")
    };
    rows.iter().map(one).collect()
}

fn stream(documents: &[String], codec: &Codec) -> Result<Vec<u32>> {
    let pieces: Vec<Vec<u32>> =
        documents.par_iter().map(|text| codec.encode(text)).collect::<Result<_>>()?;
    Ok(pieces.into_iter().flat_map(|ids| ids.into_iter().chain([codec.end_of_text])).collect())
}

fn examples(rows: &[Row], recipe: &Recipe) -> Result<Vec<Example>> {
    let mut all = Vec::new();
    for row in rows {
        let (task, input, outputs) = match row {
            Row::Text { .. } => {
                bail!("controlled training needs examples of a task, not plain text")
            }
            Row::Pair(p) if p.input.trim().is_empty() => {
                (&p.task, &p.instruction, std::slice::from_ref(&p.output))
            }
            Row::Pair(p) => (&p.task, &p.input, std::slice::from_ref(&p.output)),
            Row::Prompts { task, intent, prompts } => (task, intent, prompts.as_slice()),
        };
        let Some(task) = recipe.task_of(task) else {
            bail!("task {task:?} is not among the recipe's tasks {:?}", recipe.task_names());
        };
        all.extend(outputs.iter().map(|output| Example {
            task: task.to_owned(),
            input: input.trim().to_owned(),
            output: output.trim().to_owned(),
        }));
    }
    Ok(all)
}

/// Adds cut examples, drops what misses its input, and says how often an epoch visits each: with cuts,
/// so often that the lengths come out nearly even.
fn weighted(part: &Part, mut examples: Vec<Example>) -> Vec<(Example, f64)> {
    if part.cuts {
        let mut enders = Enders::default();
        examples.iter().for_each(|e| enders.learn(&e.output));
        let cut = |e: &Example| {
            let outputs = passages::cuts(&e.output, &enders).into_iter();
            let kept = outputs.filter(|o| WORDS.contains(&passages::count_words(o)));
            kept.map(|output| Example { output, ..e.clone() }).collect::<Vec<_>>()
        };
        let added: Vec<Example> = examples.iter().flat_map(cut).collect();
        examples.extend(added);
    }
    examples.retain(|e| passages::coverage(&e.input, &e.output) >= part.min_coverage);
    if !part.cuts {
        return examples.into_iter().map(|e| (e, 1.0)).collect();
    }
    let slot = |e: &Example| passages::count_words(&e.output).min(WORDS.end() + 1);
    let mut counts = vec![0.0; WORDS.end() + 2];
    examples.iter().for_each(|e| counts[slot(e)] += 1.0);
    let even = examples.len() as f64 / WORDS.count() as f64;
    let often = |e: &Example| (even / counts[slot(e)]).powf(0.7).clamp(0.25, 3.0);
    examples.into_iter().map(|e| (often(&e), e)).map(|(often, e)| (e, often)).collect()
}

fn paragraphs(task: String, rows: &[Row]) -> Items {
    let mut enders = Enders::default();
    let mut texts = Vec::new();
    for document in documents(rows) {
        let lines = document.lines().map(str::trim).filter(|l| passages::count_words(l) >= 25);
        texts.extend(lines.map(str::to_owned));
    }
    texts.iter().for_each(|text| enders.learn(text));
    Items::Paragraphs { task, texts, enders }
}

/// A passage of some length between 3 and 60 words, all equally wanted, with a few of its own words as
/// the input that asks for it.
fn passage(text: &str, enders: &Enders, draws: &mut Draws) -> Option<(String, String)> {
    let starts = passages::sentence_starts(text);
    if starts.is_empty() {
        return None;
    }
    let rest = &text[starts[draws.below(starts.len())]..];
    let wanted = WORDS.start() + draws.below(WORDS.count());
    let fits = |o: &String| WORDS.contains(&passages::count_words(o));
    let head = match rest.split_whitespace().nth(WORDS.end() + 10) {
        Some(word) => &rest[..word.as_ptr() as usize - rest.as_ptr() as usize],
        None => rest,
    };
    let cuts = passages::cuts(head, enders).into_iter().filter(fits);
    let output = cuts.min_by_key(|o| passages::count_words(o).abs_diff(wanted))?;
    let input = if draws.unit() < 0.4 { phrase(&output, draws) } else { keywords(&output, draws) };
    let input = if draws.unit() < 0.6 { input.to_lowercase() } else { input };
    (!input.is_empty()).then_some((input, output))
}

/// Two to six neighbouring words of `text`.
fn phrase(text: &str, draws: &mut Draws) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let len = (2 + draws.below(5)).min(words.len());
    let first = draws.below(words.len() - len + 1);
    let phrase = words[first..first + len].join(" ");
    phrase.trim_matches(|c: char| !c.is_alphanumeric()).to_owned()
}

/// One to five content words of `text`, in their order or shuffled.
fn keywords(text: &str, draws: &mut Draws) -> String {
    let words = passages::content_words_as_written(text);
    let count = (1 + draws.below(5)).min(words.len());
    let mut picks: Vec<usize> = (0..words.len()).collect();
    draws.shuffle(&mut picks);
    picks.truncate(count);
    if draws.unit() < 0.6 {
        picks.sort_unstable();
    }
    let separator = if draws.unit() < 0.7 { " " } else { ", " };
    picks.iter().map(|&i| words[i]).collect::<Vec<_>>().join(separator)
}

/// How far a part of the mix has been read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cursor {
    /// Times that it was read through.
    pub epoch: u64,
    /// Items of this epoch that were read.
    pub index: usize,
    /// Tokens taken from it so far.
    pub tokens: u64,
}

/// Draws sequences from the parts of a mix in the proportion of their weights.
pub struct Mixer {
    sources: Vec<Source>,
    orders: Vec<Vec<u32>>,
    cursors: Vec<Cursor>,
    context: usize,
    seed: u64,
}

impl Mixer {
    /// A mixer at the given position; no position is the start.
    pub fn new(
        sources: Vec<Source>,
        cursors: Vec<Cursor>,
        context: usize,
        seed: u64,
    ) -> Result<Self> {
        if let Some(empty) = sources.iter().find(|s| s.len(context) == 0) {
            bail!("{} has nothing to train on", empty.name);
        }
        let cursors =
            if cursors.is_empty() { vec![Cursor::default(); sources.len()] } else { cursors };
        if cursors.len() != sources.len() {
            bail!("the position is of another mix: {} parts, not {}", cursors.len(), sources.len());
        }
        let mut mixer = Self { sources, orders: Vec::new(), cursors, context, seed };
        mixer.orders = (0..mixer.sources.len()).map(|i| mixer.order(i)).collect();
        Ok(mixer)
    }

    fn order(&self, source: usize) -> Vec<u32> {
        let draws = Draws::at(&[self.seed, source as u64, self.cursors[source].epoch]);
        self.sources[source].order(self.context, draws)
    }

    /// The position, to go on from later.
    pub fn cursors(&self) -> &[Cursor] {
        &self.cursors
    }

    /// The next sequences: as many as fit into `budget` tokens for certain.
    pub fn take(&mut self, maker: &Maker, budget: usize) -> Result<Vec<Sequence>> {
        let mut taken = Vec::new();
        let mut held = 0;
        while taken.is_empty() || held + self.context <= budget {
            let sequence = self.next(maker)?;
            held += sequence.len();
            taken.push(sequence);
        }
        Ok(taken)
    }

    fn next(&mut self, maker: &Maker) -> Result<Sequence> {
        let behind = |i: &usize| self.cursors[*i].tokens as f64 / self.sources[*i].weight;
        let source = (0..self.sources.len())
            .min_by(|a, b| behind(a).total_cmp(&behind(b)))
            .context("the mix has no parts")?;
        let started = self.cursors[source].epoch;
        loop {
            let Cursor { epoch, index, .. } = self.cursors[source];
            let Some(&item) = self.orders[source].get(index) else {
                if epoch > started + 1 {
                    bail!("nothing in {} fits into the context", self.sources[source].name);
                }
                self.cursors[source].epoch += 1;
                self.cursors[source].index = 0;
                self.orders[source] = self.order(source);
                continue;
            };
            self.cursors[source].index += 1;
            let place = [self.seed, source as u64, epoch, index as u64, u64::from(item)];
            let mut draws = Draws::at(&place);
            if let Some(s) = self.sources[source].sequence(item as usize, maker, &mut draws)? {
                self.cursors[source].tokens += s.len() as u64;
                return Ok(s);
            }
        }
    }
}
