//! `POST /tokenize` and `POST /detokenize`, as vLLM has them: what a prompt is in tokens, under the
//! template of its task, and what tokens are as text.

use super::chat::messages;
use crate::api::http::App;
use crate::api::http::call::{Call, Head};
use crate::api::http::fields::{Fields, missing};
use crate::api::http::params::Asked;
use crate::api::http::respond::reply;
use crate::error::{Error, Result};
use crate::request::{Input, Params, Request};
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use serde_json::json;
use std::sync::Arc;

/// `{"model", "prompt" or "messages", "return_token_strs"}`; the bundle if no model is named.
pub async fn tokenize(State(app): State<Arc<App>>, head: Head, body: Body) -> Result<Response> {
    let bundle = app.bundle.clone();
    let read = |fields: Fields, call: &Call| text(fields, call, &bundle);
    let (request, names) = app.read(&head, body, read).await?;
    let prompts = app.service.prompts(&request).await?;
    let tokens: Vec<u32> = prompts.into_iter().flat_map(|prompt| prompt.tokens).collect();
    let tokenizer = app.service.tokenizer();
    Ok(reply(&json!({
        "count": tokens.len(),
        "max_model_len": app.service.engine().ready()?.context,
        "token_strs": names.then(|| tokens.iter().map(|&t| tokenizer.decode(&[t])).collect::<Vec<_>>()),
        "tokens": tokens,
    })))
}

/// Reads a body of `/tokenize`, and whether the tokens' texts are wanted.
fn text(mut body: Fields, call: &Call, bundle: &str) -> Result<(Request, bool)> {
    let model = body.take("model")?.unwrap_or_else(|| bundle.to_owned());
    let names = body.take("return_token_strs")?.unwrap_or(false);
    // There is no token that a tokenizer of this kind would add by itself.
    body.take::<bool>("add_special_tokens")?;
    let (input, prompt_field) = match body.take("prompt")? {
        Some(prompt) => (Input::Text(prompt), "prompt"),
        None => (Input::Chat(messages(&mut body)?), "messages"),
    };
    let (inputs, params) = (vec![input], Params::default());
    let asked = Asked { model, inputs, prompt_field, params, usual_max_tokens: None };
    // Of what bodies share, only controls are part of a prompt.
    let request = asked.request(&mut body, call)?;
    body.finish()?;
    Ok((request, names))
}

/// `{"tokens"}`; a `model` is of no consequence, for all have one tokenizer.
pub async fn detokenize(State(app): State<Arc<App>>, head: Head, body: Body) -> Result<Response> {
    let vocabulary = app.service.tokenizer().vocab_size();
    let read = |mut fields: Fields, _: &Call| {
        let model: Option<String> = fields.take("model")?;
        let tokens: Vec<u32> = fields.take("tokens")?.ok_or_else(|| missing("tokens"))?;
        fields.finish()?;
        if let Some(model) = model {
            app.service.catalog().find(&model)?;
        }
        match tokens.iter().find(|&&id| id as usize >= vocabulary) {
            Some(id) => {
                let message = format!("tokens has {id}; ids are below {vocabulary}");
                Err(Error::invalid("tokens", message))
            }
            None => Ok(tokens),
        }
    };
    let tokens = app.read(&head, body, read).await?;
    Ok(reply(&json!({"prompt": app.service.tokenizer().decode(&tokens)})))
}
