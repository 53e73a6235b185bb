//! Random choices that need no state: each follows from the recipe's seed and the place in the data
//! alone, so a resumed run makes the same ones.

use crate::ids::{GAMMA, mix};

/// A small generator (SplitMix64), fixed for all time unlike a library's.
#[derive(Clone, Debug)]
pub struct Draws(u64);

impl Draws {
    /// The draws that belong to this place.
    pub fn at(place: &[u64]) -> Self {
        let mut draws = Self(GAMMA);
        for part in place {
            draws.0 ^= part.wrapping_mul(0xD6E8_FEB8_6659_FD93);
            draws.0 = draws.next_u64();
        }
        draws
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mix(self.0)
    }

    /// Uniform in `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`; `n` must be above 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Puts `items` in random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
