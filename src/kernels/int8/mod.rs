//! Weights in 8 bits: `C = A · B` by dot products of integers.
//!
//! A weight is `q * scale` with `q` in -127..=127 and a scale for each column; an activation is
//! `(u - 128) * scale` with `u` in 1..=255 and a scale for each row, found as the row comes. Sums are exact
//! in 32 bits, so a row's result does not depend on the other rows, nor on the instruction set but for the
//! last two multiplications.
//!
//! The layout is the same on every machine: *panels* of 64 columns one after the other, each a `k/4 x width`
//! array of words of four neighbours of the inner dimension, the last one as wide as its columns need, in
//! sixteens.
#![allow(unsafe_code)]

mod dot;

use super::gemm::Operand;
use super::memory::{Shared, Words};
use super::threads::{each, threads};
use dot::{Level, Strip};
use rayon::prelude::*;
use std::ops::Range;

/// Columns of a full panel.
const PANEL: usize = 64;
/// What the width of a panel is a multiple of.
const STEP: usize = 16;
/// Products that are worth a task of their own; an integer one costs a quarter of a float's.
const TASK_WORK: usize = 1 << 17;
/// Rows that pass over a panel while it is in the cache, with their words.
const ROW_BLOCK: usize = 192;
/// Rows that a task rounds.
const ROUND_ROWS: usize = 8;

/// A right operand in 8 bits.
#[derive(Debug)]
pub struct Int8Matrix {
    quads: Words,
    /// By column, whole panels.
    scales: Vec<f32>,
    /// By column: what the activations' 128 adds to its sums, to be taken away.
    offsets: Vec<i32>,
    /// Length of the inner dimension, in elements.
    pub k: usize,
    /// Number of columns.
    pub columns: usize,
}

/// Words that an inner dimension of `k` takes.
fn words(k: usize) -> usize {
    k.div_ceil(4)
}

impl Int8Matrix {
    /// Rounds and packs an operand of `columns` columns. Panics if it has another size.
    pub fn pack(b: Operand<'_>, k: usize, columns: usize) -> Self {
        let data = match b {
            Operand::Inner(data) | Operand::Outer(data) => data,
        };
        assert_eq!(data.len(), k * columns, "an operand does not fit its product");
        let width = columns.next_multiple_of(STEP);
        let mut packed = Self {
            quads: Words::zeros(words(k) * width),
            scales: vec![0.0; width],
            offsets: vec![0; width],
            k,
            columns,
        };
        let Self { quads, scales, offsets, .. } = &mut packed;
        let parts = quads.as_mut_slice().par_chunks_mut(words(k) * PANEL);
        let parts = parts.zip(scales.par_chunks_mut(PANEL)).zip(offsets.par_chunks_mut(PANEL));
        parts.enumerate().for_each(|(panel, ((quads, scales), offsets))| {
            let own = panel * PANEL..((panel + 1) * PANEL).min(columns);
            pack_panel(b, (k, columns), own, quads, scales, offsets);
        });
        packed
    }

    /// Bytes that an operand takes, if they can be counted.
    pub fn size(k: usize, columns: usize) -> Option<usize> {
        let width = columns.checked_next_multiple_of(STEP)?;
        words(k).checked_add(2)?.checked_mul(width)?.checked_mul(size_of::<u32>())
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        (self.quads.len() + self.scales.len() + self.offsets.len()) * size_of::<u32>()
    }

    /// The elements of a column, as they were rounded.
    pub fn column(&self, column: usize) -> impl Iterator<Item = f32> {
        let panel = column / PANEL * PANEL;
        let width = self.width(panel);
        let begin = panel * words(self.k) + column - panel;
        let words = self.quads.as_slice()[begin..].iter().step_by(width);
        let scale = self.scales[column];
        let elements =
            words.flat_map(move |word| word.to_le_bytes().map(|q| f32::from(q as i8) * scale));
        elements.take(self.k)
    }

    /// Width of the panel that begins at this column.
    fn width(&self, panel: usize) -> usize {
        (self.columns - panel).min(PANEL).next_multiple_of(STEP)
    }

    /// `C = A · B + bias` for `a [m, k]`, with `C` row-major `[m, columns]`, all of it written.
    ///
    /// # Safety
    /// `out` must be good for writing `m * columns` elements.
    pub unsafe fn multiply(&self, a: &[f32], m: usize, bias: Option<&[f32]>, out: Shared<f32>) {
        assert_eq!(a.len(), m * self.k, "an operand does not fit its product");
        assert!(bias.is_none_or(|b| b.len() == self.columns), "a bias does not fit its product");
        let rows = Rows::new(a, m, self.k);
        let panels = self.columns.div_ceil(PANEL);
        let work = (m * self.k * PANEL).max(1);
        let tasks = 8 * threads();
        let group = TASK_WORK.div_ceil(work).max(panels.div_ceil(tasks)).max(1);
        let run = |i: usize| {
            let own = i * group..((i + 1) * group).min(panels);
            // SAFETY: passed on from the caller; each task has columns of its own.
            unsafe { self.panels(&rows, own, bias, out) };
        };
        each(panels.div_ceil(group), run);
    }

    /// All rows by some of the panels.
    ///
    /// # Safety
    /// `out` must be good for writing these columns of all rows.
    unsafe fn panels(
        &self,
        rows: &Rows,
        panels: Range<usize>,
        bias: Option<&[f32]>,
        out: Shared<f32>,
    ) {
        let level = Level::best();
        for first in (0..rows.scales.len()).step_by(ROW_BLOCK) {
            let count = (rows.scales.len() - first).min(ROW_BLOCK);
            for panel in panels.clone() {
                let column = panel * PANEL;
                let begin = |column| self.quads.as_slice()[column * words(self.k)..].as_ptr();
                // SAFETY: rows and columns are inside the operands, and whole panels have scales.
                unsafe {
                    let strip = Strip {
                        a: rows.words.as_ptr().add(first * rows.lda),
                        lda: rows.lda,
                        row_scales: rows.scales.as_ptr().add(first),
                        rows: count,
                        b: begin(column),
                        next: (panel + 1 < panels.end).then(|| begin(column + PANEL)),
                        k: words(self.k),
                        width: self.width(column),
                        scales: self.scales.as_ptr().add(column),
                        offsets: self.offsets.as_ptr().add(column),
                        bias: bias.map(|bias| bias.as_ptr().add(column)),
                        c: out.get().add(first * self.columns + column),
                        ldc: self.columns,
                        columns: (self.columns - column).min(PANEL),
                    };
                    strip.run(level);
                }
            }
        }
    }
}

/// Rounds the columns `own` of an operand of `k` by `columns`.
fn pack_panel(
    b: Operand<'_>,
    (k, columns): (usize, usize),
    own: Range<usize>,
    quads: &mut [u32],
    scales: &mut [f32],
    offsets: &mut [i32],
) {
    let (width, count) = (scales.len(), own.len());
    let mut largest = [0f32; PANEL];
    let mut put = |i: usize, c: usize, x: f32, scale: f32| {
        let q = if scale > 0.0 { (x / scale).round().clamp(-127.0, 127.0) as i32 } else { 0 };
        quads[i / 4 * width + c] |= u32::from(q as i8 as u8) << (i % 4 * 8);
        offsets[c] -= 128 * q;
    };
    match b {
        Operand::Inner(data) => {
            for (c, line) in data[own.start * k..own.end * k].chunks_exact(k).enumerate() {
                scales[c] = line.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
                line.iter().enumerate().for_each(|(i, &x)| put(i, c, x, scales[c]));
            }
        }
        Operand::Outer(data) => {
            let line = |i: usize| &data[i * columns + own.start..][..count];
            for i in 0..k {
                largest.iter_mut().zip(line(i)).for_each(|(m, x)| *m = m.max(x.abs()));
            }
            scales.iter_mut().zip(&largest).for_each(|(scale, m)| *scale = m / 127.0);
            for i in 0..k {
                line(i).iter().enumerate().for_each(|(c, &x)| put(i, c, x, scales[c]));
            }
        }
    }
}

/// A left operand in 8 bits.
struct Rows {
    words: Words,
    /// Words from one row to the next.
    lda: usize,
    scales: Vec<f32>,
}

impl Rows {
    fn new(a: &[f32], m: usize, k: usize) -> Self {
        // Rows a large power of two apart would compete for the same few places in the caches.
        let lda = words(k).next_multiple_of(STEP) + STEP;
        let mut rows = Self { words: Words::zeros(m * lda), lda, scales: vec![0.0; m] };
        let level = Level::best();
        let (words, scales) = (rows.words.as_mut_ptr(), rows.scales.as_mut_ptr());
        let (words, scales) = (Shared::new(words), Shared::new(scales));
        each(m.div_ceil(ROUND_ROWS), |i| {
            for row in i * ROUND_ROWS..((i + 1) * ROUND_ROWS).min(m) {
                // SAFETY: there are words and a scale for each row, and each row has one task.
                unsafe {
                    let words = std::slice::from_raw_parts_mut(words.get().add(row * lda), lda);
                    *scales.get().add(row) = level.round(&a[row * k..][..k], words);
                }
            }
        });
        rows
    }
}

#[cfg(test)]
mod tests;
