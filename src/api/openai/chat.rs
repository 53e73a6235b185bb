//! `POST /v1/chat/completions`: messages in, an assistant's message out. How messages become a prompt is
//! the template's business, in [`crate::text`].

use super::logprobs::ChatLogprobs;
use super::{Delivery, FINGERPRINT};
use crate::api::http::App;
use crate::api::http::answer::{Frames, Progress, Tokens, Writer, unix_time};
use crate::api::http::call::{Call, Head};
use crate::api::http::debug::{Debug, Reported};
use crate::api::http::fields::{Fields, missing};
use crate::api::http::params::{Asked, request, sampling};
use crate::api::http::respond::to_json;
use crate::api::ticket::{Chunk, Reply, Ticket};
use crate::error::{Error, Result};
use crate::request::{Input, Message, Params, Request, Usage};
use crate::text::Tokenizer;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::sync::Arc;
use utoipa::ToSchema;

/// What a client's own type of a message has beside these two, allowed where it says nothing: clients send
/// the message that they were answered with back.
pub const EMPTY_IN_MESSAGE: [&str; 9] = [
    "name",
    "refusal",
    "reasoning",
    "reasoning_content",
    "annotations",
    "audio",
    "tool_calls",
    "tool_call_id",
    "function_call",
];
/// The same of the body.
pub const EMPTY_IN_BODY: [&str; 2] = ["tools", "tool_choice"];

/// The handler.
pub async fn chat(State(app): State<Arc<App>>, head: Head, body: Body) -> Result<Response> {
    let (request, delivery) = app.read(&head, body, read).await?;
    let ticket = app.service.submit(request).await?;
    let writer = ChatWriter::new(&ticket, app.service.tokenizer().clone(), delivery);
    app.answer(ticket, writer, delivery.stream).await
}

/// Reads a body.
fn read(mut body: Fields, call: &Call) -> Result<(Request, Delivery)> {
    let model = body.take("model")?.ok_or_else(|| missing("model"))?;
    let messages = messages(&mut body)?;
    empty(&mut body, &EMPTY_IN_BODY)?;
    let delivery = Delivery::read(&mut body)?;
    let logprobs = logprobs(&mut body)?;
    // A task's `echo` is for texts; a conversation is not part of its answer.
    let params = Params { logprobs, echo: Some(false), ..sampling(&mut body)? };
    let inputs = vec![Input::Chat(messages)];
    let prompt_field = "messages";
    let asked = Asked { model, inputs, prompt_field, params, usual_max_tokens: None };
    Ok((request(body, call, asked)?, delivery))
}

/// `messages`: an array of `{"role", "content"}`, where content is a text or a list of texts.
pub fn messages(body: &mut Fields) -> Result<Vec<Message>> {
    let given: Vec<Map<String, Value>> =
        body.take("messages")?.ok_or_else(|| missing("messages"))?;
    given.into_iter().map(message).collect()
}

fn message(given: Map<String, Value>) -> Result<Message> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "content must be a string or an array of {type: text, text}")]
    enum Content {
        Text(String),
        Parts(Vec<Map<String, Value>>),
    }
    let mut given = Fields::of(given, "messages.");
    let role = given.take("role")?.ok_or_else(|| given.missing("role"))?;
    let content = match given.take("content")?.ok_or_else(|| given.missing("content"))? {
        Content::Text(text) => text,
        Content::Parts(parts) => parts.into_iter().map(part).collect::<Result<_>>()?,
    };
    empty(&mut given, &EMPTY_IN_MESSAGE)?;
    given.finish()?;
    Ok(Message { role, content })
}

/// Takes fields that hold `null` or an empty list.
fn empty(given: &mut Fields, names: &[&str]) -> Result<()> {
    for name in names {
        match given.take_value(name) {
            Some(Value::Array(list)) if list.is_empty() => {}
            Some(value) => given.put(name, value)?,
            None => {}
        }
    }
    Ok(())
}

/// A part of a content: only texts are.
fn part(given: Map<String, Value>) -> Result<String> {
    let mut given = Fields::of(given, "messages.content.");
    let kind: String = given.take("type")?.ok_or_else(|| given.missing("type"))?;
    if kind != "text" {
        let message = "messages.content.type must be text: nothing else is understood here";
        return Err(Error::invalid("messages.content.type", message));
    }
    let text = given.take("text")?.ok_or_else(|| given.missing("text"))?;
    given.finish()?;
    Ok(text)
}

/// `logprobs` is a switch here, and `top_logprobs` how many alternatives.
fn logprobs(body: &mut Fields) -> Result<Option<u32>> {
    let wanted = body.take("logprobs")?.unwrap_or(false);
    match (wanted, body.take("top_logprobs")?) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None) => Ok(None),
        (false, Some(_)) => {
            let message = "top_logprobs is allowed only with logprobs: true";
            Err(Error::invalid("top_logprobs", message))
        }
    }
}

/// Writes chat completions.
struct ChatWriter {
    id: String,
    /// The name that the client asked for.
    model: String,
    created: u64,
    delivery: Delivery,
    reported: Reported,
    tokenizer: Arc<Tokenizer>,
    /// The choices that have said who speaks.
    begun: Vec<bool>,
}

#[derive(Serialize, ToSchema)]
pub struct Completion<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: &'a [C],
    /// Absent, `null`, or a value.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Tokens>)]
    usage: Option<Option<Tokens>>,
}

/// A choice of a whole answer.
#[derive(Serialize, ToSchema)]
#[schema(as = ChatChoice)]
pub struct Whole<'a> {
    index: usize,
    message: Assistant<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    debug: Option<Debug<'a>>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = ChatMessage)]
struct Assistant<'a> {
    role: &'static str,
    content: &'a str,
    /// Nothing here refuses in words.
    refusal: Option<&'a str>,
}

/// A choice in a frame.
#[derive(Serialize, ToSchema)]
#[schema(as = ChatChunkChoice)]
pub struct Piece<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    debug: Option<Debug<'a>>,
}

#[derive(Default, Serialize, ToSchema)]
#[schema(as = ChatDelta)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl ChatWriter {
    fn new(ticket: &Ticket, tokenizer: Arc<Tokenizer>, delivery: Delivery) -> Self {
        Self {
            id: format!("chatcmpl-{}", ticket.id()),
            model: ticket.model().to_owned(),
            created: unix_time(),
            delivery,
            reported: Reported::of(ticket),
            tokenizer,
            begun: Vec::new(),
        }
    }

    fn body<C: Serialize>(
        &self,
        object: &'static str,
        choices: &[C],
        usage: Option<Option<Tokens>>,
    ) -> Vec<u8> {
        let (id, model, created) = (&self.id, &self.model, self.created);
        let system_fingerprint = FINGERPRINT;
        to_json(&Completion { id, object, created, model, system_fingerprint, choices, usage })
    }

    fn frame(&self, choices: &[Piece], usage: Option<Option<Tokens>>) -> Vec<u8> {
        self.body("chat.completion.chunk", choices, usage)
    }

    fn logprobs(&self, chunk: &Chunk) -> Option<ChatLogprobs> {
        chunk.logprobs.as_ref().map(|tokens| ChatLogprobs::of(&self.tokenizer, tokens))
    }

    fn message<'a>(&'a self, chunk: &'a Chunk) -> Whole<'a> {
        let end = chunk.end.as_ref();
        Whole {
            index: chunk.index,
            message: Assistant { role: "assistant", content: &chunk.text, refusal: None },
            logprobs: self.logprobs(chunk),
            finish_reason: end.map(|end| end.finish.as_str()),
            debug: self.reported.debug(end),
        }
    }

    /// Whether this is the first that is heard of a choice.
    fn begins(&mut self, index: usize) -> bool {
        self.begun.resize(self.begun.len().max(index + 1), false);
        !std::mem::replace(&mut self.begun[index], true)
    }
}

impl Writer for ChatWriter {
    fn whole(&self, reply: &Reply) -> Vec<u8> {
        let choices: Vec<Whole> = reply.choices.iter().map(|chunk| self.message(chunk)).collect();
        self.body("chat.completion", &choices, Some(Some(reply.usage.into())))
    }

    fn chunk(&mut self, chunk: &Chunk, sofar: &Progress, frames: &mut Frames) {
        let (index, usage) = (chunk.index, self.delivery.usage_of(sofar));
        let piece =
            |delta| Piece { index, delta, logprobs: None, finish_reason: None, debug: None };
        if self.begins(index) {
            let delta = Delta { role: Some("assistant"), content: Some("") };
            frames.push_back(self.frame(&[piece(delta)], usage));
        }
        let delta = Delta { role: None, content: Some(&chunk.text) };
        let content = Piece { logprobs: self.logprobs(chunk), ..piece(delta) };
        frames.push_back(self.frame(&[content], usage));
        if let Some(end) = &chunk.end {
            let finish_reason = Some(end.finish.as_str());
            let debug = self.reported.debug(Some(end));
            let last = Piece { finish_reason, debug, ..piece(Delta::default()) };
            frames.push_back(self.frame(&[last], usage));
        }
    }

    fn end(&mut self, usage: Usage, frames: &mut Frames) {
        if self.delivery.include_usage {
            frames.push_back(self.frame(&[], Some(Some(usage.into()))));
        }
        frames.push_back(b"[DONE]".to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(fields: &str) -> Result<Request> {
        let body = format!(r#"{{"model": "m", {fields}}}"#);
        read(Fields::parse(body.as_bytes())?, &Call::test()).map(|(request, _)| request)
    }

    fn user(content: &str) -> Message {
        Message { role: "user".into(), content: content.into() }
    }

    #[test]
    fn content_is_a_text_or_a_list_of_texts() {
        for (content, want) in [
            (r#""a b""#, "a b"),
            (r#"[{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]"#, "a b"),
            ("[]", ""),
        ] {
            let fields = format!(r#""messages": [{{"role": "user", "content": {content}}}]"#);
            assert_eq!(asked(&fields).unwrap().inputs, [Input::Chat(vec![user(want)])]);
        }
    }

    #[test]
    fn a_message_that_was_answered_may_be_sent_back() {
        let assistant = Assistant { role: "assistant", content: "hi", refusal: None };
        let mut sent = serde_json::to_value(&assistant).unwrap();
        for name in EMPTY_IN_MESSAGE {
            sent[name] = Value::Null;
        }
        sent["tool_calls"] = serde_json::json!([]);
        sent["annotations"] = serde_json::json!([]);
        let nothing = r#""tools": [], "tool_choice": null"#;
        let asked = asked(&format!(r#""messages": [{sent}], {nothing}"#)).unwrap();
        let message = Message { role: "assistant".into(), content: "hi".into() };
        assert_eq!(asked.inputs, [Input::Chat(vec![message])]);
    }

    #[test]
    fn what_is_refused_is_named() {
        let hello = r#"{"role": "user", "content": "hello"}"#;
        for (fields, param) in [
            (String::new(), "messages"),
            (r#""messages": [3]"#.into(), "messages"),
            (r#""messages": [["user", "content"]]"#.into(), "messages"),
            (
                r#""messages": [{"role": "user", "content": [["text", "a"]]}]"#.into(),
                "messages.content",
            ),
            (r#""messages": [{"role": "user"}]"#.into(), "messages.content"),
            (r#""messages": [{"role": "user", "content": null}]"#.into(), "messages.content"),
            (r#""messages": [{"role": "user", "content": 3}]"#.into(), "messages.content"),
            (
                r#""messages": [{"role": "user", "content": "x", "name": "n"}]"#.into(),
                "messages.name",
            ),
            (
                r#""messages": [{"role": "user", "content": [{"type": "image_url"}]}]"#.into(),
                "messages.content.type",
            ),
            (format!(r#""messages": [{hello}], "top_logprobs": 2"#), "top_logprobs"),
            (format!(r#""messages": [{hello}], "logprobs": 2"#), "logprobs"),
            (format!(r#""messages": [{hello}], "tools": [{{}}]"#), "tools"),
            (format!(r#""messages": [{hello}], "echo": true"#), "echo"),
        ] {
            let fields = if fields.is_empty() { r#""user": "u""#.to_owned() } else { fields };
            let error = asked(&fields).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{fields}: {error}");
        }
        let fields = format!(r#""messages": [{hello}], "logprobs": true, "top_logprobs": 2"#);
        assert_eq!(asked(&fields).unwrap().params.logprobs, Some(2));
    }
}
