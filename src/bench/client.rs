//! The HTTP side of the load: connections that are kept and reused, one streamed reply timed frame by
//! frame. Knows the OpenAI completions frame, of which Shoal's native one is a superset.

use super::sse::Parser;
use crate::telemetry;
use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::borrow::Cow;
use std::cell::RefCell;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// Most bytes read of a reply that is not a stream.
const MAX_BODY: usize = 1 << 20;
/// Most bytes of a server's error text that a report keeps.
const MAX_DETAIL: usize = 200;

/// Why a request did not end well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What reports count it as: one of a few words, or `http` with a status.
    pub kind: String,
    /// What exactly was wrong, for people.
    pub detail: String,
}

impl Failure {
    /// A failure counted as `kind`.
    pub fn new(kind: impl Into<String>, detail: impl ToString) -> Self {
        let mut detail = detail.to_string();
        if let Some((end, _)) = detail.char_indices().nth(MAX_DETAIL) {
            detail.truncate(end);
        }
        Self { kind: kind.into(), detail }
    }
}

/// One streamed reply that ended well. Times count from the instant given to [`Client::stream`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reply {
    /// To the first token; `None` if the reply had none.
    pub first_token: Option<Duration>,
    /// To the end of the stream.
    pub end: Duration,
    /// Between consecutive frames that carry a token.
    pub gaps: Vec<Duration>,
    /// Tokens of the prompt, if the server says.
    pub prompt_tokens: u64,
    /// Tokens generated: as the server's usage says, else the number of frames.
    pub tokens: u64,
}

/// Keeps connections to one server.
pub struct Client {
    /// `host:port`.
    address: String,
    authority: String,
    base_path: String,
    idle: RefCell<Vec<SendRequest<Full<Bytes>>>>,
}

impl Client {
    /// A client of the server at `url`, such as `http://127.0.0.1:8000`. Does not connect yet.
    pub fn new(url: &str) -> Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("{url} is not a URL"))?;
        let Some(authority) = uri.authority().filter(|_| uri.scheme_str() == Some("http")) else {
            bail!("{url} is not of the form http://HOST:PORT (https is not supported)");
        };
        Ok(Self {
            address: format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80)),
            authority: authority.to_string(),
            base_path: uri.path().trim_end_matches('/').to_owned(),
            idle: RefCell::default(),
        })
    }

    /// Reads the whole body of `GET path`.
    pub async fn get(&self, path: &str) -> Result<Bytes> {
        let sent = self.send(Method::GET, path, Vec::new()).await;
        let (response, connection) = sent.map_err(|f| anyhow::anyhow!("{}", f.detail))?;
        let status = response.status();
        let collected = Limited::new(response.into_body(), MAX_BODY).collect().await;
        let body = collected.map_err(|e| anyhow::anyhow!("GET {path}: {e}"))?.to_bytes();
        self.idle.borrow_mut().push(connection);
        if !status.is_success() {
            bail!("GET {path}: {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(body)
    }

    /// Posts `body` to `path` and reads the streamed reply, timed from `start`.
    pub async fn stream(
        &self,
        path: &str,
        body: Vec<u8>,
        start: Instant,
    ) -> Result<Reply, Failure> {
        let (response, connection) = self.send(Method::POST, path, body).await?;
        if !response.status().is_success() {
            let kind = format!("http {}", response.status().as_u16());
            let collected = Limited::new(response.into_body(), MAX_BODY).collect().await;
            let body = collected.map(|b| b.to_bytes()).unwrap_or_default();
            self.idle.borrow_mut().push(connection);
            return Err(Failure::new(kind, String::from_utf8_lossy(&body)));
        }
        let mut timed = Timed::new(start);
        read_frames(response.into_body(), &mut timed).await?;
        self.idle.borrow_mut().push(connection);
        Ok(timed.reply)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), Failure> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base_path))
            .header(HOST, &self.authority)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| Failure::new("malformed", e))?;
        let mut connection = self.connection().await?;
        let sent = connection.send_request(request).await;
        let response = sent.map_err(|e| Failure::new("disconnected", e))?;
        Ok((response, connection))
    }

    /// An idle connection that is still open, else a new one.
    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, Failure> {
        loop {
            let Some(mut connection) = self.idle.borrow_mut().pop() else { break };
            if connection.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        let failed = |e: &dyn std::error::Error| {
            Failure::new("connect", format!("cannot reach {}: {e}", self.address))
        };
        let socket = TcpStream::connect(&self.address).await.map_err(|e| failed(&e))?;
        socket.set_nodelay(true).map_err(|e| failed(&e))?;
        let shaken = http1::handshake(TokioIo::new(socket)).await;
        let (connection, driver) = shaken.map_err(|e| failed(&e))?;
        // Its error reaches the request that it breaks.
        tokio::spawn(driver);
        Ok(connection)
    }
}

/// One frame of a streamed completion, as far as it matters here.
#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, default)]
    text: Cow<'a, str>,
    finish_reason: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// A reply that grows frame by frame.
struct Timed {
    start: Instant,
    last_token: Option<Instant>,
    reported: Option<Usage>,
    frames: u64,
    done: bool,
    reply: Reply,
}

impl Timed {
    fn new(start: Instant) -> Self {
        let reply = Reply::default();
        Self { start, last_token: None, reported: None, frames: 0, done: false, reply }
    }

    /// Takes in the payload of one event that arrived at `now`.
    fn event(&mut self, payload: &[u8], now: Instant) -> Result<(), Failure> {
        if payload == b"[DONE]" {
            self.done = true;
            self.reply.end = now.saturating_duration_since(self.start);
            self.reply.tokens = self.reported.as_ref().map_or(self.frames, |u| u.completion_tokens);
            self.reply.prompt_tokens = self.reported.as_ref().map_or(0, |u| u.prompt_tokens);
            return Ok(());
        }
        let frame: Frame<'_> = serde_json::from_slice(payload).map_err(|e| {
            Failure::new("malformed", format!("{e} in {}", String::from_utf8_lossy(payload)))
        })?;
        if let Some(error) = frame.error {
            let name = error["code"].as_str().or(error["type"].as_str()).unwrap_or("error");
            return Err(Failure::new(format!("in stream: {name}"), &error));
        }
        let carries_token = |c: &Choice<'_>| c.finish_reason.is_none() || !c.text.is_empty();
        if frame.choices.iter().any(carries_token) {
            self.frames += 1;
            match self.last_token.replace(now) {
                Some(last) => self.reply.gaps.push(now - last),
                None => self.reply.first_token = Some(now.saturating_duration_since(self.start)),
            }
        }
        self.reported = frame.usage.or(self.reported.take());
        Ok(())
    }
}

/// Reads a stream to its end, which keeps the connection usable.
async fn read_frames<B>(mut body: B, timed: &mut Timed) -> Result<(), Failure>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let mut parser = Parser::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Failure::new("cut short", e))?;
        let now = telemetry::now();
        if let Some(data) = frame.data_ref() {
            parser.feed(data, |payload| timed.event(payload, now))?;
        }
    }
    if timed.done { Ok(()) } else { Err(Failure::new("cut short", "no [DONE] at the end")) }
}
