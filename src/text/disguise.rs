//! The wall between author and user in a chat.
//!
//! Chat templates put a turn together in one expression, `'<|im_start|>' + message['role'] + '\n' +
//! message['content'] + '<|im_end|>'`, so that what a user sent cannot be told from the author's text by
//! the values that are written. It is told by its characters: no control token can be written without
//! its *key*, one character of its text (the bar of `<|im_start|>`), and every key in a user's text is
//! replaced by a noncharacter, its disguise, before the template sees it, and put back after the control
//! tokens were found.
//!
//! Whatever a template does to strings (joins, cuts, splits, reverses, replaces, changes case, writes
//! JSON), a noncharacter never turns into a key, so a control token can only be made of keys that the
//! author wrote. One character stands for one character: lengths, positions and comparisons are as they
//! were, unless a template looks for a key in a user's text. Between keys that the author wrote a user's
//! letters do count: Phi-3 writes `'<|' + message['role'] + '|>'` and means a token, which is why roles
//! are taken from a list.
//!
//! Noncharacters that a user sent are left alone: disguises are chosen among those that were not.

use super::Segment;
use crate::error::{Error, Result};

/// The bars of `<|x|>` and `<｜x｜>`; what templates look for in a user's text has none.
const BARS: [char; 2] = ['|', '\u{ff5c}'];

/// The characters without which no control token can be written.
#[derive(Clone, Debug)]
pub struct Keys(Vec<char>);

/// The disguises of one rendering: key, noncharacter.
#[derive(Debug)]
pub struct Disguise(Vec<(char, char)>);

/// Unicode's noncharacters, which no text has a use for.
pub fn noncharacters() -> impl Iterator<Item = char> {
    let ends = (0..=0x10_u32).flat_map(|plane| [plane << 16 | 0xfffe, plane << 16 | 0xffff]);
    ('\u{fdd0}'..='\u{fdef}').chain(ends.filter_map(char::from_u32))
}

/// The character of `token` that is its key: a bar, else the first sign, else the first letter.
fn key(token: &str) -> Option<char> {
    let sign = || token.chars().find(|c| !c.is_alphanumeric());
    token.chars().find(|c| BARS.contains(c)).or_else(sign).or_else(|| token.chars().next())
}

impl Keys {
    /// The keys of these control tokens.
    pub fn new<'a>(controls: impl Iterator<Item = &'a str>) -> Self {
        let mut keys: Vec<char> = controls.filter_map(key).collect();
        // A letter can also come from a change of case.
        if keys.iter().any(|key| key.is_alphanumeric()) {
            let becomes =
                |c: &char| c.to_lowercase().chain(c.to_uppercase()).any(|c| keys.contains(&c));
            let more: Vec<char> = ('\0'..=char::MAX).filter(becomes).collect();
            keys.extend(more);
        }
        keys.sort_unstable();
        keys.dedup();
        Self(keys)
    }

    /// Disguises for the keys in `texts`.
    ///
    /// # Errors
    /// `Invalid` if the texts leave too few noncharacters.
    pub fn disguise<'a>(&self, texts: impl Iterator<Item = &'a str> + Clone) -> Result<Disguise> {
        let occurs = |c: char| texts.clone().any(|text| text.contains(c));
        let mut free = noncharacters().filter(|c| !occurs(*c));
        let keys = self.0.iter().filter(|key| occurs(**key));
        let pair = |key: &char| free.next().map(|disguise| (*key, disguise));
        let pairs: Option<Vec<(char, char)>> = keys.map(pair).collect();
        let full = || Error::invalid("messages", "messages hold too many Unicode noncharacters");
        pairs.map(Disguise).ok_or_else(full)
    }
}

impl Disguise {
    /// A user's text for the template.
    pub fn put_on(&self, text: &str) -> String {
        let disguised =
            |c| self.0.iter().find(|(key, _)| *key == c).map_or(c, |(_, nonchar)| *nonchar);
        text.chars().map(disguised).collect()
    }

    /// What the template wrote: keys that come from a user are plain, all else is trusted.
    pub fn take_off(&self, rendered: &str) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut add = |text: &str, trusted| {
            if !text.is_empty() {
                segments.push(Segment { text: text.into(), trusted });
            }
        };
        let mut rest = rendered;
        let of_user = |c: char| self.0.iter().find(|(_, nonchar)| *nonchar == c);
        while let Some((at, (key, nonchar))) =
            rest.char_indices().find_map(|(at, c)| Some((at, of_user(c)?)))
        {
            add(&rest[..at], true);
            add(key.encode_utf8(&mut [0; 4]), false);
            rest = &rest[at + nonchar.len_utf8()..];
        }
        add(rest, true);
        segments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_control_token_has_a_key() {
        for (tokens, keys) in [
            (&["<|im_start|>", "<|a|>"][..], "|"),
            (&["<s>", "</s>", "[INST]"], "<["),
            (&["<｜User｜>"], "｜"),
            (&["PAD"], "Pp"),
            (&["k"], "Kk\u{212a}"),
        ] {
            assert_eq!(String::from_iter(Keys::new(tokens.iter().copied()).0), keys, "{tokens:?}");
        }
    }

    #[test]
    fn what_was_put_on_comes_off() {
        let keys = Keys::new(["<|a|>", "<s>"].into_iter());
        let text = "<|a|> \u{fdd0}\u{fdd1} | é";
        let disguise = keys.disguise([text].into_iter()).unwrap();
        let worn = disguise.put_on(text);
        assert!(!worn.contains(['<', '|']) && worn.contains("\u{fdd0}\u{fdd1}"));
        assert_eq!(worn.chars().count(), text.chars().count());
        let segments = disguise.take_off(&format!("<|a|>{worn}"));
        assert_eq!(segments[0], Segment { text: "<|a|>".into(), trusted: true });
        assert_eq!(
            segments.into_iter().map(|s| s.text).collect::<String>(),
            format!("<|a|>{text}")
        );
    }

    #[test]
    fn too_many_noncharacters_are_refused() {
        let keys = Keys::new(["<|a|>"].into_iter());
        let all: String = noncharacters().collect();
        assert_eq!(all.chars().count(), 66);
        assert!(keys.disguise([all.as_str()].into_iter()).is_ok());
        let error = keys.disguise([all.as_str(), "|"].into_iter()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("messages"));
    }
}
