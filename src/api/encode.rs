//! The prompts of one request, from text or token ids to what the engine is given, and the grammar of its
//! texts. Refuses what cannot fit the context, as early as that is known. The templates are those of the
//! moment.
//!
//! Much text is encoded, and grammars are compiled, on threads of their own, of which there are few:
//! neither sockets nor compute wait for them.

use crate::engine::Capacity;
use crate::error::{Error, Kind, Result};
use crate::request::{Guide, Input, Request};
use crate::task::Task;
use crate::text::{Grammars, Prompt, Prompts, Tokenizer, resolve_controls};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Requests with more bytes of prompts than this are encoded off the threads that serve sockets.
const LONG_INPUT: usize = 1 << 14;

/// How many such requests are encoded at once.
const LONG_INPUTS_AT_ONCE: usize = 2;

/// Encodes the prompts of requests.
pub struct Encoder {
    shared: Arc<Shared>,
    long_inputs: Arc<Semaphore>,
    grammars: Arc<Grammars>,
    /// Held while a grammar is compiled.
    compiling: Arc<Semaphore>,
}

struct Shared {
    tokenizer: Arc<Tokenizer>,
    /// The tokens that end a text; the first stands for an empty prompt.
    ends: Vec<u32>,
    /// Bytes of the longest token: no text can be encoded in fewer than its bytes over these.
    longest_token: usize,
}

/// Whose prompts are to be encoded.
pub struct Subject {
    /// The templates of all tasks.
    pub prompts: Arc<Prompts>,
    /// The task.
    pub task: Arc<Task>,
    /// Whether it takes token ids.
    pub raw: bool,
    /// Tokens that the server takes of any prompt, where that is less than the context.
    pub most: Option<usize>,
}

impl Encoder {
    /// An encoder for a model whose texts end with one of `ends`.
    pub fn new(tokenizer: Arc<Tokenizer>, ends: Vec<u32>) -> Self {
        let ids = 0..tokenizer.vocab_size() as u32;
        let longest_token = ids.map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(0);
        let shared = Shared { tokenizer, ends, longest_token };
        let long_inputs = Arc::new(Semaphore::new(LONG_INPUTS_AT_ONCE));
        let grammars = Arc::new(Grammars::new(shared.tokenizer.clone()));
        let compiling = Arc::new(Semaphore::new(1));
        Self { shared: Arc::new(shared), long_inputs, grammars, compiling }
    }

    /// The tokenizer of all prompts.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.shared.tokenizer
    }

    /// The tokens that end a text.
    pub fn ends(&self) -> &[u32] {
        &self.shared.ends
    }

    /// The prompts of `request`, in its order, none of them empty.
    pub async fn encode(
        &self,
        subject: Subject,
        request: &Request,
        capacity: Capacity,
    ) -> Result<Vec<Prompt>> {
        let size = |input: &Input| match input {
            Input::Tokens(ids) => size_of_val(ids.as_slice()),
            words => text_size(words),
        };
        if request.inputs.iter().map(size).sum::<usize>() <= LONG_INPUT {
            return self.shared.encode(&subject, request, capacity);
        }
        if request.params.truncate.is_none() {
            self.shared.check_sizes(request, subject.most, capacity)?;
        }
        let permit = self.long_inputs.clone().acquire_owned().await;
        let (shared, request) = (self.shared.clone(), request.clone());
        let encode = move || {
            // Held to the end of the work, even if nobody waits for it any more.
            let _permit = permit;
            shared.encode(&subject, &request, capacity)
        };
        let encoded = tokio::task::spawn_blocking(encode).await;
        encoded.map_err(|e| Error::internal("a prompt was not encoded", e))?
    }

    /// What holds the texts of a request to its grammar.
    pub async fn guide(&self, request: &Request) -> Result<Option<Box<dyn Guide>>> {
        let Some((field, grammar)) = &request.grammar else { return Ok(None) };
        let (grammars, grammar) = (self.grammars.clone(), grammar.clone());
        // One at a time, for each waits for the others anyway.
        let permit = self.compiling.clone().acquire_owned().await;
        let compile = move || {
            let _permit = permit;
            grammars.compile(&grammar)
        };
        let guide = tokio::task::spawn_blocking(compile).await;
        let guide = guide.map_err(|e| Error::internal("a grammar was not compiled", e))?;
        guide.map(Some).map_err(|error| match error.kind {
            Kind::Invalid => error.with_param(*field),
            _ => error,
        })
    }
}

impl Shared {
    /// Refuses texts that are too long however they are encoded.
    fn check_sizes(
        &self,
        request: &Request,
        most: Option<usize>,
        capacity: Capacity,
    ) -> Result<()> {
        let tokens = most.unwrap_or(usize::MAX).min(capacity.context);
        let most = tokens.saturating_mul(self.longest_token);
        match request.inputs.iter().map(text_size).find(|size| *size > most) {
            Some(size) => {
                let message = format!(
                    "the prompt has {size} bytes, which are more than {tokens} tokens, the most allowed"
                );
                Err(Error::new(Kind::ContextLength, message))
            }
            None => Ok(()),
        }
    }

    fn encode(
        &self,
        subject: &Subject,
        request: &Request,
        capacity: Capacity,
    ) -> Result<Vec<Prompt>> {
        let Subject { prompts, task, .. } = subject;
        let encode = |input: &Input| {
            let mut prompt = match input {
                Input::Tokens(ids) => self.given_tokens(subject, request, ids, capacity)?,
                Input::Text(text) => prompts.encode(task, text, &request.controls)?,
                Input::Chat(messages) => prompts.chat(task, messages, &request.controls)?,
            };
            if let Some(most) = request.params.truncate
                && prompt.tokens.len() > most as usize
            {
                prompt.tokens.drain(..prompt.tokens.len() - most as usize);
                prompt.text = self.tokenizer.decode(&prompt.tokens);
            }
            if prompt.tokens.is_empty() {
                let empty = || Error::invalid("prompt", "the prompt is empty");
                prompt.tokens.push(*self.ends.first().ok_or_else(empty)?);
                prompt.text = self.tokenizer.decode(&prompt.tokens);
            }
            let length = prompt.tokens.len();
            fits(length, 0, capacity.context)?;
            match subject.most {
                Some(most) if length > most => {
                    let message =
                        format!("the prompt has {length} tokens; this server takes up to {most}");
                    Err(Error::new(Kind::ContextLength, message))
                }
                _ => Ok(prompt),
            }
        };
        // The first prompt that does not fit ends the work.
        request.inputs.iter().map(encode).collect()
    }

    fn given_tokens(
        &self,
        subject: &Subject,
        request: &Request,
        ids: &[u32],
        capacity: Capacity,
    ) -> Result<Prompt> {
        let task = &subject.task;
        if !subject.raw {
            let message = format!("{} is a task: its prompt must be text, not tokens", task.name);
            return Err(Error::invalid("prompt", message));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= capacity.vocab) {
            let message = format!("prompt has token {id}; ids are below {}", capacity.vocab);
            return Err(Error::invalid("prompt", message));
        }
        // Controls mean nothing to raw tokens; resolving them refuses whatever was given.
        resolve_controls(task, &request.controls)?;
        Ok(Prompt { text: self.tokenizer.decode(ids), tokens: ids.to_vec() })
    }
}

/// Bytes of text in `input`; what its template adds is not known yet.
fn text_size(input: &Input) -> usize {
    match input {
        Input::Text(text) => text.len(),
        Input::Tokens(_) => 0,
        Input::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
    }
}

/// Refuses a prompt of `length` tokens that leaves less than `least` of the context.
pub fn fits(length: usize, least: usize, context: usize) -> Result<()> {
    if length + least <= context {
        return Ok(());
    }
    let message = format!(
        "the prompt has {length} tokens, which leaves no room in a context of {context} tokens"
    );
    Err(Error::new(Kind::ContextLength, message).with_param("prompt"))
}
