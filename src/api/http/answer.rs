//! Answers over HTTP, whole or as server-sent events: frames, keep-alive comments, errors in the stream,
//! and its end. What is in them is each wire's own: a [`Writer`].

use super::respond::{error_body, json, log};
use super::{App, Limits};
use crate::api::ticket::{Chunk, Reply, Ticket};
use crate::error::{Error, Result};
use crate::request::{Timing, Usage};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream};
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use utoipa::ToSchema;

/// The payloads of events that are to be sent, in order.
pub type Frames = VecDeque<Vec<u8>>;

/// How a wire writes the answer to one request.
pub trait Writer: Send + 'static {
    /// The body of a whole answer.
    fn whole(&self, reply: &Reply) -> Vec<u8>;

    /// Headers of a whole answer, beside those that all have.
    fn headers(&self, _: &Reply) -> HeaderMap {
        HeaderMap::new()
    }

    /// Adds the frames of one chunk.
    fn chunk(&mut self, chunk: &Chunk, sofar: &Progress, frames: &mut Frames);

    /// Adds the frames that follow the last chunk.
    fn end(&mut self, _: Usage, frames: &mut Frames) {
        frames.push_back(b"[DONE]".to_vec());
    }

    /// The frame of an error, after which the stream ends.
    fn error(&self, error: &Error) -> Vec<u8> {
        error_body(error)
    }
}

/// How far a stream is, with the chunk that is being written.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Tokens so far.
    pub usage: Usage,
    /// Whether no chunk follows.
    pub over: bool,
}

impl App {
    /// Answers as `writer` has it, when all is done or, if it is to `stream`, as it comes.
    pub async fn answer(
        &self,
        ticket: Ticket,
        writer: impl Writer,
        stream: bool,
    ) -> Result<Response> {
        if stream {
            return Ok(respond(ticket, writer, &self.limits));
        }
        let reply = ticket.collect().await?;
        let mut response = json(StatusCode::OK, writer.whole(&reply));
        response.headers_mut().insert("server-timing", server_timing(&reply.timing));
        response.headers_mut().extend(writer.headers(&reply));
        Ok(response)
    }
}

/// Streams a ticket's chunks. An error is a `data:` frame, after which the stream ends without
/// `[DONE]`; official clients ignore named events.
fn respond(ticket: Ticket, writer: impl Writer, limits: &Limits) -> Response {
    let frames = frames(ticket, writer);
    let sse = Sse::new(frames).keep_alive(KeepAlive::new().interval(limits.keep_alive));
    ([("x-accel-buffering", "no"), ("cache-control", "no-cache")], sse).into_response()
}

fn frames(ticket: Ticket, writer: impl Writer) -> impl Stream<Item = Result<Event, Infallible>> {
    let state = (Some(ticket), writer, Frames::new());
    stream::unfold(state, |(mut ticket, mut writer, mut ready)| async move {
        while ready.is_empty()
            && let Some(live) = &mut ticket
        {
            let ended = match live.next().await {
                Some(Ok(chunk)) => {
                    let sofar = Progress { usage: live.usage(), over: live.is_over() };
                    writer.chunk(&chunk, &sofar, &mut ready);
                    false
                }
                Some(Err(error)) => {
                    log(&error);
                    ready.push_back(writer.error(&error));
                    true
                }
                None => {
                    writer.end(live.usage(), &mut ready);
                    true
                }
            };
            if ended {
                // Recorded now, not when the client has read the last frame.
                ticket = None;
            }
        }
        let frame = ready.pop_front()?;
        let event = Event::default().data(String::from_utf8_lossy(&frame));
        Some((Ok(event), (ticket, writer, ready)))
    })
}

/// Where the time of a request went, as browsers and proxies read it.
pub fn server_timing(timing: &Timing) -> HeaderValue {
    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    let (queue, prefill, decode) = (ms(timing.queue), ms(timing.prefill), ms(timing.decode));
    let text = format!("queue;dur={queue:.3}, prefill;dur={prefill:.3}, decode;dur={decode:.3}");
    HeaderValue::from_str(&text).expect("numbers and ascii letters are a header value")
}

/// `usage`, as OpenAI has it.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[schema(as = Usage)]
pub struct Tokens {
    /// Tokens of the prompts.
    pub prompt_tokens: u32,
    /// Tokens of all texts.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
}

impl From<Usage> for Tokens {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
        }
    }
}

/// Seconds since 1970, for `created` fields.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
