//! Structured output: from the words of a request ([`Grammar`]) to a [`Guide`] that says, token by
//! token, what may follow.
//!
//! llguidance does the work; here are its view of the tokenizer, the limits, and the refusals. A control
//! token is never part of a text, whatever a grammar says. A client's grammar can neither take long nor
//! take the process down: it is small, is compiled under a budget, alone, on a thread with room for
//! every nesting that the limits allow, and a panic inside is an error like any other.
//!
//! Nothing is built before the first grammar comes.

use super::Tokenizer;
use crate::error::{Error, Result};
use crate::request::{Allowed, Grammar, Guide};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use regex_syntax::hir::{Hir, Look};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};

/// The most choices.
const MAX_CHOICES: usize = 1000;
/// Bytes of all choices together, and of a schema.
const MAX_BYTES: usize = 1 << 16;
/// Bytes of a regular expression.
const MAX_REGEX: usize = 1 << 13;
/// The same with its classes written out.
const MAX_WRITTEN: usize = 1 << 20;
/// How deep a schema may be nested.
const MAX_DEPTH: usize = 64;
/// Values of a schema, inner ones counted too.
const MAX_VALUES: usize = 4000;

/// Compiled grammars that are kept for whoever asks for the same again.
const KEPT: usize = 16;

/// Common multiple of all that a schema's numbers must be multiples of, in units of their last decimal:
/// remainders are states.
const MAX_MULTIPLE: u64 = 10_000;

/// Steps that a new grammar is tried for: what is too large for any text mostly shows at once.
const TRIAL: usize = 8;

/// For compilation, which descends into schemas.
const STACK: usize = 64 << 20;

/// How llguidance says that no token may follow.
const NOTHING: &str = "NoExtensionBias";

/// Characters of a reason.
const MAX_REASON: usize = 300;

/// What a JSON text may have between its tokens: nothing, a space, or a line's end and an indentation.
/// More would let a model that is lost write white space for ever.
const WHITE_SPACE: &str = r"\x20|\n\x20{0,16}";

/// The field at fault, as far as is known here; a wire has its own name for it.
const PARAM: &str = "grammar";

/// Compiles grammars for one tokenizer.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    state: Mutex<State>,
}

/// What the first grammar brings into being.
#[derive(Default)]
struct State {
    factory: Option<ParserFactory>,
    /// By [`key`]; the one that was used last comes first.
    kept: VecDeque<(String, Follower)>,
}

impl Grammars {
    /// Grammars over the texts of `tokenizer`.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, state: Mutex::default() }
    }

    /// A guide at the beginning of a text. Takes about a millisecond, at worst some hundred, and waits
    /// for others who do the same: not for a thread that serves sockets.
    ///
    /// # Errors
    /// `Invalid`, with the parameter `grammar` and the reason, if no text can satisfy it, if it is too
    /// large, or if it says what is not supported.
    pub fn compile(&self, grammar: &Grammar) -> Result<Box<dyn Guide>> {
        check(grammar)?;
        // There is no half-changed state: a factory or an entry is there or not.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let key = key(grammar);
        let place = state.kept.iter().position(|(kept, _)| *kept == key);
        let entry = match place.and_then(|place| state.kept.remove(place)) {
            Some(entry) => entry,
            None => (key, self.compile_anew(&mut state.factory, grammar)?),
        };
        let guide = entry.1.fork();
        state.kept.push_front(entry);
        state.kept.truncate(KEPT);
        Ok(guide)
    }

    fn compile_anew(
        &self,
        factory: &mut Option<ParserFactory>,
        grammar: &Grammar,
    ) -> Result<Follower> {
        let source = source(grammar)?;
        let compile = || {
            let factory = match factory {
                Some(factory) => factory,
                None => factory.insert(new_factory(&self.tokenizer)?),
            };
            let parser = factory.create_parser(source).map_err(|e| refusal(&e))?;
            Follower::new(Matcher::new(Ok(parser)))
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("grammar".to_owned()).stack_size(STACK);
            let thread = thread.spawn_scoped(scope, compile);
            let thread = thread.map_err(|e| Error::internal("no thread for a grammar", e))?;
            thread.join().unwrap_or_else(|_| Err(panicked()))
        })
    }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

/// llguidance's view of the tokenizer. Tokens without bytes are never part of a text.
fn new_factory(tokenizer: &Tokenizer) -> Result<ParserFactory> {
    let bytes = |id| match tokenizer.token_bytes(id) {
        // No text has the byte that marks special tokens there.
        bytes if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) && bytes.len() > 1 => &[],
        _ if tokenizer.is_control(id) => &[],
        bytes => bytes,
    };
    let words: Vec<_> = (0..tokenizer.vocab_size() as u32).map(|id| bytes(id).to_vec()).collect();
    // A guide says apart from the tokens whether a text may end.
    let info = TokRxInfo::new(words.len() as u32, INVALID_TOKEN);
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
    let factory = ParserFactory::new_simple(&env);
    let mut factory = factory.map_err(|e| Error::internal("no grammars for this tokenizer", e))?;
    factory.quiet();
    *factory.limits_mut() = ParserLimits {
        // Up to 4 ms for one token's mask, most of which the next one need not take again.
        step_lexer_fuel: 50_000,
        step_max_items: 20_000,
        // At 1 to 2 kB each.
        max_lexer_states: 10_000,
        max_grammar_size: 100_000,
        verbose_errors: false,
        ..ParserLimits::default()
    };
    Ok(factory)
}

/// Refuses what is empty or too large before anything is done with it.
fn check(grammar: &Grammar) -> Result<()> {
    let bytes = match grammar {
        Grammar::Choice(choices) => {
            if choices.is_empty() || choices.len() > MAX_CHOICES {
                let given = choices.len();
                return Err(invalid(format!("{given} choices; allowed: 1 to {MAX_CHOICES}")));
            }
            if choices.iter().any(String::is_empty) {
                return Err(invalid("a choice is empty"));
            }
            choices.iter().map(String::len).sum()
        }
        Grammar::Regex(regex) => regex.len(),
        Grammar::JsonSchema(schema) => {
            check_schema(schema)?;
            schema.to_string().len()
        }
        Grammar::Json => 0,
    };
    let most = if matches!(grammar, Grammar::Regex(_)) { MAX_REGEX } else { MAX_BYTES };
    if bytes > most {
        return Err(invalid(format!("it has {bytes} bytes; allowed: up to {most}")));
    }
    Ok(())
}

fn check_schema(schema: &Value) -> Result<()> {
    let (mut values, mut multiples) = (0, Vec::new());
    let mut todo = vec![(schema, 1)];
    while let Some((value, depth)) = todo.pop() {
        values += 1;
        if depth > MAX_DEPTH {
            return Err(invalid(format!("the schema is nested deeper than {MAX_DEPTH}")));
        }
        match value {
            Value::Array(items) => todo.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => {
                // It would change what the compiler itself does.
                if fields.contains_key("x-guidance") {
                    return Err(invalid("the schema has x-guidance, which is not supported"));
                }
                multiples.extend(fields.get("multipleOf").and_then(Value::as_f64));
                todo.extend(fields.values().map(|value| (value, depth + 1)));
            }
            _ => {}
        }
    }
    if values > MAX_VALUES {
        let message = format!("the schema has {values} values; allowed: up to {MAX_VALUES}");
        return Err(invalid(message));
    }
    match common_multiple(&multiples) {
        Some(_) => Ok(()),
        None => Err(invalid("multipleOf: the numbers are too large or too fine")),
    }
}

/// The least common multiple in units of the finest, unless it is above [`MAX_MULTIPLE`].
fn common_multiple(numbers: &[f64]) -> Option<u64> {
    let whole = |scale: f64| numbers.iter().all(|n| ((n * scale).fract()).abs() < 1e-9);
    let scale = [1.0, 10.0, 100.0, 1000.0, 10_000.0].into_iter().find(|&scale| whole(scale))?;
    numbers.iter().try_fold(1, |multiple, number| {
        let number = (number.abs() * scale).round();
        let number = if number <= MAX_MULTIPLE as f64 { number as u64 } else { return None };
        let next = multiple / gcd(multiple, number) * number.max(1);
        (next <= MAX_MULTIPLE).then_some(next)
    })
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Tells grammars apart; the order of a schema's properties is the order in which they are written.
fn key(grammar: &Grammar) -> String {
    match grammar {
        Grammar::JsonSchema(schema) => schema.to_string(),
        other => format!("{other:?}"),
    }
}

/// In llguidance's words.
fn source(grammar: &Grammar) -> Result<TopLevelGrammar> {
    Ok(match grammar {
        Grammar::Choice(choices) => {
            let choices = choices.iter().map(|choice| Hir::literal(choice.as_bytes()));
            pattern(&Hir::alternation(choices.collect()))?
        }
        Grammar::Regex(regex) => pattern(&parsed(regex)?)?,
        Grammar::JsonSchema(schema) => json_text(schema.clone())?,
        Grammar::Json => json_text(json!({"type": "object"}))?,
    })
}

fn parsed(regex: &str) -> Result<Hir> {
    let parsed = regex_syntax::parse(regex).map_err(|error| {
        let why = match error {
            regex_syntax::Error::Parse(error) => error.kind().to_string(),
            regex_syntax::Error::Translate(error) => error.kind().to_string(),
            other => other.to_string(),
        };
        invalid(format!("the regular expression: {why}"))
    })?;
    let known = |look| matches!(look, Look::Start | Look::End);
    if parsed.properties().look_set().iter().all(known) {
        return Ok(parsed);
    }
    let message = "the regular expression: of assertions, only ^ and $ at the ends are supported";
    Err(invalid(message))
}

/// The expression as it is printed again has neither comments nor line ends, which llguidance's own
/// syntax would misread.
fn pattern(regex: &Hir) -> Result<TopLevelGrammar> {
    let written = regex.to_string();
    if written.len() > MAX_WRITTEN {
        return Err(invalid("the regular expression: its classes are too many and too large"));
    }
    Ok(TopLevelGrammar::from_regex(&written))
}

fn json_text(schema: Value) -> Result<TopLevelGrammar> {
    let mut schema = match schema {
        Value::Object(fields) => fields,
        Value::Bool(true) => serde_json::Map::new(),
        Value::Bool(false) => return Err(invalid("the schema allows nothing")),
        _ => return Err(invalid("a schema is an object")),
    };
    schema.insert("x-guidance".to_owned(), json!({"whitespace_pattern": WHITE_SPACE}));
    Ok(TopLevelGrammar::from_json_schema(Value::Object(schema)))
}

/// Follows one text.
struct Follower {
    matcher: Matcher,
    allowed: Allowed,
}

impl Follower {
    fn new(matcher: Matcher) -> Result<Self> {
        let mut follower = Self { matcher, allowed: Allowed::default() };
        if !follower.look()? {
            return Err(invalid("only the empty text satisfies it"));
        }
        let mut trial = follower.fork();
        for _ in 0..TRIAL {
            let words = &trial.allowed().tokens;
            let Some(word) = words.iter().position(|&word| word != 0) else { break };
            let token = 32 * word as u32 + words[word].trailing_zeros();
            if !trial.accept(token)? {
                break;
            }
        }
        Ok(follower)
    }

    /// Finds out what may follow. False if only the end may.
    fn look(&mut self) -> Result<bool> {
        if self.matcher.is_stopped() {
            return Ok(false);
        }
        let end = self.matcher.is_accepting().map_err(|e| refusal(&e))?;
        let tokens = match self.matcher.compute_mask() {
            Ok(mask) => mask.into(),
            Err(e) if end && reason(&e.to_string()) == NOTHING => Vec::new(),
            Err(e) => return Err(refusal(&e)),
        };
        self.allowed = Allowed { tokens, end };
        Ok(self.allowed.tokens.iter().any(|&word| word != 0))
    }
}

impl Guide for Follower {
    fn allowed(&self) -> &Allowed {
        &self.allowed
    }

    fn accept(&mut self, token: u32) -> Result<bool> {
        self.matcher.consume_token(token).map_err(|e| refusal(&e))?;
        self.look()
    }

    fn fork(&self) -> Box<dyn Guide> {
        let (matcher, allowed) = (self.matcher.deep_clone(), self.allowed.clone());
        Box::new(Self { matcher, allowed })
    }
}

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follower").field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::invalid(PARAM, message)
}

fn panicked() -> Error {
    invalid("it is beyond what can be compiled")
}

/// The first line; llguidance adds others for its own developers.
fn reason(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
}

/// What llguidance says, for the client.
fn refusal(error: &anyhow::Error) -> Error {
    let message = error.to_string();
    let why = reason(&message);
    if why.starts_with("panic:") {
        tracing::error!(%message, "a grammar made its compiler panic");
        return panicked();
    }
    match why {
        NOTHING => invalid("no text satisfies it"),
        why => invalid(why.chars().take(MAX_REASON).collect::<String>()),
    }
}

#[cfg(test)]
mod tests;
