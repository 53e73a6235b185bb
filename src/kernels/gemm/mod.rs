//! Matrix products on the CPU: `C = A · B`, with the inputs in f32 or rounded to bf16, sums in f32.
//!
//! The right operand is packed into panels, the left one into rows of words ([`pack`]); the innermost
//! loops ([`micro`]) are the same for f32 and bf16. Threads take blocks of rows, or of columns where
//! there are few rows. An element's additions come in an order that depends on the inner dimension
//! alone, so a row's result is bitwise the same whatever other rows there are.
#![allow(unsafe_code)]

pub mod micro;
pub mod pack;

use super::Precision;
use super::memory::{Shared, Words, with_scratch};
use super::simd::Isa;
use super::threads::{each, threads};
use micro::{Start, Strip};
use pack::{Matrix, spread, words};
use std::ops::Range;

/// Rows that a task takes when there are many; a multiple of every group of rows in [`micro`].
pub const ROW_BLOCK: usize = 96;
/// Up to so many rows, tasks split the columns ...
const FEW_ROWS: usize = 48;
/// ... and up to so many, if there are columns enough: each panel is then read once.
const SOME_ROWS: usize = 256;
/// Products of numbers that are worth a task of their own.
pub const TASK_WORK: usize = 1 << 18;

/// Rows per task where tasks split `m` rows rather than the columns, which make `panels` panels.
pub fn row_block(m: usize, panels: usize) -> Option<usize> {
    let many_panels = panels >= 4 * threads();
    (m > SOME_ROWS || (m > FEW_ROWS && !many_panels)).then_some(if m >= 8 * ROW_BLOCK {
        ROW_BLOCK
    } else {
        ROW_BLOCK / 2
    })
}

/// A right operand, packed.
#[derive(Debug)]
pub struct Panels {
    words: Words,
    isa: Isa,
    pairs: bool,
    /// Length of the inner dimension, in elements.
    pub k: usize,
    /// Number of columns.
    pub columns: usize,
}

/// A dense f32 operand of a product: the slice and the length of its lines.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// Lines along the inner dimension: `A [m, k]`, or `B` given as `[n, k]`.
    Inner(&'a [f32]),
    /// Lines along the outer dimension: `B [k, n]`, or `A` given as `[k, m]`.
    Outer(&'a [f32]),
}

impl Operand<'_> {
    /// What it is in memory, with `outer` lines or elements of lines. Panics if it has another size.
    pub fn matrix(self, outer: usize, k: usize) -> Matrix {
        let (data, stride, inner_lines) = match self {
            Self::Inner(data) => (data, k, true),
            Self::Outer(data) => (data, outer, false),
        };
        assert_eq!(data.len(), outer * k, "an operand does not fit its product");
        Matrix { data: data.as_ptr(), stride, inner_lines, k }
    }
}

impl Panels {
    /// Packs an operand of `columns` columns.
    pub fn pack(b: Operand<'_>, k: usize, columns: usize, isa: Isa, precision: Precision) -> Self {
        Self::pack_and_sum(b, k, columns, (isa, precision), None)
    }

    /// The same; where lines run along the outer dimension, the sums of the columns as well, for which
    /// `sums` has a place each.
    fn pack_and_sum(
        b: Operand<'_>,
        k: usize,
        columns: usize,
        (isa, precision): (Isa, Precision),
        sums: Option<&mut [f32]>,
    ) -> Self {
        assert!(sums.as_ref().is_none_or(|s| s.len() == columns), "sums do not fit the columns");
        let sums = sums.map(|s| Shared::new(s.as_mut_ptr()));
        let pairs = precision == Precision::Bf16;
        let matrix = b.matrix(columns, k);
        let size = words(k, pairs) * columns.next_multiple_of(isa.lanes());
        let mut panels = Self { words: Words::zeros(size), isa, pairs, k, columns };
        let dst = Shared::new(panels.words.as_mut_ptr());
        let layout = &panels;
        let pack = |panel: usize| {
            let part = layout.columns_of(panel);
            // SAFETY: all panels before this one are full, so it begins at its first column times k
            // words; the operand was checked against its shape, and each panel is written by one task.
            unsafe {
                let dst = dst.get().add(part.start * words(k, pairs));
                let sums = sums.map(|s| s.get().add(part.start));
                matrix.pack_panels_and_sum((isa, pairs), part, dst, sums);
            }
        };
        if size < 1 << 14 {
            (0..layout.count()).for_each(pack);
        } else {
            each(layout.count(), pack);
        }
        panels
    }

    /// Words that an operand takes, if they can be counted.
    pub fn size(k: usize, columns: usize, isa: Isa, precision: Precision) -> Option<usize> {
        let columns = columns.checked_next_multiple_of(isa.lanes())?;
        words(k, precision == Precision::Bf16).checked_mul(columns)
    }

    /// The instruction set that reads it, and whether its words are pairs of bf16.
    pub fn how(&self) -> (Isa, bool) {
        (self.isa, self.pairs)
    }

    /// How many panels there are.
    pub fn count(&self) -> usize {
        self.columns.div_ceil(self.isa.panel_width())
    }

    fn columns_of(&self, panel: usize) -> Range<usize> {
        let width = self.isa.panel_width();
        panel * width..((panel + 1) * width).min(self.columns)
    }

    /// The elements of a column, as they were rounded.
    pub fn column(&self, column: usize) -> impl Iterator<Item = f32> {
        let part = self.columns_of(column / self.isa.panel_width());
        let width = part.len().next_multiple_of(self.isa.lanes());
        let begin = part.start * words(self.k, self.pairs) + column - part.start;
        let words = self.words.as_slice()[begin..].iter().step_by(width);
        let elements = words.flat_map(|&word| match self.pairs {
            false => [f32::from_bits(word), 0.0].into_iter().take(1),
            // bf16 is the upper half of an f32.
            true => {
                [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)].into_iter().take(2)
            }
        });
        elements.take(self.k)
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u32>()
    }

    /// `C = A · B + bias`, with `C` row-major `[m, columns]`, all of it written.
    ///
    /// # Safety
    /// `out` must be good for writing `m * columns` elements.
    pub unsafe fn multiply(
        &self,
        a: Operand<'_>,
        m: usize,
        bias: Option<&[f32]>,
        out: Shared<f32>,
    ) {
        let matrix = a.matrix(m, self.k);
        assert!(bias.is_none_or(|b| b.len() == self.columns), "a bias does not fit its product");
        let (isa, k, all) = (self.isa, words(self.k, self.pairs), 0..self.count());
        let lda = spread(k);
        let bias = bias.map(|b| Shared::new(b.as_ptr().cast_mut()));
        let start = || bias.map_or(Start::Zero, |b| Start::Bias(b.get()));
        let rows_of_panels = |rows: Range<usize>, panels: Range<usize>, a: *const u32| {
            // SAFETY: rows and panels are inside the operands, whose shapes were checked, and no two
            // tasks share both a row and a panel.
            unsafe {
                let out = out.get().add(rows.start * self.columns);
                self.strips((a, lda), rows.len(), panels, start(), (out, self.columns));
            }
        };
        let pack = |rows: Range<usize>, a: *mut u32| {
            // SAFETY: the rows are inside the operand, and the scratch has room for them.
            unsafe { matrix.pack_rows((isa, self.pairs), rows, a, lda) };
        };
        if let Some(block) = row_block(m, all.end) {
            each(m.div_ceil(block), |i| {
                let rows = i * block..((i + 1) * block).min(m);
                with_scratch(rows.len() * lda, |a| {
                    pack(rows.clone(), a);
                    rows_of_panels(rows, all.clone(), a);
                });
            });
            return;
        }
        let mut packed = Words::zeros(m * lda);
        let a = Shared::new(packed.as_mut_ptr());
        // SAFETY: there are lda words for each row.
        unsafe { matrix.pack_all_rows((isa, self.pairs), m, a, lda) };
        let group = self.panels_per_task(m, k);
        let run = |i: usize| {
            let panels = i * group..((i + 1) * group).min(all.end);
            rows_of_panels(0..m, panels, a.get());
        };
        each(all.end.div_ceil(group), run);
    }

    /// Few enough tasks that handing them out costs little beside the work.
    fn panels_per_task(&self, m: usize, k: usize) -> usize {
        let work = (m * k * self.isa.panel_width()).max(1);
        let tasks = 4 * threads();
        TASK_WORK.div_ceil(work).max(self.count().div_ceil(tasks)).max(1)
    }

    /// `C = start + A · B` on this thread, with `A` as `rows` rows of words, and `C` with the distance of
    /// its rows.
    ///
    /// # Safety
    /// `a` must be good for reading `rows` rows of this operand's words, `lda` apart, and `out` for
    /// writing `rows` rows of its columns.
    pub unsafe fn multiply_words(
        &self,
        (a, lda): (*const u32, usize),
        rows: usize,
        start: Start,
        out: (*mut f32, usize),
    ) {
        // SAFETY: passed on from the caller.
        unsafe { self.strips((a, lda), rows, 0..self.count(), start, out) }
    }

    /// The same for some of the panels: `out` is where the first column of the first panel of all goes.
    ///
    /// # Safety
    /// The same, for writing the columns of these panels.
    pub unsafe fn strips(
        &self,
        (a, lda): (*const u32, usize),
        rows: usize,
        panels: Range<usize>,
        start: Start,
        (out, ldc): (*mut f32, usize),
    ) {
        let k = words(self.k, self.pairs);
        for panel in panels {
            let columns = self.columns_of(panel);
            // SAFETY: panels are inside the packed operand; the rest is the caller's word.
            unsafe {
                let strip = Strip {
                    a,
                    lda,
                    rows,
                    b: self.words.as_ptr().add(columns.start * k),
                    k,
                    c: out.add(columns.start),
                    ldc,
                    columns: columns.len(),
                    start: match start {
                        Start::Bias(bias) => Start::Bias(bias.add(columns.start)),
                        other => other,
                    },
                };
                strip.run(self.isa, self.pairs);
            }
        }
    }
}

/// `C = A · B` in one go, written to `out`.
///
/// # Safety
/// `out` must be good for writing `m * n` elements.
pub unsafe fn product(
    (a, b): (Operand<'_>, Operand<'_>),
    (m, k, n): (usize, usize, usize),
    bias: Option<&[f32]>,
    (isa, precision): (Isa, Precision),
    out: Shared<f32>,
) {
    let panels = Panels::pack(b, k, n, isa, precision);
    // SAFETY: passed on from the caller.
    unsafe { panels.multiply(a, m, bias, out) };
}

/// `C = Aᵀ · B` for dense `a [k, m]` and `b [k, n]`, written to `out`, and the sums of B's columns.
///
/// # Safety
/// `out` must be good for writing `m * n` elements.
pub unsafe fn product_and_sums(
    (a, b): (&[f32], &[f32]),
    (m, k, n): (usize, usize, usize),
    how: (Isa, Precision),
    out: Shared<f32>,
) -> Vec<f32> {
    let mut sums = vec![0.0; n];
    let panels = Panels::pack_and_sum(Operand::Outer(b), k, n, how, Some(&mut sums));
    // SAFETY: passed on from the caller.
    unsafe { panels.multiply(Operand::Outer(a), m, None, out) };
    sums
}

#[cfg(test)]
mod tests;
