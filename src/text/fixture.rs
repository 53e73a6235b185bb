//! A small tokenizer for tests, with and without control tokens.

use super::Tokenizer;
use serde_json::{Value, json};
use std::sync::LazyLock;

/// The tokenizer of `tests/goldens/gpt2-tiny`; its one special token is `<|endoftext|>`.
pub const GPT2_TINY: &[u8] = include_bytes!("../../tests/goldens/gpt2-tiny/tokenizer.json");

/// The same file with the tokens `<|gen|>`, `<|task:image|>`, `<|rel:none|>`, `<|words:none|>` and
/// `<|words:3|>` to `<|words:60|>` added.
pub fn json_with_controls() -> Vec<u8> {
    let mut file: Value = serde_json::from_slice(GPT2_TINY).expect("the fixture is JSON");
    let names = ["gen", "task:image", "rel:none", "words:none"].map(String::from);
    let words = (3..=60).map(|n| format!("words:{n}"));
    let added = file["added_tokens"].as_array_mut().expect("the fixture has added tokens");
    for (i, name) in names.into_iter().chain(words).enumerate() {
        added.push(json!({"id": 512 + i, "content": format!("<|{name}|>"), "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}));
    }
    file.to_string().into_bytes()
}

/// The tokenizer with control tokens, loaded once.
pub fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
        Tokenizer::from_json(&json_with_controls()).expect("the fixture is a tokenizer")
    });
    &TOKENIZER
}
