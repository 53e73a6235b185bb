//! Server-sent events: frames, keep-alive comments, errors in the stream, and its end.

use super::reply::Writer;
use super::respond::error_body;
use super::ticket::Ticket;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

/// Streams a ticket's chunks. An error is a `data:` frame, after which the stream ends without
/// `[DONE]`; official clients ignore named events.
pub fn respond(ticket: Ticket, writer: Writer, keep_alive: Duration) -> Response {
    let frames = frames(ticket, writer);
    let sse = Sse::new(frames).keep_alive(KeepAlive::new().interval(keep_alive));
    ([("x-accel-buffering", "no"), ("cache-control", "no-cache")], sse).into_response()
}

fn frames(ticket: Ticket, writer: Writer) -> impl Stream<Item = Result<Event, Infallible>> {
    let state = (Some(ticket), writer, VecDeque::new());
    stream::unfold(state, |(mut ticket, writer, mut ready)| async move {
        if ready.is_empty()
            && let Some(live) = &mut ticket
        {
            let ended = match live.next().await {
                Some(Ok(chunk)) => {
                    let last = live.is_over().then(|| live.usage());
                    ready.push_back(writer.frame(&chunk, last));
                    false
                }
                Some(Err(error)) => {
                    ready.push_back(error_body(&error));
                    true
                }
                None => {
                    ready.extend(writer.usage_frame(live.usage()));
                    ready.push_back(b"[DONE]".to_vec());
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
