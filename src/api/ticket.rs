//! The shell's half of one request: the choices that the engine works on, merged into one sequence of
//! [`Chunk`]s of text.
//!
//! Owns decoding, stop strings, usage and the request's metrics. A ticket is not `Clone`: dropping it
//! closes its receivers, which *is* cancellation, and records the request exactly once. Every generated
//! token gives exactly one chunk; the last one of a choice carries its finish reason.

use crate::engine::Event;
use crate::error::{Error, Kind, Result};
use crate::metrics::RequestMeter;
use crate::request::{ExpertUse, Finish, Timing, TokenLogprob, Usage};
use crate::telemetry::Record;
use crate::text::{Incremental, Tokenizer};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::sync::{mpsc, watch};

/// News of one choice.
#[derive(Debug, PartialEq)]
pub struct Chunk {
    /// Which choice.
    pub index: usize,
    /// More of its text; empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// If asked for.
    pub logprobs: Option<Vec<ScoredToken>>,
    /// Only in the choice's last chunk, which always has it.
    pub end: Option<End>,
}

impl Chunk {
    fn empty(index: usize) -> Self {
        Self { index, text: String::new(), logprobs: None, end: None }
    }
}

/// A token of a text or of its prompt, with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub id: u32,
    /// Its natural log-probability; nothing precedes a prompt's first token, so that it has none.
    pub logprob: Option<f32>,
    /// The likeliest tokens with theirs, best first; as many as were asked for.
    pub top: Vec<(u32, f32)>,
    /// Where it begins in the text, in characters.
    pub offset: usize,
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Why.
    pub finish: Finish,
    /// The token that ended the text and is no part of it, if one did. Its log-probability only if those
    /// of the others were asked for.
    pub stop_token: Option<ScoredToken>,
    /// Words of the whole generated text, split at Unicode white space.
    pub words: u32,
    /// Which experts its tokens went to, if that was asked for. Nothing where a stop string ended the
    /// text: the engine was not asked again.
    pub experts: Vec<ExpertUse>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    /// By index, each with the whole text and its end.
    pub choices: Vec<Chunk>,
    /// Over all choices.
    pub usage: Usage,
    /// The slowest choice's.
    pub timing: Timing,
}

/// What is to be known of a prompt after it was handed to the engine.
pub struct Echo {
    /// The prompt's text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
}

/// One choice that the engine works on.
pub struct Source {
    /// Where its events come from.
    pub events: mpsc::Receiver<Event>,
    /// The most tokens that it may have.
    pub max_new: u32,
    /// The prompt, if it begins the text.
    pub echo: Option<Arc<Echo>>,
}

/// What all choices of a ticket share.
pub struct Terms {
    /// Its id, and what is found out about it.
    pub record: Arc<Record>,
    /// The task's name.
    pub model: String,
    /// Turns ids into bytes.
    pub tokenizer: Arc<Tokenizer>,
    /// Strings that end a text.
    pub stop: Vec<String>,
    /// Whether chunks carry log-probabilities.
    pub logprobs: bool,
    /// The field that says what a text must look like.
    pub grammar: Option<&'static str>,
    /// Name, generation and weight of each adapter, where that is to be reported.
    pub debug: Option<Vec<(String, u64, f32)>>,
    /// Tokens of all prompts.
    pub prompt_tokens: u32,
    /// What its random choices follow from, given or made.
    pub seed: u64,
    /// The whole answer must be out by then.
    pub deadline: Option<Instant>,
    /// Some token must be out by then.
    pub first_token_deadline: Option<Instant>,
    /// Held until the end.
    pub in_flight: InFlight,
}

/// One request in the count of those that are being worked on.
pub struct InFlight(watch::Sender<usize>);

impl InFlight {
    /// Counts one more, until it is dropped; `None` if there are `most`.
    pub fn new(count: &watch::Sender<usize>, most: usize) -> Option<Self> {
        let enters = count.send_if_modified(|n| {
            let enters = *n < most;
            *n += usize::from(enters);
            enters
        });
        enters.then(|| Self(count.clone()))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

/// A request that the engine has accepted.
pub struct Ticket {
    terms: Terms,
    running: Vec<Running>,
    ready: VecDeque<Chunk>,
    left: usize,
    usage: Usage,
    timing: Timing,
    /// Whether some token is out.
    answering: bool,
    meter: RequestMeter,
}

struct Running {
    /// `None` after the end.
    events: Option<mpsc::Receiver<Event>>,
    echo: Option<Arc<Echo>>,
    decoder: Incremental,
    scribe: Option<Scribe>,
    words: Words,
    max_new: u32,
    /// The chunk of the last token, which waits for the finish reason.
    last: Option<Chunk>,
}

impl Ticket {
    /// A ticket for these choices.
    pub fn new(terms: Terms, sources: Vec<Source>, meter: RequestMeter) -> Self {
        let running: Vec<Running> = sources.into_iter().map(|s| Running::new(s, &terms)).collect();
        let usage = Usage { prompt_tokens: terms.prompt_tokens, completion_tokens: 0 };
        let mut ticket = Self {
            left: running.len(),
            running,
            ready: VecDeque::new(),
            usage,
            timing: Timing::default(),
            answering: false,
            terms,
            meter,
        };
        ticket.meter.prompt_tokens = Some(usage.prompt_tokens);
        ticket.echo_texts();
        ticket
    }

    /// `x-request-id`.
    pub fn id(&self) -> &str {
        &self.terms.record.id
    }

    /// The name that the client asked for.
    pub fn model(&self) -> &str {
        &self.terms.model
    }

    /// Name, generation and weight of each adapter, where that is to be reported.
    pub fn debug(&self) -> Option<&[(String, u64, f32)]> {
        self.terms.debug.as_deref()
    }

    /// What its random choices follow from, given or made.
    pub fn seed(&self) -> u64 {
        self.terms.seed
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Whether all chunks are out.
    pub fn is_over(&self) -> bool {
        self.left == 0 && self.ready.is_empty()
    }

    /// The next chunk; `None` after the end of all choices. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<Result<Chunk>> {
        let first = self.terms.first_token_deadline.filter(|_| !self.answering);
        let limit = self.terms.deadline.into_iter().chain(first).min();
        let chunk = poll_fn(|cx| self.poll_next(cx));
        let next = match limit {
            None => chunk.await,
            Some(at) => tokio::time::timeout_at(at.into(), chunk).await.unwrap_or_else(|_| {
                Some(Err(Error::new(Kind::Deadline, "the request's deadline passed")))
            }),
        };
        if let Some(Err(error)) = &next {
            self.meter.end(error.kind.row().outcome);
            self.running.clear();
            self.ready.clear();
            self.left = 0;
        }
        next
    }

    /// All chunks, put together.
    pub async fn collect(mut self) -> Result<Reply> {
        let mut choices: Vec<Chunk> = (0..self.running.len()).map(Chunk::empty).collect();
        while let Some(chunk) = self.next().await {
            let chunk = chunk?;
            let whole = &mut choices[chunk.index];
            whole.text.push_str(&chunk.text);
            match (&mut whole.logprobs, chunk.logprobs) {
                (Some(all), Some(mut more)) => all.append(&mut more),
                (all, more) => *all = all.take().or(more),
            }
            whole.end = chunk.end;
        }
        Ok(Reply { choices, usage: self.usage, timing: self.timing })
    }

    /// Prompts that are echoed without being scored are known at once.
    fn echo_texts(&mut self) {
        if self.terms.logprobs {
            return;
        }
        for (index, choice) in self.running.iter_mut().enumerate() {
            if let Some(echo) = choice.echo.take() {
                self.ready.push_back(Chunk { text: echo.text.clone(), ..Chunk::empty(index) });
            }
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk>>> {
        if let Some(chunk) = self.ready.pop_front() {
            return Poll::Ready(Some(Ok(chunk)));
        }
        for index in 0..self.running.len() {
            while let Some(events) = &mut self.running[index].events {
                let Poll::Ready(event) = events.poll_recv(cx) else { break };
                let event = event.unwrap_or_else(|| {
                    Event::Failed(Error::internal("a reply ended early", "the engine is gone"))
                });
                match self.take(index, event) {
                    Ok(Some(chunk)) => self.ready.push_back(chunk),
                    Ok(None) => {}
                    Err(error) => return Poll::Ready(Some(Err(error))),
                }
            }
        }
        match self.ready.pop_front() {
            Some(chunk) => Poll::Ready(Some(Ok(chunk))),
            None if self.left == 0 => Poll::Ready(None),
            None => Poll::Pending,
        }
    }

    fn take(&mut self, index: usize, event: Event) -> Result<Option<Chunk>> {
        let tokenizer = &self.terms.tokenizer;
        let choice = &mut self.running[index];
        let mut chunk = Chunk::empty(index);
        match event {
            Event::Failed(error) => {
                let of_grammar = error.param.as_deref() == Some("grammar");
                return Err(match self.terms.grammar.filter(|_| of_grammar) {
                    Some(field) => error.with_param(field),
                    None => error,
                });
            }
            Event::Prompt(scores) => {
                let (Some(echo), Some(scribe)) = (choice.echo.take(), &mut choice.scribe) else {
                    return Ok(None);
                };
                chunk.text.clone_from(&echo.text);
                chunk.logprobs = Some(scribe.prompt(tokenizer, &echo.tokens, scores));
                return Ok(Some(chunk));
            }
            Event::Token { id, logprob, timing, last } => {
                self.usage.completion_tokens += 1;
                self.answering = true;
                self.meter.token();
                // People are not shown special tokens; their chunks are empty.
                let shown = !tokenizer.is_special(id);
                let bytes = if shown { tokenizer.token_bytes(id) } else { &[] };
                let piece = choice.decoder.push(bytes);
                chunk.text = piece.text;
                if let Some(scribe) = &mut choice.scribe {
                    chunk.logprobs = Some(vec![scribe.token(tokenizer, id, logprob, shown)]);
                }
                choice.words.read(&chunk.text);
                if piece.stopped {
                    let (finish, words) = (Finish::StopString, choice.words.count);
                    let end = End { finish, stop_token: None, words, experts: Vec::new() };
                    self.end(index, &mut chunk, timing, end);
                } else if last {
                    choice.last = Some(chunk);
                    return Ok(None);
                }
            }
            Event::Done { finish, stop, timing, experts } => {
                chunk = choice.last.take().unwrap_or(chunk);
                let held = choice.decoder.finish();
                choice.words.read(&held);
                chunk.text.push_str(&held);
                let mut scribe = choice.scribe.take().unwrap_or_default();
                let stop_token =
                    stop.map(|stop| scribe.token(tokenizer, stop.token, stop.logprob, false));
                let end = End { finish, stop_token, words: choice.words.count, experts };
                self.end(index, &mut chunk, timing, end);
            }
        }
        Ok(Some(chunk))
    }

    fn end(&mut self, index: usize, chunk: &mut Chunk, timing: Timing, end: End) {
        self.running[index].events = None;
        self.left -= 1;
        let finish = end.finish;
        if self.running[index].max_new > 0 {
            self.meter.text(end.words);
        }
        chunk.end = Some(end);
        if self.left == 0 {
            self.meter.end("ok");
        }
        let slowest = &mut self.timing;
        slowest.queue = slowest.queue.max(timing.queue);
        slowest.prefill = slowest.prefill.max(timing.prefill);
        slowest.decode = slowest.decode.max(timing.decode);
        let timing = *slowest;
        self.terms.record.note(|facts| {
            facts.timing = timing;
            facts.finishes.push(finish);
        });
    }
}

impl Running {
    fn new(source: Source, terms: &Terms) -> Self {
        Self {
            events: Some(source.events),
            echo: source.echo,
            decoder: Incremental::new(&terms.stop),
            scribe: terms.logprobs.then(Scribe::default),
            words: Words::default(),
            max_new: source.max_new,
            last: None,
        }
    }
}

/// Finds out where in a text its tokens begin.
#[derive(Debug, Default)]
struct Scribe {
    /// Characters that began so far.
    characters: usize,
}

impl Scribe {
    /// A whole prompt.
    fn prompt(
        &mut self,
        tokenizer: &Tokenizer,
        tokens: &[u32],
        scores: Vec<Option<TokenLogprob>>,
    ) -> Vec<ScoredToken> {
        let scored = tokens.iter().zip(scores);
        scored.map(|(&id, score)| self.token(tokenizer, id, score, true)).collect()
    }

    /// The next token; `shown` is whether it is part of the text.
    fn token(
        &mut self,
        tokenizer: &Tokenizer,
        id: u32,
        score: Option<TokenLogprob>,
        shown: bool,
    ) -> ScoredToken {
        let bytes = tokenizer.token_bytes(id);
        let continues = |b: &u8| b & 0xC0 == 0x80;
        let starts = bytes.iter().filter(|b| !continues(b)).count();
        let inside = bytes.first().is_some_and(continues) && self.characters > 0;
        let offset = self.characters - usize::from(inside);
        self.characters += if shown { starts } else { 0 };
        let logprob = score.as_ref().map(|score| score.logprob);
        ScoredToken { id, logprob, top: score.map_or_else(Vec::new, |score| score.top), offset }
    }
}

/// Counts words of a text that comes in pieces.
#[derive(Default)]
struct Words {
    count: u32,
    inside: bool,
}

impl Words {
    fn read(&mut self, text: &str) {
        for c in text.chars() {
            let inside = !c.is_whitespace();
            self.count += u32::from(inside && !self.inside);
            self.inside = inside;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Words;

    #[test]
    fn words_are_counted_across_pieces() {
        let mut words = Words::default();
        for piece in ["a", " b", "c\u{2003}", "", " d\n", "e"] {
            words.read(piece);
        }
        assert_eq!(words.count, "a bc\u{2003} d\ne".split_whitespace().count() as u32);
    }
}
