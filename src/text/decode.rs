//! Token bytes to text that is safe to show, as they come.
//!
//! Bytes of an unfinished character are held, and so is text that may be the start of a stop string.
//! The pieces put together are the whole text, decoded lossily as [`String::from_utf8_lossy`] does,
//! cut before the stop string that was complete first (of two that end together, the longer).

/// Decodes one text.
#[derive(Clone, Debug)]
pub struct Incremental {
    stops: Vec<String>,
    /// Bytes of a character that is not complete; at most three.
    partial: Vec<u8>,
    /// Decoded, but maybe the start of a stop string.
    held: String,
    stopped: bool,
}

/// What one push brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text that is safe to show; often empty.
    pub text: String,
    /// Whether a stop string is complete: the text has ended.
    pub stopped: bool,
}

impl Incremental {
    /// A decoder that ends the text before the first of `stops`; empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { stops, partial: Vec::new(), held: String::new(), stopped: false }
    }

    /// Takes the bytes of the next token. After a stop string everything is ignored.
    pub fn push(&mut self, bytes: &[u8]) -> Piece {
        if self.stopped {
            return Piece { text: String::new(), stopped: true };
        }
        self.decode(bytes);
        if let Some(start) = self.first_stop() {
            self.stopped = true;
            self.held.truncate(start);
        }
        let keep = if self.stopped { 0 } else { self.possible_stop() };
        let rest = self.held.split_off(self.held.len() - keep);
        Piece { text: std::mem::replace(&mut self.held, rest), stopped: self.stopped }
    }

    /// The end of the text: what was held back. An unfinished character is U+FFFD.
    pub fn finish(&mut self) -> String {
        if !self.stopped && !std::mem::take(&mut self.partial).is_empty() {
            self.held.push(char::REPLACEMENT_CHARACTER);
            if let Some(start) = self.first_stop() {
                self.held.truncate(start);
            }
        }
        self.stopped = true;
        std::mem::take(&mut self.held)
    }

    /// Appends what is decodable to `held`, leaves the rest in `partial`.
    fn decode(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        let mut rest = self.partial.as_slice();
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    self.partial.clear();
                    return;
                }
                Err(error) => error,
            };
            let (valid, after) = rest.split_at(error.valid_up_to());
            self.held.push_str(std::str::from_utf8(valid).unwrap_or_default());
            let Some(invalid) = error.error_len() else {
                self.partial = after.to_vec();
                return;
            };
            self.held.push(char::REPLACEMENT_CHARACTER);
            rest = &after[invalid..];
        }
    }

    /// Where the stop string that is complete first begins in `held`.
    fn first_stop(&self) -> Option<usize> {
        let found = |stop: &String| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at));
        self.stops.iter().filter_map(found).min().map(|(_, start)| start)
    }

    /// How many bytes at the end of `held` may be the start of a stop string.
    fn possible_stop(&self) -> usize {
        let held = self.held.as_bytes();
        let overlap = |stop: &String| {
            let longest = (stop.len() - 1).min(held.len());
            (1..=longest).rev().find(|&n| held.ends_with(&stop.as_bytes()[..n]))
        };
        self.stops.iter().filter_map(overlap).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| s.to_string()).collect()
    }

    /// The definition, on the whole text: grow it character by character until it ends in a stop.
    fn cut(text: &str, stops: &[String]) -> String {
        for (at, c) in text.char_indices() {
            let so_far = &text[..at + c.len_utf8()];
            let ends = stops.iter().filter(|s| so_far.ends_with(s.as_str()));
            if let Some(longest) = ends.map(String::len).max() {
                return so_far[..so_far.len() - longest].to_string();
            }
        }
        text.to_string()
    }

    #[test]
    fn characters_are_never_split() {
        let mut d = Incremental::new(&[]);
        let crab = "🦀".as_bytes();
        assert_eq!(d.push(&crab[..1]).text, "");
        assert_eq!(d.push(&crab[1..3]).text, "");
        assert_eq!(d.push(&crab[3..]).text, "🦀");
        assert_eq!(d.push(&crab[..2]).text, "");
        assert_eq!(d.finish(), "\u{fffd}");
    }

    #[test]
    fn a_possible_stop_is_held_back_and_released() {
        let mut d = Incremental::new(&stops(&["END"]));
        assert_eq!(d.push(b"the E").text, "the ");
        assert_eq!(d.push(b"N").text, "");
        assert_eq!(d.push(b"Emy EN").text, "ENEmy ");
        assert_eq!(d.finish(), "EN");
    }

    #[test]
    fn a_stop_ends_the_text() {
        let mut d = Incremental::new(&stops(&["\n\n", "END"]));
        assert_eq!(d.push(b"a\n").text, "a");
        assert_eq!(d.push(b"\nb"), Piece { text: String::new(), stopped: true });
        assert_eq!(d.push(b"more"), Piece { text: String::new(), stopped: true });
        assert_eq!(d.finish(), "");
    }

    #[test]
    fn the_stop_complete_first_wins() {
        for (list, want) in [(["abc", "b"], "xa"), (["ab", "b"], "x"), (["bc", "abc"], "x")] {
            let mut whole = Incremental::new(&stops(&list));
            assert_eq!(whole.push(b"xabc"), Piece { text: want.into(), stopped: true });
        }
    }

    proptest! {
        #[test]
        fn pieces_make_up_the_text_cut_before_the_first_stop(
            chunks in proptest::collection::vec(
                proptest::collection::vec(
                    // Few letters, and the bytes of é, €, 🦀 in and out of order: collisions abound.
                    proptest::sample::select(b"aabb\xc3\xa9\xe2\x82\xac\xf0\x9f\xa6\x80\xff".to_vec()),
                    0..4,
                ),
                0..24,
            ),
            stop_list in proptest::collection::vec("[abé€🦀\u{fffd}]{1,4}", 0..4),
        ) {
            let whole = String::from_utf8_lossy(&chunks.concat()).into_owned();
            let mut decoder = Incremental::new(&stop_list);
            let mut got = String::new();
            for chunk in &chunks {
                let piece = decoder.push(chunk);
                got.push_str(&piece.text);
                if piece.stopped {
                    break;
                }
                let longest = stop_list.iter().map(String::len).max().unwrap_or(1);
                prop_assert!(decoder.held.len() < longest, "held {:?}", decoder.held);
                prop_assert!(decoder.partial.len() <= 3);
            }
            got.push_str(&decoder.finish());
            prop_assert_eq!(got, cut(&whole, &stop_list));
        }
    }
}
