//! Texts with a grammar: they are what it says, and their neighbours do not notice.

use super::*;
use crate::error::Kind;
use crate::model::sample;
use crate::model::step::{Capacity, SampleRow, Sampled, StepError, StepInput, StepOutput};
use crate::request::{Allowed, Grammar, Guide};
use crate::text::{Grammars, fixture};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Each token is above the one before it; what ends in an even one may end. 29 is the last token.
#[derive(Clone, Debug)]
pub struct Ascent(Allowed);

impl Ascent {
    /// All tokens are `least` or more.
    pub fn boxed(least: u32) -> Box<dyn Guide> {
        Box::new(Self(Allowed { tokens: vec![Self::from(least)], end: false }))
    }

    fn from(least: u32) -> u32 {
        (1 << 30) - (1 << least)
    }
}

impl Guide for Ascent {
    fn allowed(&self) -> &Allowed {
        &self.0
    }

    fn accept(&mut self, token: u32) -> crate::error::Result<bool> {
        assert!(self.0.tokens[0] >> token & 1 == 1, "{token} was not allowed");
        self.0 = Allowed { tokens: vec![Self::from(token + 1)], end: token.is_multiple_of(2) };
        Ok(token < 29)
    }

    fn fork(&self) -> Box<dyn Guide> {
        Box::new(self.clone())
    }
}

/// Accepts two tokens and errs at the third.
#[derive(Clone, Debug)]
struct Fragile(Allowed, u32);

impl Guide for Fragile {
    fn allowed(&self) -> &Allowed {
        &self.0
    }

    fn accept(&mut self, _: u32) -> crate::error::Result<bool> {
        self.1 += 1;
        if self.1 < 3 { Ok(true) } else { Err(Error::invalid("grammar", "too complex")) }
    }

    fn fork(&self) -> Box<dyn Guide> {
        Box::new(self.clone())
    }
}

/// Random logits, from which tokens are chosen as for a real model.
struct RandomModel(Capacity);

impl RandomModel {
    fn choose(&self, row: &SampleRow) -> Result<Sampled, String> {
        let mut random = SmallRng::seed_from_u64(row.seed ^ u64::from(row.index) << 32);
        let logits: Vec<f32> = (0..self.0.vocab).map(|_| random.random_range(-9.0..9.0)).collect();
        sample::choose(&logits, row)
    }
}

impl Runner for RandomModel {
    fn capacity(&self) -> Capacity {
        self.0
    }

    fn step(&mut self, input: &StepInput) -> Result<StepOutput, StepError> {
        let sampled = input.samples.iter().map(|row| self.choose(row)).collect();
        Ok(StepOutput { sampled, ..StepOutput::default() })
    }
}

fn random_model() -> RandomModel {
    let vocab = fixture::tokenizer().vocab_size();
    RandomModel(Capacity { blocks: 400, block_size: 16, context: 400, vocab })
}

fn grammars() -> Grammars {
    let tokenizer = crate::text::Tokenizer::from_json(&fixture::json_with_controls()).unwrap();
    Grammars::new(Arc::new(tokenizer))
}

/// Jobs with `guide` under all kinds of sampling.
fn jobs(guide: &dyn Guide) -> Vec<Job> {
    let end = fixture::tokenizer().token_id("<|endoftext|>").unwrap();
    let params = |temperature| Params { temperature: Some(temperature), ..Params::default() };
    let kinds = [
        params(0.0),
        params(1.0),
        params(2.0),
        Params { top_k: Some(1), ..params(1.5) },
        Params { top_p: Some(0.1), min_p: Some(0.5), ..params(1.5) },
        Params { frequency_penalty: Some(2.0), repetition_penalty: Some(9.0), ..params(1.0) },
        Params { logit_bias: Some([(end, 100.0), (40, 100.0)].into()), ..params(1.0) },
    ];
    let mut jobs = Vec::new();
    for (kind, params) in kinds.iter().enumerate() {
        jobs.extend((0..8).map(|seed| Job {
            sampling: Arc::new(params.sampling()),
            seed: seed + 100 * kind as u64,
            stop_ids: if seed % 2 == 0 { Arc::new([end]) } else { Arc::new([]) },
            min_new: if seed < 4 { 0 } else { 3 },
            guide: Some(guide.fork()),
            ..job([1, 2, 3], 300)
        }));
    }
    jobs
}

/// What all of them say, each with how it ended.
fn texts(jobs: Vec<Job>) -> Vec<(String, Option<Finish>)> {
    let (handle, _thread) = ready(random_model, Slo::default(), Settings::default());
    let heard = handle.submit_all(jobs).unwrap().into_iter().map(listen);
    let text = |heard: Heard| (fixture::tokenizer().decode(&heard.tokens), heard.finish);
    heard.map(text).collect()
}

#[test]
fn a_choice_is_one_of_the_choices_however_it_is_sampled() {
    let choices = ["yes", "no", "perhaps", "yes, but <|gen|> \n\"é\""];
    let grammar = Grammar::Choice(choices.map(String::from).to_vec());
    let mut seen = std::collections::BTreeSet::new();
    for (text, finish) in texts(jobs(&*grammars().compile(&grammar).unwrap())) {
        assert!(choices.contains(&text.as_str()), "{text}");
        assert_ne!(finish, Some(Finish::Length));
        seen.insert(text);
    }
    assert_eq!(seen.len(), choices.len());
}

#[test]
fn a_regular_expression_is_matched_however_it_is_sampled() {
    let pattern = "[A-Z][a-z]{2,8}( [a-z]+){1,3}[.!?]";
    let whole = fancy_regex::Regex::new(&format!("^(?:{pattern})$")).unwrap();
    let guide = grammars().compile(&Grammar::Regex(pattern.into())).unwrap();
    let mut ended = 0;
    for (text, finish) in texts(jobs(&*guide)) {
        match finish {
            // A word may be as long as it likes.
            Some(Finish::Length) => assert!(text.len() > 100, "{text}"),
            _ => assert!(whole.is_match(&text).unwrap(), "{text}"),
        }
        ended += usize::from(finish != Some(Finish::Length));
    }
    assert!(ended > 30, "{ended} of them came to an end");
}

#[test]
fn json_is_valid_under_its_schema_however_it_is_sampled() {
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 9},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            "known": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let guide = grammars().compile(&Grammar::JsonSchema(schema)).unwrap();
    for (text, finish) in texts(jobs(&*guide)) {
        assert_eq!(finish, Some(Finish::Grammar), "{text}");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let name = value["name"].as_str().unwrap().chars().count();
        assert!((1..=9).contains(&name), "{text}");
        assert!(value["age"].as_u64().unwrap() <= 150, "{text}");
        for (key, value) in value.as_object().unwrap() {
            match key.as_str() {
                "name" | "age" => {}
                "tags" => {
                    let tags = value.as_array().unwrap();
                    assert!(tags.len() <= 3 && tags.iter().all(|tag| tag == "a" || tag == "b"));
                }
                "known" => assert!(value.is_boolean()),
                _ => panic!("{text} has {key}"),
            }
        }
    }
}

#[test]
fn an_end_that_is_all_that_may_follow_takes_no_step() {
    let (runner, gate) = FakeRunner::small().gated();
    let (handle, thread) = ready(move || runner, Slo::default(), Settings::default());
    let only = Allowed { tokens: vec![0b1000], end: false };
    let events = handle.submit(Job { guide: Some(Box::new(Once(only))), ..job([1], 9) }).unwrap();
    assert_eq!(gate.arrival().unwrap().samples[0].allowed, Some(vec![0b1000]));
    drop(gate);
    let heard = listen(events);
    assert_eq!((heard.tokens.as_slice(), heard.finish), (&[3][..], Some(Finish::Grammar)));
    handle.drain();
    thread.join().unwrap();
}

/// One token, then the end.
#[derive(Clone, Debug)]
struct Once(Allowed);

impl Guide for Once {
    fn allowed(&self) -> &Allowed {
        &self.0
    }

    fn accept(&mut self, _: u32) -> crate::error::Result<bool> {
        Ok(false)
    }

    fn fork(&self) -> Box<dyn Guide> {
        Box::new(self.clone())
    }
}

#[test]
fn a_guide_that_errs_ends_its_own_text_only() {
    let fake = FakeRunner::small();
    let (handle, _thread) = ready(FakeRunner::small, Slo::default(), Settings::default());
    let all = Allowed { tokens: vec![u32::MAX; 8], end: false };
    let fragile = Job { guide: Some(Box::new(Fragile(all, 0))), ..job([1, 2], 9) };
    let mut heard = handle.submit_all(vec![fragile, job([3, 4], 9)]).unwrap().into_iter();
    let (fragile, neighbour) = (listen(heard.next().unwrap()), listen(heard.next().unwrap()));
    let error = fragile.failed.unwrap();
    assert_eq!((error.kind, error.message.as_str()), (Kind::Invalid, "too complex"));
    assert_eq!(fragile.tokens, fake.alone(&[1, 2], 2, 0, &[]));
    assert_eq!(neighbour.tokens, fake.alone(&[3, 4], 9, 0, &[]));
}

#[test]
fn neighbours_of_guided_rows_get_what_they_get_alone() {
    let guide = grammars().compile(&Grammar::Json).unwrap();
    let free = |jobs: Vec<Job>| jobs.into_iter().map(|job| Job { guide: None, max_new: 40, ..job });
    let free: Vec<Job> = free(jobs(&*guide)).take(16).collect();
    let alone = texts(free.clone());
    let mut mixed = Vec::new();
    for (free, guided) in free.into_iter().zip(jobs(&*guide)) {
        mixed.extend([free, Job { max_new: 40, ..guided }]);
    }
    let beside: Vec<_> = texts(mixed).into_iter().step_by(2).collect();
    assert_eq!(alone, beside);
}
