//! The innermost loops: a few rows times one panel of packed columns, sums held in registers.

use crate::kernels::simd::{Isa, Kernel, Simd};

/// Words of the inner dimension taken at a time, so that a panel's part stays in the L1 cache. It is
/// the same for every shape: the order of a row's additions must not depend on the other rows.
const K_BLOCK: usize = 128;

/// What the sums begin with.
#[derive(Clone, Copy)]
pub enum Start {
    /// Nothing.
    Zero,
    /// What the output holds.
    Output,
    /// A value per column.
    Bias(*const f32),
}

/// Rows of words times one panel.
#[derive(Clone, Copy)]
pub struct Strip {
    /// Rows of words.
    pub a: *const u32,
    /// Words from one row to the next.
    pub lda: usize,
    pub rows: usize,
    /// The panel: `k` rows of `vectors * LANES` words.
    pub b: *const u32,
    /// Words of the inner dimension.
    pub k: usize,
    pub c: *mut f32,
    /// Elements from one output row to the next.
    pub ldc: usize,
    /// Columns of the panel that exist, 1 to `vectors * LANES`.
    pub columns: usize,
    pub start: Start,
}

/// A strip whose words are pairs of bf16, or else f32.
struct Typed<const PAIRS: bool>(Strip);

impl<const PAIRS: bool> Kernel for Typed<PAIRS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let strip = self.0;
        // SAFETY: passed on from the caller of `Strip::run`; the vector count is what the columns need.
        unsafe {
            match strip.columns.div_ceil(S::LANES) {
                0 => {}
                1 => strip.blocks::<S, PAIRS, 1>(),
                2 => strip.blocks::<S, PAIRS, 2>(),
                3 if S::LANES == 16 => strip.blocks::<S, PAIRS, 3>(),
                4 if S::LANES == 16 => strip.blocks::<S, PAIRS, 4>(),
                n => unreachable!("a panel of {n} vectors"),
            }
        }
    }
}

impl Strip {
    /// Computes the strip; words are pairs of bf16, or else f32.
    ///
    /// # Safety
    /// All pointers must be good for the sizes above, `c` for writing by this thread alone.
    pub unsafe fn run(self, isa: Isa, pairs: bool) {
        match pairs {
            true => isa.run(Typed::<true>(self)),
            false => isa.without_bf16().run(Typed::<false>(self)),
        }
    }

    #[inline(always)]
    unsafe fn blocks<S: Simd, const PAIRS: bool, const NV: usize>(mut self) {
        let mut left = self.k;
        loop {
            let k = left.min(K_BLOCK);
            // SAFETY: passed on; a, b stay inside their k words.
            unsafe {
                Strip { k, ..self }.row_groups::<S, PAIRS, NV>();
                left -= k;
                if left == 0 {
                    return;
                }
                self.a = self.a.add(k);
                self.b = self.b.add(k * NV * S::LANES);
            }
            self.start = Start::Output;
        }
    }

    #[inline(always)]
    unsafe fn row_groups<S: Simd, const PAIRS: bool, const NV: usize>(mut self) {
        while self.rows > 0 {
            // SAFETY: passed on; each group advances by the rows that it computed.
            unsafe {
                let done = match self.rows {
                    12.. if NV <= 2 && S::LANES == 16 => self.group::<S, PAIRS, 12, NV>(),
                    6.. => self.group::<S, PAIRS, 6, NV>(),
                    4.. => self.group::<S, PAIRS, 4, NV>(),
                    2.. => self.group::<S, PAIRS, 2, NV>(),
                    _ => self.group::<S, PAIRS, 1, NV>(),
                };
                self.rows -= done;
                self.a = self.a.add(done * self.lda);
                self.c = self.c.add(done * self.ldc);
            }
        }
    }

    #[inline(always)]
    unsafe fn group<S: Simd, const PAIRS: bool, const MR: usize, const NV: usize>(&self) -> usize {
        let last = self.columns - (NV - 1) * S::LANES;
        // SAFETY: passed on; the last vector of a row touches only the columns that exist.
        unsafe {
            let load = |p: *const f32, v: usize| {
                let p = p.add(v * S::LANES);
                if v + 1 == NV { S::load_n(p, last) } else { S::load(p) }
            };
            let mut sums = [[S::splat(0.0); NV]; MR];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    match self.start {
                        Start::Zero => {}
                        Start::Output => *sum = load(self.c.add(r * self.ldc), v),
                        Start::Bias(bias) => *sum = load(bias, v),
                    }
                }
            }
            let rows: [*const u32; MR] = std::array::from_fn(|r| self.a.add(r * self.lda));
            let mut b = self.b.cast::<f32>();
            for k in 0..self.k {
                let columns: [S::V; NV] = std::array::from_fn(|v| S::load(b.add(v * S::LANES)));
                for (sums, row) in sums.iter_mut().zip(&rows) {
                    let a = S::splat_word(*row.add(k));
                    for (sum, &column) in sums.iter_mut().zip(&columns) {
                        *sum = if PAIRS {
                            S::dot_pairs(*sum, a, column)
                        } else {
                            S::fma(a, column, *sum)
                        };
                    }
                }
                b = b.add(NV * S::LANES);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, &sum) in sums.iter().enumerate() {
                    let p = self.c.add(r * self.ldc + v * S::LANES);
                    if v + 1 == NV { S::store_n(p, sum, last) } else { S::store(p, sum) }
                }
            }
        }
        MR
    }
}
