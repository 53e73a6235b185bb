//! Paged keys and values, and attention over them.
//!
//! The pool is a set of blocks; a sequence's table says which blocks hold it. Position `p` lives in
//! slot `p % block_size` of block `table[p / block_size]`. Each row's result is computed on its own, so
//! it does not depend on what else is in the step.
#![allow(unsafe_code)]

mod head;

use super::Precision;
use super::autograd::elements;
use super::gemm::pack::{Matrix, words};
use super::memory::{Pages, Shared, Words, filled, with_scratch};
use super::simd::Isa;
use super::threads::{each, threads};
use candle_core::{DType, Device, Result, Tensor, bail};
use head::Head;
use std::ops::Range;

/// Products of positions and width that are worth a task of their own.
const TASK_WORK: usize = 1 << 14;
/// Rows that one thread writes faster than several.
const FEW_ROWS: usize = 8;

/// What a pool keeps for each position.
#[derive(Clone, Copy, Debug)]
pub struct KvShape {
    /// Layers, each with keys and values of its own.
    pub layers: usize,
    /// Positions of a block.
    pub block_size: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What keys, values, queries and weights are rounded to.
    pub precision: Precision,
}

impl KvShape {
    /// Whether words hold pairs of bf16. Odd sizes stay f32.
    fn pairs(&self) -> bool {
        let even = self.block_size.is_multiple_of(2) && self.head_dim.is_multiple_of(2);
        self.precision == Precision::Bf16 && even
    }

    /// Bytes of keys and values in all layers.
    pub fn bytes_per_position(&self) -> usize {
        2 * self.layers * self.heads * words(self.head_dim, self.pairs()) * size_of::<u32>()
    }
}

/// Keys and values of all layers.
///
/// They are kept in words of one f32 or of two bf16, so that scores and outputs are both computed with
/// neighbouring lanes: blocks are `[layer][keys, values][head]`, and of these keys are
/// `[words of dim][slot]` and values `[words of slot][dim]`. All of a block is in one place, so that a pool
/// takes no more memory than its blocks in use.
#[derive(Debug)]
pub struct KvPool {
    words: Pages,
    layers: usize,
    blocks: usize,
    block_size: usize,
    heads: usize,
    head_dim: usize,
    pairs: bool,
}

/// Which sequence and position each row of a step is.
#[derive(Clone, Copy, Debug)]
pub struct PagedRows<'a> {
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
    /// For each sequence its rows and its part of `tables`.
    pub slices: &'a [(Range<usize>, Range<usize>)],
    /// Block tables, one after the other.
    pub tables: &'a [u32],
}

impl KvPool {
    /// A pool of zeros; its memory is touched only as blocks are written. An error if there is not that
    /// much memory to be had.
    pub fn new(shape: KvShape, blocks: usize) -> Result<Self> {
        let KvShape { layers, block_size, heads, head_dim, .. } = shape;
        let size = [layers, blocks, block_size, heads, head_dim]
            .iter()
            .try_fold(1usize, |product, &n| product.checked_mul(n))
            .filter(|&n| n > 0 && n <= isize::MAX as usize / 16);
        let Some(size) = size else {
            bail!("a KV pool of {blocks} blocks of {block_size} x {heads} x {head_dim} is no size");
        };
        let pairs = shape.pairs();
        let count = words(size, pairs);
        let Ok(words) = Pages::zeros(2 * count) else {
            bail!("no memory for a KV pool of {} bytes", 2 * count * size_of::<u32>());
        };
        Ok(Self { words, layers, blocks, block_size, heads, head_dim, pairs })
    }

    /// Writes K and V of all rows of `qkv [rows, 3d]` into their blocks, then attends from each row
    /// over positions `0..=its own` of its sequence. Gives `[rows, d]`. Refuses tables that are too
    /// short or name blocks outside the pool, before anything is written.
    pub fn attend(&mut self, layer: usize, qkv: &Tensor, rows: &PagedRows<'_>) -> Result<Tensor> {
        let (count, width) = qkv.dims2()?;
        let d = self.heads * self.head_dim;
        if width != 3 * d || layer >= self.layers || qkv.dtype() != DType::F32 {
            bail!("qkv {:?} at layer {layer} does not fit the KV pool", qkv.shape());
        }
        let tables = self.tables_by_row(count, rows)?;
        let qkv = qkv.contiguous()?;
        let qkv = elements(&qkv)?;
        let stride = words(3 * d, self.pairs);
        let matrix = Matrix { data: qkv.as_ptr(), stride: 3 * d, inner_lines: true, k: 3 * d };
        let mut packed = Words::zeros(count * stride);
        // SAFETY: there are count rows of 3d elements, and as many words for each.
        unsafe {
            let how = (Isa::best(), self.pairs);
            matrix.pack_all_rows(how, count, Shared::new(packed.as_mut_ptr()), stride);
        }
        let step = Step { layer, tables: &tables, positions: rows.positions, packed: &packed };
        self.write(&step);
        // SAFETY: there is a task for each row and head, and each writes its whole part.
        let out = unsafe { filled(count * d, |out| self.look(&step, out)) };
        Tensor::from_vec(out, (count, d), &Device::Cpu)
    }

    /// Attention of all rows, to `[rows, d]`.
    fn look(&self, step: &Step<'_>, out: Shared<f32>) {
        let (count, d) = (step.tables.len(), self.heads * self.head_dim);
        let attend = |i: usize, next: Option<usize>| {
            let head = self.head(step, i, out);
            let next = next.map(|next| self.head(step, next, out).keys(0));
            with_scratch(Head::scratch(head.len, self.block_size), |scores| {
                // SAFETY: the tables were checked, and each task has a row and head of its own.
                unsafe { Head { scores: scores.cast(), ..head }.run(next) };
            });
        };
        let positions: usize = step.positions.iter().map(|&p| p as usize + 1).sum();
        let all = count * self.heads;
        let tasks = (positions * d / TASK_WORK).clamp(1, 8 * threads()).min(all);
        each(tasks, |task| {
            let (first, end) = (task * all / tasks, (task + 1) * all / tasks);
            (first..end).for_each(|i| attend(i, Some(i + 1).filter(|&next| next < end)));
        });
    }

    /// The `i`-th row and head. Rows of one sequence come one after the other, so that its blocks stay in
    /// the cache.
    fn head<'a>(&'a self, step: &'a Step<'a>, i: usize, out: Shared<f32>) -> Head<'a> {
        let (head, row) = (i / step.tables.len(), i % step.tables.len());
        let query = words(self.head_dim, self.pairs);
        Head {
            pool: self,
            base: self.offset(step.layer, 0, head),
            table: step.tables[row],
            len: step.positions[row] as usize + 1,
            q: &step.line(row)[head * query..][..query],
            scores: std::ptr::null_mut(),
            // SAFETY: the output is `[count, d]`, and this row and head are inside.
            out: unsafe { out.get().add((row * self.heads + head) * self.head_dim) },
        }
    }

    /// Each row's block table, after checking that every position has a block of the pool.
    fn tables_by_row<'a>(&self, count: usize, rows: &PagedRows<'a>) -> Result<Vec<&'a [u32]>> {
        if rows.positions.len() != count {
            bail!("{} positions for {count} rows", rows.positions.len());
        }
        let mut by_row = Vec::with_capacity(count);
        for (slice, table) in rows.slices {
            if slice.start != by_row.len() || slice.end > count || slice.end < slice.start {
                bail!("slice {slice:?} does not follow row {} of {count}", by_row.len());
            }
            let Some(table) = rows.tables.get(table.clone()) else {
                bail!("block table {table:?} is outside the {} entries", rows.tables.len());
            };
            let Some(last) = rows.positions[slice.clone()].iter().max() else { continue };
            let used = table.get(..*last as usize / self.block_size + 1);
            if !used.is_some_and(|t| t.iter().all(|&block| (block as usize) < self.blocks)) {
                bail!("position {last} has no block in {table:?}");
            }
            by_row.resize(slice.end, table);
        }
        if by_row.len() != count {
            bail!("slices cover {} of {count} rows", by_row.len());
        }
        Ok(by_row)
    }

    /// Words of one head's part of a block, in either array.
    fn part(&self) -> usize {
        words(self.block_size * self.head_dim, self.pairs)
    }

    /// Where a head's keys of a block begin; its values are [`values`](Self::values) behind them.
    fn offset(&self, layer: usize, block: u32, head: usize) -> usize {
        block as usize * self.block() + (2 * layer * self.heads + head) * self.part()
    }

    /// From a head's keys to its values.
    fn values(&self) -> usize {
        self.heads * self.part()
    }

    /// From one block to the next.
    fn block(&self) -> usize {
        2 * self.layers * self.heads * self.part()
    }

    /// Writes the keys and values of all rows, head by head: rows of one sequence may share words.
    fn write(&mut self, step: &Step<'_>) {
        let begin = Shared::new(self.words.as_mut_ptr());
        let pool = &*self;
        let heads = if step.tables.len() < FEW_ROWS { self.heads } else { 1 };
        each(self.heads.div_ceil(heads), |task| {
            for head in task * heads..(task + 1) * heads {
                for row in 0..step.tables.len() {
                    // SAFETY: the tables were checked; a head's words are written by one task, and
                    // nobody reads the pool meanwhile.
                    unsafe { pool.write_row(step, row, head, begin.get()) };
                }
            }
        });
    }

    /// Writes the words of one row's keys and values of one head.
    ///
    /// # Safety
    /// The row's position must have a block in the pool, whose words are at `words`.
    unsafe fn write_row(&self, step: &Step<'_>, row: usize, head: usize, words: *mut u32) {
        let (size, dim, position) = (self.block_size, self.head_dim, step.positions[row] as usize);
        let (slot, block) = (position % size, step.tables[row][position / size]);
        let line = step.line(row);
        let (own, third) = (line.len() / 3 / self.heads, line.len() / 3);
        let key = &line[third + head * own..][..own];
        let value = &line[2 * third + head * own..][..own];
        // SAFETY: the slot is inside the block, and the block inside the pool.
        let (keys, values) = unsafe {
            let keys = words.add(self.offset(step.layer, block, head));
            let values = keys.add(self.values());
            (keys, std::slice::from_raw_parts_mut(values, self.part()))
        };
        for (i, &k) in key.iter().enumerate() {
            // SAFETY: as above.
            unsafe { *keys.add(i * size + slot) = k };
        }
        if !self.pairs {
            return values[slot * dim..][..dim].copy_from_slice(value);
        }
        // A word of the row holds two dimensions of this slot; one of the pool two slots.
        let line = values[slot / 2 * dim..][..dim].chunks_exact_mut(2);
        for (pair, &v) in line.zip(value) {
            set_half(&mut pair[0], slot % 2, v & 0xffff);
            set_half(&mut pair[1], slot % 2, v >> 16);
        }
    }
}

/// The rows of one call.
struct Step<'a> {
    layer: usize,
    /// Each row's block table, checked.
    tables: &'a [&'a [u32]],
    positions: &'a [u32],
    /// q, k and v of each row as words.
    packed: &'a Words,
}

impl Step<'_> {
    fn line(&self, row: usize) -> &[u32] {
        let stride = self.packed.len() / self.tables.len();
        &self.packed.as_slice()[row * stride..][..stride]
    }
}

/// Sets the low (0) or high (1) half of a word.
fn set_half(word: &mut u32, half: usize, bits: u32) {
    let shift = 16 * half;
    *word = *word & !(0xffff << shift) | bits << shift;
}

#[cfg(test)]
mod tests;
