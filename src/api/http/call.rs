//! What comes before a body is understood: the request's identity, its deadlines, its bytes.

use super::Limits;
use super::fields::Fields;
use crate::error::{Error, Kind, Result};
use crate::ids::random;
use crate::telemetry::Record;
use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, header};
use http_body_util::BodyExt;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// The header of a request's id, in and out.
pub const REQUEST_ID: &str = "x-request-id";
const TIMEOUT: &str = "x-request-timeout-ms";
const FIRST_TOKEN_TIMEOUT: &str = "x-llm-d-slo-ttft-ms";

/// How many bytes beyond the limit are read before the connection is given up.
const MAX_THROWN_AWAY: usize = 64 << 20;

/// The longest time limit that means anything: a day.
pub const MAX_TIMEOUT_MS: f64 = 86_400_000.0;

/// A request's head: who it is, and what its headers say.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its id and arrival.
    pub record: Arc<Record>,
    /// As sent.
    pub headers: HeaderMap,
}

impl Head {
    /// The head of a request with these headers, observed or not.
    pub fn new(headers: &HeaderMap, extensions: &Extensions) -> Self {
        let record = extensions.get::<Arc<Record>>().cloned();
        let record = record.unwrap_or_else(|| Record::new(Self::id(headers)));
        Self { record, headers: headers.clone() }
    }

    /// The id that these headers ask for, if it is fit to be logged and sent back, else a new one.
    pub fn id(headers: &HeaderMap) -> String {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.:/+=".contains(&b);
        let fit = |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(allowed);
        let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(fit);
        given.map_or_else(|| format!("{:016x}{:016x}", random(), random()), str::to_owned)
    }
}

impl<S: Sync> FromRequestParts<S> for Head {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::new(&parts.headers, &parts.extensions))
    }
}

/// What is known of a request before its body is read.
#[derive(Clone, Debug)]
pub struct Call {
    /// Its id and arrival.
    pub record: Arc<Record>,
    /// `x-request-timeout-ms`.
    pub timeout: Option<Duration>,
    /// `x-llm-d-slo-ttft-ms`.
    pub first_token_timeout: Option<Duration>,
}

impl Call {
    /// What the head of a request says.
    pub fn new(head: &Head) -> Result<Self> {
        Ok(Self {
            record: head.record.clone(),
            timeout: duration(&head.headers, TIMEOUT)?,
            first_token_timeout: duration(&head.headers, FIRST_TOKEN_TIMEOUT)?,
        })
    }

    /// When the whole answer and when its first token must be out, if the body gives `timeout`.
    pub fn deadlines(&self, timeout: Option<Duration>) -> (Option<Instant>, Option<Instant>) {
        let from_arrival = |limit| self.record.arrived + limit;
        let whole = timeout.into_iter().chain(self.timeout).min();
        (whole.map(from_arrival), self.first_token_timeout.map(from_arrival))
    }
}

fn duration(headers: &HeaderMap, name: &str) -> Result<Option<Duration>> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let ms =
        value.to_str().ok().and_then(|v| v.trim().parse().ok()).ok_or_else(|| {
            Error::invalid(name, format!("{name} must be a number of milliseconds"))
        })?;
    milliseconds(name, ms).map(Some)
}

/// A time limit as clients give it, in milliseconds.
pub fn milliseconds(name: &str, ms: f64) -> Result<Duration> {
    if ms > 0.0 && ms <= MAX_TIMEOUT_MS {
        return Ok(Duration::from_secs_f64(ms / 1000.0));
    }
    let message = format!("{name} is {ms}; allowed: above 0, up to {MAX_TIMEOUT_MS} milliseconds");
    Err(Error::new(Kind::Invalid, message).with_param(name))
}

/// Reads a body within the limits of bytes and time; `room` is what all that are being read may have.
pub async fn read_body(body: Body, limits: &Limits, room: &Semaphore) -> Result<Vec<u8>> {
    let bytes = tokio::time::timeout(limits.body_timeout, read(body, limits.max_body_bytes, room));
    bytes.await.map_err(|_| {
        let message = format!("the body took longer than {:?}", limits.body_timeout);
        Error::new(Kind::RequestTimeout, message)
    })?
}

/// Refuses a body that is compressed.
pub fn check_encoding(headers: &HeaderMap) -> Result<()> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            Err(Error::new(Kind::MediaType, "the body must not be compressed"))
        }
        _ => Ok(()),
    }
}

/// Reads a body that nobody looks at, within the same limits, so that its client hears the answer.
pub async fn discard(body: Body, limits: &Limits) {
    // However it ends, the answer is the same.
    let _ = tokio::time::timeout(limits.body_timeout, read(body, 0, &Semaphore::new(0))).await;
}

/// The fields of a body that says of itself that it is JSON.
pub fn json_fields(headers: &HeaderMap, body: &[u8]) -> Result<Fields> {
    let media = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    let media = media.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if media != "application/json" && !(media.contains('/') && media.ends_with("+json")) {
        let message = "the body must have the content type application/json";
        return Err(Error::new(Kind::MediaType, message));
    }
    Fields::parse(body)
}

/// Collects a body. One that is too large, or for which there is no room, is read on and thrown away: a
/// client that is still writing would not hear the answer.
async fn read(mut body: Body, limit: usize, room: &Semaphore) -> Result<Vec<u8>> {
    let (mut bytes, mut length) = (Vec::new(), 0);
    // `None` once there was not enough.
    let mut held = room.try_acquire_many(0).ok();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Error::new(Kind::Invalid, "the body ended early"))?;
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        if length <= limit {
            let more = room.try_acquire_many(data.len() as u32).ok();
            held = held.zip(more).map(|(mut held, more)| {
                held.merge(more);
                held
            });
            match held {
                Some(_) => bytes.extend_from_slice(&data),
                None => bytes = Vec::new(),
            }
        } else if length - limit > MAX_THROWN_AWAY {
            break;
        }
    }
    if length > limit {
        return Err(Error::new(Kind::TooLarge, format!("the body has more than {limit} bytes")));
    }
    if held.is_none() {
        let message = "bodies that other clients are still sending leave no room for this one";
        return Err(Error::new(Kind::Overloaded, message));
    }
    Ok(bytes)
}

#[cfg(test)]
impl Call {
    /// A call whose headers say nothing.
    pub fn test() -> Self {
        Self { record: Record::new("id"), timeout: None, first_token_timeout: None }
    }
}
