//! Where English text may be cut, and what of it a user might have typed: word counts, content words,
//! prefixes that end after a sentence or a clause. Plain functions of text; knows no tokens.

use std::collections::HashSet;

/// Words as requests count them: split at Unicode white space.
pub fn count_words(text: &str) -> usize {
    text.split_whitespace().count()
}

#[rustfmt::skip]
const STOP_WORDS: &[&str] = &[
    "a", "about", "after", "all", "also", "an", "and", "any", "are", "as", "at", "be", "been", "before", "but", "by",
    "can", "could", "did", "do", "does", "for", "from", "had", "has", "have", "he", "her", "him", "his", "how", "i",
    "if", "in", "into", "is", "it", "its", "like", "made", "may", "me", "more", "most", "my", "no", "not", "of", "on",
    "one", "or", "other", "our", "out", "over", "s", "she", "so", "some", "such", "t", "than", "that", "the", "their",
    "them", "then", "there", "these", "they", "this", "to", "under", "up", "us", "was", "we", "were", "what", "when",
    "where", "which", "while", "who", "will", "with", "would", "you", "your",
];

/// Words that open a clause which cannot stand alone: "When it rains, ..." is not cut at its comma.
#[rustfmt::skip]
const OPENERS: &[&str] = &[
    "above", "across", "after", "against", "along", "although", "among", "around", "as", "at", "because", "before",
    "behind", "below", "beneath", "beside", "between", "beyond", "by", "during", "for", "from", "given", "if", "in",
    "inside", "near", "on", "once", "outside", "over", "since", "though", "through", "to", "under", "until", "when",
    "where", "while", "with", "within", "without",
];

/// Content words of a text as they are written, in order, without repetition.
pub fn content_words_as_written(text: &str) -> Vec<&str> {
    let mut seen = HashSet::new();
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty());
    words
        .filter(|word| {
            let word = word.to_lowercase();
            !STOP_WORDS.contains(&word.as_str()) && seen.insert(word)
        })
        .collect()
}

/// Content words of a text in lower case, in order, without repetition.
pub fn content_words(text: &str) -> Vec<String> {
    content_words_as_written(text).into_iter().map(str::to_lowercase).collect()
}

/// A word without its commonest endings, so that "marching" covers "march".
fn stem(word: &str) -> &str {
    let cut = ["ies", "ing", "ed", "es", "ly", "er", "s"]
        .iter()
        .find_map(|ending| word.strip_suffix(ending).filter(|rest| rest.chars().count() >= 3));
    cut.unwrap_or(word)
}

/// Share of `input`'s content words that appear in `output`; 1 if it has none.
pub fn coverage(input: &str, output: &str) -> f64 {
    let wanted = content_words(input);
    if wanted.is_empty() {
        return 1.0;
    }
    let output = content_words(output);
    let has: HashSet<&str> = output.iter().map(|w| stem(w)).collect();
    wanted.iter().filter(|w| has.contains(stem(w))).count() as f64 / wanted.len() as f64
}

fn bare(word: &str) -> String {
    word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase()
}

/// The words that texts are seen to end sentences with. A cut after another word ("in the freezing,
/// misty air") would leave a stump.
#[derive(Debug, Default)]
pub struct Enders(HashSet<String>);

impl Enders {
    /// Learns from one more text.
    pub fn learn(&mut self, text: &str) {
        let words: Vec<&str> = text.split_whitespace().collect();
        for (i, word) in words.iter().enumerate() {
            if i + 1 == words.len() || word.ends_with(['.', '!', '?']) {
                self.0.insert(bare(word));
            }
        }
    }
}

/// Where a text may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Byte after the last word.
    end: usize,
    /// After a sentence; else after a clause.
    sentence: bool,
}

/// Prefixes of `text`, shorter than the whole, that end after a sentence or a clause. One that ends
/// after a clause gets the full stop that the text itself ends with.
pub fn cuts(text: &str, enders: &Enders) -> Vec<String> {
    let stop = if text.trim_end().ends_with('.') { "." } else { "" };
    let finish = |place: Place| {
        let cut = &text[..place.end];
        match place.sentence {
            true => cut.to_owned(),
            false => format!("{}{stop}", cut.trim_end_matches([',', ';'])),
        }
    };
    places(text, enders).into_iter().map(finish).collect()
}

fn places(text: &str, enders: &Enders) -> Vec<Place> {
    let words: Vec<(usize, &str)> = text
        .split_whitespace()
        .map(|w| (w.as_ptr() as usize - text.as_ptr() as usize, w))
        .collect();
    let mut found = Vec::new();
    let mut nesting = Nesting::default();
    let (mut opener, mut clause_words) = (true, 0);
    for (i, &(start, word)) in words.iter().enumerate() {
        if clause_words == 0 && (i == 0 || ends_sentence(words[i - 1].1)) {
            let first = bare(word);
            opener = OPENERS.contains(&first.as_str()) || first.ends_with("ing");
        }
        clause_words += 1;
        nesting.see(word);
        // "Three objects: apron, button" must not end at the first of its list.
        opener |= word.ends_with(':');
        let Some(&(_, next)) = words.get(i + 1) else { break };
        let end = start + word.len();
        if ends_sentence(word) && !next.starts_with(char::is_lowercase) {
            if nesting.is_flat() {
                found.push(Place { end, sentence: true });
            }
            clause_words = 0;
        } else if word.ends_with([',', ';']) {
            let whole = clause_words >= 3 && !opener && enders.0.contains(&bare(word));
            if whole && nesting.is_flat() {
                found.push(Place { end, sentence: false });
            }
            (opener, clause_words) = (false, 0);
        }
    }
    found
}

fn ends_sentence(word: &str) -> bool {
    let bare = word.trim_end_matches(['"', '\'', ')', ']']);
    bare.ends_with(['.', '!', '?']) && bare.trim_end_matches('.').chars().count() > 1
}

/// Whether a place is outside of quotes and brackets.
#[derive(Default)]
struct Nesting {
    quotes: i32,
    doubles: usize,
    brackets: i32,
}

impl Nesting {
    fn see(&mut self, word: &str) {
        self.quotes += i32::from(word.trim_start_matches(['(', '[']).starts_with('\''));
        let closed =
            word.trim_end_matches(['.', ',', ';', ':', '!', '?', ')', ']']).ends_with('\'');
        self.quotes = (self.quotes - i32::from(closed)).max(0);
        self.doubles += word.matches('"').count();
        self.brackets += word.matches(['(', '[']).count() as i32;
        self.brackets -= word.matches([')', ']']).count() as i32;
    }

    fn is_flat(&self) -> bool {
        self.quotes == 0 && self.doubles.is_multiple_of(2) && self.brackets == 0
    }
}

/// Starts of sentences of `text`, as bytes.
pub fn sentence_starts(text: &str) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut fresh = true;
    for word in text.split_whitespace() {
        if fresh && !word.starts_with(char::is_lowercase) {
            starts.push(word.as_ptr() as usize - text.as_ptr() as usize);
        }
        fresh = ends_sentence(word);
    }
    starts
}
