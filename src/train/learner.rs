//! What a step and an evaluation are, whichever variables are learnt: a whole model's or an adapter's.

use super::batch::{self, Batch};
use super::objective::Sequence;
use super::params::{Gradients, Params};
use super::recipe;
use crate::kernels::{Ops, Precision};
use crate::model::{CausalPacked, Decoder, Pass, Spec};
use anyhow::{Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};

/// A decoder with the variables that are learnt through it.
pub struct Learner {
    /// The variables.
    pub params: Params,
    pub(super) decoder: Decoder,
    pub(super) ops: Ops,
    pub(super) device: Device,
}

/// Something whose loss on a batch can be made smaller.
pub trait Learn {
    /// What computes.
    fn learner(&self) -> &Learner;

    /// Mean loss over the learnt rows of a batch.
    fn loss(&self, batch: &Batch) -> Result<Tensor>;

    /// One optimiser step over the sequences; gives mean loss and gradient norm.
    fn step(
        &self,
        sequences: &[Sequence],
        micro_tokens: usize,
        constants: &recipe::Optimizer,
        lr: f64,
        number: usize,
    ) -> Result<(f64, f64)> {
        let Learner { params, .. } = self.learner();
        let mut sums = Gradients::default();
        let (mut loss, mut learnt) = (0.0, 0.0);
        for batch in batch::group(sequences, micro_tokens) {
            let weight = batch.learnt() as f64;
            let mean = self.loss(&batch)?;
            let grads = self.learner().gradients(&mean)?;
            params.accumulate(&mut sums, &grads, weight)?;
            loss += f64::from(mean.to_scalar::<f32>()?) * weight;
            learnt += weight;
        }
        ensure!((loss / learnt).is_finite(), "the loss is not finite: the run diverged");
        let norm = params.step(&sums, constants, lr, number)?;
        Ok((loss / learnt, norm))
    }

    /// Mean loss over sequences, without learning; NaN for none.
    fn evaluate(&self, sequences: &[Sequence], micro_tokens: usize) -> Result<f64> {
        let (mut loss, mut learnt) = (0.0, 0.0);
        for batch in batch::group(sequences, micro_tokens) {
            let weight = batch.learnt() as f64;
            loss += f64::from(self.loss(&batch)?.to_scalar::<f32>()?) * weight;
            learnt += weight;
        }
        Ok(loss / learnt)
    }
}

impl Learner {
    /// A decoder over these variables.
    pub fn new(
        spec: &Spec,
        params: Params,
        precision: recipe::Precision,
        device: &Device,
    ) -> Result<Self> {
        let precision = match precision {
            recipe::Precision::Bf16 => Precision::Bf16,
            recipe::Precision::F32 => Precision::F32,
        };
        let ops = Ops::new(device, precision);
        let decoder = Decoder::new(spec, params.var_builder()?, ops)?;
        Ok(Self::over(decoder, params, ops, device))
    }

    /// Variables that reach the loss in another way than as the decoder's own weights.
    pub fn over(decoder: Decoder, params: Params, ops: Ops, device: &Device) -> Self {
        Self { params, decoder, ops, device: device.clone() }
    }

    /// Attention among the packed sequences of a batch.
    pub fn causal<'a>(&self, batch: &'a Batch) -> CausalPacked<'a> {
        let heads = self.decoder.spec().heads;
        CausalPacked { ops: self.ops, seq_starts: &batch.starts, heads }
    }

    /// Mean loss over the learnt rows of a batch, in this pass.
    pub fn loss_in(&self, pass: &mut dyn Pass, batch: &Batch) -> Result<Tensor> {
        let tokens = Tensor::new(batch.tokens.as_slice(), &self.device)?;
        let positions = Tensor::new(batch.positions.as_slice(), &self.device)?;
        let hidden = self.decoder.hidden(&tokens, &positions, pass)?;
        Ok(self.ops.cross_entropy(&hidden, self.decoder.head()?, &batch.targets)?)
    }

    /// Gradients of all variables that a loss depends on.
    pub fn gradients(&self, loss: &Tensor) -> Result<GradStore> {
        Ok(self.ops.backward(loss)?)
    }
}

impl Learn for Learner {
    fn learner(&self) -> &Learner {
        self
    }

    fn loss(&self, batch: &Batch) -> Result<Tensor> {
        self.loss_in(&mut self.causal(batch), batch)
    }
}
