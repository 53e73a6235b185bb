//! A socket whose other side must go on reading, and may have to begin in time: hyper bounds neither how
//! long an answer may take to leave nor when HTTP/2 must begin. What comes in may be told to the connection's
//! [`Pulse`].

use super::pulse::Pulse;
use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Fails a write that makes no progress for `limit`.
pub struct Impatient<T> {
    inner: T,
    limit: Duration,
    pulse: Option<Pulse>,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Bytes that are still to be read before it ends.
    greeting: Option<(usize, Pin<Box<Sleep>>)>,
}

impl<T> Impatient<T> {
    /// Watches the writes to `inner`.
    pub fn new(inner: T, limit: Duration) -> Self {
        Self { inner, limit, pulse: None, stalled: None, greeting: None }
    }

    /// The same, which tells `pulse` of what is read.
    pub fn with_pulse(self, pulse: Pulse) -> Self {
        Self { pulse: Some(pulse), ..self }
    }

    /// The same, whose first `bytes` must come within `limit`.
    pub fn greeted_within(self, bytes: usize, limit: Duration) -> Self {
        Self { greeting: Some((bytes, Box::pin(sleep(limit)))), ..self }
    }

    /// What a write comes to that has come to `written` so far.
    fn watch<R>(&mut self, cx: &mut Context<'_>, written: Poll<Result<R>>) -> Poll<Result<R>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let limit = self.limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        stalled.as_mut().poll(cx).map(|()| Err(Error::from(ErrorKind::TimedOut)))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Impatient<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        if let Some((_, late)) = &mut self.greeting
            && late.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(Error::from(ErrorKind::TimedOut)));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buffer);
        let come = buffer.filled().len() - before;
        if let Some(pulse) = self.pulse.as_ref().filter(|_| come > 0) {
            pulse.bytes();
        }
        self.greeting = self.greeting.take().and_then(|(left, late)| {
            let left = left.checked_sub(come).filter(|left| *left > 0)?;
            Some((left, late))
        });
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Impatient<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    #[tokio::test]
    async fn only_a_write_that_stands_still_fails() {
        let (near, mut far) = duplex(8);
        let mut socket = Impatient::new(near, Duration::from_millis(20));
        socket.write_all(b"12345678").await.unwrap();
        let error = socket.write_all(b"9").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let mut read = [0; 8];
        far.read_exact(&mut read).await.unwrap();
        socket.write_all(b"9").await.unwrap();
    }

    #[tokio::test]
    async fn a_greeting_must_come_whole_and_in_time() {
        let limit = Duration::from_millis(20);
        for (said, in_time) in [(&b"123"[..], false), (b"1234", true), (b"12345", true)] {
            let (near, mut far) = duplex(8);
            let mut socket = Impatient::new(near, limit).greeted_within(4, limit);
            far.write_all(said).await.unwrap();
            let mut read = [0; 8];
            assert_eq!(socket.read(&mut read).await.unwrap(), said.len());
            let silent = tokio::time::timeout(limit * 3, socket.read(&mut read)).await;
            assert_eq!(silent.is_err(), in_time, "{said:?}");
        }
    }
}
