//! Recipes and mixes.

use super::{Kitchen, codec};
use crate::train::data::Row;
use crate::train::objective::Sequence;
use crate::train::passages::{count_words, coverage};
use crate::train::recipe::{Form, Part, Recipe};
use crate::train::sources::{Maker, Mixer, Source};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

#[test]
fn all_faults_of_a_recipe_come_at_once() {
    let kitchen = Kitchen::new(2, 1e-3);
    kitchen.change("heads = 2", "heads = 5");
    kitchen.change("size = 400", "size = 10");
    kitchen.change("data = \"pairs\", form = \"text\"", "data = \"books\", form = \"text\"");
    kitchen.change("form = \"instruction\"", "form = \"keywords\"");
    kitchen.change("steps = 2\n", "steps = 0\n");
    kitchen.change("layers = 2", "layers = 2000");
    kitchen.change("tokens = 100", "tokens = 0");
    kitchen.change("image = []", "image = [\"picture\"]");
    kitchen.change("music = []", "music = [\"picture\"]");
    let error = format!("{:#}", Recipe::load(&kitchen.recipe()).unwrap_err());
    for fault in [
        "a width of 64 does not split into 5 heads",
        "tokenizer.size is 10",
        "no data named \"books\"",
        "keywords of \"pairs\" need a task",
        "steps must be above 0",
        "model.layers is 2000; allowed: 1 to 1024",
        "held_out.tokens must be above 0",
        "tasks: \"picture\" is there twice",
    ] {
        assert!(error.contains(fault), "{fault}: {error}");
    }
    kitchen.change("name = \"tiny\"", "nmae = \"tiny\"");
    let error = format!("{:#}", Recipe::load(&kitchen.recipe()).unwrap_err());
    assert!(error.contains("nmae"), "{error}");
}

fn shipped(file: &str) -> (PathBuf, Recipe) {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/prompter");
    let recipe = Recipe::load(&home.join(file)).unwrap();
    (home.join("data"), recipe)
}

#[test]
fn the_distilled_recipe_runs_from_the_clone_alone() {
    let (own, recipe) = shipped("distilled.toml");
    assert_eq!(recipe.locate(None, &own).unwrap().len(), 12);
    assert_eq!(recipe.task_names().len(), 6, "no task without a file in tasks/");
}

#[test]
fn the_shipped_recipe_is_sound_and_says_where_its_other_data_come_from() {
    let (own, mut recipe) = shipped("train.toml");
    let error = format!("{:#}", recipe.locate(None, &own).unwrap_err());
    assert_eq!(error.lines().filter(|l| l.contains("made from: ")).count(), 6, "{error}");
    assert!(error.contains("A_instruct.jsonl.zst is not in "), "{error}");
    assert!(error.contains("--data DIR"), "{error}");
    recipe.data.retain(|file| file.name == "distilled" || file.name == "plain");
    assert_eq!(recipe.locate(None, &own).unwrap().len(), 12);
}

fn part(form: Form) -> Part {
    let task = (form == Form::Keywords).then(|| "image".to_owned());
    let weight = if form == Form::Controlled { 3.0 } else { 1.0 };
    let cuts = form == Form::Controlled;
    Part { data: "d".into(), form, weight, task, cuts, min_coverage: 0.0 }
}

fn rows(form: Form) -> Vec<Row> {
    let text = |i: usize| {
        let sentence = format!("The lamp {i} stands on a table, near the window. It is warm, ");
        let end = "and rain falls on the roof of a quiet house by the sea at night.";
        format!("{sentence}{end} Nobody comes.")
    };
    let row = |i: usize| match form {
        Form::Controlled => Row::Prompts {
            task: "image".into(),
            intent: format!("lamp {i}"),
            prompts: vec![text(i), format!("Lamp {i} at night")],
        },
        _ => Row::Text { text: text(i), source: None },
    };
    (0..12).map(row).collect()
}

fn mixer(recipe: &Recipe, context: usize) -> Mixer {
    let codec = codec();
    let source = |form| Source::training(&part(form), recipe, &rows(form), &codec).unwrap();
    let sources = [Form::Text, Form::Keywords, Form::Controlled].map(source).into();
    Mixer::new(sources, Vec::new(), context, 9).unwrap()
}

#[test]
fn a_mix_keeps_its_proportions_and_its_budget() {
    let recipe = Recipe::load(&Kitchen::new(2, 1e-3).recipe()).unwrap();
    let codec = codec();
    let maker = Maker { codec: &codec, context: 160, dropout: 0.1 };
    let mut mixer = mixer(&recipe, 160);
    for _ in 0..60 {
        let taken = mixer.take(&maker, 500).unwrap();
        let tokens: usize = taken.iter().map(Sequence::len).sum();
        assert!((340..=500).contains(&tokens), "{tokens}");
        assert!(taken.iter().all(|s| s.len() <= 160));
    }
    let tokens: Vec<f64> = mixer.cursors().iter().map(|c| c.tokens as f64).collect();
    let total: f64 = tokens.iter().sum();
    for (tokens, share) in tokens.into_iter().zip([0.2, 0.2, 0.6]) {
        assert!((tokens / total - share).abs() < 0.02, "{tokens} of {total}, not {share}");
    }
}

#[test]
fn cuts_fill_lengths_and_keywords_are_words_of_the_passage() {
    let recipe = Recipe::load(&Kitchen::new(2, 1e-3).recipe()).unwrap();
    let codec = codec();
    let maker = Maker { codec: &codec, context: 400, dropout: 0.0 };
    let seen = |form| {
        let source = Source::training(&part(form), &recipe, &rows(form), &codec).unwrap();
        let mut mixer = Mixer::new(vec![source], Vec::new(), 400, 1).unwrap();
        let sequences = mixer.take(&maker, 20_000).unwrap();
        sequences.iter().map(|s| codec.decode(&s.tokens).unwrap()).collect::<Vec<_>>()
    };
    let mut lengths: BTreeMap<usize, usize> = BTreeMap::new();
    for text in seen(Form::Controlled).iter().chain(&seen(Form::Keywords)) {
        let (asked, output) = text.split_once("<|gen|>").unwrap();
        let (controls, input) = asked.split_once("<|rel:none|>").unwrap();
        let words = count_words(output);
        assert_eq!(controls, format!("<|task:image|><|words:{words}|>"));
        assert!(input.starts_with("lamp ") || coverage(input, output) == 1.0, "{text}");
        *lengths.entry(words).or_default() += 1;
    }
    assert!(lengths.len() >= 4, "{lengths:?}");
}

#[test]
fn an_epoch_visits_every_document_once() {
    let recipe = Recipe::load(&Kitchen::new(2, 1e-3).recipe()).unwrap();
    let codec = codec();
    let form = Form::Instruction;
    let source = Source::training(&part(form), &recipe, &rows(form), &codec).unwrap();
    let mut mixer = Mixer::new(vec![source], Vec::new(), 400, 1).unwrap();
    let maker = Maker { codec: &codec, context: 400, dropout: 0.0 };
    let mut epoch = || -> Vec<Vec<u32>> {
        (0..12).map(|_| mixer.take(&maker, 1).unwrap().remove(0).tokens).collect()
    };
    let (first, second) = (epoch(), epoch());
    assert_ne!(first, second, "another order");
    let set = |epoch: Vec<Vec<u32>>| epoch.into_iter().collect::<BTreeSet<_>>();
    let (first, second) = (set(first), set(second));
    assert_eq!((first.len(), &first), (12, &second));
}

#[test]
fn plain_text_has_no_task_to_be_controlled() {
    let recipe = Recipe::load(&Kitchen::new(2, 1e-3).recipe()).unwrap();
    let rows = [Row::Text { text: "text".into(), source: None }];
    assert!(Source::training(&part(Form::Controlled), &recipe, &rows, &codec()).is_err());
    let other =
        Row::Prompts { task: "poetry".into(), intent: "i".into(), prompts: vec!["p".into()] };
    let error = Source::training(&part(Form::Controlled), &recipe, &[other], &codec());
    assert!(format!("{:#}", error.err().unwrap()).contains("poetry"));
}
