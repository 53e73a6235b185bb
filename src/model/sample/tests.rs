//! Against exact distributions, against candle's sampler where the two agree on the meaning, and
//! properties of the parts.

use super::*;
use crate::request::Params;
use candle_core::{Device, Tensor};
use candle_transformers::generation::{self, LogitsProcessor};
use proptest::prelude::*;
use std::sync::Arc;

fn row(params: Params) -> SampleRow {
    SampleRow {
        row: 0,
        sampling: Arc::new(params.sampling()),
        seed: 11,
        index: 0,
        history: Vec::new(),
        prompt_len: 0,
        banned: Vec::new(),
        allowed: None,
    }
}

fn greedy() -> Params {
    Params { temperature: Some(0.0), ..Params::default() }
}

fn token(logits: &[f32], row: &SampleRow) -> u32 {
    choose(logits, row).unwrap().token
}

/// Uneven logits with ties and a long tail.
fn logits(vocab: usize) -> Vec<f32> {
    (0..vocab).map(|i| ((i * 37 % 101) as f32 / 12.0).floor()).collect()
}

/// The distribution by the plainest means: sort everything, cut, normalise.
fn exact(logits: &[f32], p: &Params) -> Vec<f64> {
    let t = f64::from(p.temperature.unwrap_or(1.0));
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    if let Some(k) = p.top_k.filter(|&k| k > 0) {
        order.truncate(k as usize);
    }
    let weight = |i: usize| (f64::from(logits[i] - logits[order[0]]) / t).exp();
    let total: f64 = order.iter().map(|&i| weight(i)).sum();
    let mut reached = 0.0;
    let mut probabilities = vec![0.0; logits.len()];
    for &i in &order {
        if reached < f64::from(p.top_p.unwrap_or(1.0)) * total
            && weight(i) >= f64::from(p.min_p.unwrap_or(0.0))
        {
            probabilities[i] = weight(i);
        }
        reached += weight(i);
    }
    let kept: f64 = probabilities.iter().sum();
    probabilities.iter().map(|p| p / kept).collect()
}

fn assert_frequencies(counts: &[u32], probabilities: &[f64], what: &str) {
    let n = f64::from(counts.iter().sum::<u32>());
    for (id, (&count, &p)) in counts.iter().zip(probabilities).enumerate() {
        assert!(p > 0.0 || count == 0, "{what}: token {id} was cut but came {count} times");
        let deviations = (f64::from(count) - n * p).abs() / (n * p * (1.0 - p)).sqrt().max(1.0);
        assert!(deviations < 5.0, "{what}: token {id} came {count} times, not {}", n * p);
    }
}

#[test]
fn frequencies_are_the_exact_probabilities() {
    let logits = logits(300);
    let cases = [
        Params::default(),
        Params { temperature: Some(0.6), ..Params::default() },
        Params { top_k: Some(7), ..Params::default() },
        Params { top_k: Some(5000), ..Params::default() },
        Params { top_p: Some(0.8), ..Params::default() },
        Params { top_p: Some(0.02), ..Params::default() },
        Params { min_p: Some(0.1), temperature: Some(1.5), ..Params::default() },
        Params { top_k: Some(40), top_p: Some(0.9), min_p: Some(0.2), ..Params::default() },
    ];
    for params in cases {
        let mut counts = vec![0; logits.len()];
        let mut row = row(params.clone());
        for index in 0..20_000 {
            row.index = index;
            counts[token(&logits, &row) as usize] += 1;
        }
        assert_frequencies(&counts, &exact(&logits, &params), &format!("{params:?}"));
    }
}

#[test]
fn candles_sampler_agrees() {
    let logits = logits(200);
    let tensor = Tensor::new(&logits[..], &Device::Cpu).unwrap();
    let t = Some(0.8);
    let cases = [
        (generation::Sampling::ArgMax, greedy()),
        (
            generation::Sampling::All { temperature: 0.8 },
            Params { temperature: t, ..Params::default() },
        ),
        (
            generation::Sampling::TopK { k: 9, temperature: 0.8 },
            Params { temperature: t, top_k: Some(9), ..Params::default() },
        ),
        (
            generation::Sampling::TopP { p: 0.7, temperature: 0.8 },
            Params { temperature: t, top_p: Some(0.7), ..Params::default() },
        ),
    ];
    for (sampling, params) in cases {
        let what = format!("{sampling:?}");
        let ours = match params.temperature {
            Some(0.0) => {
                let mut one = vec![0.0; logits.len()];
                one[token(&logits, &row(params)) as usize] = 1.0;
                one
            }
            _ => exact(&logits, &params),
        };
        // At equal probability candle cuts anywhere among the tied, so only whole classes compare.
        let class = |i: usize| logits[i] as usize;
        let mut by_class = vec![0.0; 10];
        ours.iter().enumerate().for_each(|(i, p)| by_class[class(i)] += p);
        let mut processor = LogitsProcessor::from_sampling(5, sampling);
        let mut counts = vec![0; 10];
        for _ in 0..4_000 {
            counts[class(processor.sample(&tensor).unwrap() as usize)] += 1;
        }
        assert_frequencies(&counts, &by_class, &what);
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    assert_eq!(token(&[1.0, 3.0, 3.0, 2.0], &row(greedy())), 1);
    assert_eq!(top(&[1.0, 3.0, 3.0, 2.0, 3.0], 2), [1, 2]);
    let one = Params { top_k: Some(1), ..Params::default() };
    assert_eq!(token(&[1.0, 3.0, 3.0], &row(one)), 1);
}

#[test]
fn bias_and_bans_are_obeyed() {
    let biased = Params { logit_bias: Some([(2, 5.0)].into()), ..greedy() };
    assert_eq!(token(&[3.0, 1.0, 0.0], &row(biased.clone())), 2);
    let banned = SampleRow { banned: vec![2, 0], ..row(biased) };
    assert_eq!(token(&[3.0, 1.0, 0.0], &banned), 1);
    let all = SampleRow { banned: vec![0, 1, 2], ..row(greedy()) };
    assert!(choose(&[3.0, 1.0, 0.0], &all).is_err());
    let unknown = SampleRow { banned: vec![3], ..row(greedy()) };
    assert!(choose(&[3.0, 1.0, 0.0], &unknown).is_err());
}

#[test]
fn only_what_is_allowed_is_chosen() {
    let logits: Vec<f32> = (0..100).map(|token| token as f32).collect();
    let only = |words: &[u32], params| SampleRow { allowed: Some(words.to_vec()), ..row(params) };
    assert_eq!(token(&logits, &only(&[u32::MAX, 0b110], greedy())), 34);
    assert_eq!(token(&logits, &only(&[0, 0, 0, 0b1001, u32::MAX], greedy())), 99);
    let hot = Params { temperature: Some(2.0), ..Params::default() };
    assert_eq!(token(&logits, &only(&[0b100], hot.clone())), 2, "of a hundred that are likelier");
    let pushed = Params { logit_bias: Some([(7, 100.0)].into()), ..greedy() };
    assert_eq!(token(&logits, &only(&[0b100], pushed)), 2);
    assert!(choose(&logits, &only(&[], hot.clone())).is_err());
    let all = choose(&logits, &only(&[u32::MAX; 4], hot.clone()));
    assert_eq!(all, choose(&logits, &row(hot)));
    let logprobs = Params { logprobs: Some(1), ..greedy() };
    let chosen = choose(&logits, &only(&[0b100], logprobs)).unwrap().logprob.unwrap();
    assert_eq!((chosen.token, chosen.top[0].0), (2, 99), "as the model has it");
}

#[test]
fn penalties_count_what_they_should() {
    let params = Params {
        repetition_penalty: Some(2.0),
        presence_penalty: Some(0.5),
        frequency_penalty: Some(0.25),
        ..greedy()
    };
    // Token 0 is only in the prompt, 1 in both, 2 twice in the output, 3 nowhere.
    let row = SampleRow { history: vec![0, 1, 1, 2, 2], prompt_len: 2, ..row(params) };
    let adjusted = adjusted(&[4.0, -4.0, 4.0, 4.0], &row).unwrap();
    assert_eq!(&adjusted[..], [2.0, -8.75, 1.0, 4.0]);
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let params = Params { logprobs: Some(2), logit_bias: Some([(0, 50.0)].into()), ..greedy() };
    let chosen = choose(&[0.0, 1.0, 2.0], &row(params)).unwrap();
    let log_sum = (1.0f32 + 1.0f32.exp() + 2.0f32.exp()).ln();
    let report = chosen.logprob.unwrap();
    assert_eq!((chosen.token, report.token), (0, 0));
    assert!((report.logprob + log_sum).abs() < 1e-6);
    assert_eq!(report.top.iter().map(|t| t.0).collect::<Vec<_>>(), [2, 1]);
    let scored = score(&[0.0, 1.0, 2.0], &ScoreRow { row: 0, target: 2, top: 0 }).unwrap();
    assert!((scored.logprob - (2.0 - log_sum)).abs() < 1e-6 && scored.top.is_empty());
}

#[test]
fn what_is_not_finite_is_an_error() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(choose(&[0.0, bad, 1.0], &row(Params::default())).is_err());
        let scored = ScoreRow { row: 0, target: 0, top: 1 };
        assert!(score(&[0.0, bad, 1.0], &scored).is_err());
    }
    // A tiny penalty overflows f32: an error as well, not a panic.
    let params = Params { repetition_penalty: Some(f32::MIN_POSITIVE), ..Params::default() };
    let overflow = SampleRow { history: vec![0], ..row(params) };
    assert!(choose(&[1e30, 0.0], &overflow).is_err());
}

#[test]
fn draws_are_uniform_and_independent() {
    for (what, draw) in [
        ("indices", &(|i| uniform(3, i)) as &dyn Fn(u32) -> f64),
        ("seeds", &|i| uniform(u64::from(i), 0)),
        ("seeds far apart", &|i| uniform(u64::from(i) << 40, 7)),
    ] {
        let draws: Vec<f64> = (0..4096).map(draw).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mut sorted = draws.clone();
        sorted.sort_by(f64::total_cmp);
        // Kolmogorov and Smirnov's distance: 1.95 / sqrt(n) is passed once in a thousand.
        let distance = |(i, u): (usize, &f64)| (u - i as f64 / 4096.0).abs();
        let furthest = sorted.iter().enumerate().map(distance).fold(0.0, f64::max);
        assert!(furthest < 1.95 / 64.0, "{what}: {furthest}");
        let product = |w: &[f64]| (w[0] - 0.5) * (w[1] - 0.5);
        let correlation = draws.windows(2).map(product).sum::<f64>() / 4095.0 * 12.0;
        assert!(correlation.abs() < 5.0 / 64.0, "{what}: {correlation}");
    }
}

fn some_logits() -> impl Strategy<Value = Vec<f32>> {
    // Few distinct values make ties; many tokens make the nucleus outgrow its first guess.
    prop_oneof![
        prop::collection::vec((-8i8..8).prop_map(f32::from), 1..1500),
        prop::collection::vec(-20.0f32..20.0, 1..300),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn top_is_a_head_of_the_ranking(logits in some_logits(), k in 0usize..200) {
        let mut ranking: Vec<u32> = (0..logits.len() as u32).collect();
        ranking.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        ranking.truncate(k);
        prop_assert_eq!(top(&logits, k), ranking);
    }

    #[test]
    fn the_nucleus_is_minimal(logits in some_logits(), p in 0.001f32..1.0) {
        let weights: Vec<f32> = logits.iter().map(|l| (l / 4.0).exp()).collect();
        let wanted = sum(&weights) * f64::from(p);
        let mut kept = weights.clone();
        keep_nucleus(&mut kept, p);
        let size = kept.iter().filter(|&&w| w > 0.0).count();
        let mut ids = top(&weights, size);
        let smallest = f64::from(weights[ids[size - 1] as usize]);
        prop_assert!(sum(&kept) >= wanted * (1.0 - 1e-9));
        prop_assert!(sum(&kept) - smallest < wanted * (1.0 + 1e-9));
        ids.sort();
        let left = (0u32..).zip(&kept).filter(|(_, w)| **w > 0.0).map(|(id, _)| id);
        prop_assert_eq!(left.collect::<Vec<_>>(), ids);
    }

    #[test]
    fn truncation_that_cuts_nothing_changes_nothing(logits in some_logits(), seed in any::<u64>()) {
        let plain = SampleRow { seed, ..row(Params::default()) };
        let all = Params { top_k: Some(logits.len() as i64), ..Params::default() };
        let all = SampleRow { seed, ..row(all) };
        prop_assert_eq!(token(&logits, &plain), token(&logits, &all));
    }

    #[test]
    fn banned_tokens_never_come(
        logits in prop::collection::vec(-20.0f32..20.0, 2..200),
        temperature in prop_oneof![Just(0.0f32), Just(1e-30f32), 0.01f32..2.0],
        top_k in 0i64..300,
        top_p in 0.01f32..=1.0,
        min_p in 0.0f32..=1.0,
        seed in any::<u64>(),
        banned in prop::collection::vec(0u32..100, 0..50),
    ) {
        let params = Params {
            temperature: Some(temperature),
            top_k: Some(top_k),
            top_p: Some(top_p),
            min_p: Some(min_p),
            ..Params::default()
        };
        let banned: Vec<u32> = banned.into_iter().filter(|&b| (b as usize) < logits.len()).collect();
        let row = SampleRow { seed, banned: banned.clone(), ..row(params) };
        match choose(&logits, &row) {
            Ok(sampled) => prop_assert!(!banned.contains(&sampled.token)),
            Err(_) => prop_assert!((0..logits.len() as u32).all(|t| banned.contains(&t))),
        }
    }
}
