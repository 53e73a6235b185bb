//! Chat templates: Hugging Face's Jinja, which makes a conversation one text.
//!
//! A bundle's is in `chat_template.jinja`, else in `tokenizer_config.json`; a task may have its own.
//! They see what transformers gives them: `messages`, `add_generation_prompt` (always true), `tools` and
//! `documents` (none), the tokenizer's `bos_token`, `eos_token` and so on; a task's also sees `controls`.
//! What users sent wears a [`Disguise`](super::disguise) meanwhile.

use super::Segment;
use super::disguise::{Disguise, Keys, noncharacters};
use super::jinja::{Raised, environment, without_generation};
use super::template::{MAX_SOURCE, reason};
use crate::error::{Error, Result};
use crate::request::{Message, ROLES};
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs;
use std::io::{self, ErrorKind as IoKind, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// The file beside the tokenizer that holds nothing but the template; it wins.
const FILE: &str = "chat_template.jinja";
/// The tokenizer's settings.
const SETTINGS: &str = "tokenizer_config.json";
const NAME: &str = "chat";
/// The most turns of a conversation.
pub const MAX_MESSAGES: usize = 1024;
/// Longest text that a template may write, in bytes.
const MAX_TEXT: usize = 16 << 20;

/// What templates see beside the conversation, by name: special tokens, as text.
pub type Names = BTreeMap<String, String>;

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

/// What a bundle's folder says about chats.
#[derive(Debug, Default)]
pub struct ChatSettings {
    /// The template and the file it is from.
    pub template: Option<(ChatTemplate, &'static str)>,
    /// `bos_token`, `eos_token` and the like.
    pub names: Names,
}

impl ChatSettings {
    /// Reads them; a folder without such files has no template and no names.
    pub fn load(folder: &Path) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        let mut fault = |place: &str, fault: String| faults.push(format!("{place}: {fault}"));
        let settings = match read(&folder.join(SETTINGS)).and_then(|text| parse(text.as_deref())) {
            Ok(settings) => settings,
            Err(e) => {
                fault(SETTINGS, e);
                Json::Null
            }
        };
        let source = match read(&folder.join(FILE)) {
            Ok(Some(source)) => Ok(Some((source, FILE))),
            Ok(None) => chosen(&settings).map(|source| Some((source?, SETTINGS))),
            Err(e) => Err(e),
        };
        let mut template = None;
        match source {
            Ok(None) => {}
            Ok(Some((source, file))) => match ChatTemplate::compile(&source) {
                Ok(compiled) => template = Some((compiled, file)),
                Err(e) if file == FILE => fault(FILE, e),
                Err(e) => fault(SETTINGS, format!("chat_template: {e}")),
            },
            Err(e) => fault(SETTINGS, e),
        }
        if faults.is_empty() { Ok(Self { template, names: names(&settings) }) } else { Err(faults) }
    }
}

/// The text of a file, if it is there.
fn read(path: &Path) -> Result<Option<String>, String> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == IoKind::NotFound => Ok(None),
        Err(e) => Err(e.to_string()),
    }
}

fn parse(text: Option<&str>) -> Result<Json, String> {
    text.map_or(Ok(Json::Null), |text| serde_json::from_str(text).map_err(|e| e.to_string()))
}

/// The template in the settings: the only one, or of several the one named `default`.
fn chosen(settings: &Json) -> Result<Option<String>, String> {
    match &settings["chat_template"] {
        Json::Null => Ok(None),
        Json::String(source) => Ok(Some(source.clone())),
        Json::Array(list) => {
            let default = list.iter().find(|one| one["name"] == "default");
            let source = default.and_then(|one| one["template"].as_str());
            let none = "chat_template: none of the list is named \"default\"";
            source.map(|source| Some(source.into())).ok_or_else(|| none.into())
        }
        _ => Err("chat_template: allowed: a template, or a list of {name, template}".into()),
    }
}

/// Every `..._token` of the settings, which is a text or `{"content": text}`.
fn names(settings: &Json) -> Names {
    let entries = settings.as_object().into_iter().flatten();
    let token = |(name, value): (&String, &Json)| {
        let text = value.as_str().or_else(|| value["content"].as_str())?;
        name.ends_with("_token").then(|| (name.clone(), text.into()))
    };
    entries.filter_map(token).collect()
}

impl ChatTemplate {
    /// Compiles a template; the error names the line.
    pub fn compile(source: &str) -> Result<Self, String> {
        if source.len() > MAX_SOURCE {
            return Err(format!("the template has {} bytes; allowed: {MAX_SOURCE}", source.len()));
        }
        if noncharacters().any(|c| source.contains(c)) {
            return Err("the template contains a Unicode noncharacter, which is reserved".into());
        }
        let mut environment = environment();
        environment
            .add_template_owned(NAME, without_generation(source))
            .map_err(|e| format!("line {}: {}", e.line().unwrap_or(1), reason(&e)))?;
        Ok(Self { environment })
    }

    /// Writes a conversation. `keys` are those of the tokenizer's control tokens.
    ///
    /// # Errors
    /// `Invalid` with the template's own words if it raises, and if it cannot take these messages;
    /// `Internal` if it could take none.
    pub fn render(
        &self,
        messages: &[Message],
        keys: &Keys,
        names: &Names,
        controls: &BTreeMap<String, String>,
    ) -> Result<Vec<Segment>> {
        let disguise = keys.disguise(messages.iter().map(|message| message.content.as_str()))?;
        let turn = |message: &Message| {
            context! { role => message.role, content => disguise.put_on(&message.content) }
        };
        let all = everything(messages.iter().map(turn).collect(), names, controls);
        let text = self.write(all).map_err(|e| refusal(&e, &disguise))?;
        Ok(disguise.take_off(&text))
    }

    /// What it makes of one small turn, if it takes that.
    ///
    /// # Errors
    /// A fault of the template itself: a function, filter, test or method that there is not.
    pub fn probe(
        &self,
        names: &Names,
        controls: &BTreeMap<String, String>,
    ) -> Result<Option<String>, String> {
        let turn = context! { role => "user", content => "x" };
        match self.write(everything(vec![turn], names, controls)) {
            Ok(text) => Ok(Some(text)),
            Err(e) if is_unknown(&e) || e.kind() == ErrorKind::UnknownMethod => {
                Err(format!("line {}: {}", e.line().unwrap_or(1), reason(&e)))
            }
            Err(_) => Ok(None),
        }
    }

    fn write(&self, all: Value) -> Result<String, minijinja::Error> {
        let mut text = Bounded(Vec::new());
        let template = self.environment.get_template(NAME)?;
        // Slices of nothing panic in minijinja, and who sends an empty text decides that.
        let write = || template.render_captured_to(all, &mut text).map(|_| ());
        let panicked = |_| minijinja::Error::new(ErrorKind::InvalidOperation, "a slice of nothing");
        catch_unwind(AssertUnwindSafe(write)).map_err(panicked)??;
        let broken =
            |e| minijinja::Error::new(ErrorKind::BadSerialization, "not text").with_source(e);
        String::from_utf8(text.0).map_err(broken)
    }
}

/// What a template sees.
fn everything(messages: Vec<Value>, names: &Names, controls: &BTreeMap<String, String>) -> Value {
    context! {
        messages, controls, add_generation_prompt => true, tools => (), documents => (),
        ..Value::from_serialize(names)
    }
}

/// What may be written.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_TEXT {
            return Err(IoKind::FileTooLarge.into());
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the template names what there is not, whatever the messages.
fn is_unknown(error: &minijinja::Error) -> bool {
    let kinds = [ErrorKind::UnknownFilter, ErrorKind::UnknownFunction, ErrorKind::UnknownTest];
    kinds.contains(&error.kind())
}

/// Why a conversation was not written.
fn refusal(error: &minijinja::Error, disguise: &Disguise) -> Error {
    if is_unknown(error) {
        return Error::internal("the chat template cannot be rendered", reason(error));
    }
    let raised = error.source().is_some_and(|source| source.is::<Raised>());
    let message = match error.detail() {
        Some(words) if raised => words.to_owned(),
        _ if error.kind() == ErrorKind::WriteFailure => {
            format!("the chat template writes more than {MAX_TEXT} bytes")
        }
        _ => {
            let line = error.line().unwrap_or(1);
            format!("the chat template cannot take these messages: line {line}: {}", reason(error))
        }
    };
    let message: String = disguise.take_off(&message).into_iter().map(|s| s.text).collect();
    Error::invalid("messages", message)
}

/// Refuses what no template is for: no messages, too many, roles that are none.
pub fn check_messages(messages: &[Message]) -> Result<()> {
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let message = format!("messages has {}; allowed: 1 to {MAX_MESSAGES}", messages.len());
        return Err(Error::invalid("messages", message));
    }
    let strange = messages.iter().enumerate().find(|(_, m)| !ROLES.contains(&m.role.as_str()));
    let Some((i, Message { role, .. })) = strange else { return Ok(()) };
    let shown: String = role.chars().take(40).collect();
    let message = format!("messages[{i}].role is {shown:?}; allowed: {}", ROLES.join(", "));
    Err(Error::invalid("messages", message))
}

#[cfg(test)]
mod tests;
