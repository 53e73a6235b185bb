//! Whole runs: the loop, checkpoints, the bundle that comes out.

use super::{Kitchen, PAIRS, example};
use crate::model::step::{Runner, SampleRow, Slice, StepInput};
use crate::model::{self, LoadOptions};
use crate::request::Sampling;
use crate::train::checkpoint;
use crate::train::objective::prompt;
use crate::train::report::{CURVE, Entry, LOG};
use crate::train::run::{Job, Outcome, export_checkpoint, run};
use crate::train::tokenizer::Codec;
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

fn job(kitchen: &Kitchen, out: &str, max_time: Option<Duration>) -> Job {
    Job {
        recipe: kitchen.recipe(),
        data: None,
        out: kitchen.path().join(out),
        max_time,
        signals: false,
        accept_changed_recipe: false,
    }
}

fn losses(out: &Path) -> Vec<(u64, f64)> {
    let log = fs::read_to_string(out.join(LOG)).unwrap();
    let entries = log.lines().map(|line| serde_json::from_str(line).unwrap());
    let steps = entries.filter_map(|entry| match entry {
        Entry::Step { total_steps, loss, .. } => Some((total_steps, loss)),
        Entry::HeldOut { .. } => None,
    });
    steps.collect()
}

fn bits(tensors: &BTreeMap<String, Tensor>) -> BTreeMap<&str, Vec<u32>> {
    let bits = |t: &Tensor| {
        let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    tensors.iter().map(|(name, t)| (name.as_str(), bits(t))).collect()
}

/// Stopped after every single step, a run is bit for bit the one that was never stopped.
#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    let kitchen = Kitchen::new(5, 1e-3);
    assert_eq!(run(&job(&kitchen, "whole", None)).unwrap(), Outcome::Finished);
    let stopping = job(&kitchen, "stopped", Some(Duration::ZERO));
    let mut stops = 0;
    while run(&stopping).unwrap() == Outcome::Stopped {
        stops += 1;
    }
    assert!(stops >= 4, "{stops}");
    let load = |out: &str| checkpoint::load(&kitchen.path().join(out)).unwrap().unwrap();
    let ((whole, mut at), (stopped, stopped_at)) = (load("whole"), load("stopped"));
    assert_eq!(bits(&whole), bits(&stopped));
    at.seconds = stopped_at.seconds;
    assert_eq!(at, stopped_at);
    let log = |out: &str| losses(&kitchen.path().join(out));
    assert_eq!(log("whole"), log("stopped"));
    assert_eq!(log("whole").len(), 7);
}

#[test]
fn lines_of_a_lost_run_leave_the_log() {
    let kitchen = Kitchen::new(4, 1e-3);
    let stopping = job(&kitchen, "out", Some(Duration::ZERO));
    assert_eq!(run(&stopping).unwrap(), Outcome::Stopped);
    let log = stopping.out.join(LOG);
    let kept = fs::read_to_string(&log).unwrap();
    let first: serde_json::Value = serde_json::from_str(kept.lines().next().unwrap()).unwrap();
    let mut lost = first.clone();
    lost["total_steps"] = 2.into();
    fs::write(&log, format!("{first}\n{lost}\n{{\"kind\": \"st")).unwrap();
    // Nor does a checkpoint whose writing was cut short count.
    fs::write(stopping.out.join("checkpoint.partial"), "x").unwrap();
    run(&job(&kitchen, "out", None)).unwrap();
    let steps: Vec<u64> = losses(&stopping.out).iter().map(|l| l.0).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_log_that_is_broken_before_its_end_is_left_alone() {
    let kitchen = Kitchen::new(4, 1e-3);
    let job = job(&kitchen, "out", Some(Duration::ZERO));
    run(&job).unwrap();
    let log = job.out.join(LOG);
    let broken = format!("{{\"kind\": \"st\n{}", fs::read_to_string(&log).unwrap());
    fs::write(&log, &broken).unwrap();
    let error = format!("{:#}", run(&job).unwrap_err());
    assert!(error.contains("log.jsonl: line 1"), "{error}");
    assert_eq!(fs::read_to_string(&log).unwrap(), broken);
}

#[test]
fn a_changed_recipe_is_refused_unless_accepted() {
    let kitchen = Kitchen::new(2, 1e-3);
    let stopping = job(&kitchen, "out", Some(Duration::ZERO));
    run(&stopping).unwrap();
    kitchen.change("steps = 2\n", "steps = 3\n");
    kitchen.change("every = 1000", "every = 500");
    run(&stopping).expect("lengths of stages may change");
    kitchen.change("weight_decay = 0.0", "weight_decay = 0.1");
    let exported = kitchen.path().join("exported");
    for refused in [run(&stopping).map(|_| ()), export_checkpoint(&stopping, &exported)] {
        let error = format!("{:#}", refused.unwrap_err());
        assert!(error.contains("train.toml has changed since the checkpoint"), "{error}");
        assert!(error.contains("--accept-changed-recipe"), "{error}");
    }
    let accepting = Job { accept_changed_recipe: true, ..stopping.clone() };
    export_checkpoint(&accepting, &exported).unwrap();
    assert_eq!(run(&accepting).unwrap(), Outcome::Stopped);
    run(&stopping).expect("what was accepted is the checkpoint's recipe from then on");
}

#[test]
fn a_checkpoint_that_names_no_recipe_goes_on() {
    let kitchen = Kitchen::new(2, 1e-3);
    let job = job(&kitchen, "out", Some(Duration::ZERO));
    run(&job).unwrap();
    let (tensors, mut position) = checkpoint::load(&job.out).unwrap().unwrap();
    position.recipe = None;
    let json = serde_json::to_value(&position).unwrap();
    let mut old = json.clone();
    old.as_object_mut().unwrap().remove("recipe").unwrap();
    assert_eq!(serde_json::from_value::<checkpoint::Position>(old).unwrap(), position);
    let tensors: Vec<_> = tensors.into_iter().collect();
    checkpoint::save(&job.out, &tensors, &position).unwrap();
    kitchen.change("weight_decay = 0.0", "weight_decay = 0.1");
    export_checkpoint(&job, &kitchen.path().join("exported")).unwrap();
    assert_eq!(run(&job).unwrap(), Outcome::Stopped);
}

#[test]
fn a_broken_checkpoint_or_another_shape_is_refused() {
    let kitchen = Kitchen::new(2, 1e-3);
    run(&job(&kitchen, "out", Some(Duration::ZERO))).unwrap();
    kitchen.change("width = 64", "width = 32");
    let accepting = Job { accept_changed_recipe: true, ..job(&kitchen, "out", None) };
    let error = format!("{:#}", run(&accepting).unwrap_err());
    assert!(error.contains("transformer.wte.weight"), "{error}");
    fs::write(kitchen.path().join("out").join(checkpoint::FILE), "broken").unwrap();
    let error = format!("{:#}", run(&job(&kitchen, "out", None)).unwrap_err());
    assert!(error.contains("cannot resume from"), "{error}");
}

#[test]
fn data_that_is_missing_or_differs_is_named() {
    let kitchen = Kitchen::new(2, 1e-3);
    let data = kitchen.path().join("data/pairs.jsonl");
    fs::write(&data, "{\"text\": \"other\"}\n").unwrap();
    let error = format!("{:#}", run(&job(&kitchen, "out", None)).unwrap_err());
    assert!(error.contains("pairs.jsonl has SHA-256"), "{error}");
    fs::remove_file(&data).unwrap();
    let error = format!("{:#}", run(&job(&kitchen, "out", None)).unwrap_err());
    assert!(error.contains("pairs.jsonl is not in "), "{error}");
}

/// Greedy continuation of `ids` by the serving runner.
fn greedy(runner: &mut impl Runner, ids: &[u32], end: u32) -> Vec<u32> {
    let capacity = runner.capacity();
    let blocks = capacity.context.div_ceil(capacity.block_size);
    let sampling = Arc::new(Sampling {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        logprobs: None,
    });
    let (mut reply, mut rows, mut first) = (Vec::new(), ids.to_vec(), 0u32);
    loop {
        let sample = SampleRow {
            row: rows.len() - 1,
            sampling: sampling.clone(),
            seed: 0,
            index: reply.len() as u32,
            history: Vec::new(),
            prompt_len: ids.len(),
            banned: Vec::new(),
            allowed: None,
        };
        let input = StepInput {
            positions: (first..first + rows.len() as u32).collect(),
            slices: vec![Slice { rows: 0..rows.len(), table: 0..blocks, gate: None }],
            block_tables: (0..blocks as u32).collect(),
            adapters: Vec::new(),
            samples: vec![sample],
            scores: Vec::new(),
            tokens: rows.clone(),
        };
        let token = runner.step(&input).unwrap().sampled[0].as_ref().unwrap().token;
        first += rows.len() as u32;
        if token == end || first as usize >= capacity.context {
            return reply;
        }
        reply.push(token);
        rows = vec![token];
    }
}

/// From examples to a served model: learnt by heart, written as a bundle, read back, answered.
#[test]
fn a_model_learns_its_examples_by_heart_and_serves_them() {
    let kitchen = Kitchen::new(150, 5e-3);
    fs::create_dir(kitchen.path().join("tasks")).unwrap();
    fs::write(kitchen.path().join("tasks/image.toml"), "description = 'x'\n").unwrap();
    assert_eq!(run(&job(&kitchen, "out", None)).unwrap(), Outcome::Finished);
    let out = kitchen.path().join("out");
    let (_, last) = *losses(&out).last().unwrap();
    assert!(last < 0.02, "final loss {last}");
    assert!(fs::read_to_string(out.join(CURVE)).unwrap().contains("</svg>"));

    let bundle = out.join("bundle");
    for file in ["tokenizer_config.json", "train.toml", "tasks/image.toml", "data/pairs.jsonl"] {
        assert!(bundle.join(file).is_file(), "{file}");
    }
    let codec = Codec::load(&bundle.join("tokenizer.json")).unwrap();
    let mut runner = model::load(&bundle, &LoadOptions::default()).unwrap();
    for (task, input, output) in PAIRS {
        let ids = prompt(&codec, &example(task, input, output), false).unwrap();
        let reply = greedy(&mut runner, &ids, codec.end_of_text);
        assert_eq!(codec.decode(&reply).unwrap(), output, "{task}: {input}");
    }

    let again = kitchen.path().join("again");
    fs::create_dir_all(again.join("tasks")).unwrap();
    for stale in ["train.toml", "tasks/image.toml"] {
        fs::write(again.join(stale), "stale").unwrap();
    }
    export_checkpoint(&job(&kitchen, "out", None), &again).unwrap();
    for fresh in ["train.toml", "tasks/image.toml"] {
        assert_eq!(fs::read(again.join(fresh)).unwrap(), fs::read(bundle.join(fresh)).unwrap());
    }
    let mode = |file: &str| fs::metadata(again.join(file)).unwrap().permissions().mode();
    assert_eq!(mode("model.safetensors"), mode("config.json"), "others may read the weights");
    let weights = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
    assert!(weights(&again) == weights(&bundle), "the checkpoint gives the same bundle");

    // A bundle over the recipe's own folder keeps what it was made from.
    export_checkpoint(&job(&kitchen, "out", None), kitchen.path()).unwrap();
    assert!(weights(kitchen.path()) == weights(&bundle));
    assert_eq!(fs::read(kitchen.recipe()).unwrap(), fs::read(bundle.join("train.toml")).unwrap());
}
