//! Paged keys and values, and attention over them.
//!
//! The pool is a set of blocks; a sequence's table says which blocks hold it. Position `p` lives in
//! slot `p % block_size` of block `table[p / block_size]`. Each row's result is computed on its own, so
//! it does not depend on what else is in the step.
#![allow(unsafe_code)]

mod head;

use super::threads::{each, threads};
use super::Precision;
use super::autograd::elements;
use super::gemm::pack::{Matrix, words};
use super::memory::{Shared, Words, filled, with_scratch};
use super::simd::Isa;
use candle_core::{DType, Device, Result, Tensor, bail};
use head::Head;
use std::ops::Range;

/// Products of positions and width below which one thread is faster than several.
const SMALL: usize = 1 << 16;

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
/// neighbouring lanes: within a block, keys as `[head][words of dim][slot]` and values as
/// `[head][words of slot][dim]`.
#[derive(Debug)]
pub struct KvPool {
    keys: Words,
    values: Words,
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
        let (Some(keys), Some(values)) = (Words::try_zeros(count), Words::try_zeros(count)) else {
            bail!("no memory for a KV pool of {} bytes", 2 * count * size_of::<u32>());
        };
        Ok(Self { keys, values, layers, blocks, block_size, heads, head_dim, pairs })
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
        let row_words = words(3 * d, self.pairs);
        let mut packed = Words::zeros(count * row_words);
        let matrix = Matrix { data: qkv.as_ptr(), stride: 3 * d, inner_lines: true, k: 3 * d };
        // SAFETY: there are count rows of 3d elements, and as many words for each.
        unsafe {
            let how = (Isa::best(), self.pairs);
            matrix.pack_rows(how, 0..count, packed.as_mut_ptr(), row_words);
        }
        let line = |row: usize| &packed.as_slice()[row * row_words..][..row_words];
        for (row, table) in tables.iter().enumerate() {
            self.write(layer, table, rows.positions[row] as usize, &line(row)[row_words / 3..]);
        }
        let pool = &*self;
        let attend = |i: usize, out: Shared<f32>| {
            // Rows of one sequence come one after the other, so that its blocks stay in the cache.
            let (head, row) = (i / count, i % count);
            let query = words(pool.head_dim, pool.pairs);
            let len = rows.positions[row] as usize + 1;
            with_scratch(Head::scratch(len, pool.block_size), |scores| {
                let head = Head {
                    pool,
                    base: pool.offset(layer, 0, head),
                    table: tables[row],
                    len,
                    q: &line(row)[head * query..][..query],
                    scores: scores.cast(),
                    // SAFETY: the output is `[count, d]`, and this row and head are inside.
                    out: unsafe { out.get().add(row * d + head * pool.head_dim) },
                };
                // SAFETY: the table was checked, and each task has a row and head of its own.
                unsafe { head.run() };
            });
        };
        let positions: usize = rows.positions.iter().map(|&p| p as usize + 1).sum();
        let tasks = count * pool.heads;
        let run = |out: Shared<f32>| {
            if positions * d < SMALL {
                (0..tasks).for_each(|i| attend(i, out));
            } else {
                let few = tasks.div_ceil(8 * threads());
                each(tasks.div_ceil(few), |part| {
                    let own = part * few..((part + 1) * few).min(tasks);
                    own.for_each(|i| attend(i, out));
                });
            }
        };
        // SAFETY: there is a task for each row and head, and each writes its whole part.
        let out = unsafe { filled(count * d, run) };
        Tensor::from_vec(out, (count, d), &Device::Cpu)
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

    /// Where a head's part of a block begins, in both arrays.
    fn offset(&self, layer: usize, block: u32, head: usize) -> usize {
        ((layer * self.blocks + block as usize) * self.heads + head) * self.part()
    }

    /// Writes the words of one row's keys, then values.
    fn write(&mut self, layer: usize, table: &[u32], position: usize, kv: &[u32]) {
        let (slot, size, dim) = (position % self.block_size, self.block_size, self.head_dim);
        let block = table[position / self.block_size];
        let (k, v) = kv.split_at(kv.len() / 2);
        let heads = k.chunks_exact(k.len() / self.heads).zip(v.chunks_exact(v.len() / self.heads));
        for (head, (k, v)) in heads.enumerate() {
            let begin = self.offset(layer, block, head);
            let part = begin..begin + self.part();
            let keys = &mut self.keys.as_mut_slice()[part.clone()];
            keys[slot..].iter_mut().step_by(size).zip(k).for_each(|(key, &k)| *key = k);
            let values = &mut self.values.as_mut_slice()[part];
            if self.pairs {
                // A word of v holds two dimensions of this slot; one of the pool two slots.
                let line = values[slot / 2 * dim..][..dim].chunks_exact_mut(2);
                for (pair, &v) in line.zip(v) {
                    set_half(&mut pair[0], slot % 2, v & 0xffff);
                    set_half(&mut pair[1], slot % 2, v >> 16);
                }
            } else {
                values[slot * dim..][..dim].copy_from_slice(v);
            }
        }
    }
}

/// Sets the low (0) or high (1) half of a word.
fn set_half(word: &mut u32, half: usize, bits: u32) {
    let shift = 16 * half;
    *word = *word & !(0xffff << shift) | bits << shift;
}

#[cfg(test)]
mod tests;
