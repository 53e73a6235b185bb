//! Adapters: small weights that some rows of a batch add to a shared model.
//!
//! Whatever an adapter is on disk (a PEFT LoRA, a mixture of task adapters), at load it becomes
//! [`Deltas`]: for some linear layers `y += x · A · B`, already scaled. A row runs with a [`Mix`]: a few of
//! these with a weight each.
//!
//! Knows files, names and low-rank matrices; must not know rows, requests or the decoder. Invariant: what
//! cannot be honoured exactly is refused by name, never half loaded.

mod config;
mod confined;
pub mod deltas;
mod files;
mod load;
mod lora;
mod mta;
pub mod registry;
mod save;
mod targets;

pub use config::FILE as CONFIG_FILE;
pub use deltas::{Deltas, LowRank, Shape};
pub use files::FILE as WEIGHTS_FILE;
pub use load::{Kind, Limits, Loaded, load};
pub use save::{Change, save};

use std::sync::Arc;

/// A linear layer of a transformer block that an adapter may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Module {
    /// `attn.c_attn`: queries, keys and values.
    Qkv,
    /// `attn.c_proj`.
    AttnProj,
    /// `mlp.c_fc`.
    FcIn,
    /// `mlp.c_proj`.
    FcOut,
}

impl Module {
    /// All of them, in the order of a block.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::AttnProj, Self::FcIn, Self::FcOut];

    /// Its name in Hugging Face's GPT-2, below the block.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qkv => "attn.c_attn",
            Self::AttnProj => "attn.c_proj",
            Self::FcIn => "mlp.c_fc",
            Self::FcOut => "mlp.c_proj",
        }
    }

    /// Whether it is part of the feed-forward network.
    pub fn is_mlp(self) -> bool {
        matches!(self, Self::FcIn | Self::FcOut)
    }
}

/// What a row runs with beside the base weights: `Σ weight · deltas`, not normalised.
#[derive(Debug)]
pub struct Mix {
    /// Names these very weights, and no others for the life of the process: a reloaded adapter has another
    /// key. Never 0, which stands for the base alone.
    pub key: u64,
    /// Its parts, at least one.
    pub parts: Vec<Part>,
}

/// One adapter of a [`Mix`].
#[derive(Clone, Debug)]
pub struct Part {
    /// Its weights, in memory for as long as anybody holds this.
    pub deltas: Arc<Deltas>,
    /// How much of it.
    pub weight: f32,
}
