//! The operations of training, each a fast kernel or its reference.

use super::simd::Isa;
use super::{
    Precision, attention, autograd, embed, linear, loss, memory, norm, pointwise, reference,
};
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, bail};

/// Which implementation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The kernels of this module. CPU only.
    Fast,
    /// Compositions of candle's operations. Any device.
    Reference,
}

/// Differentiable operations on packed rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ops {
    /// Which implementation runs.
    pub mode: Mode,
    /// What the inputs of matrix products are rounded to in [`Mode::Fast`].
    pub precision: Precision,
}

impl Ops {
    /// The fastest implementation that `device` has.
    pub fn new(device: &Device, precision: Precision) -> Self {
        let mode = if device.is_cpu() { Mode::Fast } else { Mode::Reference };
        Self { mode, precision }
    }

    fn how(&self) -> (Isa, Precision) {
        (Isa::best(), self.precision)
    }

    /// `x [rows, in] · w [in, out] + b [out]`, the layout of GPT-2's Conv1D.
    pub fn linear(&self, x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
        match self.mode {
            Mode::Fast => linear::linear(x, w, b, self.how()),
            Mode::Reference => reference::linear(x, w, b),
        }
    }

    /// `x [rows, d] · tableᵀ`, with `table [vocab, d]`: the tied language-model head.
    pub fn project(&self, x: &Tensor, table: &Tensor) -> Result<Tensor> {
        match self.mode {
            Mode::Fast => linear::project(x, table, self.how()),
            Mode::Reference => reference::project(x, table),
        }
    }

    /// Layer normalisation over the last dimension.
    pub fn layer_norm(&self, x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
        match self.mode {
            Mode::Fast => norm::layer_norm(x, w, b, eps, Isa::best()),
            Mode::Reference => reference::layer_norm(x, w, b, eps),
        }
    }

    /// GELU in its tanh form (`gelu_new`).
    pub fn gelu(&self, x: &Tensor) -> Result<Tensor> {
        match self.mode {
            Mode::Fast => pointwise::gelu(x, Isa::best()),
            Mode::Reference => x.gelu(),
        }
    }

    /// `a + b`, of one shape. For residual connections: [`backward`](Self::backward) knows it.
    pub fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        match self.mode {
            Mode::Fast => pointwise::add(a, b),
            Mode::Reference => a.add(b),
        }
    }

    /// Gradients of all variables that `loss` depends on, as [`Tensor::backward`] gives them.
    ///
    /// Faster than that when everything between the variables and the loss came from these
    /// operations.
    pub fn backward(&self, loss: &Tensor) -> Result<GradStore> {
        match self.mode {
            Mode::Fast => {
                memory::keep_freed_memory();
                autograd::backward(loss)
            }
            Mode::Reference => loss.backward(),
        }
    }

    /// The same from any tensor on, given its gradient. Only in [`Mode::Fast`], and only if everything
    /// below came from these operations.
    pub fn backward_from(&self, output: &Tensor, grad: &Tensor) -> Result<GradStore> {
        memory::keep_freed_memory();
        match autograd::backward_from(output, grad)? {
            Some(grads) => Ok(grads),
            None => bail!("the graph holds operations of other modules"),
        }
    }

    /// Rows `ids` (u32) of `table`.
    pub fn embed(&self, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
        match self.mode {
            Mode::Fast => embed::embed(table, ids, Isa::best()),
            Mode::Reference => table.index_select(ids, 0),
        }
    }

    /// Causal multi-head attention. `qkv [rows, 3d]` holds packed sequences, sequence `i` in rows
    /// `seq_starts[i]..seq_starts[i + 1]`; the last entry is the number of rows. Gives `[rows, d]`.
    pub fn causal_attention(
        &self,
        qkv: &Tensor,
        seq_starts: &[usize],
        heads: usize,
    ) -> Result<Tensor> {
        let (rows, width) = qkv.dims2()?;
        let ordered = seq_starts.first() == Some(&0)
            && seq_starts.last() == Some(&rows)
            && seq_starts.is_sorted();
        if !ordered {
            bail!("sequence starts {seq_starts:?} do not cover {rows} rows");
        }
        if heads == 0 || width == 0 || width % (3 * heads) != 0 {
            bail!("a width of {width} does not split into q, k and v of {heads} heads");
        }
        match self.mode {
            Mode::Fast => attention::causal(qkv, seq_starts, heads, self.how()),
            Mode::Reference => reference::causal_attention(qkv, seq_starts, heads),
        }
    }

    /// Mean over the rows with a target of the negative log-likelihood under
    /// `softmax(hidden [rows, d] · table [vocab, d]ᵀ)`: the head and its loss as one, so that no
    /// `[rows, vocab]` is ever kept. `targets` has one entry a row, [`super::IGNORE`] for none.
    pub fn cross_entropy(
        &self,
        hidden: &Tensor,
        table: &Tensor,
        targets: &[u32],
    ) -> Result<Tensor> {
        let (rows, _) = hidden.dims2()?;
        let (vocab, _) = table.dims2()?;
        if targets.len() != rows {
            bail!("{} targets for {rows} rows", targets.len());
        }
        if let Some(t) = targets.iter().find(|&&t| t != super::IGNORE && t as usize >= vocab) {
            bail!("target {t} is outside a vocabulary of {vocab}");
        }
        match self.mode {
            Mode::Fast => loss::cross_entropy(hidden, table, targets, self.how()),
            Mode::Reference => reference::cross_entropy(hidden, table, targets),
        }
    }
}
