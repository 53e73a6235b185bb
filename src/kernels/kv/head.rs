//! One row's attention in one head.

use super::KvPool;
use crate::kernels::simd::{Isa, Kernel, LINE, Simd, prefetch, softmax};

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

    /// Runs it; the keys at `next` will be wanted after it.
    ///
    /// # Safety
    /// The table's blocks up to `len` must be inside the pool, and `scores` and `out` as large as said.
    pub unsafe fn run(self, next: Option<*const u32>) {
        match self.pool.pairs {
            true => Isa::best().run(Typed::<true>(self, next)),
            false => Isa::best().without_bf16().run(Typed::<false>(self, next)),
        }
    }

    /// The keys of the `i`-th block, `[words of head_dim, block_size]`.
    pub fn keys(&self, i: usize) -> *const u32 {
        let begin = self.base + self.table[i] as usize * self.pool.block();
        // In bounds, as tables name blocks of the pool.
        self.pool.words.as_slice()[begin..].as_ptr()
    }

    /// The values of the `i`-th block, `[words of slot, head_dim]`.
    fn values(&self, i: usize) -> *const u32 {
        // Inside the same block.
        self.keys(i).wrapping_add(self.pool.values())
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

    /// Scores of all slots of the blocks.
    #[inline(always)]
    unsafe fn score<S: Simd, const PAIRS: bool>(&self) {
        let (size, blocks) = (self.pool.block_size, self.len.div_ceil(self.pool.block_size));
        for i in 0..blocks {
            let keys = self.keys(i);
            // What comes next is far from here, and no stream that the machine could follow.
            let next = if i + 1 < blocks { self.keys(i + 1) } else { self.values(0) };
            ask_for(next, self.pool.part());
            for at in (0..size).step_by(S::LANES) {
                let n = (size - at).min(S::LANES);
                // SAFETY: the block is inside the pool, and the scores have a place for every slot.
                unsafe {
                    let dots = self.dots::<S, PAIRS>(keys.add(at), n);
                    S::store_n(self.scores.add(i * size + at), dots, n);
                }
            }
        }
    }

    /// Weighted sums of the values, `NV` vectors of neighbouring dimensions from `at` on.
    #[inline(always)]
    unsafe fn sums<S: Simd, const PAIRS: bool, const NV: usize>(
        &self,
        at: usize,
        next: Option<*const u32>,
    ) {
        let KvPool { block_size, head_dim, .. } = *self.pool;
        let per_word = if PAIRS { 2 } else { 1 };
        let blocks = self.len.div_ceil(block_size);
        // SAFETY: blocks are inside the pool; each holds `[words of slot, head_dim]` values; the output is
        // as wide as a head.
        unsafe {
            let mut sums = [[S::splat(0.0); 2]; NV];
            for i in 0..blocks {
                let values = self.values(i).add(at);
                let next = if i + 1 < blocks { Some(self.values(i + 1)) } else { next };
                if let Some(next) = next {
                    ask_for(next, self.pool.part());
                }
                let weights = self.scores.cast::<u32>().add(i * block_size / per_word);
                let here = (self.len - i * block_size).min(block_size);
                for word in 0..here.div_ceil(per_word) {
                    let weight = S::splat_word(*weights.add(word));
                    for (v, sums) in sums.iter_mut().enumerate() {
                        let n = (head_dim - at - v * S::LANES).min(S::LANES);
                        let from = values.add(word * head_dim + v * S::LANES);
                        let value = S::load_n(from.cast(), n);
                        // A slot beyond the end may hold anything, even what is not a number.
                        let half = PAIRS && 2 * word + 1 == here;
                        let value = if half { S::low_halves(value) } else { value };
                        let sum = &mut sums[word % 2];
                        *sum = multiply::<S, PAIRS>(weight, value, *sum);
                    }
                }
            }
            for (v, [even, odd]) in sums.into_iter().enumerate() {
                let at = at + v * S::LANES;
                let n = (head_dim - at).min(S::LANES);
                S::store_n(self.out.add(at), S::add(even, odd), n);
            }
        }
    }
}

#[inline(always)]
unsafe fn multiply<S: Simd, const PAIRS: bool>(a: S::V, b: S::V, sum: S::V) -> S::V {
    // SAFETY: registers only.
    unsafe { if PAIRS { S::dot_pairs(sum, a, b) } else { S::fma(a, b, sum) } }
}

/// Asks for `words` words, so that they are at hand later.
#[inline(always)]
fn ask_for(from: *const u32, words: usize) {
    (0..words).step_by(LINE).for_each(|at| prefetch::<true>(from.wrapping_add(at)));
}

struct Typed<'a, const PAIRS: bool>(Head<'a>, Option<*const u32>);

impl<const PAIRS: bool> Kernel for Typed<'_, PAIRS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self(head, next) = self;
        let head_dim = head.pool.head_dim;
        // SAFETY: blocks are inside the pool, scores have a place for every slot and two vectors more,
        // and the output has room for a head.
        unsafe {
            head.score::<S, PAIRS>();
            softmax::<S>(head.scores, head.len, 1.0 / (head_dim as f32).sqrt(), 1.0);
            if PAIRS {
                // In place: words are written behind where elements are read.
                let end = head.len.next_multiple_of(2 * S::LANES);
                std::ptr::write_bytes(head.scores.add(head.len), 0, end - head.len);
                for at in (0..end / 2).step_by(S::LANES) {
                    S::store(head.scores.add(at), S::pairs_of(head.scores.add(2 * at)));
                }
            }
            let mut at = 0;
            while at < head_dim {
                // Four at a time, to go through the values once.
                let vectors = (head_dim - at).div_ceil(S::LANES).min(4);
                match vectors {
                    4 => head.sums::<S, PAIRS, 4>(at, next),
                    3 => head.sums::<S, PAIRS, 3>(at, next),
                    2 => head.sums::<S, PAIRS, 2>(at, next),
                    _ => head.sums::<S, PAIRS, 1>(at, next),
                }
                at += vectors * S::LANES;
            }
        }
    }
}
