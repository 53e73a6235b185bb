//! Sums over rows.
#![allow(unsafe_code)]

use super::simd::{Isa, Kernel, Simd};

/// Rows whose sums a task makes; fixed, so that the order of additions is.
pub const ROWS: usize = 64;

/// Adds up vectors of `width`, in order.
pub fn merge(parts: Vec<Vec<f32>>, width: usize, isa: Isa) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    parts.iter().for_each(|part| isa.run(AddTo { sums: &mut sums, row: part }));
    sums
}

/// `sums += row`.
pub struct AddTo<'a> {
    pub sums: &'a mut [f32],
    pub row: &'a [f32],
}

impl Kernel for AddTo<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.sums.len().min(self.row.len());
        for at in (0..len).step_by(S::LANES) {
            let n = (len - at).min(S::LANES);
            // SAFETY: `at + n` is within both slices.
            unsafe {
                let sums = self.sums.as_mut_ptr().add(at);
                let row = S::load_n(self.row.as_ptr().add(at), n);
                S::store_n(sums, S::add(S::load_n(sums, n), row), n);
            }
        }
    }
}
