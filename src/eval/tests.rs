use super::*;
use crate::model::{Spec, init, weights};
use crate::text::fixture;
use crate::train::objective::{Example, controlled};
use crate::train::tokenizer::Codec;
use clap::Parser;
use report::Figures;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

const TASK: &str = r#"
description = "Writes a prompt."
template = "<|task:image|>{{ controls.words }}<|rel:none|>{{ input }}<|gen|>"
[controls.words]
kind = "integer"
range = [3, 60]
token = "<|words:{}|>"
[defaults]
temperature = 1.0
max_tokens = 12
"#;

const INTENTS: [&str; 8] = [
    "a fox in snow",
    "two ships",
    "red market",
    "an old tree",
    "rain",
    "a deer at dawn",
    "city lights",
    "the sea",
];

/// A bundle with a small fresh model, and a recipe that holds out half of [`INTENTS`].
fn bundle() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        layers: 1,
        heads: 2,
        width: 16,
        inner: 64,
        context: 96,
        vocab: 574,
        eps: 1e-5,
        eos: fixture::tokenizer().token_id("<|endoftext|>").into_iter().collect(),
        tasks: Vec::new(),
        moe: None,
    };
    let tensors = init::fresh(&spec, 7).unwrap();
    weights::save(dir.path(), &spec, &tensors, candle_core::DType::F32).unwrap();
    let write = |name: &str, text: &[u8]| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("tokenizer.json", &fixture::json_with_controls());
    write("tasks/image.toml", TASK.as_bytes());
    let rows = INTENTS.map(|intent| {
        let prompts = [format!("{intent}, seen from afar"), format!("A picture of {intent}.")];
        serde_json::json!({"task": "image", "intent": intent, "prompts": prompts}).to_string()
    });
    write("data/image.jsonl", rows.join("\n").as_bytes());
    let sha256 = crate::train::data::sha256_of(&dir.path().join("data/image.jsonl")).unwrap();
    write("train.toml", recipe(&sha256).as_bytes());
    dir
}

fn recipe(sha256: &str) -> String {
    format!(
        r#"
name = "small"
seed = 1
[model]
layers = 1
heads = 2
width = 16
context = 96
[tokenizer]
size = 574
data = ["distilled"]
max_megabytes = 1
[tasks]
image = []
[held_out]
fraction = 0.5
[[data]]
name = "distilled"
file = "image.jsonl"
sha256 = "{sha256}"
[[stage]]
name = "tasks"
steps = 1
batch_tokens = 96
micro_tokens = 96
learning_rate = 1e-3
final_rate = 0.1
warmup = 0
mix = [{{ data = "distilled", form = "controlled", weight = 1.0 }}]
"#
    )
}

fn args(bundle: &Path, more: &str) -> Args {
    let bundle = bundle.to_str().unwrap();
    Cli::try_parse_from(["eval", bundle].into_iter().chain(more.split_whitespace())).unwrap().args
}

#[test]
fn a_fresh_model_is_measured_from_end_to_end() {
    let dir = bundle();
    let args = args(dir.path(), "--lengths 3 --samples 2");
    let report = measure(&args).unwrap();
    let names: Vec<_> = report.rows.iter().map(|r| r.task.as_str()).collect();
    assert_eq!(names, ["image", "all"]);
    let row = &report.rows[0];
    assert!(0 < row.intents && row.intents < INTENTS.len(), "{row:?}");
    assert_eq!(report.rows[1], Figures { task: "all".into(), ..row.clone() });
    // A fresh model finds all of its 574 tokens about equally likely.
    assert!((row.loss.unwrap() - 574f64.ln()).abs() < 0.1, "{row:?}");
    assert_eq!((row.generated, row.teacher_coverage), (3 * row.intents, Some(1.0)));
    assert!(row.length.is_some() && row.cut.unwrap() > 0.5, "{row:?}");
    let texts = &report.samples[0].texts;
    assert_eq!(texts.len(), 2);
    assert_ne!(texts[0].intent, texts[1].intent);
    assert!(texts.iter().all(|t| LENGTHS.contains(&t.asked.unwrap())));
    assert_eq!(measure(&args).unwrap().to_string(), report.to_string());
}

#[test]
fn the_two_sides_of_the_split_share_nothing() {
    let dir = bundle();
    let side = |held_out| {
        let list = intents::read(dir.path(), None, None, held_out).unwrap().by_task.remove("image");
        list.unwrap().into_iter().map(|i| i.text).collect::<Vec<_>>()
    };
    let (held_out, trained) = (side(true), side(false));
    let mut all = [held_out, trained].concat();
    all.sort();
    let mut expected = INTENTS.map(str::to_owned);
    expected.sort();
    assert_eq!(all, expected);
}

#[test]
fn other_data_than_the_recipe_names_is_refused() {
    let dir = bundle();
    let path = dir.path().join("data/image.jsonl");
    let more = fs::read_to_string(&path).unwrap() + "\n";
    fs::write(&path, more).unwrap();
    let fault = intents::read(dir.path(), None, None, true).unwrap_err().to_string();
    assert!(fault.ends_with("is not the file that train.toml names"), "{fault}");
    fs::remove_file(&path).unwrap();
    let fault = intents::read(dir.path(), None, None, true).unwrap_err().to_string();
    assert!(fault.contains("--data DIR"), "{fault}");
}

/// What is scored is, token by token, what training learns from.
#[test]
fn scoring_has_the_layout_of_training() {
    let dir = bundle();
    let model = Model::load(dir.path()).unwrap();
    let codec = Codec::load(&dir.path().join("tokenizer.json")).unwrap();
    let task = model.tasks.find("image").unwrap();
    let (input, output) = ("a fox <|gen|> in snow", "A red fox trots over fresh snow.");
    let example = Example { task: "image".into(), input: input.into(), output: output.into() };
    let learnt = controlled(&codec, &example, 96, 0.0, &mut Draws::at(&[])).unwrap().unwrap();
    let prompt = model.prompt(task, input, Some(7)).unwrap();
    let from = prompt.len();
    let job = model.scoring(task, prompt, output).unwrap().unwrap();
    assert_eq!(job.tokens[..job.tokens.len() - 1], learnt.tokens);
    assert_eq!(job.tokens[from..], learnt.targets[from - 1..]);
    let counted = learnt.targets.iter().filter(|&&t| t != crate::kernels::IGNORE).count();
    assert_eq!(counted, job.tokens.len() - from);
}

fn measured() -> Measured {
    let text = |asked: usize, words: usize, text: &str| Text {
        intent: "a <b> fox".into(),
        asked: Some(asked),
        words,
        coverage: 0.5,
        cut: false,
        text: text.into(),
    };
    Measured {
        intents: 2,
        loss: Loss { nats: 6.0, tokens: 4 },
        teacher: vec![1.0, 0.5],
        texts: vec![text(5, 4, "a b a b"), text(9, 12, "c *d*\nc")],
    }
}

#[test]
fn figures_by_hand() {
    let figures = measured().figures("image");
    assert_eq!(figures.loss, Some(1.5));
    assert_eq!(figures.teacher_coverage, Some(0.75));
    assert_eq!(figures.distinct_2, Some(4.0 / 5.0));
    let length = figures.length.unwrap();
    assert_eq!((length.mean_absolute_error, length.within_2), (2.0, 0.5));
    let nothing = Measured::default().figures("image");
    assert_eq!((nothing.loss, nothing.coverage, nothing.length), (None, None, None));
}

#[test]
fn the_model_card_keeps_what_is_around_the_figures() {
    let measured = measured();
    let report = Report {
        shoal: "0",
        bundle: "b".into(),
        split: "held-out",
        held_out_fraction: 0.05,
        parameters: 1_000_000,
        seed: 1,
        rows: vec![measured.figures("all")],
        samples: vec![Samples { task: "image".into(), texts: measured.texts }],
    };
    let dir = tempfile::tempdir().unwrap();
    let card = dir.path().join("CARD.md");
    fs::write(&card, "before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
        .unwrap();
    report.write_markdown(&card).unwrap();
    report.write_markdown(&card).unwrap();
    let text = fs::read_to_string(&card).unwrap();
    assert!(text.starts_with("before\n<!-- figures: begin -->\n\n| task |"), "{text}");
    assert!(text.ends_with("\n<!-- figures: end -->\nafter\n") && !text.contains("old"), "{text}");
    assert!(
        text.contains("| all | 2 | 1.500 | 2 | 0.800 | 2.00 | 50.0% | 1.000 | 50.0% | 75.0% |")
    );
    assert!(text.contains("- *a \\<b> fox* (9 -> 12 words): c \\*d\\* c\n"), "{text}");
    fs::write(&card, "no marks").unwrap();
    assert!(report.write_markdown(&card).is_err());
}
