//! Causal attention of packed sequences for training: one task per sequence and head.
//!
//! A task's five products are the small products of [`gemm`](super::gemm) over strided parts of the
//! packed q, k and v, on blocks of rows, so that what the mask hides is mostly not computed. The
//! backward pass computes the weights anew from the forward pass's log-sums.
#![allow(unsafe_code)]

use super::Precision;
use super::autograd::{elements, record};
use super::gemm::micro::{Start, Strip};
use super::gemm::pack::{Matrix, words};
use super::linear::wanted;
use super::memory::{Shared, filled, with_scratch};
use super::simd::{Isa, Kernel, Simd, Softmax, exp};
use super::threads::each;
use candle_core::{Result, Tensor};
use std::ops::Range;

/// Rows of scores computed together; a multiple of every group of rows in the innermost loops.
const BLOCK: usize = 48;

/// `qkv [rows, 3d]` to `[rows, d]`. The starts must be ascending from 0 to `rows`, and the width must
/// split into the heads.
pub fn causal(
    qkv: &Tensor,
    starts: &[usize],
    heads: usize,
    (isa, precision): (Isa, Precision),
) -> Result<Tensor> {
    let (rows, width) = qkv.dims2()?;
    let d = width / 3;
    let sequences: Vec<Range<usize>> = starts.windows(2).map(|pair| pair[0]..pair[1]).collect();
    let all = All { sequences, rows, d, heads, isa, pairs: precision == Precision::Bf16 };
    let qkv = qkv.contiguous()?;
    let mut log_sums = vec![0f32; rows * heads];
    let out = {
        let qkv = elements(&qkv)?;
        let log_sums = Shared::new(log_sums.as_mut_ptr());
        // SAFETY: every row belongs to one sequence, and each task writes its head's part of its rows.
        unsafe { filled(rows * d, |out| all.forward(&qkv, log_sums, out)) }
    };
    let saved = qkv.clone();
    record("causal_attention", &[&qkv], out, (rows, d), move |out, grad| {
        let grad = grad.contiguous()?;
        let dqkv = wanted(&saved, || {
            let (qkv, out, dout) = (elements(&saved)?, elements(out)?, elements(&grad)?);
            // SAFETY: as above, for q, k and v of each row.
            Ok(unsafe {
                filled(rows * 3 * d, |dqkv| all.backward(&qkv, &out, &dout, &log_sums, dqkv))
            })
        })?;
        Ok(vec![dqkv])
    })
}

/// What all tasks share.
struct All {
    sequences: Vec<Range<usize>>,
    rows: usize,
    d: usize,
    heads: usize,
    isa: Isa,
    pairs: bool,
}

impl All {
    /// Runs a task for each sequence and head; longest sequences need no special care, as tasks are many.
    fn each(&self, task: impl Fn(Range<usize>, usize) + Sync) {
        each(self.sequences.len() * self.heads, |i| {
            let rows = self.sequences[i / self.heads].clone();
            if !rows.is_empty() {
                task(rows, i % self.heads);
            }
        });
    }

    fn forward(&self, qkv: &[f32], log_sums: Shared<f32>, out: Shared<f32>) {
        assert_eq!(qkv.len(), self.rows * 3 * self.d, "q, k and v do not fit");
        self.each(|rows, head| {
            let part = self.part(rows, head);
            with_scratch(part.forward_scratch(), |scratch| {
                Forward { part, qkv, log_sums: log_sums.get(), out: out.get() }.run(scratch);
            });
        });
    }

    fn backward(
        &self,
        qkv: &[f32],
        out: &[f32],
        dout: &[f32],
        log_sums: &[f32],
        dqkv: Shared<f32>,
    ) {
        let fits = out.len() == self.rows * self.d && dout.len() == out.len();
        assert!(fits && qkv.len() == 3 * out.len(), "a gradient of another shape");
        self.each(|rows, head| {
            let part = self.part(rows, head);
            with_scratch(part.backward_scratch(), |scratch| {
                Backward { part, qkv, out, dout, log_sums, dqkv: dqkv.get() }.run(scratch);
            });
        });
    }

    fn part(&self, rows: Range<usize>, head: usize) -> Part {
        let Self { d, heads, isa, pairs, .. } = *self;
        Part { first: rows.start, len: rows.len(), head, heads, d, size: d / heads, isa, pairs }
    }
}

/// One head of one sequence.
#[derive(Clone, Copy)]
struct Part {
    first: usize,
    len: usize,
    head: usize,
    heads: usize,
    /// Width of all heads together.
    d: usize,
    /// Width of one head.
    size: usize,
    isa: Isa,
    pairs: bool,
}

impl Part {
    /// Words of a packed right operand.
    fn panels(&self, k: usize, columns: usize) -> usize {
        words(k, self.pairs) * columns.next_multiple_of(self.isa.lanes())
    }

    /// Words of a packed left operand.
    fn lines(&self, rows: usize, k: usize) -> usize {
        rows * words(k, self.pairs)
    }

    fn forward_scratch(&self) -> usize {
        let (t, size) = (self.len, self.size);
        let operands = self.panels(size, t) + self.panels(t, size);
        operands + self.lines(BLOCK, size) + self.lines(BLOCK, t) + BLOCK * t
    }

    fn backward_scratch(&self) -> usize {
        let (t, size) = (self.len, self.size);
        let scores = 2 * self.panels(size, t) + self.lines(BLOCK, size);
        let inputs = 3 * self.panels(t, size) + self.lines(BLOCK, t);
        2 * t * t + scores.max(inputs)
    }

    /// Where this part begins in a `[rows, width]` whose heads begin at `column`.
    fn at(&self, width: usize, column: usize) -> usize {
        self.first * width + column + self.head * self.size
    }

    fn scale(&self) -> f32 {
        1.0 / (self.size as f32).sqrt()
    }

    fn how(&self) -> (Isa, bool) {
        (self.isa, self.pairs)
    }

    /// Words of the inner dimension of scores, and of outputs.
    fn words(&self) -> (usize, usize) {
        (words(self.size, self.pairs), words(self.len, self.pairs))
    }

    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let len = self.len;
        (0..len).step_by(BLOCK).map(move |from| from..(from + BLOCK).min(len))
    }

    /// q, k or v (by its column) as an operand of scores: lines along the head's width.
    unsafe fn lines_of(&self, data: *const f32, width: usize, column: usize) -> Matrix {
        // SAFETY: the caller's array is `[rows, width]`, and this part lies inside.
        let data = unsafe { data.add(self.at(width, column)) };
        Matrix { data, stride: width, inner_lines: true, k: self.size }
    }

    /// The same as an operand of outputs: the inner dimension is the position.
    unsafe fn positions_of(&self, data: *const f32, width: usize, column: usize) -> Matrix {
        // SAFETY: passed on.
        let lines = unsafe { self.lines_of(data, width, column) };
        Matrix { inner_lines: false, k: self.len, ..lines }
    }
}

/// Takes `count` words off the scratch.
unsafe fn take(scratch: &mut *mut u32, count: usize) -> *mut u32 {
    let taken = *scratch;
    // SAFETY: the caller's scratch was sized for all that is taken.
    *scratch = unsafe { taken.add(count) };
    taken
}

/// A small product: rows of words times panels.
#[derive(Clone, Copy)]
struct Small {
    a: *const u32,
    lda: usize,
    rows: usize,
    b: *const u32,
    /// Words of the inner dimension in the panels, and the part of it that is used.
    b_words: usize,
    used: (usize, usize),
    /// Columns that the panels have, and how many of them matter: panels beyond are left out.
    columns: usize,
    needed: usize,
    c: *mut f32,
    ldc: usize,
}

impl Small {
    unsafe fn run(self, (isa, pairs): (Isa, bool)) {
        let (from, to) = self.used;
        for first in (0..self.columns.min(self.needed)).step_by(isa.panel_width()) {
            let columns = (self.columns - first).min(isa.panel_width());
            let line = columns.next_multiple_of(isa.lanes());
            // SAFETY: the caller's operands and output are as large as the fields say.
            unsafe {
                let strip = Strip {
                    a: self.a,
                    lda: self.lda,
                    rows: self.rows,
                    b: self.b.add(first * self.b_words + from * line),
                    k: to - from,
                    c: self.c.add(first),
                    ldc: self.ldc,
                    columns,
                    start: Start::Zero,
                };
                strip.run(isa, pairs);
            }
        }
    }
}

struct Forward<'a> {
    part: Part,
    qkv: &'a [f32],
    log_sums: *mut f32,
    out: *mut f32,
}

impl Forward<'_> {
    fn run(self, mut scratch: *mut u32) {
        let (part, how) = (self.part, self.part.how());
        let (t, d, size) = (part.len, part.d, part.size);
        let (size_words, t_words) = part.words();
        // SAFETY: the slices were checked to be `[rows, 3d]` and `[rows, d]`, the part lies inside, the
        // scratch is as large as `forward_scratch` says, and only this task writes this head's part.
        unsafe {
            let k_panels = take(&mut scratch, part.panels(size, t));
            let v_panels = take(&mut scratch, part.panels(t, size));
            let q_words = take(&mut scratch, part.lines(BLOCK, size));
            let p_words = take(&mut scratch, part.lines(BLOCK, t));
            let scores = scratch.cast::<f32>();
            let qkv = self.qkv.as_ptr();
            part.lines_of(qkv, 3 * d, d).pack_panels(how, 0..t, k_panels);
            part.positions_of(qkv, 3 * d, 2 * d).pack_panels(how, 0..size, v_panels);
            let q = part.lines_of(qkv, 3 * d, 0);
            for block in part.blocks() {
                let (rows, end) = (block.len(), block.end);
                q.pack_rows(how, block.clone(), q_words, size_words);
                let products = Small {
                    a: q_words,
                    lda: size_words,
                    rows,
                    b: k_panels,
                    b_words: size_words,
                    used: (0, size_words),
                    columns: t,
                    needed: end,
                    c: scores,
                    ldc: t,
                };
                products.run(how);
                for i in 0..rows {
                    let (row, seen) = (scores.add(i * t), block.start + i + 1);
                    let softmax = Softmax { row, len: seen, scale: part.scale(), total: 1.0 };
                    let log_sum = softmax.run(part.isa);
                    std::ptr::write_bytes(row.add(seen), 0, end - seen);
                    let at = (part.first + block.start + i) * part.heads + part.head;
                    *self.log_sums.add(at) = log_sum;
                }
                let p = Matrix { data: scores, stride: t, inner_lines: true, k: end };
                let end = words(end, part.pairs);
                p.pack_rows(how, 0..rows, p_words, end);
                let outputs = Small {
                    a: p_words,
                    lda: end,
                    rows,
                    b: v_panels,
                    b_words: t_words,
                    used: (0, end),
                    columns: size,
                    needed: size,
                    c: self.out.add(part.at(d, 0) + block.start * d),
                    ldc: d,
                };
                outputs.run(how);
            }
        }
    }
}

struct Backward<'a> {
    part: Part,
    qkv: &'a [f32],
    out: &'a [f32],
    dout: &'a [f32],
    log_sums: &'a [f32],
    dqkv: *mut f32,
}

impl Backward<'_> {
    fn run(self, mut scratch: *mut u32) {
        let t = self.part.len;
        // SAFETY: the scratch is as large as `backward_scratch` says: weights and their gradients first,
        // then what each of the two passes takes anew.
        unsafe {
            let weights = take(&mut scratch, t * t).cast::<f32>();
            let dscores = take(&mut scratch, t * t).cast::<f32>();
            self.score_gradients(weights, dscores, scratch);
            self.input_gradients(weights, dscores, scratch);
        }
    }

    /// Computes the weights again, and the gradients of the scores.
    unsafe fn score_gradients(&self, weights: *mut f32, dscores: *mut f32, mut scratch: *mut u32) {
        let (part, how) = (self.part, self.part.how());
        let (t, d, size) = (part.len, part.d, part.size);
        let (size_words, _) = part.words();
        // SAFETY: as for the forward pass.
        unsafe {
            let [k_panels, v_panels] = [(); 2].map(|()| take(&mut scratch, part.panels(size, t)));
            let lines = take(&mut scratch, part.lines(BLOCK, size));
            let qkv = self.qkv.as_ptr();
            part.lines_of(qkv, 3 * d, d).pack_panels(how, 0..t, k_panels);
            part.lines_of(qkv, 3 * d, 2 * d).pack_panels(how, 0..t, v_panels);
            let q = part.lines_of(qkv, 3 * d, 0);
            let dout = part.lines_of(self.dout.as_ptr(), d, 0);
            for block in part.blocks() {
                for (left, b, c) in [(q, k_panels, weights), (dout, v_panels, dscores)] {
                    left.pack_rows(how, block.clone(), lines, size_words);
                    let products = Small {
                        a: lines,
                        lda: size_words,
                        rows: block.len(),
                        b,
                        b_words: size_words,
                        used: (0, size_words),
                        columns: t,
                        needed: block.end,
                        c: c.add(block.start * t),
                        ldc: t,
                    };
                    products.run(how);
                }
                for i in block.clone() {
                    let at = part.at(d, 0) + i * d;
                    let (out, dout) = (&self.out[at..at + size], &self.dout[at..at + size]);
                    let row = ScoreRow {
                        weights: weights.add(i * t),
                        dscores: dscores.add(i * t),
                        seen: i + 1,
                        scale: part.scale(),
                        log_sum: self.log_sums[(part.first + i) * part.heads + part.head],
                        dot: out.iter().zip(dout).map(|(o, d)| o * d).sum(),
                    };
                    part.isa.without_bf16().run(row);
                    // What the mask hides is zero as far as later products look.
                    let hidden = block.end - (i + 1);
                    std::ptr::write_bytes(weights.add(i * t + i + 1), 0, hidden);
                    std::ptr::write_bytes(dscores.add(i * t + i + 1), 0, hidden);
                }
            }
        }
    }

    /// Gradients of q, k and v from the weights and the gradients of the scores.
    unsafe fn input_gradients(&self, weights: *mut f32, dscores: *mut f32, mut scratch: *mut u32) {
        let (part, how) = (self.part, self.part.how());
        let (t, d, size) = (part.len, part.d, part.size);
        let (_, t_words) = part.words();
        // SAFETY: as for the forward pass.
        unsafe {
            let [q_panels, k_panels, dout_panels] =
                [(); 3].map(|()| take(&mut scratch, part.panels(t, size)));
            let lines = take(&mut scratch, part.lines(BLOCK, t));
            let qkv = self.qkv.as_ptr();
            part.positions_of(qkv, 3 * d, 0).pack_panels(how, 0..size, q_panels);
            part.positions_of(qkv, 3 * d, d).pack_panels(how, 0..size, k_panels);
            let dout = part.positions_of(self.dout.as_ptr(), d, 0);
            dout.pack_panels(how, 0..size, dout_panels);
            for block in part.blocks() {
                let c = self.dqkv.add(part.at(3 * d, 0) + block.start * 3 * d);
                let product = Small {
                    a: lines,
                    lda: 0,
                    rows: block.len(),
                    b: k_panels,
                    b_words: t_words,
                    used: (0, t_words),
                    columns: size,
                    needed: size,
                    c,
                    ldc: 3 * d,
                };
                // q: this block's rows see positions up to its end.
                let lda = words(block.end, part.pairs);
                Matrix { data: dscores, stride: t, inner_lines: true, k: block.end }.pack_rows(
                    how,
                    block.clone(),
                    lines,
                    lda,
                );
                Small { lda, used: (0, lda), ..product }.run(how);
                // k and v: this block's positions are seen by rows from its start on.
                let from = words(block.start, part.pairs);
                let (lda, used) = (t_words - from, (from, t_words));
                for (scores, b, column) in [(dscores, q_panels, d), (weights, dout_panels, 2 * d)] {
                    let data = scores.add(block.start * t);
                    Matrix { data, stride: t, inner_lines: false, k: t - block.start }.pack_rows(
                        how,
                        block.clone(),
                        lines,
                        lda,
                    );
                    Small { lda, used, b, c: c.add(column), ..product }.run(how);
                }
            }
        }
    }
}

/// A row's scores to weights and its gradients of weights to gradients of scores, in place.
struct ScoreRow {
    weights: *mut f32,
    dscores: *mut f32,
    /// Positions that the row sees.
    seen: usize,
    scale: f32,
    log_sum: f32,
    /// Output times gradient: what softmax takes off each gradient.
    dot: f32,
}

impl Kernel for ScoreRow {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { weights, dscores, seen, .. } = self;
        // SAFETY: both rows have at least `seen` elements.
        unsafe {
            let (scale, shift) = (S::splat(self.scale), S::splat(-self.log_sum));
            for at in (0..seen).step_by(S::LANES) {
                let n = (seen - at).min(S::LANES);
                let p = exp::<S>(S::fma(S::load_n(weights.add(at), n), scale, shift));
                let dp = S::sub(S::load_n(dscores.add(at), n), S::splat(self.dot));
                S::store_n(weights.add(at), p, n);
                S::store_n(dscores.add(at), S::mul(S::mul(p, dp), scale), n);
            }
        }
    }
}
