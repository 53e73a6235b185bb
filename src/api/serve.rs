//! Listening and leaving, for HTTP and gRPC alike. The sockets are bound before the model is loaded, so
//! that probes are answered from the first moment; on a signal readiness goes false at once, new work is
//! refused as unavailable, what runs is finished, and only then do the connections close.
//!
//! Connections are bounded, over all listeners: those beyond the limit hear that there are too many and
//! are closed, so that nobody hangs in the backlog of a server that has no file descriptors left.

use super::http::{App, Limits};
use super::pulse::{Expired, Pulse};
use super::socket::Impatient;
use super::stall::Awaited;
use crate::engine::State;
use axum::Router;
use axum::body::Body;
use futures::TryFutureExt;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// How long a failed server goes on to say so before it ends.
const FAILED_GRACE: Duration = Duration::from_secs(1);

/// Connections beyond the limit that are told so; any more are closed at once.
const REFUSED_AT_ONCE: usize = 64;

/// How long telling may take.
const REFUSING: Duration = Duration::from_secs(2);

/// Pause after an error of `accept` (usually: no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Bytes that a client of HTTP/2 begins with.
const PREFACE: usize = 24;

/// The largest frame that clients may send, in bytes: what all of them send anyway.
const MAX_FRAME: u32 = 16 << 10;

/// Bytes of one stream that wait for its client at most; the rest waits as tokens.
const SEND_BUFFER: usize = 64 << 10;

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

/// What a server listens on.
pub struct Listeners {
    /// For HTTP.
    pub http: TcpListener,
    /// For gRPC, if that is wanted.
    pub grpc: Option<TcpListener>,
}

/// Serves `app` until the first of `stop` or until the engine fails, then drains for at most
/// `shutdown_timeout`.
pub async fn serve(
    listeners: Listeners,
    app: Arc<App>,
    shutdown_timeout: Duration,
    mut stop: mpsc::Receiver<()>,
) -> Ended {
    // Every connection holds a sender: the channel ends with the last of them.
    let (open, mut closed) = mpsc::channel::<()>(1);
    // Dropping it ends the listening.
    let mut accepting = JoinSet::new();
    let door = Door::new(&app, open);
    if let Some(listener) = listeners.grpc {
        let house = House::new(Protocol::Http2, app.grpc_router(), app.full_grpc_router());
        accepting.spawn(accept(listener, house, door.clone()));
    }
    let house = House::new(Protocol::Http1, app.clone().router(), app.clone().full_router());
    accepting.spawn(accept(listeners.http, house, door));
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
        app.closing.cancel();
        // Every answer is out; half a request is not worth waiting for.
        let _ = tokio::time::timeout(app.limits.closing_grace, closed.recv()).await;
    };
    let cut = tokio::select! {
        () = drain => None,
        () = tokio::time::sleep(shutdown_timeout) => Some(Ended::TimedOut),
        Some(()) = stop.recv() => Some(Ended::Interrupted),
    };
    // A failure stays one, however the rest ended.
    cut.filter(|_| ended == Ended::Drained).unwrap_or(ended)
}

/// What a listener's connections speak.
#[derive(Clone, Copy)]
enum Protocol {
    Http1,
    /// From the first byte: gRPC.
    Http2,
}

/// What one listener's connections come to.
struct House {
    protocol: Protocol,
    service: TowerToHyperService<Router>,
    /// For connections beyond the limit.
    full: TowerToHyperService<Router>,
}

impl House {
    fn new(protocol: Protocol, service: Router, full: Router) -> Self {
        let (service, full) = (TowerToHyperService::new(service), TowerToHyperService::new(full));
        Self { protocol, service, full }
    }
}

/// What all listeners share: how many connections there may be, and when they are to close.
#[derive(Clone)]
struct Door {
    limits: Limits,
    places: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    closing: CancellationToken,
    /// Only held, by every connection.
    _open: mpsc::Sender<()>,
}

impl Door {
    fn new(app: &App, open: mpsc::Sender<()>) -> Self {
        Self {
            limits: app.limits,
            places: Arc::new(Semaphore::new(app.limits.max_connections)),
            refusals: Arc::new(Semaphore::new(REFUSED_AT_ONCE)),
            closing: app.closing.clone(),
            _open: open,
        }
    }
}

async fn accept(listener: TcpListener, house: House, door: Door) {
    let protocol = house.protocol;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = door.closing.cancelled() => return,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "no connection was accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let door = door.clone();
        if let Ok(place) = door.places.clone().try_acquire_owned() {
            let service = house.service.clone();
            tokio::spawn(async move {
                connection(socket, protocol, service, true, &door).await;
                drop((place, door));
            });
        } else if let Ok(place) = door.refusals.clone().try_acquire_owned() {
            let service = house.full.clone();
            tokio::spawn(async move {
                let connection = connection(socket, protocol, service, false, &door);
                let _ = tokio::time::timeout(REFUSING, connection).await;
                drop((place, door));
            });
        }
    }
}

/// Serves one connection: as many requests as come; over HTTP/1 only one unless it is to `stay`.
async fn connection(
    socket: TcpStream,
    protocol: Protocol,
    service: TowerToHyperService<Router>,
    stay: bool,
    door: &Door,
) {
    let Door { limits, closing, .. } = door;
    // A frame is small and urgent.
    let _ = socket.set_nodelay(true);
    let pulse = Pulse::new();
    let socket = Impatient::new(socket, limits.write_timeout);
    let expired = || pulse.expired(limits);
    let result = match protocol {
        Protocol::Http1 => {
            let socket = TokioIo::new(socket.with_pulse(pulse.clone()));
            let service = service_fn(|request| beating(&service, &pulse, request));
            let connection = http1(limits, stay).serve_connection(socket, service);
            until_closed(connection, |c| c.graceful_shutdown(), closing, expired).await
        }
        Protocol::Http2 => {
            // hyper waits for ever for a client that connects and says nothing.
            let socket = TokioIo::new(socket.greeted_within(PREFACE, limits.body_timeout));
            let (limit, pulse) = (limits.write_timeout, pulse.clone());
            let service = service_fn(move |request| {
                let answer = beating(&service, &pulse, request);
                answer.map_ok(move |response| response.map(|body| Awaited::new(body, limit)))
            });
            let connection = http2(limits).serve_connection(socket, service);
            until_closed(connection, |c| c.graceful_shutdown(), closing, expired).await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Answers a request, and says meanwhile that the connection is busy.
fn beating(
    service: &TowerToHyperService<Router>,
    pulse: &Pulse,
    request: hyper::Request<Incoming>,
) -> impl Future<Output = Result<hyper::Response<Body>, Infallible>> + use<> {
    let busy = pulse.busy();
    // The body holds it to its own end.
    let held = move |body: Body| {
        Body::new(body.map_err(move |error| {
            let _busy = &busy;
            error
        }))
    };
    service.call(request).map_ok(move |response| response.map(held))
}

/// HTTP/1; for how long a head may take, see [`Pulse`].
fn http1(limits: &Limits, stay: bool) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_header_size(limits.max_header_bytes)
        .max_headers(limits.max_headers)
        .keep_alive(stay);
    builder
}

/// HTTP/2 for clients that may be many, slow or gone.
fn http2(limits: &Limits) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.max_streams)
        .max_header_list_size(limits.max_header_bytes as u32)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(SEND_BUFFER)
        // A peer that is gone answers no ping.
        .keep_alive_interval(limits.keep_alive)
        .keep_alive_timeout(limits.write_timeout);
    builder
}

/// Runs a connection to its end; from `closing` on, or when it has been idle for too long, it takes no
/// further requests. One whose request does not come to its end is cut.
async fn until_closed<C, E>(
    connection: C,
    shut_down: impl Fn(Pin<&mut C>),
    closing: &CancellationToken,
    expired: impl Fn() -> E,
) -> hyper::Result<()>
where
    C: Future<Output = hyper::Result<()>>,
    E: Future<Output = Expired>,
{
    let mut connection = pin!(connection);
    let mut leaving = false;
    loop {
        tokio::select! {
            result = connection.as_mut() => return result,
            () = closing.cancelled(), if !leaving => {}
            // A request that comes at this very moment is still answered; half a one is not.
            expired = expired() => {
                if leaving || expired == Expired::Head {
                    return Ok(());
                }
            }
        }
        leaving = true;
        shut_down(connection.as_mut());
    }
}
