//! The one GPT-2 decoder: training differentiates it, serving runs it over a paged cache.
//!
//! It maps packed rows to packed rows and never learns which sequence, adapter or task a row belongs to:
//! that is the [`Pass`] it is handed. Invariant: apart from attention each row is computed on its own.

use super::{MoeLayer, Routes, Spec};
use crate::adapter::Module;
use crate::kernels::{Format, Ops, PackedMatrix, Precision};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

/// A linear layer at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Transformer block.
    pub layer: usize,
    /// Which of its linear layers.
    pub module: Module,
    /// Whether the rows are those of [`Pass::kept`] only.
    pub kept: bool,
}

/// One pass over the model: what it knows of its rows and the decoder does not.
pub trait Pass {
    /// The rows (u32, ascending) whose hidden states are wanted; `None` is all. All rows reach the
    /// attention of every layer, but what follows the last one is done for these alone.
    fn kept(&self) -> Option<&Tensor> {
        None
    }

    /// Causal attention, the only place where rows meet: `qkv [rows, 3d]` of one layer to `[rows, d]`.
    /// Called once per layer, in order.
    fn attend(&mut self, layer: usize, qkv: &Tensor) -> Result<Tensor>;

    /// What the rows' adapters make of `y = x · w + b`.
    fn adapt(&mut self, _site: Site, _x: &Tensor, y: Tensor) -> Result<Tensor> {
        Ok(y)
    }

    /// The tasks of the rows as the gates of experts count them, of the kept rows only or of all. It may
    /// end early: rows beyond it have none.
    fn gates(&self, _kept: bool) -> &[Option<u32>] {
        &[]
    }

    /// Hears where the rows, of the kept ones only or of all, went in a layer with experts.
    fn routed(&mut self, _layer: usize, _kept: bool, _routes: &Routes) {}
}

/// Attention among packed whole sequences, differentiable: what training uses.
#[derive(Clone, Copy, Debug)]
pub struct CausalPacked<'a> {
    /// Does the arithmetic.
    pub ops: Ops,
    /// First row of each sequence, then the number of rows.
    pub seq_starts: &'a [usize],
    /// Attention heads.
    pub heads: usize,
}

impl Pass for CausalPacked<'_> {
    fn attend(&mut self, _layer: usize, qkv: &Tensor) -> Result<Tensor> {
        self.ops.causal_attention(qkv, self.seq_starts, self.heads)
    }
}

/// `x · w + b`.
#[derive(Debug)]
enum Linear {
    /// Weights as they are: differentiable.
    Plain { w: Tensor, b: Tensor },
    /// Weights in their kernel's layout.
    Packed { w: PackedMatrix, b: Tensor },
}

impl Linear {
    fn forward(&self, ops: &Ops, x: &Tensor) -> Result<Tensor> {
        match self {
            Linear::Plain { w, b } => ops.linear(x, w, Some(b)),
            Linear::Packed { w, b } => w.matmul(x, Some(b)),
        }
    }
}

#[derive(Debug)]
struct Norm {
    w: Tensor,
    b: Tensor,
    eps: f64,
}

impl Norm {
    fn forward(&self, ops: &Ops, x: &Tensor) -> Result<Tensor> {
        ops.layer_norm(x, &self.w, &self.b, self.eps)
    }
}

/// What follows attention in a block.
#[derive(Debug)]
enum FeedForward {
    Dense { c_fc: Linear, c_proj: Linear },
    Experts(MoeLayer),
}

impl FeedForward {
    fn forward(
        &self,
        ops: &Ops,
        (layer, kept): (usize, bool),
        x: &Tensor,
        pass: &mut dyn Pass,
    ) -> Result<Tensor> {
        let site = |module| Site { layer, module, kept };
        match self {
            FeedForward::Dense { c_fc, c_proj } => {
                let inner = pass.adapt(site(Module::FcIn), x, c_fc.forward(ops, x)?)?;
                let inner = ops.gelu(&inner)?;
                pass.adapt(site(Module::FcOut), &inner, c_proj.forward(ops, &inner)?)
            }
            FeedForward::Experts(experts) => {
                let (y, routes) = experts.forward(ops, x, pass.gates(kept))?;
                pass.routed(layer, kept, &routes);
                Ok(y)
            }
        }
    }
}

#[derive(Debug)]
struct Block {
    ln_1: Norm,
    c_attn: Linear,
    attn_proj: Linear,
    ln_2: Norm,
    feed_forward: FeedForward,
}

impl Block {
    /// All rows of `x`; of the last block only the kept ones, once attention has seen them all.
    fn forward(
        &self,
        ops: &Ops,
        layer: usize,
        x: &Tensor,
        pass: &mut dyn Pass,
        last: bool,
    ) -> Result<Tensor> {
        let site = |module, kept| Site { layer, module, kept };
        let normal = self.ln_1.forward(ops, x)?;
        let qkv = self.c_attn.forward(ops, &normal)?;
        let qkv = pass.adapt(site(Module::Qkv, false), &normal, qkv)?;
        let mut attended = pass.attend(layer, &qkv)?;
        let mut x = x.clone();
        let keep = pass.kept().filter(|_| last);
        let kept = keep.is_some();
        if let Some(rows) = keep {
            (x, attended) = (x.index_select(rows, 0)?, attended.index_select(rows, 0)?);
        }
        let projected = self.attn_proj.forward(ops, &attended)?;
        let x = ops.add(&x, &pass.adapt(site(Module::AttnProj, kept), &attended, projected)?)?;
        let normal = self.ln_2.forward(ops, &x)?;
        ops.add(&x, &self.feed_forward.forward(ops, (layer, kept), &normal, pass)?)
    }
}

/// The embedding table `[vocab, d]`, which is also the head.
#[derive(Debug)]
enum Table {
    /// As it is: differentiable.
    Plain(Tensor),
    /// In its kernel's layout, from which rows are taken as well: it is not held twice.
    Packed(PackedMatrix),
}

impl Table {
    fn embed(&self, ops: &Ops, tokens: &Tensor) -> Result<Tensor> {
        match self {
            Table::Plain(table) => ops.embed(table, tokens),
            Table::Packed(table) => table.embed(tokens),
        }
    }

    fn project(&self, ops: &Ops, hidden: &Tensor) -> Result<Tensor> {
        match self {
            Table::Plain(table) => ops.project(hidden, table),
            Table::Packed(table) => table.matmul(hidden, None),
        }
    }
}

/// GPT-2: embeddings, blocks, final norm, and the embedding table again as head.
#[derive(Debug)]
pub struct Decoder {
    spec: Spec,
    ops: Ops,
    wte: Table,
    wpe: Tensor,
    blocks: Vec<Block>,
    ln_f: Norm,
}

impl Decoder {
    /// Over weights as they are, so that gradients reach them. `vb` holds [`Spec::tensors`].
    pub fn new(spec: &Spec, vb: VarBuilder<'_>, ops: Ops) -> Result<Self> {
        Builder { spec, ops, packed: None }.decoder(&vb)
    }

    /// Over weights packed for serving, held in `format`.
    pub fn packed(
        spec: &Spec,
        vb: VarBuilder<'_>,
        ops: Ops,
        format: impl Into<Format>,
    ) -> Result<Self> {
        Builder { spec, ops, packed: Some(format.into()) }.decoder(&vb)
    }

    /// The final hidden states `[rows, d]`, after the last norm, of `tokens` (u32 `[rows]`) at
    /// `positions` (u32 `[rows]`); of the rows that the pass keeps.
    pub fn hidden(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        pass: &mut dyn Pass,
    ) -> Result<Tensor> {
        let ops = &self.ops;
        let mut x = ops.add(&self.wte.embed(ops, tokens)?, &ops.embed(&self.wpe, positions)?)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let last = layer + 1 == self.blocks.len();
            x = block.forward(ops, layer, &x, pass, last)?;
        }
        self.ln_f.forward(ops, &x)
    }

    /// Logits `[rows, vocab]` of hidden states `[rows, d]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.wte.project(&self.ops, hidden)
    }

    /// The embedding table `[vocab, d]`, which is the head: for the fused loss. An error if it is packed.
    pub fn head(&self) -> Result<&Tensor> {
        match &self.wte {
            Table::Plain(table) => Ok(table),
            Table::Packed(_) => bail!("a packed decoder is not trained"),
        }
    }

    /// What the inputs of its products are rounded to.
    pub fn precision(&self) -> Precision {
        self.ops.precision
    }

    /// The model's shape.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }
}

/// Takes a decoder's parts out of a variable builder.
struct Builder<'a> {
    spec: &'a Spec,
    ops: Ops,
    packed: Option<Format>,
}

impl Builder<'_> {
    fn decoder(&self, vb: &VarBuilder<'_>) -> Result<Decoder> {
        let (spec, vb) = (self.spec, vb.pp("transformer"));
        let wte = vb.get((spec.vocab, spec.width), "wte.weight")?;
        let wte = match self.packed {
            Some(format) => Table::Packed(PackedMatrix::from_out_in(&wte, format)?),
            None => Table::Plain(wte),
        };
        let blocks = (0..spec.layers).map(|i| self.block(i, &vb.pp("h").pp(i)));
        Ok(Decoder {
            spec: spec.clone(),
            ops: self.ops,
            wpe: vb.get((spec.context, spec.width), "wpe.weight")?,
            blocks: blocks.collect::<Result<_>>()?,
            ln_f: self.norm(&vb.pp("ln_f"))?,
            wte,
        })
    }

    fn block(&self, layer: usize, vb: &VarBuilder<'_>) -> Result<Block> {
        let (d, attn) = (self.spec.width, vb.pp("attn"));
        Ok(Block {
            ln_1: self.norm(&vb.pp("ln_1"))?,
            c_attn: self.linear(&attn.pp("c_attn"), d, 3 * d)?,
            attn_proj: self.linear(&attn.pp("c_proj"), d, d)?,
            ln_2: self.norm(&vb.pp("ln_2"))?,
            feed_forward: self.feed_forward(layer, vb)?,
        })
    }

    fn feed_forward(&self, layer: usize, vb: &VarBuilder<'_>) -> Result<FeedForward> {
        let (spec, d, inner) = (self.spec, self.spec.width, self.spec.inner);
        if let Some(moe) = spec.moe_of(layer) {
            let vb = vb.pp("moe");
            let layer = match self.packed {
                Some(format) => MoeLayer::packed(spec, moe, &vb, format),
                None => MoeLayer::new(spec, moe, &vb),
            };
            return layer.map(FeedForward::Experts);
        }
        let mlp = vb.pp("mlp");
        Ok(FeedForward::Dense {
            c_fc: self.linear(&mlp.pp("c_fc"), d, inner)?,
            c_proj: self.linear(&mlp.pp("c_proj"), inner, d)?,
        })
    }

    fn linear(&self, vb: &VarBuilder<'_>, inputs: usize, outputs: usize) -> Result<Linear> {
        let w = vb.get((inputs, outputs), "weight")?;
        let b = vb.get(outputs, "bias")?;
        Ok(match self.packed {
            Some(format) => Linear::Packed { w: PackedMatrix::from_in_out(&w, format)?, b },
            None => Linear::Plain { w, b },
        })
    }

    fn norm(&self, vb: &VarBuilder<'_>) -> Result<Norm> {
        let d = self.spec.width;
        Ok(Norm { w: vb.get(d, "weight")?, b: vb.get(d, "bias")?, eps: self.spec.eps })
    }
}
