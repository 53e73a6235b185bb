//! The language-model head and its cross entropy as one operation.
//!
//! Rows go through in chunks: logits, softmax, and both gradients at once, so that only a chunk's
//! logits ever exist. The gradients are those of a loss gradient of 1 and are scaled when the backward
//! pass comes.
#![allow(unsafe_code)]

use super::autograd::{elements, record};
use super::gemm::micro::Start;
use super::gemm::pack::{Matrix, spread, words};
use super::gemm::{Operand, Panels};
use super::memory::{Shared, Words, with_scratch};
use super::simd::{Isa, Softmax};
use super::threads::each;
use super::{IGNORE, Precision};
use candle_core::{Device, Result, Tensor, bail};
use std::ops::Range;

/// Rows whose logits one task holds.
const TASK_ROWS: usize = 48;
/// Rows whose logit gradients are kept, in words, until the table's gradient takes them in.
const CHUNK_ROWS: usize = 12 * TASK_ROWS;
/// Vocabulary entries that one task of the table's gradient takes.
const VOCAB_BLOCK: usize = 192;

/// Mean negative log-likelihood of `targets` under `softmax(hidden · tableᵀ)` over the rows that have
/// one; the targets are below the table's length.
pub fn cross_entropy(
    hidden: &Tensor,
    table: &Tensor,
    targets: &[u32],
    (isa, precision): (Isa, Precision),
) -> Result<Tensor> {
    let ((_, d), (vocab, table_d)) = (hidden.dims2()?, table.dims2()?);
    if d != table_d || d == 0 {
        bail!("cross entropy: {:?} by the transpose of {:?}", hidden.dims(), table.dims());
    }
    let rows: Vec<usize> = (0..targets.len()).filter(|&row| targets[row] != IGNORE).collect();
    if rows.is_empty() {
        bail!("cross entropy needs at least one row with a target");
    }
    let (hidden, table) = (hidden.contiguous()?, table.contiguous()?);
    let kept: Vec<u32> = rows.iter().map(|&row| targets[row]).collect();
    let gradients = hidden.track_op() || table.track_op();
    let (loss, dhidden, dtable) = {
        let (all, table) = (elements(&hidden)?, elements(&table)?);
        let mut compact = Vec::new();
        let used: &[f32] = if rows.len() == targets.len() {
            &all
        } else {
            rows.iter().for_each(|row| compact.extend_from_slice(&all[row * d..][..d]));
            &compact
        };
        Head::new(used, &table, &kept, d, isa, precision).run(gradients)
    };
    if !gradients {
        return Tensor::new(loss, &Device::Cpu);
    }
    let dhidden = if rows.len() == targets.len() {
        dhidden
    } else {
        let mut scattered = vec![0.0; targets.len() * d];
        for (row, grad) in rows.iter().zip(dhidden.chunks_exact(d)) {
            scattered[row * d..][..d].copy_from_slice(grad);
        }
        scattered
    };
    let dhidden = Tensor::from_vec(dhidden, (targets.len(), d), &Device::Cpu)?;
    let dtable = Tensor::from_vec(dtable, (vocab, d), &Device::Cpu)?;
    record("cross_entropy", &[&hidden, &table], vec![loss], (), move |_, grad| {
        let scale = f64::from(grad.to_scalar::<f32>()?);
        let scaled = |t: &Tensor| if scale == 1.0 { Ok(t.clone()) } else { t * scale };
        Ok(vec![Some(scaled(&dhidden)?), Some(scaled(&dtable)?)])
    })
}

struct Head<'a> {
    hidden: &'a [f32],
    targets: &'a [u32],
    d: usize,
    vocab: usize,
    isa: Isa,
    precision: Precision,
    /// The table for `hidden · tableᵀ`, and for `dlogits · table`.
    to_logits: Panels,
    from_logits: Panels,
}

impl<'a> Head<'a> {
    fn new(
        hidden: &'a [f32],
        table: &[f32],
        targets: &'a [u32],
        d: usize,
        isa: Isa,
        precision: Precision,
    ) -> Self {
        let vocab = table.len() / d;
        let to_logits = Panels::pack(Operand::Inner(table), d, vocab, isa, precision);
        let from_logits = Panels::pack(Operand::Outer(table), vocab, d, isa, precision);
        Self { hidden, targets, d, vocab, isa, precision, to_logits, from_logits }
    }

    /// The mean loss, and the gradients of hidden and table (empty unless asked for).
    fn run(&self, gradients: bool) -> (f32, Vec<f32>, Vec<f32>) {
        let count = self.targets.len();
        let pairs = self.precision == Precision::Bf16;
        let mut losses = vec![0f32; count];
        let size = |n: usize| if gradients { n } else { 0 };
        let mut dhidden = vec![0f32; size(count * self.d)];
        let mut dtable = vec![0f32; size(self.vocab * self.d)];
        let stride = words(CHUNK_ROWS.min(count), pairs);
        let mut by_entry = Words::zeros(size(self.vocab * stride));
        for chunk in (0..count).step_by(CHUNK_ROWS) {
            let rows = chunk..(chunk + CHUNK_ROWS).min(count);
            let shared = Targets {
                losses: Shared::new(losses.as_mut_ptr()),
                dhidden: Shared::new(dhidden.as_mut_ptr()),
                by_entry: Shared::new(by_entry.as_mut_ptr()),
            };
            each(rows.len().div_ceil(TASK_ROWS), |i| {
                let first = rows.start + i * TASK_ROWS;
                let part = first..(first + TASK_ROWS).min(rows.end);
                let logits = spread(self.vocab) + spread(words(self.vocab, pairs));
                with_scratch(TASK_ROWS * (logits + words(self.d, pairs)), |scratch| {
                    let at = i * words(TASK_ROWS, pairs);
                    Rows { head: self, part, shared, at, stride, gradients }.run(scratch);
                });
            });
            if gradients {
                self.add_to_table(&rows, &by_entry, stride, &mut dtable);
            }
        }
        let sum: f64 = losses.iter().copied().map(f64::from).sum();
        ((sum / count as f64) as f32, dhidden, dtable)
    }

    /// `dtable += dlogitsᵀ · hidden` for the rows of one chunk.
    fn add_to_table(
        &self,
        rows: &Range<usize>,
        by_entry: &Words,
        stride: usize,
        dtable: &mut [f32],
    ) {
        let hidden = &self.hidden[rows.start * self.d..rows.end * self.d];
        let operand = Operand::Outer(hidden);
        let panels = Panels::pack(operand, rows.len(), self.d, self.isa, self.precision);
        let out = Shared::new(dtable.as_mut_ptr());
        each(self.vocab.div_ceil(VOCAB_BLOCK), |i| {
            let first = i * VOCAB_BLOCK;
            let count = VOCAB_BLOCK.min(self.vocab - first);
            // SAFETY: the words hold `stride` for each entry, of which the chunk's rows are written;
            // dtable has `d` for each entry; tasks have entries of their own.
            unsafe {
                let a = by_entry.as_ptr().add(first * stride);
                let c = (out.get().add(first * self.d), self.d);
                panels.multiply_words((a, stride), count, Start::Output, c);
            }
        });
    }
}

#[derive(Clone, Copy)]
struct Targets {
    losses: Shared<f32>,
    dhidden: Shared<f32>,
    by_entry: Shared<u32>,
}

/// One task: some rows from hidden to gradients.
struct Rows<'a> {
    head: &'a Head<'a>,
    part: Range<usize>,
    shared: Targets,
    /// Where this task's rows stand in the words of an entry.
    at: usize,
    stride: usize,
    gradients: bool,
}

impl Rows<'_> {
    /// Scratch: logits, the same in words, and hidden in words.
    fn run(self, scratch: *mut u32) {
        let Head { d, vocab, hidden, targets, isa, precision, .. } = *self.head;
        let pairs = precision == Precision::Bf16;
        let how = (isa, pairs);
        let (rows, kd) = (self.part.len(), words(d, pairs));
        let (line, word_line) = (spread(vocab), spread(words(vocab, pairs)));
        // SAFETY: the scratch has room for TASK_ROWS rows of logits, of logit words and of hidden words;
        // the outputs have a place for each row, and tasks have rows of their own.
        unsafe {
            let logits = scratch.cast::<f32>();
            let logit_words = scratch.add(TASK_ROWS * line);
            let hidden_words = logit_words.add(TASK_ROWS * word_line);
            let hidden = hidden.as_ptr().add(self.part.start * d);
            let hidden = Matrix { data: hidden, stride: d, inner_lines: true, k: d };
            hidden.pack_rows(how, 0..rows, hidden_words, kd);
            let to_logits = &self.head.to_logits;
            to_logits.multiply_words((hidden_words, kd), rows, Start::Zero, (logits, line));
            let total = 1.0 / targets.len() as f32;
            for i in 0..rows {
                let row = self.part.start + i;
                let logits = logits.add(i * line);
                let target = logits.add(targets[row] as usize);
                let own = *target;
                let log_sum = Softmax { row: logits, len: vocab, scale: 1.0, total }.run(isa);
                *self.shared.losses.get().add(row) = log_sum - own;
                *target -= total;
            }
            if !self.gradients {
                return;
            }
            let by_row = Matrix { data: logits, stride: line, inner_lines: true, k: vocab };
            by_row.pack_rows(how, 0..rows, logit_words, word_line);
            let dhidden = self.shared.dhidden.get().add(self.part.start * d);
            let from_logits = &self.head.from_logits;
            from_logits.multiply_words((logit_words, word_line), rows, Start::Zero, (dhidden, d));
            let by_entry = self.shared.by_entry.get().add(self.at);
            let across = Matrix { inner_lines: false, k: rows, ..by_row };
            across.pack_rows(how, 0..vocab, by_entry, self.stride);
        }
    }
}
