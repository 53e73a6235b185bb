//! Server-sent events as they come off the wire: bytes in, `data` payloads out, wherever the chunk
//! borders fall. Fields other than `data` and comments (keep-alives) are skipped.

/// Collects the bytes of one response body.
#[derive(Default)]
pub struct Parser {
    /// The line under way, without its end.
    line: Vec<u8>,
    /// The `data` of the event under way; several lines are joined by a line feed.
    data: Vec<u8>,
    has_data: bool,
}

impl Parser {
    /// Takes the next bytes and calls `event` with the payload of each event that they complete; its
    /// first error ends the parse.
    pub fn feed<E>(
        &mut self,
        mut bytes: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(end) = bytes.iter().position(|&b| b == b'\n') {
            self.line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            if self.end_line() {
                event(&self.data)?;
                self.data.clear();
                self.has_data = false;
            }
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes the finished line in; whether it completes an event.
    fn end_line(&mut self) -> bool {
        let line = self.line.strip_suffix(b"\r").unwrap_or(&self.line);
        let is_end = line.is_empty();
        if let Some(value) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            self.has_data = true;
        }
        self.line.clear();
        is_end && self.has_data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        let mut parser = Parser::default();
        let mut found = Vec::new();
        for chunk in chunks {
            let take = |data: &[u8]| -> Result<(), std::str::Utf8Error> {
                found.push(std::str::from_utf8(data)?.to_owned());
                Ok(())
            };
            parser.feed(chunk, take).unwrap();
        }
        found
    }

    #[test]
    fn every_chunk_border_gives_the_same_events() {
        let stream =
            "data: {\"text\": \"föx\"}\n\n: keep-alive\n\nevent: x\r\nid: 7\r\ndata:two\r\n\
                      data: lines\r\n\r\ndata: [DONE]\n\ndata: unfinished"
                .as_bytes();
        let expected = ["{\"text\": \"föx\"}", "two\nlines", "[DONE]"];
        assert_eq!(events(&[stream]), expected);
        for cut in 0..=stream.len() {
            assert_eq!(events(&[&stream[..cut], &stream[cut..]]), expected, "cut at {cut}");
        }
        let single: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(events(&single), expected);
    }

    #[test]
    fn an_empty_payload_is_an_event_and_a_blank_line_is_none() {
        assert_eq!(events(&[b"\n\n\ndata:\n\n\n"]), [""]);
    }

    #[test]
    fn an_error_ends_the_parse() {
        let mut calls = 0;
        let flow = Parser::default().feed(b"data: 1\n\ndata: 2\n\n", |data| {
            calls += 1;
            Err(data[0])
        });
        assert_eq!((flow, calls), (Err(b'1'), 1));
    }
}
