//! The vocabulary: byte-level BPE trained on the recipe's data, with the control tokens as special
//! entries at its start. What it writes is the `tokenizers` format that serving and Python read.

use crate::text::END_OF_TEXT;
use anyhow::{Context, Result, anyhow, bail};
use std::path::Path;
use tokenizers::decoders::byte_level::ByteLevel as Decoder;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// Stands between an input and its output.
pub const GENERATE: &str = "<|gen|>";
/// Lengths, in words, that have a control token.
pub const WORDS: std::ops::RangeInclusive<usize> = 3..=60;
/// Relevance levels that have a control token.
pub const RELEVANCE: std::ops::RangeInclusive<usize> = 1..=5;

/// All special tokens in the order of their ids.
pub fn special_tokens(tasks: &[String]) -> Vec<String> {
    let mut all = vec![END_OF_TEXT.to_owned(), GENERATE.to_owned()];
    all.extend(tasks.iter().map(|task| format!("<|task:{task}|>")));
    all.push("<|words:none|>".to_owned());
    all.extend(WORDS.map(|n| format!("<|words:{n}|>")));
    all.push("<|rel:none|>".to_owned());
    all.extend(RELEVANCE.map(|n| format!("<|rel:{n}|>")));
    all
}

/// Trains a tokenizer of `size` entries on `texts`.
pub fn train(
    texts: impl Iterator<Item = String> + Send,
    tasks: &[String],
    size: usize,
) -> Result<Tokenizer> {
    let specials = special_tokens(tasks);
    let added = specials.iter().map(|t| AddedToken::from(t.clone(), true)).collect();
    let mut trainer = TrainerWrapper::from(
        BpeTrainer::builder()
            .vocab_size(size)
            .min_frequency(2)
            .special_tokens(added)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .show_progress(false)
            .build(),
    );
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, false, true)));
    tokenizer.with_decoder(Some(Decoder::default()));
    tokenizer.train(&mut trainer, texts).map_err(|e| anyhow!("tokenizer training: {e}"))?;
    Ok(tokenizer)
}

/// Writes `tokenizer.json`.
pub fn save(tokenizer: &Tokenizer, path: &Path) -> Result<()> {
    tokenizer.save(path, true).map_err(|e| anyhow!("cannot write {}: {e}", path.display()))
}

/// A tokenizer with the ids that training needs. Text is never parsed for special tokens.
pub struct Codec {
    tokenizer: Tokenizer,
    /// Id of [`END_OF_TEXT`].
    pub end_of_text: u32,
    /// Id of [`GENERATE`].
    pub generate: u32,
}

impl Codec {
    /// Wraps a tokenizer that [`train`] made.
    pub fn new(mut tokenizer: Tokenizer) -> Result<Self> {
        tokenizer.set_encode_special_tokens(true);
        let id = |token: &str| {
            tokenizer.token_to_id(token).with_context(|| format!("the tokenizer has no {token}"))
        };
        let (end_of_text, generate) = (id(END_OF_TEXT)?, id(GENERATE)?);
        Ok(Self { tokenizer, end_of_text, generate })
    }

    /// Reads the tokenizer of any bundle. One without [`GENERATE`] has its end of text in that place.
    pub fn of_bundle(bundle: &Path, end_of_text: Option<u32>) -> Result<Self> {
        let path = bundle.join("tokenizer.json");
        let mut tokenizer = Tokenizer::from_file(&path)
            .map_err(|e| anyhow!("cannot read {}: {e}", path.display()))?;
        tokenizer.set_encode_special_tokens(true);
        let end_of_text = end_of_text.or_else(|| tokenizer.token_to_id(END_OF_TEXT));
        let end_of_text = end_of_text.context("the base names no end of text")?;
        let generate = tokenizer.token_to_id(GENERATE).unwrap_or(end_of_text);
        Ok(Self { tokenizer, end_of_text, generate })
    }

    /// Reads `tokenizer.json`.
    pub fn load(path: &Path) -> Result<Self> {
        let tokenizer = Tokenizer::from_file(path)
            .map_err(|e| anyhow!("cannot read {}: {e}", path.display()))?;
        Self::new(tokenizer)
    }

    /// Number of entries.
    pub fn size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Id of a special token.
    pub fn special(&self, token: &str) -> Result<u32> {
        match self.tokenizer.token_to_id(token) {
            Some(id) => Ok(id),
            None => bail!("the tokenizer has no {token}"),
        }
    }

    /// Tokens of plain text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| anyhow!("{e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens, special ones included.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, false).map_err(|e| anyhow!("{e}"))
    }
}
