//! A small HTTP client that sees what a server really sends: status, headers, bytes, and each event of
//! a stream. One connection per request; dropping a [`Stream`] closes its connection.

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{HeaderMap, Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::net::SocketAddr;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// A whole response.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    /// The parts of an error body; panics if it is not one of ours.
    pub fn error(&self) -> (u16, String, Option<String>, Option<String>) {
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("no error: {json}"));
        let keys: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(!error["message"].as_str().unwrap().is_empty());
        let text = |name: &str| error[name].as_str().map(str::to_string);
        (self.status, text("type").unwrap(), text("param"), text("code"))
    }
}

/// A stream of server-sent events.
pub struct Stream {
    pub headers: HeaderMap,
    body: Incoming,
    buffer: Vec<u8>,
    connection: JoinHandle<()>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Stream {
    /// The next event or comment, without the empty line that ends it; `None` after the last.
    pub async fn raw(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\n\n") {
                let rest = self.buffer.split_off(end + 2);
                let mut event = std::mem::replace(&mut self.buffer, rest);
                event.truncate(end);
                return Some(String::from_utf8(event).expect("events are whole UTF-8"));
            }
            let frame = self.body.frame().await?.expect("the stream is not cut");
            self.buffer.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
    }

    /// The payload of the next event that has one.
    pub async fn data(&mut self) -> Option<String> {
        while let Some(event) = self.raw().await {
            if let Some(data) = event.strip_prefix("data: ") {
                return Some(data.to_string());
            }
            assert!(event.starts_with(':'), "neither data nor comment: {event:?}");
        }
        None
    }

    /// The next frame; panics at the stream's end.
    pub async fn frame(&mut self) -> Value {
        let data = self.data().await.expect("a frame");
        serde_json::from_str(&data).unwrap_or_else(|e| panic!("{e}: {data}"))
    }

    /// All frames that are left; panics unless `[DONE]` is the last.
    pub async fn rest(&mut self) -> Vec<Value> {
        let mut frames = Vec::new();
        loop {
            match self.data().await.expect("[DONE] ends the stream").as_str() {
                "[DONE]" => break,
                data => frames.push(serde_json::from_str(data).unwrap()),
            }
        }
        assert_eq!(self.raw().await, None, "nothing follows [DONE]");
        frames
    }
}

/// The text of all frames, by choice.
pub fn texts(frames: &[Value]) -> Vec<String> {
    let mut texts = Vec::new();
    for choice in frames.iter().flat_map(|frame| frame["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        texts.resize(texts.len().max(index + 1), String::new());
        texts[index].push_str(choice["text"].as_str().unwrap());
    }
    texts
}

/// Speaks to one server.
#[derive(Clone, Copy)]
pub struct Client(pub SocketAddr);

impl Client {
    pub async fn get(&self, path: &str) -> Reply {
        self.get_with(path, &[]).await
    }

    pub async fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Reply {
        self.whole(self.send(Method::GET, path, headers, Bytes::new()).await).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_with(path, &[], body).await
    }

    pub async fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Reply {
        let mut all = vec![("content-type", "application/json")];
        all.extend(headers);
        self.call(Method::POST, path, &all, body.to_string()).await
    }

    pub async fn call(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Reply {
        self.whole(self.send(method, path, headers, body.into()).await).await
    }

    /// Opens a stream; panics on any status but 200.
    pub async fn stream(&self, path: &str, body: &Value) -> Stream {
        self.try_stream(path, &[], body).await.unwrap_or_else(|reply| panic!("{reply:?}"))
    }

    pub async fn try_stream(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> Result<Stream, Reply> {
        let mut all = vec![("content-type", "application/json")];
        all.extend(headers);
        let sent = self.send(Method::POST, path, &all, body.to_string().into()).await;
        if sent.0.status() != 200 {
            return Err(self.whole(sent).await);
        }
        let (response, connection) = sent;
        let (head, body) = response.into_parts();
        Ok(Stream { headers: head.headers, body, buffer: Vec::new(), connection })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> (Response<Incoming>, JoinHandle<()>) {
        let socket = TcpStream::connect(self.0).await.expect("the server listens");
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
        let connection = tokio::spawn(async move {
            let _ = connection.await;
        });
        let mut request =
            Request::builder().method(method).uri(path).header("host", self.0.to_string());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body)).unwrap();
        (sender.send_request(request).await.expect("a response"), connection)
    }

    async fn whole(&self, (response, connection): (Response<Incoming>, JoinHandle<()>)) -> Reply {
        let (head, body) = response.into_parts();
        let body = body.collect().await.expect("a whole body").to_bytes().to_vec();
        connection.abort();
        Reply { status: head.status.as_u16(), headers: head.headers, body }
    }
}
