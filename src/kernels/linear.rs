//! Products of activations and weights, with gradients.
#![allow(unsafe_code)]

use super::Precision;
use super::autograd::{elements, record};
use super::gemm::{Operand, product, product_and_sums};
use super::memory::filled;
use super::simd::Isa;
use candle_core::{Device, Result, Tensor, bail};

type How = (Isa, Precision);

/// `A · B + bias` as a vector.
fn multiply(
    ab: (Operand<'_>, Operand<'_>),
    shape: (usize, usize, usize),
    bias: Option<&[f32]>,
    how: How,
) -> Vec<f32> {
    // SAFETY: a product writes all of its output and reads none.
    unsafe { filled(shape.0 * shape.2, |out| product(ab, shape, bias, how, out)) }
}

/// `xᵀ · dy`, and the sums of dy's columns.
fn weight_gradients(
    x: &[f32],
    dy: &[f32],
    shape: (usize, usize, usize),
    how: How,
) -> (Vec<f32>, Vec<f32>) {
    let mut sums = Vec::new();
    // SAFETY: a product writes all of its output and reads none.
    let product = unsafe {
        filled(shape.0 * shape.2, |out| sums = product_and_sums((x, dy), shape, how, out))
    };
    (product, sums)
}

/// `x [rows, in] · w [in, out] + b [out]`.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>, how: How) -> Result<Tensor> {
    let ((rows, inner), (w_in, outer)) = (x.dims2()?, w.dims2()?);
    if inner != w_in || b.is_some_and(|b| b.elem_count() != outer) {
        bail!("linear: {:?} by {:?} with bias {:?}", x.dims(), w.dims(), b.map(Tensor::dims));
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    let b = b.map(Tensor::contiguous).transpose()?;
    let out = {
        let bias = b.as_ref().map(elements).transpose()?;
        let (x, w) = (elements(&x)?, elements(&w)?);
        let ab = (Operand::Inner(&x), Operand::Outer(&w));
        multiply(ab, (rows, inner, outer), bias.as_deref(), how)
    };
    let saved = (x.clone(), w.clone(), b.clone());
    let backward = move |_: &Tensor, grad: &Tensor| {
        let (x, w, b) = &saved;
        let grad = grad.contiguous()?;
        let dy = elements(&grad)?;
        let dx = wanted(x, || {
            let ab = (Operand::Inner(&dy), Operand::Inner(&elements(w)?));
            Ok(multiply(ab, (rows, outer, inner), None, how))
        })?;
        let mut grads = vec![dx, None];
        grads.extend(b.as_ref().map(|_| None));
        if w.track_op() || b.as_ref().is_some_and(Tensor::track_op) {
            let (dw, db) = weight_gradients(&elements(x)?, &dy, (inner, rows, outer), how);
            grads[1] = wanted(w, || Ok(dw))?;
            if let Some(b) = b {
                grads[2] = wanted(b, || Ok(db))?;
            }
        }
        Ok(grads)
    };
    let inputs: Vec<&Tensor> = [&x, &w].into_iter().chain(&b).collect();
    record("linear", &inputs, out, (rows, outer), backward)
}

/// `x [rows, d] · tableᵀ`, with `table [vocab, d]`.
pub fn project(x: &Tensor, table: &Tensor, how: How) -> Result<Tensor> {
    let ((rows, d), (vocab, table_d)) = (x.dims2()?, table.dims2()?);
    if d != table_d {
        bail!("project: {:?} by the transpose of {:?}", x.dims(), table.dims());
    }
    let (x, table) = (x.contiguous()?, table.contiguous()?);
    let out = {
        let ab = (Operand::Inner(&elements(&x)?), Operand::Inner(&elements(&table)?));
        multiply(ab, (rows, d, vocab), None, how)
    };
    let saved = (x.clone(), table.clone());
    let backward = move |_: &Tensor, grad: &Tensor| {
        let (x, table) = &saved;
        let grad = grad.contiguous()?;
        let dy = elements(&grad)?;
        let dx = wanted(x, || {
            let ab = (Operand::Inner(&dy), Operand::Outer(&elements(table)?));
            Ok(multiply(ab, (rows, vocab, d), None, how))
        })?;
        let dtable = wanted(table, || {
            let ab = (Operand::Outer(&dy), Operand::Outer(&elements(x)?));
            Ok(multiply(ab, (vocab, rows, d), None, how))
        })?;
        Ok(vec![dx, dtable])
    };
    record("project", &[&x, &table], out, (rows, vocab), backward)
}

/// The gradient of `input`, shaped like it, unless nothing asks for it.
pub fn wanted(input: &Tensor, grad: impl FnOnce() -> Result<Vec<f32>>) -> Result<Option<Tensor>> {
    if !input.track_op() {
        return Ok(None);
    }
    Tensor::from_vec(grad()?, input.shape(), &Device::Cpu).map(Some)
}
