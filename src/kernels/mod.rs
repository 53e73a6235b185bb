//! How the arithmetic is done: the only safe door to the only unsafe code of the crate.
//!
//! [`Ops`] are the differentiable operations of training, each with a plain reference
//! ([`mod@reference`]) that defines it. [`PackedMatrix`] and [`KvPool`] are what serving runs on;
//! [`grouped_matmul`] and [`low_rank_add`] are what rows with experts and adapters of their own need. All
//! tensors are f32 and row-major; "rows" are the packed rows of many sequences, one after the other.
//!
//! Nothing here knows models, requests or training schedules. Invariants: on the CPU the result of a
//! row does not depend, not even in its last bit, on the other rows of the call; shapes that do not fit
//! are errors, never panics.

mod attention;
mod autograd;
mod embed;
mod gemm;
mod grouped;
mod int8;
mod kv;
mod linear;
mod loss;
mod memory;
mod mix;
mod mmap;
mod norm;
mod ops;
mod optim;
mod packed;
mod pointwise;
mod reduce;
mod reference;
mod simd;
mod threads;
mod vocabulary;

pub use autograd::elements;
pub use grouped::{Group, LowRankGroup, grouped_matmul, low_rank_add};
pub use kv::{KvPool, KvShape, PagedRows};
pub use memory::keep_freed_memory;
pub use mix::mix_rows;
pub use mmap::map_file;
pub use ops::{Mode, Ops};
pub use optim::{AdamW, adamw_step, l2_norm_squared};
pub use packed::{Format, PackedMatrix};
pub use threads::{collect, set_threads, threads};
pub use vocabulary::{BLOCK, block_sums, exponentials, largest};

/// The target of a row that takes no part in [`Ops::cross_entropy`].
pub const IGNORE: u32 = u32::MAX;

/// What the inputs of matrix products are rounded to; sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// No rounding.
    F32,
    /// bfloat16: 8 bits of mantissa, half the bytes.
    Bf16,
}

#[cfg(test)]
mod tests;
