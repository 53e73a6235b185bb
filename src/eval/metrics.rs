//! The figures of `shoal eval` as plain functions of texts and numbers: no model, no files.

use serde::Serialize;
use std::collections::HashSet;

/// How near a wanted length counts as met, in words.
const NEAR: usize = 2;

/// Words of a text as it is compared here: split at white space, lower case, no outer punctuation.
fn plain_words(text: &str) -> impl Iterator<Item = String> {
    let bare = |word: &str| word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
    text.split_whitespace().map(bare).filter(|word| !word.is_empty())
}

/// Distinct-n: different runs of `n` words over all runs, within texts, over all of them together.
/// More text gives a lower figure, so compare equal amounts. `None` without a run.
pub fn distinct<'a>(texts: impl IntoIterator<Item = &'a str>, n: usize) -> Option<f64> {
    let mut seen = HashSet::new();
    let mut total = 0usize;
    for text in texts {
        let words: Vec<String> = plain_words(text).collect();
        for run in words.windows(n) {
            total += 1;
            seen.insert(run.to_vec());
        }
    }
    (total > 0).then(|| seen.len() as f64 / total as f64)
}

/// The mean; `None` of nothing.
pub fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.into_iter().fold((0.0, 0u64), |(sum, n), v| (sum + v, n + 1));
    (count > 0).then(|| sum / count as f64)
}

/// Spearman's rank correlation: Pearson's of the ranks, ties given their mean rank. `None` when either
/// side has fewer than two different values.
pub fn spearman(pairs: &[(f64, f64)]) -> Option<f64> {
    let a = ranks(pairs.iter().map(|p| p.0).collect());
    let b = ranks(pairs.iter().map(|p| p.1).collect());
    let middle = (pairs.len() as f64 + 1.0) / 2.0;
    let product = |x: &[f64], y: &[f64]| -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - middle) * (y - middle)).sum()
    };
    let spread = (product(&a, &a) * product(&b, &b)).sqrt();
    (spread > 0.0).then(|| product(&a, &b) / spread)
}

/// The rank of each value, from 1; equal values share the mean of their places.
fn ranks(values: Vec<f64>) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for tied in order.chunk_by(|&i, &j| values[i] == values[j]) {
        let rank = before as f64 + (tied.len() as f64 + 1.0) / 2.0;
        tied.iter().for_each(|&i| ranks[i] = rank);
        before += tied.len();
    }
    ranks
}

/// How well asked-for lengths are kept.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LengthControl {
    /// Mean absolute difference between words asked for and given.
    pub mean_absolute_error: f64,
    /// Share that differs by at most two words.
    pub within_2: f64,
    /// Rank correlation of asked-for and given; `None` if either never varies.
    pub spearman: Option<f64>,
}

impl LengthControl {
    /// Of pairs (words asked for, words given); `None` without any.
    pub fn of(pairs: &[(usize, usize)]) -> Option<Self> {
        let error = |&(asked, given): &(usize, usize)| asked.abs_diff(given);
        let near = pairs.iter().filter(|p| error(p) <= NEAR).count();
        let floats: Vec<_> = pairs.iter().map(|&(a, g)| (a as f64, g as f64)).collect();
        Some(Self {
            mean_absolute_error: mean(pairs.iter().map(|p| error(p) as f64))?,
            within_2: near as f64 / pairs.len() as f64,
            spearman: spearman(&floats),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: Option<f64>, b: f64) {
        assert!(a.is_some_and(|a| (a - b).abs() < 1e-12), "{a:?} is not {b}");
    }

    #[test]
    fn distinct_counts_runs_within_texts() {
        // a-b, b-a, a-b: two of three differ.
        close(distinct(["a b a b"], 2), 2.0 / 3.0);
        // Case and punctuation do not tell words apart; runs do not cross from text to text.
        close(distinct(["A fox, a fox.", "red fox"], 2), 3.0 / 4.0);
        close(distinct(["a b a"], 1), 2.0 / 3.0);
        assert_eq!(distinct(["one", ""], 2), None);
    }

    #[test]
    fn spearman_by_hand() {
        close(spearman(&[(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)]), 1.0);
        close(spearman(&[(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]), -1.0);
        // Without ties it is 1 - 6 sum d^2 / (n (n^2 - 1)), here d = 0, 1, 1, 0: 1 - 12 / 60.
        close(spearman(&[(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 4.0)]), 0.8);
        // Ties: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4 give 4.5 / sqrt(4.5 * 5).
        let tied = [(1.0, 1.0), (2.0, 2.0), (2.0, 3.0), (4.0, 4.0)];
        close(spearman(&tied), 4.5 / (4.5f64 * 5.0).sqrt());
        assert_eq!(spearman(&[(1.0, 5.0), (2.0, 5.0)]), None);
        assert_eq!(spearman(&[]), None);
    }

    #[test]
    fn length_control_by_hand() {
        let control = LengthControl::of(&[(10, 10), (20, 22), (30, 27), (5, 6)]).unwrap();
        assert_eq!(control.mean_absolute_error, 1.5);
        assert_eq!(control.within_2, 0.75);
        close(control.spearman, 1.0);
        assert_eq!(LengthControl::of(&[]), None);
    }
}
