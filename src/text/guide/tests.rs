use super::*;
use crate::error::Kind;
use crate::text::fixture;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn grammars() -> Grammars {
    Grammars::new(Arc::new(Tokenizer::from_json(&fixture::json_with_controls()).unwrap()))
}

fn ids(allowed: &Allowed) -> Vec<u32> {
    let bit = |id: &u32| allowed.tokens[*id as usize / 32] >> (id % 32) & 1 == 1;
    (0..32 * allowed.tokens.len() as u32).filter(bit).collect()
}

/// A text that the guide leads to, of up to 300 tokens, and whether it is complete.
fn write(mut guide: Box<dyn Guide>, seed: u64) -> (String, bool) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut text = Vec::new();
    let mut complete = false;
    while !complete && text.len() < 300 {
        let possible = ids(guide.allowed());
        assert!(!possible.is_empty(), "nothing may follow");
        let token = possible[random.random_range(0..possible.len())];
        text.push(token);
        complete = !guide.accept(token).unwrap();
        complete |= guide.allowed().end && random.random_bool(0.3);
    }
    (fixture::tokenizer().decode(&text), complete)
}

fn schema(text: &str) -> Grammar {
    Grammar::JsonSchema(serde_json::from_str(text).unwrap())
}

fn regex(text: &str) -> Grammar {
    Grammar::Regex(text.to_owned())
}

#[test]
fn texts_are_what_the_grammar_says() {
    let grammars = grammars();
    for pattern in [
        "a/b",
        "^abc$",
        "(?x) a b # c \n d",
        "a\n\"/\"\\\\",
        "[^ab]{3}",
        "(?i)yes|no",
        "\\p{Greek}{2,4}",
    ] {
        let guide = grammars.compile(&regex(pattern)).unwrap();
        let whole = fancy_regex::Regex::new(&format!("^(?:{pattern})$")).unwrap();
        for seed in 0..20 {
            let (text, complete) = write(guide.fork(), seed);
            assert!(complete && whole.is_match(&text).unwrap(), "{pattern}: {text}");
        }
    }
}

#[test]
fn json_is_json_and_a_schema_orders_its_properties() {
    let grammars = grammars();
    let guide = grammars.compile(&Grammar::Json).unwrap();
    let objects = (0..60).filter_map(|seed| {
        let (text, complete) = write(guide.fork(), seed);
        complete.then(|| serde_json::from_str::<Value>(&text).unwrap())
    });
    let objects: Vec<Value> = objects.collect();
    assert!(!objects.is_empty() && objects.iter().all(Value::is_object));
    for names in [["b", "a"], ["a", "b"]] {
        let properties = names.map(|name| format!(r#""{name}": {{"type": "null"}}"#)).join(",");
        let grammar = schema(&format!(
            r#"{{"properties": {{{properties}}}, "required": ["a", "b"],
                 "type": "object", "additionalProperties": false}}"#
        ));
        let (text, complete) = write(grammars.compile(&grammar).unwrap(), 1);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert!(complete && value.as_object().unwrap().keys().eq(names), "{text}");
    }
}

#[test]
fn control_tokens_are_never_part_of_a_text() {
    let tokenizer = fixture::tokenizer();
    let guide = grammars().compile(&regex("(?s:.+)")).unwrap();
    let possible = ids(guide.allowed());
    let words = possible.iter().filter(|id| !tokenizer.is_control(**id)).count();
    assert!(possible.len() == words && words > 300, "{words} of {}", possible.len());
    let choice = Grammar::Choice(vec!["<|gen|><|endoftext|>".into()]);
    let (text, _) = write(grammars().compile(&choice).unwrap(), 0);
    assert_eq!(text, "<|gen|><|endoftext|>");
}

#[test]
fn a_fork_goes_its_own_way() {
    let choice = Grammar::Choice(vec!["ab".into(), "ba".into()]);
    let mut one = grammars().compile(&choice).unwrap();
    let a = fixture::tokenizer().token_id("a").unwrap();
    let (start, other) = (one.allowed().clone(), one.fork());
    assert!(one.accept(a).unwrap());
    assert_eq!(other.allowed(), &start);
    assert_ne!(one.allowed(), &start);
    assert_eq!(one.fork().allowed(), one.allowed());
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let grammars = grammars();
    let deep = format!("{}{{}}{}", r#"{"items":"#.repeat(70), "}".repeat(70));
    let wide = format!(r#"{{"enum": [{}0]}}"#, "0,".repeat(MAX_VALUES));
    for (grammar, reason) in [
        (Grammar::Choice(vec![]), "0 choices; allowed: 1 to 1000"),
        (Grammar::Choice(vec!["a".into(); 1001]), "1001 choices"),
        (Grammar::Choice(vec!["a".into(), String::new()]), "a choice is empty"),
        (Grammar::Choice(vec!["a".repeat(MAX_BYTES + 1)]), "allowed: up to 65536"),
        (regex(&"a".repeat(MAX_REGEX + 1)), "allowed: up to 8192"),
        (regex(""), "only the empty text"),
        (regex("^$"), "only the empty text"),
        (regex("["), "the regular expression: unclosed character class"),
        (regex("a\\"), "the regular expression: incomplete escape"),
        (regex(r"(a)\1"), "the regular expression: backreferences are not supported"),
        (regex("(?=a)b"), "the regular expression: look-around"),
        (regex(r"a\b"), "of assertions, only ^ and $"),
        (regex(r"a[^\s\S]"), "no text satisfies it"),
        (regex(&"(".repeat(400)), "the regular expression: "),
        (schema("1"), "a schema is an object"),
        (schema("false"), "the schema allows nothing"),
        (schema(r#"{"x-guidance": {"lenient": true}}"#), "x-guidance"),
        (schema(r#"{"type": "banana"}"#), "Invalid type: banana"),
        (schema(r#"{"not": {}}"#), "Unimplemented keys: [\"not\"]"),
        (schema(r#"{"type": "integer", "minimum": 5, "maximum": 3}"#), "minimum (5) is greater"),
        (schema(r#"{"allOf": [{"type": "string"}, {"type": "null"}]}"#), "incompatible types"),
        (schema(r#"{"type": "string", "pattern": "^a$", "minLength": 5}"#), "Unsatisfiable"),
        (schema(r##"{"$ref": "#"}"##), "no text satisfies it"),
        (schema(r##"{"allOf": [{"$ref": "#"}, {"type": "object"}]}"##), "circular references"),
        (schema(r#"{"$ref": "http://example.com/x.json"}"#), "example.com"),
        (schema(r#"{"type": "integer", "multipleOf": 999983}"#), "multipleOf"),
        (schema(r#"{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}"#), "multipleOf"),
        (schema(&deep), "nested deeper than 64"),
        (schema(&wide), "values; allowed: up to"),
    ] {
        let error = grammars.compile(&grammar).unwrap_err();
        assert_eq!((error.kind, error.param.as_deref()), (Kind::Invalid, Some("grammar")));
        assert!(error.message.contains(reason), "{reason}: {error}");
        assert!(!error.message.contains('\n'), "{error}");
    }
}

/// Nothing here may take long, overflow a stack or panic; whether it is refused does not matter.
#[test]
fn hostile_grammars_are_refused_or_bounded() {
    let grammars = grammars();
    let list =
        |n: usize, item: &dyn Fn(usize) -> String| (0..n).map(item).collect::<Vec<_>>().join(",");
    let names = list(MAX_VALUES / 2 - 20, &|i| format!(r#""p{i}": {{"type": "null"}}"#));
    let needed = list(MAX_VALUES - 20, &|i| format!(r#""p{i}""#));
    let chain =
        list(900, &|i| format!(r##""a{i}": {{"items": {{"$ref": "#/$defs/a{}"}}}}"##, i + 1));
    let any = list(12, &|i| {
        format!(r#"{{"anyOf": [{{"required": ["a{i}"]}}, {{"required": ["b{i}"]}}, {{}}]}}"#)
    });
    let objects = list(600, &|i| format!(r#"{{"e{i}": {{"f": {i}}}}}"#));
    let patterns = list(60, &|i| format!(r#""^x{i}[a-z]*$": {{}}"#));
    for hostile in [
        format!(r#"{{"type": "object", "properties": {{{names}}}}}"#),
        format!(r#"{{"type": "object", "required": [{needed}]}}"#),
        format!(r##"{{"$ref": "#/$defs/a0", "$defs": {{{chain}, "a900": {{}}}}}}"##),
        format!(r#"{{"allOf": [{any}]}}"#),
        format!(r#"{{"enum": [{objects}]}}"#),
        format!(r#"{{"patternProperties": {{{patterns}}}}}"#),
        format!("{}{{}}{}", r#"{"items":"#.repeat(60), "}".repeat(60)),
        r#"{"type": "string", "minLength": 100000000}"#.into(),
        r#"{"type": "array", "maxItems": 18446744073709551615, "items": {}}"#.into(),
        r#"{"type": "string", "pattern": "^(a|b|ab)*(.{0,500}x.{500})+$"}"#.into(),
        r#"{"type": "number", "minimum": -1e308, "maximum": 1e308}"#.into(),
        // These two panic inside.
        r#"{"allOf": [{"multipleOf": 0.0001}, {"multipleOf": 0.9973}]}"#.into(),
        format!(r#"{{"type": "integer", "minimum": "{}"}}"#, "é".repeat(200)),
    ] {
        let _ = grammars.compile(&schema(&hostile)).map(|guide| try_out(guide, 30));
    }
    let words = list(3000, &|i| format!("w{i}")).replace(',', "|");
    let classes = [r"\p{L}".repeat(1600), r"\p{L}".repeat(150), "(?i)\\w".repeat(1000)];
    let others = ["((a{1000}){1000}){1000}", "(.*a.{200})*", ".*(a|b).{20}c", &words[..8000]];
    for hostile in classes.iter().map(String::as_str).chain(others) {
        let _ = grammars.compile(&regex(hostile)).map(|guide| try_out(guide, 30));
    }
}

/// Goes on until it errs or enough was written.
fn try_out(mut guide: Box<dyn Guide>, tokens: usize) {
    let mut random = SmallRng::seed_from_u64(1);
    for _ in 0..tokens {
        let possible = ids(guide.allowed());
        let token = possible[random.random_range(0..possible.len())];
        if !matches!(guide.accept(token), Ok(true)) {
            break;
        }
    }
}

#[test]
fn what_was_compiled_is_kept_and_the_oldest_goes() {
    let grammars = grammars();
    let choice = |n: usize| Grammar::Choice(vec![format!("choice {n}")]);
    for n in 0..KEPT {
        grammars.compile(&choice(n)).unwrap();
    }
    grammars.compile(&choice(0)).unwrap();
    grammars.compile(&choice(KEPT)).unwrap();
    let state = grammars.state.lock().unwrap();
    let kept: Vec<&String> = state.kept.iter().map(|(key, _)| key).collect();
    assert_eq!(kept.len(), KEPT);
    assert!(kept.contains(&&key(&choice(0))) && !kept.contains(&&key(&choice(1))));
}
