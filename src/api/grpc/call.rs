//! What comes before a call's message is understood: who it is, its deadlines, its bytes.

use super::status::refusal;
use crate::api::App;
use crate::api::http::call::{Call, Head, MAX_TIMEOUT_MS, read_body};
use crate::api::ticket::{Chunk, Ticket};
use crate::error::{Error, Kind, Result};
use crate::request::Request;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::middleware::Next;
use axum::response::Response;
use futures::stream::{self, Stream, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Code, Status};

/// The header that client libraries make of a call's deadline.
const TIMEOUT: &str = "grpc-timeout";

/// Hands what a message asks for to the service; what else was understood of it comes back.
pub async fn submit<T, U>(
    app: &App,
    head: &Head,
    message: T,
    understand: impl FnOnce(T, &Call) -> Result<(Request, U)>,
) -> Result<(Ticket, U)> {
    let (asked, rest) = read(app, head, message, understand)?;
    Ok((app.service.submit(asked).await?, rest))
}

/// Understands a message as a wire does. What cannot be understood is counted here.
pub fn read<T, A>(
    app: &App,
    head: &Head,
    message: T,
    understand: impl FnOnce(T, &Call) -> Result<A>,
) -> Result<A> {
    let read = || understand(message, &call(head)?);
    read().inspect_err(|error| app.service.count_refused(&head.record, error))
}

/// What `message` makes of a ticket's chunks, until the last or an error. The ticket is over and recorded
/// with the last, not when the client has read it.
pub fn messages<T>(
    ticket: Ticket,
    message: impl FnMut(Result<Chunk>, &Ticket) -> T,
) -> impl Stream<Item = T> {
    stream::unfold(Some((ticket, message)), |live| async move {
        // One binding: however it ends, the ticket goes before what the messages hold.
        let mut live = live?;
        let chunk = live.0.next().await?;
        let said = live.1(chunk, &live.0);
        Some((said, (!live.0.is_over()).then_some(live)))
    })
}

/// What the head of a call says.
pub fn call(head: &Head) -> Result<Call> {
    let call = Call::new(head)?;
    let given = timeout(&head.headers)?;
    Ok(Call { timeout: call.timeout.into_iter().chain(given).min(), ..call })
}

/// `grpc-timeout`: up to 8 digits and a unit. Zero is a deadline that has passed.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let duration = value.to_str().ok().and_then(duration).ok_or_else(|| {
        let message = "grpc-timeout must be 1 to 8 digits and one of H, M, S, m, u, n";
        Error::invalid(TIMEOUT, message)
    })?;
    // Later than this is as good as never.
    Ok(Some(duration.min(Duration::from_secs_f64(MAX_TIMEOUT_MS / 1000.0))))
}

fn duration(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let plain = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    let count: u64 = digits.parse().ok().filter(|_| plain)?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// Why a message could not be read, in our words, if it is the message's fault.
pub fn unreadable(status: &Status) -> Option<Error> {
    let kind = match status.code() {
        Code::Internal => Kind::Invalid,
        Code::OutOfRange => Kind::TooLarge,
        _ => return None,
    };
    Some(Error::new(kind, format!("the message cannot be read: {}", status.message())))
}

/// The middleware of calls with many messages: they end when the server does, however long their client
/// would go on.
pub async fn many(
    State(app): State<Arc<App>>,
    request: axum::extract::Request,
    next: Next,
) -> Response {
    let closing = app.closing.clone().cancelled_owned();
    let until = |body: Body| Body::from_stream(body.into_data_stream().take_until(closing));
    next.run(request.map(until)).await
}

/// The middleware of calls with one message: reads it within the limits of bytes and time, and refuses
/// what is no message in our words, as a body over HTTP.
pub async fn whole(
    State(app): State<Arc<App>>,
    head: Head,
    request: axum::extract::Request,
    next: Next,
) -> Response {
    let refuse = |error: &Error| {
        app.service.count_refused(&head.record, error);
        refusal(error)
    };
    let (parts, body) = request.into_parts();
    let bytes = match read_body(body, &app.limits, &app.room).await {
        Ok(bytes) => bytes,
        Err(error) => return refuse(&error),
    };
    let request = axum::extract::Request::from_parts(parts, Body::from(bytes));
    let response = next.run(request).await;
    // What has no outcome was not seen by a wire, and an internal error of it is the message's fault.
    let status = Status::from_header_map(response.headers());
    match status.as_ref().and_then(unreadable) {
        Some(error) if head.record.facts().outcome.is_none() => refuse(&error),
        _ => response,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_of_client_libraries() {
        let ms = |text| duration(text).map(|d| d.as_secs_f64() * 1000.0);
        let good = [("2H", 7.2e6), ("2M", 1.2e5), ("3S", 3e3), ("99999999m", 99_999_999.0)];
        for (text, want) in good.into_iter().chain([("5u", 0.005), ("7n", 7e-6), ("0n", 0.0)]) {
            assert_eq!(ms(text), Some(want), "{text}");
        }
        for bad in ["", "m", "5", "5s", "-5m", "+5m", "123456789m", "5é", "5 m"] {
            assert_eq!(ms(bad), None, "{bad}");
        }
    }
}
