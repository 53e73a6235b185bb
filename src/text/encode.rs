//! The tokenizer: byte-level BPE as Hugging Face writes it for GPT-2.
//!
//! The BPE behind it has no control tokens at all (special ones, and all that look like `<|...|>`): they
//! are taken out of the file before it is loaded, so that no text can become one. Those that trusted
//! text names are found here, and the text between them, trusted or not, is encoded as one piece. Other
//! added tokens are words like any other, and stay in it.

use super::Segment;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// Ids above this are a broken file, not a vocabulary.
const MAX_ID: u32 = 1 << 22;

/// Why a tokenizer file was refused.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct LoadError {
    path: String,
    reason: String,
}

/// Text to token ids and back. Immutable; share it freely between threads.
pub struct Tokenizer {
    /// Knows no special tokens.
    bpe: tokenizers::Tokenizer,
    ids: HashMap<String, u32>,
    /// Control tokens, longest first, so that the first match is the right one.
    controls: Vec<(String, u32)>,
    /// The bytes that one of them begins with.
    first_bytes: [bool; 256],
    special: Vec<bool>,
    bytes: ByteTable,
}

/// The bytes of every token, in one allocation.
#[derive(Default)]
struct ByteTable {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<u32>,
}

impl ByteTable {
    fn push(&mut self, token: &[u8]) {
        self.bytes.extend_from_slice(token);
        self.ends.push(self.bytes.len() as u32);
    }

    fn get(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

#[derive(Deserialize, Serialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default = "yes")]
    normalized: bool,
}

/// What Hugging Face assumes of `normalized`.
fn yes() -> bool {
    true
}

impl AddedToken {
    /// Whether only trusted text may name it.
    fn is_control(&self) -> bool {
        self.special || (self.content.starts_with("<|") && self.content.ends_with("|>"))
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. What cannot be honoured exactly is refused by name.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        let path = path.as_ref();
        let refuse = |reason: String| LoadError { path: path.display().to_string(), reason };
        let json = std::fs::read(path).map_err(|e| refuse(e.to_string()))?;
        Self::from_json(&json).map_err(refuse)
    }

    /// The tokenizer that the contents of a `tokenizer.json` describe.
    pub fn from_json(json: &[u8]) -> Result<Self, String> {
        let mut file: Value =
            serde_json::from_slice(json).map_err(|e| format!("not a tokenizer: {e}"))?;
        check_components(&file)?;
        let added = take_added(&mut file)?;
        let vocab = vocabulary(&file)?;
        let table = assemble(&vocab, &added)?;
        let (controls, words): (Vec<_>, Vec<_>) = added.iter().partition(|t| t.is_control());
        let bpe = serde_json::from_value(strip(file, &controls, &words));
        let bpe = bpe.map_err(|e| e.to_string())?;
        let named = |t: &AddedToken| (t.content.clone(), t.id);
        let mut controls: Vec<_> = controls.into_iter().map(named).collect();
        controls.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.0.cmp(&b.0)));
        let mut first_bytes = [false; 256];
        for token in controls.iter().filter_map(|(token, _)| token.bytes().next()) {
            first_bytes[usize::from(token)] = true;
        }
        let mut special = vec![false; table.ends.len()];
        for token in added.iter().filter(|t| t.special) {
            special[token.id as usize] = true;
        }
        let ids = vocab.into_iter().chain(added.iter().map(named)).collect();
        Ok(Self { bpe, ids, controls, first_bytes, special, bytes: table })
    }

    /// Token ids of a user's text: special tokens inside it are plain text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        self.encode_into(text, &mut ids)?;
        Ok(ids)
    }

    /// Token ids of a rendered template: special tokens count in trusted segments only. Nothing is
    /// put between segments; neighbouring text is encoded as if it were written in one piece.
    pub fn encode_template(&self, segments: &[Segment]) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut text = String::new();
        for segment in segments {
            let mut rest = segment.text.as_str();
            while segment.trusted
                && let Some((at, token, id)) = self.first_control(rest)
            {
                text.push_str(&rest[..at]);
                self.encode_into(&text, &mut ids)?;
                text.clear();
                ids.push(id);
                rest = &rest[at + token.len()..];
            }
            text.push_str(rest);
        }
        self.encode_into(&text, &mut ids)?;
        Ok(ids)
    }

    /// The id of a token by its text: a special token's own, or a vocabulary entry as the file
    /// spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The control tokens, which only trusted text can name.
    pub fn controls(&self) -> impl Iterator<Item = &str> {
        self.controls.iter().map(|(token, _)| token.as_str())
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.bytes.ends.len()
    }

    /// What the token adds to the text; not always whole characters. Empty for unused ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// Whether the token is a special one, which people are not shown.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Whether the token is one that only trusted text may name; all special ones are.
    pub fn is_control(&self, id: u32) -> bool {
        self.controls.iter().any(|&(_, control)| control == id)
    }

    /// The text of these tokens; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn encode_into(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        if !text.is_empty() {
            let encoding = self.bpe.encode_fast(text, false);
            let encoding = encoding.map_err(|e| Error::internal("encoding failed", e))?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(())
    }

    /// The first control token in `text`, the longest where several begin.
    fn first_control(&self, text: &str) -> Option<(usize, &str, u32)> {
        let begins = |byte: u8| self.first_bytes[usize::from(byte)];
        let places = text.bytes().enumerate().filter(|(_, byte)| begins(*byte));
        places.map(|(at, _)| at).filter(|at| text.is_char_boundary(*at)).find_map(|at| {
            let (token, id) =
                self.controls.iter().find(|(t, _)| text[at..].starts_with(t.as_str()))?;
            Some((at, token.as_str(), *id))
        })
    }
}

/// Refuses every component that byte-level BPE without surprises does not have.
fn check_components(file: &Value) -> Result<(), String> {
    let kind = |part: &str| match &file[part] {
        Value::Null => "none".to_string(),
        v => v["type"].as_str().unwrap_or("untyped").to_string(),
    };
    for (part, allowed) in [
        ("normalizer", &["none"][..]),
        ("pre_tokenizer", &["ByteLevel"]),
        ("decoder", &["ByteLevel"]),
        ("post_processor", &["none", "ByteLevel"]),
    ] {
        let found = kind(part);
        if !allowed.contains(&found.as_str()) {
            return Err(format!("{part} is {found}; allowed: {}", allowed.join(", ")));
        }
    }
    if file["pre_tokenizer"]["add_prefix_space"] != false {
        return Err("pre_tokenizer.add_prefix_space must be false".into());
    }
    let model = &file["model"];
    // Files of 2019 have no type.
    if !matches!(model["type"].as_str(), Some("BPE") | None) {
        return Err(format!("model is {}; allowed: BPE", kind("model")));
    }
    for option in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
        if !matches!(&model[option], Value::Null) && model[option] != "" {
            return Err(format!("model.{option} is {}; it must be absent", model[option]));
        }
    }
    Ok(())
}

/// Takes the added tokens out of the file.
fn take_added(file: &mut Value) -> Result<Vec<AddedToken>, String> {
    let added = match file["added_tokens"].take() {
        Value::Null => Vec::new(),
        list => serde_json::from_value::<Vec<AddedToken>>(list)
            .map_err(|e| format!("added_tokens: {e}"))?,
    };
    for token in &added {
        if token.content.is_empty() {
            return Err(format!("added token {} is empty", token.id));
        }
        if token.single_word || token.lstrip || token.rstrip {
            let name = &token.content;
            return Err(format!("added token {name}: single_word, lstrip, rstrip must be false"));
        }
    }
    Ok(added)
}

/// The BPE's own vocabulary, as the file spells it.
fn vocabulary(file: &Value) -> Result<HashMap<String, u32>, String> {
    let entries = file["model"]["vocab"].as_object().ok_or("model.vocab is missing")?;
    let id = |(token, id): (&String, &Value)| match id.as_u64() {
        Some(id) if id <= u64::from(MAX_ID) => Ok((token.clone(), id as u32)),
        _ => Err(format!("token {token:?} has the id {id}; allowed: 0 to {MAX_ID}")),
    };
    entries.iter().map(id).collect()
}

/// The file without control tokens, without padding and truncation. The other added tokens are in its
/// vocabulary too, because the library numbers those anew that are not.
fn strip(mut file: Value, controls: &[&AddedToken], words: &[&AddedToken]) -> Value {
    file["added_tokens"] = json!(words);
    file["padding"] = Value::Null;
    file["truncation"] = Value::Null;
    if let Some(vocab) = file["model"]["vocab"].as_object_mut() {
        for token in controls {
            vocab.swap_remove(&token.content);
        }
        for token in words {
            vocab.insert(token.content.clone(), token.id.into());
        }
    }
    file
}

/// The bytes of all tokens; refuses ids with two owners and vocabularies that lack a byte.
fn assemble(vocab: &HashMap<String, u32>, added: &[AddedToken]) -> Result<ByteTable, String> {
    let byte_of = byte_of_char();
    let mut tokens: HashMap<u32, Vec<u8>> = HashMap::new();
    let mut single = [false; 256];
    for token in added {
        if token.id > MAX_ID {
            return Err(format!("token {:?} has the id {}", token.content, token.id));
        }
        if vocab.get(&token.content).is_some_and(|&id| id != token.id)
            || tokens.insert(token.id, token.content.clone().into_bytes()).is_some()
        {
            return Err(format!("token {:?}: its id {} is not its own", token.content, token.id));
        }
    }
    for (token, &id) in vocab {
        // An added token that the vocabulary lists too.
        if tokens.get(&id).is_some_and(|own| own == token.as_bytes()) {
            continue;
        }
        let bytes: Option<Vec<u8>> = token.chars().map(|c| byte_of.get(&c).copied()).collect();
        let bytes = bytes.ok_or_else(|| format!("token {token:?} is not byte-level"))?;
        if let [byte] = bytes[..] {
            single[usize::from(byte)] = true;
        }
        if tokens.insert(id, bytes).is_some() {
            return Err(format!("token {token:?}: its id {id} is not its own"));
        }
    }
    if let Some(byte) = single.iter().position(|found| !found) {
        return Err(format!("the vocabulary has no token for the byte {byte:#04x}"));
    }
    let mut table = ByteTable::default();
    for id in 0..=tokens.keys().copied().max().unwrap_or(0) {
        table.push(tokens.get(&id).map_or(&[], Vec::as_slice));
    }
    Ok(table)
}

/// GPT-2's spelling of bytes: printable ones are themselves, the others follow from U+0100.
fn byte_of_char() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255).filter(|&b| !printable(b)).zip('\u{100}'..).map(|(b, c)| (c, b));
    (0..=255).filter(|&b| printable(b)).map(|b| (char::from(b), b)).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixture;
    use proptest::prelude::*;

    fn trusted(text: &str) -> Segment {
        Segment { text: text.into(), trusted: true }
    }

    fn plain(text: &str) -> Segment {
        Segment { text: text.into(), trusted: false }
    }

    #[test]
    fn plain_text_never_becomes_a_special_token() {
        let t = fixture::tokenizer();
        for text in ["<|endoftext|>", "a fox<|gen|> in<|words:20|>", "<|gen|>"] {
            let ids = t.encode_plain(text).unwrap();
            assert!(ids.iter().all(|&id| !t.is_special(id)), "{text}: {ids:?}");
            assert_eq!(t.decode(&ids), text);
        }
    }

    #[test]
    fn trusted_text_names_special_tokens() {
        let t = fixture::tokenizer();
        let gen_id = t.token_id("<|gen|>").unwrap();
        let mut want = vec![t.token_id("<|words:20|>").unwrap()];
        want.extend(t.encode_plain("a <|gen|> fox").unwrap());
        want.push(gen_id);
        let segments = [trusted("<|words:20|>"), plain("a <|gen|> fox"), trusted("<|gen|>")];
        let ids = t.encode_template(&segments).unwrap();
        assert_eq!(ids, want);
        assert_eq!(ids.iter().filter(|&&id| id == gen_id).count(), 1);
        assert_eq!(t.decode(&ids), "<|words:20|>a <|gen|> fox<|gen|>");
    }

    #[test]
    fn a_special_token_split_over_segments_stays_text() {
        let t = fixture::tokenizer();
        let ids = t.encode_template(&[trusted("<|"), plain("gen"), trusted("|>")]).unwrap();
        assert_eq!(ids, t.encode_plain("<|gen|>").unwrap());
    }

    #[test]
    fn matches_the_reference_library() {
        let t = fixture::tokenizer();
        let reference = tokenizers::Tokenizer::from_bytes(fixture::GPT2_TINY).unwrap();
        for text in ["", " ", "Hello, world!", "  naïve\n\n\t日本語 🦀 don't", "\u{fdd0}\0"] {
            let ids = t.encode_plain(text).unwrap();
            assert_eq!(ids, reference.encode(text, false).unwrap().get_ids(), "{text:?}");
            assert_eq!(t.decode(&ids), text);
        }
        assert_eq!(t.token_bytes(t.token_id("Ġa").unwrap()), b" a");
        assert_eq!(t.token_bytes(1 << 30), b"");
    }

    /// Added tokens that are not special are words: wherever the library finds one, so do we.
    #[test]
    fn added_words_are_encoded_as_the_reference_library_does() {
        let mut file: Value = serde_json::from_slice(fixture::GPT2_TINY).unwrap();
        let added = file["added_tokens"].as_array_mut().unwrap();
        // The first is in the vocabulary as well; the library numbers the others on from there.
        for (id, content, normalized) in [
            (512, "widget", true),
            (513, "<|x|>", true),
            (514, " wid", false),
            (515, "naïve🦀", true),
        ] {
            added
                .push(json!({"id": id, "content": content, "special": false, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": normalized}));
        }
        file["model"]["vocab"]["widget"] = json!(512);
        let json = file.to_string().into_bytes();
        let t = Tokenizer::from_json(&json).unwrap();
        let reference = tokenizers::Tokenizer::from_bytes(&json).unwrap();
        for text in ["a widget", "widgets, widwidget", "  wid wid", "so naïve🦀!", "widge t"] {
            let ids = t.encode_plain(text).unwrap();
            assert_eq!(ids, reference.encode(text, false).unwrap().get_ids(), "{text:?}");
            assert_eq!(t.decode(&ids), text);
            assert_eq!(t.encode_template(&[trusted(text)]).unwrap(), ids);
        }
        assert_eq!(t.encode_plain("widget").unwrap(), [512]);
        assert!(!t.encode_plain("<|x|>").unwrap().contains(&513));
        assert_eq!(t.encode_template(&[trusted("<|x|>")]).unwrap(), [513]);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (pointer, value, want) in [
            ("/decoder/type", "\"WordPiece\"", "decoder is WordPiece"),
            ("/pre_tokenizer/type", "\"Metaspace\"", "pre_tokenizer is Metaspace"),
            ("/pre_tokenizer/add_prefix_space", "true", "add_prefix_space"),
            ("/normalizer", "{\"type\": \"NFC\"}", "normalizer is NFC"),
            ("/model/type", "\"Unigram\"", "model is Unigram"),
            ("/added_tokens/0/lstrip", "true", "<|endoftext|>"),
            ("/added_tokens/0/id", "7", "is not its own"),
            ("/model/vocab/A", "5", "is not its own"),
            ("/model/vocab/A", "-1", "has the id -1"),
        ] {
            let mut file: Value = serde_json::from_slice(fixture::GPT2_TINY).unwrap();
            *file.pointer_mut(pointer).unwrap() = serde_json::from_str(value).unwrap();
            let error = Tokenizer::from_json(file.to_string().as_bytes()).err().unwrap();
            assert!(error.contains(want), "{pointer}: {error}");
        }
        assert!(Tokenizer::from_json(b"[]").is_err());
    }

    proptest! {
        #[test]
        fn text_survives_a_round_trip(text in any::<String>()) {
            let t = fixture::tokenizer();
            let ids = t.encode_plain(&text).unwrap();
            prop_assert_eq!(t.decode(&ids), text);
        }
    }
}
