//! The plain form of every training operation: compositions of candle's differentiable operations.
//!
//! It is the oracle of the fast kernels' tests, what runs on devices without kernels of ours, and the
//! definition of what each operation means. It must stay obvious; speed is somebody else's concern.
//! (candle's own `layer_norm` and `softmax_last_dim` have no backward pass, so they are not used.)

use super::IGNORE;
use candle_core::{D, Result, Tensor, bail};

/// `x · w + b`, with `w` stored `[in, out]`.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let y = x.matmul(w)?;
    match b {
        Some(b) => y.broadcast_add(b),
        None => Ok(y),
    }
}

/// `x · tableᵀ`.
pub fn project(x: &Tensor, table: &Tensor) -> Result<Tensor> {
    x.matmul(&table.t()?)
}

/// Normalises each row to mean 0 and variance 1 (biased), then scales and shifts.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normal = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    normal.broadcast_mul(w)?.broadcast_add(b)
}

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let max = x.max_keepdim(D::Minus1)?.detach();
    let exp = x.broadcast_sub(&max)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// Causal multi-head attention of packed sequences; `seq_starts` ends with the number of rows.
pub fn causal_attention(qkv: &Tensor, seq_starts: &[usize], heads: usize) -> Result<Tensor> {
    let mut outputs = Vec::new();
    let mut first = 0;
    while first + 1 < seq_starts.len() {
        // Neighbours of one length go through together.
        let len = seq_starts[first + 1] - seq_starts[first];
        let mut last = first + 1;
        while last + 1 < seq_starts.len() && seq_starts[last + 1] - seq_starts[last] == len {
            last += 1;
        }
        if len > 0 {
            let rows = seq_starts[last] - seq_starts[first];
            let part = qkv.narrow(0, seq_starts[first], rows)?;
            outputs.push(attend_equal_lengths(&part, last - first, heads)?);
        }
        first = last;
    }
    Tensor::cat(&outputs, 0)
}

fn attend_equal_lengths(qkv: &Tensor, batch: usize, heads: usize) -> Result<Tensor> {
    let (rows, width) = qkv.dims2()?;
    let (len, d) = (rows / batch, width / 3);
    let split = |part: usize| {
        qkv.narrow(1, part * d, d)?
            .reshape((batch, len, heads, d / heads))?
            .transpose(1, 2)?
            .contiguous()
    };
    let (q, k, v) = (split(0)?, split(1)?, split(2)?);
    let scale = 1.0 / ((d / heads) as f64).sqrt();
    let scores = (q.matmul(&k.transpose(2, 3)?)? * scale)?;
    let mask: Vec<f32> =
        (0..len * len).map(|i| if i % len > i / len { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(mask, (len, len), qkv.device())?;
    let weights = softmax(&scores.broadcast_add(&mask)?)?;
    weights.matmul(&v)?.transpose(1, 2)?.reshape((rows, d))
}

/// Mean negative log-likelihood of the targets under `softmax(hidden · tableᵀ)`.
pub fn cross_entropy(hidden: &Tensor, table: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let (rows, kept): (Vec<u32>, Vec<u32>) =
        (0u32..).zip(targets.iter().copied()).filter(|&(_, t)| t != IGNORE).unzip();
    if rows.is_empty() {
        bail!("cross entropy needs at least one row with a target");
    }
    let count = rows.len();
    let rows = Tensor::from_vec(rows, count, hidden.device())?;
    let kept = Tensor::from_vec(kept, (count, 1), hidden.device())?;
    let logits = project(&hidden.index_select(&rows, 0)?, table)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    (log_sum - shifted.gather(&kept, 1)?)?.mean_all()
}
