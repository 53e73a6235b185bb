//! An answer over HTTP/2 that its client must go on taking. The socket shows no such client: it reads and
//! answers pings, but gives the stream no room, and then hyper asks the answer for nothing more, so that
//! what makes it would wait for ever.

use axum::body::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use std::io::{Error, ErrorKind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::task::AbortHandle;

/// A body that is dropped, with all that it holds, once nobody has asked for its next frame for a while.
pub struct Awaited<B> {
    state: Arc<Mutex<State<B>>>,
    /// Watches it.
    watch: AbortHandle,
}

struct State<B> {
    /// `None` once it was given up.
    body: Option<B>,
    /// Whether it is the client that is waited for, not the body.
    ready: bool,
    /// How often it was asked.
    asked: u64,
}

impl<B: Send + 'static> Awaited<B> {
    /// Gives `body` up when its client has asked for nothing for `limit`, within another `limit`.
    pub fn new(body: B, limit: Duration) -> Self {
        let state = Arc::new(Mutex::new(State { body: Some(body), ready: true, asked: 0 }));
        let watch = tokio::spawn(watch(Arc::downgrade(&state), limit)).abort_handle();
        Self { state, watch }
    }
}

async fn watch<B>(state: Weak<Mutex<State<B>>>, limit: Duration) {
    let mut seen = 0;
    loop {
        tokio::time::sleep(limit).await;
        let Some(state) = state.upgrade() else { return };
        let mut state = lock(&state);
        if state.ready && state.asked == seen {
            let body = state.body.take();
            drop(state);
            drop(body);
            return;
        }
        seen = state.asked;
    }
}

fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B> Drop for Awaited<B> {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl<B: Body<Data = Bytes, Error = axum::Error> + Unpin> Body for Awaited<B> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut state = lock(&self.state);
        state.asked += 1;
        let Some(body) = &mut state.body else {
            return Poll::Ready(Some(Err(axum::Error::new(Error::from(ErrorKind::TimedOut)))));
        };
        let frame = Pin::new(body).poll_frame(cx);
        state.ready = frame.is_ready();
        frame
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.state).body.as_ref().is_some_and(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.state).body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt, StreamBody};
    use tokio::sync::mpsc::{Receiver, channel};

    const LIMIT: Duration = Duration::from_millis(10);

    /// A body of what is sent.
    fn body(
        frames: Receiver<&'static str>,
    ) -> Awaited<impl Body<Data = Bytes, Error = axum::Error>> {
        let frames = futures::stream::unfold(frames, |mut frames| async move {
            let data = Bytes::from_static(frames.recv().await?.as_bytes());
            Some((Ok(Frame::data(data)), frames))
        });
        Awaited::new(StreamBody::new(Box::pin(frames)), LIMIT)
    }

    #[tokio::test]
    async fn only_a_client_that_asks_for_nothing_is_given_up() {
        let (send, frames) = channel(4);
        let mut body = body(frames);
        let next = tokio::time::timeout(LIMIT * 5, body.frame()).await;
        assert!(next.is_err(), "it is the body that takes its time");
        send.send("more").await.unwrap();
        assert!(body.frame().await.unwrap().is_ok());
        // What makes the body hears of it.
        send.closed().await;
        assert!(body.frame().await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_body_that_was_never_asked_is_given_up_too() {
        let (send, frames) = channel(4);
        let _body = body(frames);
        send.closed().await;
    }
}
