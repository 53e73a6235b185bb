//! Weights made ready at load for the kernel that will run.
#![allow(unsafe_code)]

use super::Precision;
use super::autograd::elements;
use super::gemm::{Operand, Panels};
use super::int8::Int8Matrix;
use super::memory::{Shared, filled};
use super::simd::Isa;
use candle_core::{DType, Device, Result, Tensor, bail};

/// What a weight is held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Floats; activations are rounded alike.
    Float(Precision),
    /// 8 bits with a scale for each output; activations in 8 bits with a scale for each row.
    Int8,
}

impl From<Precision> for Format {
    fn from(precision: Precision) -> Self {
        Self::Float(precision)
    }
}

/// A weight matrix in the layout that its kernel reads. CPU only.
#[derive(Debug)]
pub struct PackedMatrix {
    held: Held,
}

#[derive(Debug)]
enum Held {
    Float(Panels),
    Int8(Int8Matrix),
}

impl PackedMatrix {
    /// Packs `w [in, out]`, the layout of GPT-2's Conv1D, of any float type.
    pub fn from_in_out(w: &Tensor, format: impl Into<Format>) -> Result<Self> {
        let (inner, outer) = w.dims2()?;
        Self::pack(w, (inner, outer), format.into(), |w| Operand::Outer(w))
    }

    /// Packs `w [out, in]`, the layout of an embedding table used as a head, of any float type.
    pub fn from_out_in(w: &Tensor, format: impl Into<Format>) -> Result<Self> {
        let (outer, inner) = w.dims2()?;
        Self::pack(w, (inner, outer), format.into(), |w| Operand::Inner(w))
    }

    fn pack(
        w: &Tensor,
        (inner, outer): (usize, usize),
        format: Format,
        operand: impl FnOnce(&[f32]) -> Operand<'_>,
    ) -> Result<Self> {
        if inner == 0 || outer == 0 {
            bail!("an empty weight of {inner} by {outer}");
        }
        let w = w.to_dtype(DType::F32)?.contiguous()?;
        let w = elements(&w)?;
        let held = match format {
            Format::Float(precision) => {
                Held::Float(Panels::pack(operand(&w), inner, outer, Isa::best(), precision))
            }
            Format::Int8 => Held::Int8(Int8Matrix::pack(operand(&w), inner, outer)),
        };
        Ok(Self { held })
    }

    /// `x [rows, in] · w + bias [out]`. Not differentiable.
    pub fn matmul(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (rows, inner) = x.dims2()?;
        let (own_inner, outer) = self.shape();
        if inner != own_inner || bias.is_some_and(|b| b.elem_count() != outer) {
            bail!("{:?} by a packed matrix of {own_inner} by {outer}", x.dims());
        }
        let (x, bias) = (x.contiguous()?, bias.map(Tensor::contiguous).transpose()?);
        let bias = bias.as_ref().map(elements).transpose()?;
        let x = elements(&x)?;
        // SAFETY: a product writes all of its output and reads none.
        let out =
            unsafe { filled(rows * outer, |out| self.multiply(&x, rows, bias.as_deref(), out)) };
        Tensor::from_vec(out, (rows, outer), &Device::Cpu)
    }

    /// The same of slices.
    ///
    /// # Safety
    /// `out` must be good for writing `rows` rows of the output.
    pub(super) unsafe fn multiply(
        &self,
        x: &[f32],
        rows: usize,
        bias: Option<&[f32]>,
        out: Shared<f32>,
    ) {
        // SAFETY: passed on from the caller.
        unsafe {
            match &self.held {
                Held::Float(panels) => panels.multiply(Operand::Inner(x), rows, bias, out),
                Held::Int8(matrix) => matrix.multiply(x, rows, bias, out),
            }
        }
    }

    /// What products of floats read; `None` if it is held in something else.
    pub(super) fn panels(&self) -> Option<&Panels> {
        match &self.held {
            Held::Float(panels) => Some(panels),
            Held::Int8(_) => None,
        }
    }

    /// Columns `ids` (u32 `[rows]`) of the matrix, each a row of the result: what
    /// [`from_out_in`](Self::from_out_in) packed, as the kernel reads it. Not differentiable.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let ids = ids.flatten_all()?.to_vec1::<u32>()?;
        let (inner, outer) = self.shape();
        if let Some(id) = ids.iter().find(|&&id| id as usize >= outer) {
            bail!("row {id} of a table of {outer}");
        }
        let mut out = Vec::with_capacity(ids.len() * inner);
        for &id in &ids {
            match &self.held {
                Held::Float(panels) => out.extend(panels.column(id as usize)),
                Held::Int8(matrix) => out.extend(matrix.column(id as usize)),
            }
        }
        Tensor::from_vec(out, (ids.len(), inner), &Device::Cpu)
    }

    /// What it is held in.
    pub fn format(&self) -> Format {
        match self.panels().map(Panels::how) {
            Some((_, true)) => Format::Float(Precision::Bf16),
            Some((_, false)) => Format::Float(Precision::F32),
            None => Format::Int8,
        }
    }

    /// Its shape, `(in, out)`.
    pub fn shape(&self) -> (usize, usize) {
        match &self.held {
            Held::Float(panels) => (panels.k, panels.columns),
            Held::Int8(matrix) => (matrix.k, matrix.columns),
        }
    }

    /// What a matrix of this shape takes in memory once it is packed; `usize::MAX` if that is beyond
    /// counting.
    pub fn bytes_of(inner: usize, outer: usize, format: impl Into<Format>) -> usize {
        let bytes = match format.into() {
            Format::Float(precision) => Panels::size(inner, outer, Isa::best(), precision)
                .and_then(|words| words.checked_mul(size_of::<u32>())),
            Format::Int8 => Int8Matrix::size(inner, outer),
        };
        bytes.unwrap_or(usize::MAX)
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        match &self.held {
            Held::Float(panels) => panels.bytes(),
            Held::Int8(matrix) => matrix.bytes(),
        }
    }
}
