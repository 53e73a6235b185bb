//! Operands as the innermost loops read them.
//!
//! A *word* is 32 bits of the inner dimension: one f32, or two neighbouring bf16. Left operands become
//! rows of words; right operands become *panels*: groups of columns, each a `k x width` array of words,
//! one after the other. The last panel is as wide as its columns need, in whole vectors.

use super::super::threads::each;
use crate::kernels::memory::Shared;
use crate::kernels::simd::{Isa, Kernel, Simd};
use std::ops::Range;

/// An f32 matrix in memory, as an operand with an inner dimension `k` and an outer one.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub data: *const f32,
    /// Elements from one line to the next.
    pub stride: usize,
    /// Whether a line holds neighbours of the inner dimension (else of the outer one).
    pub inner_lines: bool,
    /// Length of the inner dimension, in elements.
    pub k: usize,
}

// SAFETY: a description of memory that is only read; the uses are unsafe and say why they may.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Sync for Matrix {}

/// Words that an inner dimension of `k` takes.
pub fn words(k: usize, pairs: bool) -> usize {
    if pairs { k.div_ceil(2) } else { k }
}

/// How far apart to keep rows of `count` words. Not a multiple of a large power of two: such rows would
/// compete for the same few places in the caches.
pub fn spread(count: usize) -> usize {
    if count >= 256 { count.next_multiple_of(16) + 16 } else { count }
}

impl Matrix {
    /// Words `at..at + count` (at most one vector) of the inner dimension at outer index `i`, zeros after.
    #[inline(always)]
    unsafe fn inner<S: Simd, const PAIRS: bool>(&self, i: usize, at: usize, count: usize) -> S::V {
        // SAFETY: nothing beyond element k of line i is read.
        unsafe {
            let line = self.data.add(i * self.stride);
            if !PAIRS {
                return S::load_n(line.add(at), count);
            }
            if count == S::LANES && 2 * (at + count) <= self.k {
                return S::pairs_of(line.add(2 * at));
            }
            let mut elements = [0f32; 32];
            let present = (2 * count).min(self.k - 2 * at);
            std::ptr::copy_nonoverlapping(line.add(2 * at), elements.as_mut_ptr(), present);
            S::pairs_of(elements.as_ptr())
        }
    }

    /// What word `at` of the inner dimension holds at outer indices `i..i + count`, zeros after: an
    /// element, and the one after it if words are pairs.
    #[inline(always)]
    unsafe fn lines<S: Simd, const PAIRS: bool>(
        &self,
        i: usize,
        at: usize,
        count: usize,
    ) -> (S::V, S::V) {
        let at = if PAIRS { 2 * at } else { at };
        // SAFETY: only lines below k are read, and of each only `count` elements.
        unsafe {
            let line = self.data.add(at * self.stride + i);
            let even = S::load_n(line, count);
            if PAIRS && at + 1 < self.k {
                (even, S::load_n(line.add(self.stride), count))
            } else {
                (even, S::splat(0.0))
            }
        }
    }

    /// Writes the outer indices of `part` as rows of words, `stride` words apart.
    ///
    /// # Safety
    /// The matrix and `dst` must be as large as this says.
    pub unsafe fn pack_rows(
        self,
        (isa, pairs): (Isa, bool),
        part: Range<usize>,
        dst: *mut u32,
        stride: usize,
    ) {
        let Range { start: from, end } = part;
        let task = Pack { matrix: self, from, count: end - from, dst, stride };
        match pairs {
            true => isa.run(ToRows::<true>(task)),
            false => isa.without_bf16().run(ToRows::<false>(task)),
        }
    }

    /// Writes the first `rows` outer indices as rows of words, in parallel if they are many.
    ///
    /// # Safety
    /// The matrix and `dst` must be as large as this says.
    pub unsafe fn pack_all_rows(
        self,
        how: (Isa, bool),
        rows: usize,
        dst: Shared<u32>,
        stride: usize,
    ) {
        if rows * self.k < 1 << 15 {
            // SAFETY: passed on from the caller.
            return unsafe { self.pack_rows(how, 0..rows, dst.get(), stride) };
        }
        each(rows.div_ceil(16), |i| {
            let part = i * 16..((i + 1) * 16).min(rows);
            // SAFETY: passed on from the caller; each row has one task.
            unsafe { self.pack_rows(how, part, dst.get().add(i * 16 * stride), stride) };
        });
    }

    /// Writes the outer indices of `part` as panels.
    ///
    /// # Safety
    /// The matrix must be as large as this says, and `dst` must have `words(k) x` the columns of the part
    /// in whole vectors.
    pub unsafe fn pack_panels(self, how: (Isa, bool), part: Range<usize>, dst: *mut u32) {
        // SAFETY: passed on from the caller.
        unsafe { self.pack_panels_and_sum(how, part, dst, None) }
    }

    /// The same; for lines along the outer dimension also the sum of each column, to `sums`.
    ///
    /// # Safety
    /// The same, and `sums` must have a place for each column of the part.
    pub unsafe fn pack_panels_and_sum(
        self,
        (isa, pairs): (Isa, bool),
        part: Range<usize>,
        dst: *mut u32,
        sums: Option<*mut f32>,
    ) {
        for from in part.clone().step_by(isa.panel_width()) {
            let count = (part.end - from).min(isa.panel_width());
            // SAFETY: all panels of the part before this one are full.
            let dst = unsafe { dst.add((from - part.start) * words(self.k, pairs)) };
            // SAFETY: there is a place for each column.
            let sums = sums.map(|sums| unsafe { sums.add(from - part.start) });
            let task = Pack { matrix: self, from, count, dst, stride: 0 };
            match pairs {
                true => isa.run(ToPanel::<true>(task, sums)),
                false => isa.without_bf16().run(ToPanel::<false>(task, sums)),
            }
        }
    }
}

/// Part of a matrix to be packed.
struct Pack {
    matrix: Matrix,
    from: usize,
    count: usize,
    dst: *mut u32,
    stride: usize,
}

struct ToRows<const PAIRS: bool>(Pack);

impl<const PAIRS: bool> Kernel for ToRows<PAIRS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Pack { matrix, from, count, dst, stride } = self.0;
        let k = words(matrix.k, PAIRS);
        // SAFETY: indices stay below `count` and `k`; partial vectors are cut.
        unsafe {
            if matrix.inner_lines {
                for i in 0..count {
                    for at in (0..k).step_by(S::LANES) {
                        let n = (k - at).min(S::LANES);
                        let v = matrix.inner::<S, PAIRS>(from + i, at, n);
                        S::store_n(dst.add(i * stride + at).cast(), v, n);
                    }
                }
                return;
            }
            let mut square = [0u32; 256];
            for at in (0..k).step_by(S::LANES) {
                let depth = (k - at).min(S::LANES);
                for i in (0..count).step_by(S::LANES) {
                    let n = (count - i).min(S::LANES);
                    for j in 0..depth {
                        let (even, odd) = matrix.lines::<S, PAIRS>(from + i, at + j, n);
                        let v = if PAIRS { S::pairs(even, odd) } else { even };
                        S::store(square.as_mut_ptr().add(j * S::LANES).cast(), v);
                    }
                    let to = dst.add(i * stride + at);
                    transpose_part::<S>(&square, to, stride, n, depth);
                }
            }
        }
    }
}

struct ToPanel<const PAIRS: bool>(Pack, Option<*mut f32>);

impl<const PAIRS: bool> Kernel for ToPanel<PAIRS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Pack { matrix, from, count, dst, .. } = self.0;
        let k = words(matrix.k, PAIRS);
        let width = count.next_multiple_of(S::LANES);
        // SAFETY: indices stay below `count` and `k`; partial vectors are filled with zeros.
        unsafe {
            if !matrix.inner_lines {
                let mut sums = [S::splat(0.0); 4];
                for at in 0..k {
                    for i in (0..count).step_by(S::LANES) {
                        let n = (count - i).min(S::LANES);
                        let (even, odd) = matrix.lines::<S, PAIRS>(from + i, at, n);
                        let v = if PAIRS { S::pairs(even, odd) } else { even };
                        S::store(dst.add(at * width + i).cast(), v);
                        let sum = &mut sums[i / S::LANES];
                        *sum = S::add(*sum, S::add(even, odd));
                    }
                }
                if let Some(out) = self.1 {
                    for i in (0..count).step_by(S::LANES) {
                        let n = (count - i).min(S::LANES);
                        S::store_n(out.add(i), sums[i / S::LANES], n);
                    }
                }
                return;
            }
            let mut square = [0u32; 256];
            for i in (0..count).step_by(S::LANES) {
                let n = (count - i).min(S::LANES);
                for at in (0..k).step_by(S::LANES) {
                    let depth = (k - at).min(S::LANES);
                    for j in 0..S::LANES {
                        let v = if j < n {
                            matrix.inner::<S, PAIRS>(from + i + j, at, depth)
                        } else {
                            S::splat(0.0)
                        };
                        S::store(square.as_mut_ptr().add(j * S::LANES).cast(), v);
                    }
                    let to = dst.add(at * width + i);
                    transpose_part::<S>(&square, to, width, depth, S::LANES);
                }
            }
        }
    }
}

/// Transposes a square of words and writes its first `rows` rows of `columns` words.
#[inline(always)]
unsafe fn transpose_part<S: Simd>(
    square: &[u32; 256],
    dst: *mut u32,
    stride: usize,
    rows: usize,
    columns: usize,
) {
    // SAFETY: the caller's `dst` is good for that part; the square holds LANES * LANES words.
    unsafe {
        if rows == S::LANES && columns == S::LANES {
            return S::transpose(square.as_ptr(), S::LANES, dst, stride);
        }
        let mut turned = [0u32; 256];
        S::transpose(square.as_ptr(), S::LANES, turned.as_mut_ptr(), S::LANES);
        for i in 0..rows {
            let v = S::load(turned.as_ptr().add(i * S::LANES).cast());
            S::store_n(dst.add(i * stride).cast(), v, columns);
        }
    }
}
