//! Low-rank changes of a model's linear layers, in the layout that their kernel reads.

use super::Module;
use crate::kernels::PackedMatrix;
use std::sync::Arc;

/// `y += x · a · b`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[in, r]`. Adapters that were folded out of one mixture share it.
    pub a: Arc<PackedMatrix>,
    /// `[r, out]`, with every scale in it.
    pub b: Arc<PackedMatrix>,
}

/// What one adapter adds to a model.
#[derive(Debug)]
pub struct Deltas {
    /// By layer and [`Module`].
    pub layers: Vec<[Option<LowRank>; Module::ALL.len()]>,
}

impl Deltas {
    /// What is added to one linear layer, if anything is.
    pub fn get(&self, layer: usize, module: Module) -> Option<&LowRank> {
        self.layers.get(layer)?[module as usize].as_ref()
    }
}
