//! Weights made ready at load for the kernel that will run.
#![allow(unsafe_code)]

use super::Precision;
use super::autograd::elements;
use super::gemm::{Operand, Panels};
use super::memory::filled;
use super::simd::Isa;
use candle_core::{DType, Device, Result, Tensor, bail};

/// A weight matrix in the layout that its kernel reads. CPU only.
#[derive(Debug)]
pub struct PackedMatrix {
    pub(super) panels: Panels,
}

impl PackedMatrix {
    /// Packs `w [in, out]`, the layout of GPT-2's Conv1D, of any float type.
    pub fn from_in_out(w: &Tensor, precision: Precision) -> Result<Self> {
        let (inner, outer) = w.dims2()?;
        Self::pack(w, (inner, outer), precision, |w| Operand::Outer(w))
    }

    /// Packs `w [out, in]`, the layout of an embedding table used as a head, of any float type.
    pub fn from_out_in(w: &Tensor, precision: Precision) -> Result<Self> {
        let (outer, inner) = w.dims2()?;
        Self::pack(w, (inner, outer), precision, |w| Operand::Inner(w))
    }

    fn pack(
        w: &Tensor,
        (inner, outer): (usize, usize),
        precision: Precision,
        operand: impl FnOnce(&[f32]) -> Operand<'_>,
    ) -> Result<Self> {
        if inner == 0 || outer == 0 {
            bail!("an empty weight of {inner} by {outer}");
        }
        let w = w.to_dtype(DType::F32)?.contiguous()?;
        let panels = Panels::pack(operand(&elements(&w)?), inner, outer, Isa::best(), precision);
        Ok(Self { panels })
    }

    /// `x [rows, in] · w + bias [out]`. Not differentiable.
    pub fn matmul(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (rows, inner) = x.dims2()?;
        let outer = self.panels.columns;
        if inner != self.panels.k || bias.is_some_and(|b| b.elem_count() != outer) {
            bail!("{:?} by a packed matrix of {} by {outer}", x.dims(), self.panels.k);
        }
        let (x, bias) = (x.contiguous()?, bias.map(Tensor::contiguous).transpose()?);
        let bias = bias.as_ref().map(elements).transpose()?;
        let x = elements(&x)?;
        // SAFETY: a product writes all of its output and reads none.
        let out = unsafe {
            filled(rows * outer, |out| {
                self.panels.multiply(Operand::Inner(&x), rows, bias.as_deref(), out);
            })
        };
        Tensor::from_vec(out, (rows, outer), &Device::Cpu)
    }

    /// Columns `ids` (u32 `[rows]`) of the matrix, each a row of the result: what
    /// [`from_out_in`](Self::from_out_in) packed, as the kernel reads it. Not differentiable.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let ids = ids.flatten_all()?.to_vec1::<u32>()?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.panels.columns) {
            bail!("row {id} of a table of {}", self.panels.columns);
        }
        let mut out = Vec::with_capacity(ids.len() * self.panels.k);
        ids.iter().for_each(|&id| out.extend(self.panels.column(id as usize)));
        Tensor::from_vec(out, (ids.len(), self.panels.k), &Device::Cpu)
    }

    /// Its shape, `(in, out)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.panels.k, self.panels.columns)
    }

    /// What a matrix of this shape takes in memory once it is packed; `usize::MAX` if that is beyond
    /// counting.
    pub fn bytes_of(inner: usize, outer: usize, precision: Precision) -> usize {
        Panels::size(inner, outer, Isa::best(), precision)
            .and_then(|words| words.checked_mul(size_of::<u32>()))
            .unwrap_or(usize::MAX)
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        self.panels.bytes()
    }
}
