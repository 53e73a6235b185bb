//! Readers, split, tokenizer, layout of examples, packing.

use super::{PAIRS, codec, example, tasks};
use crate::kernels::IGNORE;
use crate::task::TaskTable;
use crate::text::Template;
use crate::train::batch::{Batch, group};
use crate::train::data::{Row, is_held_out, read_rows};
use crate::train::draws::Draws;
use crate::train::objective::{Sequence, controlled, prompt};
use crate::train::tokenizer::{Codec, save, special_tokens, train};
use proptest::prelude::*;
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;

fn rows(path: &Path, max: Option<usize>) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    read_rows(path, max, |row| {
        rows.push(row);
        Ok(())
    })?;
    Ok(rows)
}

fn written(name: &str, text: &str) -> (TempDir, std::path::PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

const GOOD: &str = r#"{"text": "once", "title": "T", "source": "s"}
{"task": "a", "input": "i", "output": "o", "instruction": "do", "split": "test", "licence": "l"}
{"task": "b", "topic": "t", "intent": "x", "prompts": ["p", "q"]}
"#;

#[test]
fn reads_all_shapes_plain_and_compressed() {
    let (_dir, path) = written("rows.jsonl", GOOD);
    let plain = rows(&path, None).unwrap();
    assert_eq!(plain.len(), 3);
    assert_eq!(plain[0], Row::Text { text: "once".into(), source: Some("s".into()) });
    assert_eq!(plain.iter().map(Row::key).collect::<Vec<_>>(), ["s", "i", "x"]);
    assert!(plain[1].is_held_out(0.0), "the file's own split holds");
    assert_eq!(rows(&path, Some(2)).unwrap(), plain[..2]);

    let packed = path.with_extension("jsonl.zst");
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let bytes = ruzstd::encoding::compress_to_vec(GOOD.as_bytes(), level);
    std::fs::File::create(&packed).unwrap().write_all(&bytes).unwrap();
    assert_eq!(rows(&packed, None).unwrap(), plain);
}

#[test]
fn bad_lines_are_refused_by_file_and_line() {
    let bad = [
        "{",
        "[]",
        "{}",
        r#"{"text": " "}"#,
        r#"{"text": "a", "output": "b", "task": "c"}"#,
        r#"{"task": "a", "output": ""}"#,
        r#"{"task": "a", "intent": "b", "prompts": ["c", ""]}"#,
        r#"{"task": "a", "input": "b"}"#,
        r#"{"text": "a", "colour": "b"}"#,
        r#"{"task": "a", "output": "b", "split": "other"}"#,
        r#"{"task": "a", "output": "b c", "controls": {"words": 3}}"#,
        r#"{"task": "a", "output": "b c", "controls": {"relevance": 5}}"#,
        r#"{"task": "a", "intent": "b", "prompts": ["c"], "controls": {"words": 1}}"#,
    ];
    for line in bad {
        let (_dir, path) = written("rows.jsonl", &format!("{GOOD}{line}\n"));
        let error = format!("{:#}", rows(&path, None).unwrap_err());
        assert!(error.contains("rows.jsonl, line 4"), "{line}: {error}");
    }
}

#[test]
fn the_split_goes_by_intent() {
    let kept = (0..4000).filter(|i| is_held_out(&format!("intent {i}"), 0.05)).count();
    assert!((140..260).contains(&kept), "{kept} of 4000");
    for intent in ["a fox in snow", "An Old Clock", "x"] {
        let shouted = format!("  {}  ", intent.to_uppercase().replace(' ', "   "));
        for fraction in [0.1, 0.5, 0.9] {
            assert_eq!(is_held_out(intent, fraction), is_held_out(&shouted, fraction));
        }
        assert!(is_held_out(intent, 1.0) && !is_held_out(intent, 0.0));
    }
}

/// Published figures are of these intents: which they are may never change.
#[test]
fn the_distilled_intents_are_held_out_as_ever() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/prompter/data");
    for (file, count, first) in [
        ("assistant.jsonl", 41, "help me house train my puppy"),
        ("image.jsonl", 59, "bird migration over mountains"),
        ("music.jsonl", 40, "crickets and frogs night loop, lo-fi"),
        ("template.jsonl", 39, "owl night walk at the nature reserve"),
        ("video.jsonl", 45, "costume party with animals and a piano"),
        ("writing.jsonl", 51, "op-ed defending spiders"),
    ] {
        let rows = rows(&data.join(file), None).unwrap();
        let held_out: Vec<&str> =
            rows.iter().filter(|row| row.is_held_out(0.05)).map(Row::key).collect();
        assert_eq!((held_out.len(), held_out[0]), (count, first), "{file}");
    }
}

#[test]
fn what_was_made_from_a_document_is_on_its_side() {
    let text = r#"{"text": "once", "source": "books:a"}
{"text": "twice", "source": "books:a"}
{"task": "a", "instruction": "go on", "output": "o", "source": "books:a (derived)"}
{"text": "once"}
{"task": "a", "input": "i", "output": "o", "source": "site:rows.csv"}
{"task": "a", "intent": "x", "prompts": ["p"], "source": "books:a"}
"#;
    let (_dir, path) = written("rows.jsonl", text);
    let rows = rows(&path, None).unwrap();
    let keys: Vec<&str> = rows.iter().map(Row::key).collect();
    assert_eq!(keys, ["books:a", "books:a", "books:a", "once", "i", "x"]);
}

#[test]
fn the_tokenizer_begins_with_the_special_tokens_and_survives_its_file() {
    let (dir, path) = written("tokenizer.json", "");
    let texts = PAIRS.map(|p| p.2.to_owned()).into_iter();
    let trained = train(texts, &tasks(), 400).unwrap();
    save(&trained, &path).unwrap();
    let codec = Codec::load(&path).unwrap();
    let specials = special_tokens(&tasks());
    for (id, token) in (0..).zip(&specials) {
        assert_eq!(codec.special(token).unwrap(), id, "{token}");
    }
    assert_eq!((codec.end_of_text, codec.generate), (0, 1));
    assert!(codec.size() <= 400 && codec.size() > specials.len() + 256);
    for text in ["Red fox, dawn.", "naïve café — 日本 🙂", "  two  spaces ", "", "a\nb\tc\0"]
    {
        assert_eq!(codec.decode(&codec.encode(text).unwrap()).unwrap(), text);
    }
    drop(dir);
}

#[test]
fn text_never_becomes_a_control() {
    let codec = codec();
    for text in ["<|gen|>", "a <|endoftext|> b", "<|task:image|><|words:20|>"] {
        let ids = codec.encode(text).unwrap();
        assert!(ids.iter().all(|&id| id as usize >= special_tokens(&tasks()).len()), "{text}");
        assert_eq!(codec.decode(&ids).unwrap(), text);
    }
}

#[test]
fn a_tokenizer_is_trained_alike_each_time() {
    let json = || {
        let texts = PAIRS.map(|p| p.2.to_owned()).into_iter();
        train(texts, &tasks(), 380).unwrap().to_string(false).unwrap()
    };
    assert_eq!(json(), json());
}

#[test]
fn an_example_is_laid_out_as_serving_lays_out_a_request() {
    let codec = codec();
    let fox = example("image", " a fox in the snow ", "Red fox in fresh snow.");
    let sequence = controlled(&codec, &fox, 64, 0.0, &mut Draws::at(&[1])).unwrap().unwrap();
    let mut ids = sequence.tokens.clone();
    ids.push(*sequence.targets.last().unwrap());
    let text = "<|task:image|><|words:5|><|rel:none|>a fox in the snow<|gen|>Red fox in fresh \
                snow.<|endoftext|>";
    assert_eq!(codec.decode(&ids).unwrap(), text);

    let asked = prompt(&codec, &fox, false).unwrap();
    let learnt: Vec<u32> = sequence.targets.iter().copied().filter(|&t| t != IGNORE).collect();
    assert_eq!(learnt, ids[asked.len()..], "the reply and its end, nothing else");
    assert_eq!(sequence.targets.iter().take_while(|&&t| t == IGNORE).count(), asked.len() - 1);
}

#[test]
fn the_shipped_templates_give_the_layout_of_training() {
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/prompter");
    let table = TaskTable::load(&bundle, "prompter").unwrap();
    let shipped: Vec<_> = table.iter().filter(|task| task.name != "prompter").collect();
    let names: Vec<String> = shipped.iter().map(|task| task.name.clone()).collect();
    let texts = PAIRS.map(|p| p.2.to_owned()).into_iter();
    let codec = Codec::new(train(texts, &names, 400).unwrap()).unwrap();
    let input = " \n a fox in the snow\u{a0}\n";
    for task in shipped {
        let template = Template::compile(&task.template).unwrap();
        let controls = [("words".to_owned(), "<|words:5|>".to_owned())].into();
        let served = template.render(input, &controls).unwrap();
        let user: Vec<&str> =
            served.iter().filter(|s| !s.trusted).map(|s| s.text.as_str()).collect();
        assert_eq!(user, ["a fox in the snow"], "{}", task.name);
        let served: String = served.into_iter().map(|segment| segment.text).collect();
        let example = example(&task.name, input, "Red fox in fresh snow.");
        assert_eq!(served, codec.decode(&prompt(&codec, &example, false).unwrap()).unwrap());
    }
}

#[test]
fn labels_say_what_the_output_is() {
    let codec = codec();
    let label = |words: usize, dropped: bool| {
        let fox = example("image", "a fox", &vec!["fox"; words].join("  "));
        codec.decode(&prompt(&codec, &fox, dropped).unwrap()[1..2]).unwrap()
    };
    for words in 3..=60 {
        assert_eq!(label(words, false), format!("<|words:{words}|>"));
        assert_eq!(label(words, true), "<|words:none|>");
    }
    for words in [1, 2, 61, 100] {
        assert_eq!(label(words, false), "<|words:none|>");
    }
    let unknown = example("poetry", "a fox", "three words here");
    assert!(prompt(&codec, &unknown, false).is_err());
}

#[test]
fn controls_are_dropped_as_often_as_asked() {
    let codec = codec();
    let fox = example("image", "a fox", "Red fox in snow");
    let none = codec.special("<|words:none|>").unwrap();
    let dropped = |i: &u64| {
        let mut draws = Draws::at(&[*i]);
        let sequence = controlled(&codec, &fox, 64, 0.1, &mut draws).unwrap().unwrap();
        sequence.tokens[1] == none
    };
    let count = (0..3000).filter(dropped).count();
    assert!((240..360).contains(&count), "{count} of 3000");
}

#[test]
fn what_does_not_fit_is_left_out_whole() {
    let codec = codec();
    let fox = example("image", "a fox", "Red fox in fresh snow at dawn");
    let whole = controlled(&codec, &fox, 64, 0.0, &mut Draws::at(&[])).unwrap().unwrap();
    let at = |context| controlled(&codec, &fox, context, 0.0, &mut Draws::at(&[])).unwrap();
    assert_eq!(at(whole.len()), Some(whole.clone()));
    assert_eq!(at(whole.len() - 1), None);
}

proptest! {
    #[test]
    fn packing_loses_nothing(
        lengths in prop::collection::vec(1usize..40, 1..30),
        rows in 40usize..120,
    ) {
        let mut next = 0;
        let mut count = |n: usize| -> Vec<u32> { (0..n).map(|_| { next += 1; next }).collect() };
        let sequences: Vec<Sequence> = lengths
            .iter()
            .map(|&n| { let tokens = count(n); Sequence { targets: tokens.clone(), tokens } })
            .collect();
        let batches = group(&sequences, rows);
        let all: Vec<u32> = batches.iter().flat_map(|b| b.tokens.clone()).collect();
        prop_assert_eq!(&all, &(1..=next).collect::<Vec<_>>());
        for batch in &batches {
            prop_assert!(batch.tokens.len() <= rows);
            prop_assert_eq!(&batch.tokens, &batch.targets);
            for (start, end) in batch.starts.iter().zip(&batch.starts[1..]) {
                let positions: Vec<u32> = (0..(end - start) as u32).collect();
                prop_assert_eq!(&batch.positions[*start..*end], &positions[..]);
            }
            prop_assert_eq!(batch.starts.last(), Some(&batch.tokens.len()));
        }
    }
}

#[test]
fn a_plain_sequence_is_cut_to_the_context() {
    let ids: Vec<u32> = (0..10).collect();
    let sequence = Sequence::plain(&ids, 4);
    assert_eq!((sequence.tokens, sequence.targets), (vec![0, 1, 2, 3], vec![1, 2, 3, 4]));
    assert!(Sequence::plain(&ids[..1], 4).is_empty());
    assert_eq!(Batch::pack(&[Sequence::plain(&ids, 20)]).learnt(), 9);
}
