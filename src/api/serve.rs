//! Listening and leaving. The socket is bound before the model is loaded, so that probes are answered
//! from the first moment; on a signal readiness goes false at once, new work is refused with 503, what
//! runs is finished, and only then do the connections close.
//!
//! Connections are bounded: those beyond the limit get a 503 and are closed, so that nobody hangs in
//! the backlog of a server that has no file descriptors left.

use super::http::{App, Limits};
use super::socket::Impatient;
use crate::engine::State;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// How long a failed server goes on to say so before it ends.
const FAILED_GRACE: Duration = Duration::from_secs(1);

/// Connections beyond the limit that are told so; any more are closed at once.
const REFUSED_AT_ONCE: usize = 64;

/// How long telling may take.
const REFUSING: Duration = Duration::from_secs(2);

/// Pause after an error of `accept` (usually: no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How serving ended; each has its exit code in `main`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A signal came, and everything that ran was finished.
    Drained,
    /// A signal came, and time ran out before everything was finished.
    TimedOut,
    /// A second signal came.
    Interrupted,
    /// The engine failed.
    Failed,
}

/// SIGTERM and SIGINT, as they come.
pub fn signals() -> std::io::Result<mpsc::Receiver<()>> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(async move {
        loop {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            if sender.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// Serves `app` until the first of `stop` or until the engine fails, then drains for at most
/// `shutdown_timeout`.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    shutdown_timeout: Duration,
    mut stop: mpsc::Receiver<()>,
) -> Ended {
    let closing = CancellationToken::new();
    // Every connection holds a sender: the channel ends with the last of them.
    let (open, mut closed) = mpsc::channel::<()>(1);
    let accepting = tokio::spawn(accept(listener, app.clone(), closing.clone(), open));
    let mut state = app.service.engine().watch();
    let ended = tokio::select! {
        _ = stop.recv() => Ended::Drained,
        _ = state.wait_for(|state| *state == State::Failed) => Ended::Failed,
    };
    tracing::info!(?ended, "draining");
    app.service.engine().drain();
    let drain = async {
        match ended {
            Ended::Failed => tokio::time::sleep(FAILED_GRACE).await,
            _ => app.service.idle().await,
        }
        closing.cancel();
        // Every answer is out; half a request is not worth waiting for.
        let _ = tokio::time::timeout(app.limits.closing_grace, closed.recv()).await;
    };
    let cut = tokio::select! {
        () = drain => None,
        () = tokio::time::sleep(shutdown_timeout) => Some(Ended::TimedOut),
        Some(()) = stop.recv() => Some(Ended::Interrupted),
    };
    accepting.abort();
    // A failure stays one, however the rest ended.
    cut.filter(|_| ended == Ended::Drained).unwrap_or(ended)
}

async fn accept(
    listener: TcpListener,
    app: Arc<App>,
    closing: CancellationToken,
    open: mpsc::Sender<()>,
) {
    let limits = app.limits;
    let service = TowerToHyperService::new(app.clone().router());
    let full = TowerToHyperService::new(app.full_router());
    let places = Arc::new(Semaphore::new(limits.max_connections));
    let refusals = Arc::new(Semaphore::new(REFUSED_AT_ONCE));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = closing.cancelled() => return,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "no connection was accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (open, closing) = (open.clone(), closing.clone());
        if let Ok(place) = places.clone().try_acquire_owned() {
            let connection = connection(socket, service.clone(), limits, true, closing);
            tokio::spawn(async move {
                connection.await;
                drop((place, open));
            });
        } else if let Ok(place) = refusals.clone().try_acquire_owned() {
            let connection = connection(socket, full.clone(), limits, false, closing);
            tokio::spawn(async move {
                let _ = tokio::time::timeout(REFUSING, connection).await;
                drop((place, open));
            });
        }
    }
}

/// Serves one connection: one request, or as many as come if it is to `stay`.
async fn connection(
    socket: TcpStream,
    service: TowerToHyperService<axum::Router>,
    limits: Limits,
    stay: bool,
    closing: CancellationToken,
) {
    // A frame is small and urgent.
    let _ = socket.set_nodelay(true);
    let socket = TokioIo::new(Impatient::new(socket, limits.write_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.body_timeout)
        .keep_alive(stay)
        .serve_connection(socket, service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}
