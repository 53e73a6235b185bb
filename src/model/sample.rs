//! From a row of logits to a token.
//!
//! In order: bias, penalties, tokens that are banned or not allowed, temperature, top-k, top-p, min-p, draw. Log-probabilities
//! are those of the raw logits, before all of that. Invariants: the outcome is a function of the row,
//! its [`SampleRow`] and nothing else, so a seed gives the same text in any batch; ties go to the
//! lowest id.
//!
//! candle-transformers' `LogitsProcessor` is what the tests compare with, not what runs: its generator
//! is a state that advances with each call (here the draw is a function of seed and index, so that
//! preemption and batch order cannot change it), it sorts the whole vocabulary for top-p, and it
//! knows neither min-p nor penalties.

use super::step::{RowError, SampleRow, Sampled, ScoreRow};
use crate::ids::{GAMMA, mix};
use crate::kernels::{BLOCK, block_sums, exponentials, largest};
use crate::request::{Sampling, TokenLogprob};
use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// Chooses the next token. Fails on logits that are not finite and if every token is banned.
pub fn choose(raw: &[f32], row: &SampleRow) -> Result<Sampled, RowError> {
    let max = finite(raw)?;
    let logits = adjusted(raw, row)?;
    let max = match &logits {
        Cow::Borrowed(_) => max,
        Cow::Owned(logits) => logits.iter().copied().fold(f32::NEG_INFINITY, f32::max),
    };
    let best = logits.iter().position(|&l| l == max).filter(|_| max.is_finite());
    let best = best.ok_or("no token is left to choose from")? as u32;
    let token = match row.sampling.temperature {
        0.0 => best,
        _ => draw(&logits, best, &row.sampling, uniform(row.seed, row.index))?,
    };
    let logprob = row.sampling.logprobs.map(|top| logprob(raw, token, top));
    Ok(Sampled { token, logprob })
}

/// Scores a token that is known to follow.
pub fn score(raw: &[f32], row: &ScoreRow) -> Result<TokenLogprob, RowError> {
    finite(raw)?;
    if row.target as usize >= raw.len() {
        return Err(outside(row.target, raw.len()));
    }
    Ok(logprob(raw, row.target, row.top))
}

/// The random draw of a seed's `index`-th token, in [0, 1): SplitMix64 as a counter-based generator.
fn uniform(seed: u64, index: u32) -> f64 {
    // Mixing the seed first keeps neighbouring seeds from being shifted copies of one stream.
    let start = mix(seed.wrapping_add(GAMMA));
    let bits = mix(start.wrapping_add(GAMMA.wrapping_mul(u64::from(index) + 1)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The largest of the logits, if all are finite.
fn finite(raw: &[f32]) -> Result<f32, RowError> {
    largest(raw).ok_or_else(|| "the model gave logits that are not finite".into())
}

fn outside(token: u32, vocab: usize) -> RowError {
    format!("token {token} is outside a vocabulary of {vocab}")
}

/// The logits after bias, penalties and bans; what must not be chosen has minus infinity.
fn adjusted<'a>(raw: &'a [f32], row: &SampleRow) -> Result<Cow<'a, [f32]>, RowError> {
    let sampling = &*row.sampling;
    let mut logits = Cow::Borrowed(raw);
    if !sampling.logit_bias.is_empty() {
        for &(token, bias) in &sampling.logit_bias {
            *logit(&mut logits, token)? += bias;
        }
    }
    if sampling.needs_history() {
        for (token, count) in output_counts(row) {
            let l = logit(&mut logits, token)?;
            let repetition = sampling.repetition_penalty;
            *l = if *l < 0.0 { *l * repetition } else { *l / repetition };
            if count > 0 {
                *l -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
            }
        }
    }
    for &token in &row.banned {
        *logit(&mut logits, token)? = f32::NEG_INFINITY;
    }
    if let Some(allowed) = &row.allowed {
        keep_allowed(logits.to_mut(), allowed);
    }
    Ok(logits)
}

/// Makes impossible what has no bit.
fn keep_allowed(logits: &mut [f32], allowed: &[u32]) {
    let words = allowed.iter().copied().chain(std::iter::repeat(0));
    for (logits, word) in logits.chunks_mut(u32::BITS as usize).zip(words) {
        match word {
            0 => logits.fill(f32::NEG_INFINITY),
            u32::MAX => {}
            word => {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

fn logit<'l>(logits: &'l mut Cow<'_, [f32]>, token: u32) -> Result<&'l mut f32, RowError> {
    let vocab = logits.len();
    logits.to_mut().get_mut(token as usize).ok_or_else(|| outside(token, vocab))
}

/// How often each token of the history was generated; 0 for those that only the prompt has.
fn output_counts(row: &SampleRow) -> BTreeMap<u32, u32> {
    let mut counts = BTreeMap::new();
    for (i, &token) in row.history.iter().enumerate() {
        *counts.entry(token).or_insert(0) += u32::from(i >= row.prompt_len);
    }
    counts
}

/// Draws a token by `u` in [0, 1) from what temperature and truncation leave. Tokens are laid end to end
/// in the order of their ids, so truncation that cuts nothing changes nothing.
fn draw(logits: &[f32], best: u32, sampling: &Sampling, u: f64) -> Result<u32, RowError> {
    let k = sampling.top_k as usize;
    let ids = (1..logits.len()).contains(&k).then(|| {
        let mut ids = top(logits, k);
        ids.sort_unstable();
        ids
    });
    let left: Cow<'_, [f32]> = match &ids {
        Some(ids) => ids.iter().map(|&id| logits[id as usize]).collect(),
        None => logits.into(),
    };
    let mut weights = exponentials(&left, logits[best as usize], sampling.temperature);
    let possible = weights.iter_mut().zip(&*left);
    possible.for_each(|(w, &l)| *w = if l == f32::NEG_INFINITY { 0.0 } else { *w });
    if sampling.top_p < 1.0 {
        keep_nucleus(&mut weights, sampling.top_p);
    }
    // The likeliest token's weight is 1, so a share of it is the share itself.
    if sampling.min_p > 0.0 {
        weights.iter_mut().filter(|w| **w < sampling.min_p).for_each(|w| *w = 0.0);
    }
    let at = pick(&weights, u).ok_or("sampling weights are not finite")?;
    Ok(ids.map_or(at as u32, |ids| ids[at]))
}

fn sum(weights: &[f32]) -> f64 {
    block_sums(weights).into_iter().map(f64::from).sum()
}

/// The first index whose cumulative share exceeds `u`.
fn pick(weights: &[f32], u: f64) -> Option<usize> {
    let sums = block_sums(weights);
    let total: f64 = sums.iter().copied().map(f64::from).sum();
    if !(total > 0.0 && total.is_finite()) {
        return None;
    }
    let target = u * total;
    let mut reached = 0.0;
    let mut exceeds = |weight: f32| {
        reached += f64::from(weight);
        reached > target
    };
    // Rounding can leave none: then it is the last that is possible.
    let Some(block) = sums.iter().position(|&sum| exceeds(sum)) else {
        return weights.iter().rposition(|&w| w > 0.0);
    };
    reached -= f64::from(sums[block]);
    let own = &weights[block * BLOCK..((block + 1) * BLOCK).min(weights.len())];
    let found = own.iter().position(|&w| {
        reached += f64::from(w);
        reached > target
    });
    found.or_else(|| own.iter().rposition(|&w| w > 0.0)).map(|at| block * BLOCK + at)
}

/// How two tokens rank: the likelier first, of equals the lower id.
fn rank(scores: &[f32], a: u32, b: u32) -> Ordering {
    scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b))
}

/// The `k` best tokens, best first, in one pass over the vocabulary.
fn top(scores: &[f32], k: usize) -> Vec<u32> {
    let mut kept: Vec<u32> = Vec::new();
    let mut floor = f32::NEG_INFINITY;
    for (id, &score) in (0u32..).zip(scores) {
        // Of equals the earlier, already kept, is the better.
        if score > floor {
            kept.push(id);
            if k > 0 && kept.len() == 2 * k {
                kept.select_nth_unstable_by(k - 1, |&a, &b| rank(scores, a, b));
                kept.truncate(k);
                floor = scores[kept[k - 1] as usize];
            }
        }
    }
    kept.sort_unstable_by(|&a, &b| rank(scores, a, b));
    kept.truncate(k);
    kept
}

/// Zeroes all but the smallest set of tokens that has a share `p` of the weight.
///
/// The set is a head of the ranking. Which token is its last is found by bisection over an ever better
/// sorted range, so that no more is sorted than must be; mostly the 64 best hold it.
fn keep_nucleus(weights: &mut [f32], p: f32) {
    let mass = |ids: &[u32]| ids.iter().map(|&id| f64::from(weights[id as usize])).sum::<f64>();
    let mut missing = sum(weights) * f64::from(p);
    let mut ids = top(weights, 64);
    if mass(&ids) < missing {
        ids = (0..weights.len() as u32).collect();
    }
    let (mut start, mut end) = (0, ids.len());
    while end - start > 1 {
        let half = (end - start) / 2;
        ids[start..end].select_nth_unstable_by(half, |&a, &b| rank(weights, a, b));
        let better = mass(&ids[start..start + half]);
        if better >= missing {
            end = start + half;
        } else {
            missing -= better;
            start += half;
        }
    }
    let Some(&last) = ids.get(start) else { return };
    let (cut, last_id) = (weights[last as usize], last as usize);
    for (id, w) in weights.iter_mut().enumerate() {
        if *w < cut || (*w == cut && id > last_id) {
            *w = 0.0;
        }
    }
}

/// A token's log-probability and the `n` likeliest tokens with theirs.
fn logprob(raw: &[f32], token: u32, n: u32) -> TokenLogprob {
    let max = raw.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let log_sum = f64::from(max) + sum(&exponentials(raw, max, 1.0)).ln();
    let of = |token: u32| (f64::from(raw[token as usize]) - log_sum) as f32;
    let best = if n == 0 { Vec::new() } else { top(raw, n as usize) };
    let top = best.into_iter().map(|t| (t, of(t))).collect();
    TokenLogprob { token, logprob: of(token), top }
}

#[cfg(test)]
mod tests;
