//! Low-rank changes of a model's linear layers, in the layout that their kernel reads.
//!
//! Invariant: every change fits the base model that its [`Deltas`] are for.

use super::Module;
use crate::kernels::{PackedMatrix, Precision};
use std::sync::Arc;

/// What an adapter must know of its base model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Width inside the feed-forward networks.
    pub inner: usize,
    /// Layers that have experts where the others have `mlp`.
    pub moe_layers: Vec<usize>,
    /// What adapters are held in: as the base model's weights are.
    pub precision: Precision,
}

impl Shape {
    /// Inputs and outputs of a linear layer.
    pub fn sizes(&self, module: Module) -> (usize, usize) {
        match module {
            Module::Qkv => (self.width, self.width.saturating_mul(3)),
            Module::AttnProj => (self.width, self.width),
            Module::FcIn => (self.width, self.inner),
            Module::FcOut => (self.inner, self.width),
        }
    }

    /// Whether there is such a linear layer, once.
    pub fn has(&self, layer: usize, module: Module) -> bool {
        layer < self.layers && !(module.is_mlp() && self.moe_layers.contains(&layer))
    }
}

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
    shape: Shape,
    /// By layer and [`Module`].
    layers: Vec<[Option<LowRank>; Module::ALL.len()]>,
}

impl Deltas {
    /// Nothing yet, for a model of this shape.
    pub fn new(shape: &Shape) -> Self {
        let layers = (0..shape.layers).map(|_| Default::default()).collect();
        Self { shape: shape.clone(), layers }
    }

    /// Sets what is added to one linear layer; an error says why it does not fit.
    pub fn set(&mut self, layer: usize, module: Module, change: LowRank) -> Result<(), String> {
        let ((inner, rank), (b_rank, outer)) = (change.a.shape(), change.b.shape());
        let (name, sizes) = (module.name(), self.shape.sizes(module));
        if !self.shape.has(layer, module) {
            return Err(format!("the model has no h.{layer}.{name}"));
        }
        if (inner, outer) != sizes || rank != b_rank {
            return Err(format!(
                "h.{layer}.{name} is {sizes:?}, not {inner} by {rank} by {b_rank} by {outer}"
            ));
        }
        self.layers[layer][module as usize] = Some(change);
        Ok(())
    }

    /// The model that it is for.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// What is added to one linear layer, if anything is.
    pub fn get(&self, layer: usize, module: Module) -> Option<&LowRank> {
        self.layers.get(layer)?[module as usize].as_ref()
    }
}
