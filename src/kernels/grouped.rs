//! Products in which groups of neighbouring rows have weights of their own: experts and adapters.
//!
//! One pass over all groups, with nothing gathered or padded: a task takes panels of several groups, or
//! rows of several. Small work stays on the calling thread, where waking another costs more than it saves.
#![allow(unsafe_code)]

use super::PackedMatrix;
use super::autograd::elements;
use super::gemm::micro::Start;
use super::gemm::pack::{Matrix, spread, words};
use super::gemm::{Operand, Panels, ROW_BLOCK, TASK_WORK, row_block};
use super::memory::{Shared, filled, with_scratch};
use super::simd::Isa;
use super::threads::{each, each_part, threads};
use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Result, Tensor, bail};
use std::ops::Range;

/// Neighbouring rows that share a linear layer.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// Rows of the input and the output.
    pub rows: Range<usize>,
    /// `[in, out]`, the same for all groups.
    pub w: &'a PackedMatrix,
    /// `[out]`.
    pub bias: Option<&'a Tensor>,
}

/// Neighbouring rows to which a low-rank product is added.
#[derive(Clone, Debug)]
pub struct LowRankGroup<'a> {
    /// Rows of the input and the output.
    pub rows: Range<usize>,
    /// `[in, r]`, with a rank of its own.
    pub a: &'a PackedMatrix,
    /// `[r, out]`.
    pub b: &'a PackedMatrix,
    /// What the product is multiplied by.
    pub weight: f32,
}

/// `y[rows] = x[rows] · w + bias` for each group, as `[rows, columns]`. Not differentiable.
///
/// The groups follow one another and cover the rows of `x [rows, in]`; a group may be empty. An error if
/// they do not, if shapes do not fit, or if the weights are held in different precisions.
pub fn grouped_matmul(x: &Tensor, groups: &[Group<'_>], columns: usize) -> Result<Tensor> {
    let (rows, inner) = x.dims2()?;
    let mut covered = 0;
    for Group { rows: own, w, bias } in groups {
        if own.start != covered || own.end < covered || own.end > rows {
            bail!("group {own:?} does not follow row {covered} of {rows}");
        }
        covered = own.end;
        let fits = w.shape() == (inner, columns)
            && w.format() == groups[0].w.format()
            && bias.is_none_or(|b| b.elem_count() == columns);
        if !fits {
            let bias = bias.map(Tensor::dims);
            bail!("{:?} by {:?} with bias {bias:?} to {columns} columns", x.dims(), w.shape());
        }
    }
    if covered != rows {
        bail!("groups cover {covered} of {rows} rows");
    }
    let x = x.contiguous()?;
    let x = elements(&x)?;
    let biases: Vec<_> =
        groups.iter().map(|g| g.bias.map(elements).transpose()).collect::<Result<_>>()?;
    let parts = groups.iter().zip(&biases).filter(|(group, _)| !group.rows.is_empty());
    let floats = parts.clone().map(|(group, bias)| {
        let bias = bias.as_deref().map(|b| Shared::new(b.as_ptr().cast_mut()));
        Some(Part { rows: group.rows.clone(), panels: group.w.panels()?, bias })
    });
    let run = |out: Shared<f32>| match floats.collect::<Option<Vec<Part<'_>>>>() {
        // SAFETY: the parts cover all rows, and fit the input and the columns.
        Some(floats) => unsafe { multiply(&x, &floats, out) },
        None => parts.for_each(|(Group { rows, w, .. }, bias)| {
            let own = &x[rows.start * inner..rows.end * inner];
            // SAFETY: as above; these rows' place is theirs alone.
            unsafe {
                let out = Shared::new(out.get().add(rows.start * columns));
                w.multiply(own, rows.len(), bias.as_deref(), out);
            }
        }),
    };
    // SAFETY: every row is in a group.
    let out = unsafe { filled(rows * columns, run) };
    Tensor::from_vec(out, (rows, columns), &Device::Cpu)
}

/// A group that was found to fit.
struct Part<'a> {
    rows: Range<usize>,
    panels: &'a Panels,
    bias: Option<Shared<f32>>,
}

impl Part<'_> {
    /// Some of its rows, packed at `a`, by some of its panels.
    ///
    /// # Safety
    /// `a` must hold these rows, `lda` words apart, and `out` have a place for all rows of all parts.
    unsafe fn multiply(
        &self,
        (a, lda): (*const u32, usize),
        rows: Range<usize>,
        panels: Range<usize>,
        out: Shared<f32>,
    ) {
        let start = self.bias.map_or(Start::Zero, |b| Start::Bias(b.get()));
        let columns = self.panels.columns;
        // SAFETY: passed on from the caller.
        unsafe {
            let out = out.get().add(rows.start * columns);
            self.panels.strips((a, lda), rows.len(), panels, start, (out, columns));
        }
    }
}

/// # Safety
/// The parts must follow one another over the rows of `x` and fit it; `out` must have a place for all.
unsafe fn multiply(x: &[f32], parts: &[Part<'_>], out: Shared<f32>) {
    let [first, ..] = parts else { return };
    let rows = parts.last().map_or(0, |last| last.rows.end);
    let (how, k, count) = (first.panels.how(), first.panels.k, first.panels.count());
    let (matrix, lda) = (Operand::Inner(x).matrix(rows, k), spread(words(k, how.1)));
    if let Some(block) = row_block(rows, parts.len() * count) {
        let blocks = parts.iter().flat_map(|part| {
            let starts = part.rows.clone().step_by(block);
            starts.map(move |start| (part, start..(start + block).min(part.rows.end)))
        });
        let blocks: Vec<_> = blocks.collect();
        each(blocks.len(), |i| {
            let (part, rows) = blocks[i].clone();
            with_scratch(rows.len() * lda, |a| {
                // SAFETY: the scratch has room for the block; each block has one task.
                unsafe {
                    matrix.pack_rows(how, rows.clone(), a, lda);
                    part.multiply((a, lda), rows, 0..count, out);
                }
            });
        });
        return;
    }
    with_scratch(rows * lda, |a| {
        let a = Shared::new(a);
        // SAFETY: the scratch has room for all rows.
        unsafe { matrix.pack_all_rows(how, rows, a, lda) };
        let (tasks, panels_of) = split(parts, how.0.panel_width() * k, count);
        let run = |task: usize| {
            for part in parts {
                // SAFETY: each panel of each part has one task.
                unsafe {
                    let a = a.get().add(part.rows.start * lda);
                    part.multiply((a, lda), part.rows.clone(), panels_of(part, task), out);
                }
            }
        };
        each(tasks, run);
    });
}

/// Shares the panels of all parts out to tasks of about the same work, where one row of one panel is
/// `work` products: how many tasks, and which of a part's `count` panels one of them takes.
fn split(
    parts: &[Part<'_>],
    work: usize,
    count: usize,
) -> (usize, impl Fn(&Part<'_>, usize) -> Range<usize>) {
    let rows = parts.last().map_or(0, |last| last.rows.end);
    let tasks = 4 * threads();
    // All rows of all panels in a line, part by part and panel by panel, cut into pieces of this length:
    // a panel belongs to the piece in which it begins.
    let length = TASK_WORK.div_ceil(work).max((rows * count).div_ceil(tasks));
    let panels_of = move |part: &Part<'_>, task: usize| {
        let (begin, each) = (part.rows.start * count, part.rows.len());
        let panel = |at: usize| at.saturating_sub(begin).div_ceil(each).min(count);
        panel(task * length)..panel((task + 1) * length)
    };
    ((rows * count).div_ceil(length), panels_of)
}

/// Adds `weight · x[rows] · a · b` to `y[rows]` for each group, in order, and gives `y` back.
///
/// Groups may overlap and may leave rows out; their ranks may differ. The memory of `y [rows, out]` is
/// changed, so nobody else should hold it. Not differentiable. An error if shapes do not fit, if `y` is
/// not dense, or if `x [rows, in]` is in its memory.
pub fn low_rank_add(y: Tensor, x: &Tensor, groups: &[LowRankGroup<'_>]) -> Result<Tensor> {
    let ((rows, columns), (x_rows, inner)) = (y.dims2()?, x.dims2()?);
    if rows != x_rows {
        bail!("{:?} for the rows of {:?}", x.dims(), y.dims());
    }
    for LowRankGroup { rows: own, a, b, .. } in groups {
        if own.start > own.end || own.end > rows {
            bail!("group {own:?} is not among {rows} rows");
        }
        let ((a_in, rank), (b_in, b_out)) = (a.shape(), b.shape());
        let alike = a.format() == b.format() && a.panels().is_some();
        if (a_in, b_out) != (inner, columns) || rank != b_in || !alike {
            let (a_is, b_is) = (a.format(), b.format());
            let (a, b) = (a.shape(), b.shape());
            bail!("{a:?} {a_is:?} and {b:?} {b_is:?} between {inner} and {columns} columns");
        }
    }
    if y.track_op() {
        bail!("a product cannot be added in place where gradients are wanted");
    }
    if groups.iter().any(|group| !group.rows.is_empty()) {
        y.inplace_op2(&x.contiguous()?, &LowRank { groups, inner, columns })?;
    }
    Ok(y)
}

/// Groups that were found to fit.
struct LowRank<'a> {
    groups: &'a [LowRankGroup<'a>],
    inner: usize,
    columns: usize,
}

impl InplaceOp2 for LowRank<'_> {
    fn name(&self) -> &'static str {
        "low_rank_add"
    }

    fn cpu_fwd(
        &self,
        y: &mut CpuStorage,
        y_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let (CpuStorage::F32(y), CpuStorage::F32(x)) = (y, x) else {
            bail!("low_rank_add: only f32 is computed");
        };
        let dense = |layout: &Layout| layout.contiguous_offsets().map(|(start, end)| start..end);
        let (Some(y_range), Some(x_range)) = (dense(y_layout), dense(x_layout)) else {
            bail!("low_rank_add: a tensor of shape {:?} is not dense", y_layout.shape());
        };
        let (Some(y), Some(x)) = (y.get_mut(y_range), x.get(x_range)) else {
            bail!("low_rank_add: a tensor is larger than its storage");
        };
        self.add(y, x);
        Ok(())
    }
}

impl LowRank<'_> {
    fn add(&self, y: &mut [f32], x: &[f32]) {
        let block = self.rows_per_task(x.len() / self.inner);
        let add = |i: usize, y: &mut [f32]| {
            let first = i * block;
            for group in self.groups {
                let rows =
                    group.rows.start.max(first)..group.rows.end.min(first + y.len() / self.columns);
                if !rows.is_empty() {
                    let y =
                        &mut y[(rows.start - first) * self.columns..][..rows.len() * self.columns];
                    add_group(group, &x[rows.start * self.inner..rows.end * self.inner], y);
                }
            }
        };
        each_part(y, block * self.columns, add);
    }

    /// All of `rows` if the work is not worth several tasks.
    fn rows_per_task(&self, rows: usize) -> usize {
        let work = |group: &LowRankGroup<'_>| {
            group.rows.len() * group.a.shape().1 * (self.inner + self.columns)
        };
        let work: usize = self.groups.iter().map(work).sum();
        let tasks = (work / TASK_WORK).clamp(1, 4 * threads());
        rows.div_ceil(tasks).clamp(1, ROW_BLOCK)
    }
}

/// Adds a group's product for rows `x` to rows `y`, at most a block of them.
fn add_group(group: &LowRankGroup<'_>, x: &[f32], y: &mut [f32]) {
    // Groups in anything but floats were refused.
    let (Some(a), Some(b)) = (group.a.panels(), group.b.panels()) else { return };
    let (rows, rank, how): (usize, usize, (Isa, bool)) = (x.len() / a.k, a.columns, a.how());
    let (x_stride, t_stride) = (spread(words(a.k, how.1)), spread(words(rank, how.1)));
    with_scratch(rows * (x_stride + rank + t_stride), |scratch| {
        // SAFETY: the scratch has room for the rows' words, for their products with `a` and for the words
        // of these; `x` and `y` are whole rows of the widths of `a` and `b`.
        unsafe {
            let t: *mut f32 = scratch.add(rows * x_stride).cast();
            let t_words = scratch.add(rows * (x_stride + rank));
            Operand::Inner(x).matrix(rows, a.k).pack_rows(how, 0..rows, scratch, x_stride);
            a.multiply_words((scratch, x_stride), rows, Start::Zero, (t, rank));
            for i in 0..rows * rank {
                *t.add(i) *= group.weight;
            }
            let t = Matrix { data: t, stride: rank, inner_lines: true, k: rank };
            t.pack_rows(how, 0..rows, t_words, t_stride);
            let y = (y.as_mut_ptr(), b.columns);
            b.multiply_words((t_words, t_stride), rows, Start::Output, y);
        }
    });
}

#[cfg(test)]
mod tests;
