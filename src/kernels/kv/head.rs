//! One row's attention in one head.

use super::KvPool;
use crate::kernels::simd::{Isa, Kernel, Simd, softmax};

/// A query, what it sees, and where the result goes.
pub struct Head<'a> {
    pub pool: &'a KvPool,
    /// Where block 0's part of this layer and head begins.
    pub base: usize,
    pub table: &'a [u32],
    /// Positions that the row sees.
    pub len: usize,
    /// The query, in words.
    pub q: &'a [u32],
    /// [`scratch`](Self::scratch) elements.
    pub scores: *mut f32,
    /// As many elements as a head is wide.
    pub out: *mut f32,
}

impl Head<'_> {
    /// Elements that the scores need: one for each slot of the blocks, and as much again as a vector of
    /// pairs may read beyond them.
    pub fn scratch(len: usize, block_size: usize) -> usize {
        len.next_multiple_of(block_size) + 32
    }

    /// Runs it.
    ///
    /// # Safety
    /// The table's blocks up to `len` must be inside the pool, and `scores` and `out` as large as said.
    pub unsafe fn run(self) {
        match self.pool.pairs {
            true => Isa::best().run(Typed::<true>(self)),
            false => Isa::best().without_bf16().run(Typed::<false>(self)),
        }
    }

    /// Products of the query and the keys of `n` neighbouring slots.
    #[inline(always)]
    unsafe fn dots<S: Simd, const PAIRS: bool>(&self, keys: *const u32, n: usize) -> S::V {
        let slots = self.pool.block_size;
        // SAFETY: the caller's keys are `[words of head_dim, block_size]` from the first of n slots on.
        unsafe {
            // Four sums, for the additions not to wait for each other.
            let mut sums = [S::splat(0.0); 4];
            for (i, &q) in self.q.iter().enumerate() {
                let key = S::load_n(keys.add(i * slots).cast(), n);
                sums[i % 4] = multiply::<S, PAIRS>(S::splat_word(q), key, sums[i % 4]);
            }
            let [a, b, c, d] = sums;
            S::add(S::add(a, b), S::add(c, d))
        }
    }

    /// Weighted sum of the values, `n` neighbouring dimensions of them.
    #[inline(always)]
    unsafe fn sums<S: Simd, const PAIRS: bool>(&self, at: usize, n: usize) -> S::V {
        let KvPool { block_size, head_dim, heads, .. } = *self.pool;
        let per_word = if PAIRS { 2 } else { 1 };
        let stride = heads * self.pool.part();
        // SAFETY: blocks are inside the pool; each holds `[words of slot, head_dim]` values.
        unsafe {
            let mut sums = [S::splat(0.0); 4];
            let mut weights = self.scores.cast_const().cast::<u32>();
            let mut left = self.len;
            for &block in &self.table[..self.len.div_ceil(block_size)] {
                let begin = self.base + block as usize * stride + at;
                let values = self.pool.values.as_ptr().add(begin);
                let here = left.min(block_size);
                for word in 0..here.div_ceil(per_word) {
                    let value = S::load_n(values.add(word * head_dim).cast(), n);
                    // A slot beyond the end may hold anything, even what is not a number.
                    let half = PAIRS && 2 * word + 1 == here;
                    let value = if half { S::low_halves(value) } else { value };
                    let weight = S::splat_word(*weights.add(word));
                    sums[word % 4] = multiply::<S, PAIRS>(weight, value, sums[word % 4]);
                }
                left -= here;
                weights = weights.add(block_size / per_word);
            }
            let [a, b, c, d] = sums;
            S::add(S::add(a, b), S::add(c, d))
        }
    }
}

#[inline(always)]
unsafe fn multiply<S: Simd, const PAIRS: bool>(a: S::V, b: S::V, sum: S::V) -> S::V {
    // SAFETY: registers only.
    unsafe { if PAIRS { S::dot_pairs(sum, a, b) } else { S::fma(a, b, sum) } }
}

struct Typed<'a, const PAIRS: bool>(Head<'a>);

impl<const PAIRS: bool> Kernel for Typed<'_, PAIRS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let head = self.0;
        let KvPool { block_size, head_dim, heads, .. } = *head.pool;
        let blocks = head.len.div_ceil(block_size);
        let stride = heads * head.pool.part();
        // SAFETY: blocks are inside the pool, scores have a place for every slot and two vectors more,
        // and the output has room for a head.
        unsafe {
            for (i, &block) in head.table[..blocks].iter().enumerate() {
                let keys = head.pool.keys.as_ptr().add(head.base + block as usize * stride);
                for at in (0..block_size).step_by(S::LANES) {
                    let n = (block_size - at).min(S::LANES);
                    let dots = head.dots::<S, PAIRS>(keys.add(at), n);
                    S::store_n(head.scores.add(i * block_size + at), dots, n);
                }
            }
            let scale = 1.0 / (head_dim as f32).sqrt();
            softmax::<S>(head.scores, head.len, scale, 1.0);
            if PAIRS {
                // In place: words are written behind where elements are read.
                let end = head.len.next_multiple_of(2 * S::LANES);
                std::ptr::write_bytes(head.scores.add(head.len), 0, end - head.len);
                for at in (0..end / 2).step_by(S::LANES) {
                    S::store(head.scores.add(at), S::pairs_of(head.scores.add(2 * at)));
                }
            }
            for at in (0..head_dim).step_by(S::LANES) {
                let n = (head_dim - at).min(S::LANES);
                S::store_n(head.out.add(at), head.sums::<S, PAIRS>(at, n), n);
            }
        }
    }
}
