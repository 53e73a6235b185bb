//! Cuts, coverage, draws.

use crate::train::draws::Draws;
use crate::train::passages::{Enders, content_words, count_words, coverage, cuts, sentence_starts};

fn enders(words: &[&str]) -> Enders {
    let mut enders = Enders::default();
    words.iter().for_each(|word| enders.learn(word));
    enders
}

#[test]
fn cuts_end_after_sentences_and_whole_clauses() {
    let enders = enders(&["snow", "dawn", "light"]);
    let text = "A red fox crosses fresh snow, paw lifted, at dawn. Soft light. Calm.";
    assert_eq!(
        cuts(text, &enders),
        [
            "A red fox crosses fresh snow.",
            "A red fox crosses fresh snow, paw lifted, at dawn.",
            "A red fox crosses fresh snow, paw lifted, at dawn. Soft light.",
        ]
    );
    let bare = "Red fox in snow; grey sky over birches";
    assert_eq!(cuts(bare, &enders), ["Red fox in snow"], "no full stop where the text has none");
}

#[test]
fn nothing_is_cut_where_a_stump_would_remain() {
    let enders = enders(&["snow", "old", "hill", "apron", "sun", "deep"]);
    let whole = [
        "In the deep snow, a fox",
        "Looking up from the hill, a fox waits",
        "The fox was very old, grey and thin",
        "Set three things: apron, button, curtain",
        "A sign says 'Closed for snow, sorry' in red",
        "A sign (left of the hill, by the road) in red",
        "She said \"mind the sun. Please\" and left",
        "One snow, two",
        "It costs 3.50 to enter",
        "",
    ];
    for text in &whole[..2] {
        assert!(cuts(text, &enders).is_empty(), "{text}");
    }
    assert_eq!(cuts(whole[2], &enders), ["The fox was very old"]);
    for text in &whole[3..] {
        assert!(cuts(text, &enders).is_empty(), "{text}");
    }
    assert!(cuts("The misty morning was freezing, grey and wet", &enders).is_empty());
}

#[test]
fn a_cut_is_always_a_shorter_beginning() {
    let text = "First, one thing. Then a second thing happens, slowly; it ends well, mostly. Yes!";
    let enders = enders(&["thing", "happens", "slowly", "well"]);
    let all = cuts(text, &enders);
    assert!(all.len() >= 3);
    for cut in all {
        assert!(text.starts_with(cut.trim_end_matches('.')), "{cut}");
        assert!(count_words(&cut) < count_words(text));
    }
    let starts = sentence_starts(text);
    let firsts: Vec<&str> =
        starts.iter().map(|&s| text[s..].split_whitespace().next().unwrap()).collect();
    assert_eq!(firsts, ["First,", "Then", "Yes!"]);
}

#[test]
fn coverage_counts_content_words_whatever_their_ending() {
    assert_eq!(content_words("A fox's den, in the old, OLD snow"), ["fox", "den", "old", "snow"]);
    assert_eq!(coverage("ants marching to work", "An ant march at working hours"), 1.0);
    assert_eq!(coverage("red fox", "A grey fox"), 0.5);
    assert_eq!(coverage("of the", "anything"), 1.0);
    assert_eq!(coverage("red", ""), 0.0);
}

#[test]
fn words_are_split_at_unicode_white_space() {
    assert_eq!(count_words("a\u{2003}b\u{a0}c\n d — e"), 6);
}

#[test]
fn draws_follow_from_their_place() {
    let at = |place: &[u64]| Draws::at(place).next_u64();
    assert_eq!(at(&[1, 2]), at(&[1, 2]));
    assert_ne!(at(&[1, 2]), at(&[2, 1]));
    let mut draws = Draws::at(&[7]);
    let units: Vec<f64> = (0..4000).map(|_| draws.unit()).collect();
    let mean = units.iter().sum::<f64>() / 4000.0;
    assert!((mean - 0.5).abs() < 0.03 && units.iter().all(|u| (0.0..1.0).contains(u)));
    assert!((0..1000).all(|_| draws.below(3) < 3));
    let mut items: Vec<u32> = (0..50).collect();
    draws.shuffle(&mut items);
    assert_ne!(items, (0..50).collect::<Vec<_>>());
    items.sort_unstable();
    assert_eq!(items, (0..50).collect::<Vec<_>>());
}
