//! Requests from bytes, and replies to bytes.

use bytes::{Buf, Bytes, BytesMut};
use redis_protocol::{resp2, resp3};

use crate::store::{MAX_KEY, MAX_VALUE};

pub(super) use resp3::types::BytesFrame as Reply;

/// Most arguments of a request.
const MAX_ARGUMENTS: usize = 64 << 10;
/// Most bytes of a request, and of the values in a reply.
pub(super) const MAX_REQUEST: usize = 2 * MAX_VALUE + MAX_KEY;
/// Most bytes of a line: those before arguments are short.
const MAX_LINE: usize = 64 << 10;

/// Takes requests from what a client sent. The sizes of a request are checked as they come, before anything
/// is kept, and before the codec, which knows no limits, looks at it.
#[derive(Debug, Default)]
pub(super) struct Parser {
    /// What of the buffer belongs to arguments that are known.
    checked: usize,
    /// Arguments whose sizes are not known yet.
    left: usize,
}

impl Parser {
    /// The next request: a command and its arguments. An empty one is to be passed over.
    ///
    /// # Errors
    ///
    /// Redis's words for what breaks the protocol, after which nothing makes sense any more.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Vec<Bytes>>, String> {
        if self.checked == 0 && buffer.first().is_some_and(|byte| *byte != b'*') {
            return inline(buffer);
        }
        if self.checked == 0 {
            let Some((count, end)) = number(buffer, 0, "multibulk")? else {
                return Ok(None);
            };
            if count <= 0 {
                buffer.advance(end);
                return Ok(Some(Vec::new()));
            }
            (self.checked, self.left) = (end, count as usize);
        }
        if self.left > MAX_ARGUMENTS {
            return Err("Protocol error: invalid multibulk length".to_owned());
        }
        while self.left > 0 {
            match buffer.get(self.checked) {
                None => return Ok(None),
                Some(b'$') => {}
                Some(byte) => {
                    let found = char::from(*byte);
                    return Err(format!("Protocol error: expected '$', got '{found}'"));
                }
            }
            let Some((len, end)) = number(buffer, self.checked, "bulk")? else {
                return Ok(None);
            };
            if !(0..=MAX_VALUE as i64).contains(&len) {
                return Err("Protocol error: invalid bulk length".to_owned());
            }
            self.checked = end + len as usize + 2;
            self.left -= 1;
            if self.checked > MAX_REQUEST {
                return Err(format!(
                    "Protocol error: a request has more than {MAX_REQUEST} bytes"
                ));
            }
        }
        if buffer.len() < self.checked {
            return Ok(None);
        }
        self.checked = 0;
        let frame = resp2::decode::decode_bytes_mut(buffer);
        let broken = || "Protocol error: invalid bulk length".to_owned();
        let (frame, ..) = frame.ok().flatten().ok_or_else(broken)?;
        let resp2::types::BytesFrame::Array(frames) = frame else {
            return Err(broken());
        };
        let arguments = frames.into_iter().map(|frame| match frame {
            resp2::types::BytesFrame::BulkString(bytes) => Ok(bytes),
            _ => Err(broken()),
        });
        arguments.collect::<Result<_, _>>().map(Some)
    }

    /// How many bytes of the request that is coming have to be kept, as far as is known.
    pub(super) fn wanted(&self) -> usize {
        self.checked
    }
}

/// A request as a person types it.
fn inline(buffer: &mut BytesMut) -> Result<Option<Vec<Bytes>>, String> {
    let Some(end) = buffer.iter().position(|byte| *byte == b'\n') else {
        return match buffer.len() > MAX_LINE {
            true => Err("Protocol error: too big inline request".to_owned()),
            false => Ok(None),
        };
    };
    let line = buffer.split_to(end + 1).freeze();
    let words = line.split(u8::is_ascii_whitespace);
    let words = words.filter(|word| !word.is_empty());
    Ok(Some(words.map(|word| line.slice_ref(word)).collect()))
}

/// The number in the line at `start`, after its first byte, and where the line ends.
fn number(buffer: &[u8], start: usize, what: &str) -> Result<Option<(i64, usize)>, String> {
    let line = buffer.get(start + 1..).unwrap_or_default();
    let Some(end) = line.iter().take(32).position(|byte| *byte == b'\r') else {
        return match line.len() >= 32 {
            true => Err(format!("Protocol error: too big {what} count string")),
            false => Ok(None),
        };
    };
    if line.len() < end + 2 {
        return Ok(None);
    }
    let number = std::str::from_utf8(&line[..end]).ok();
    let number = number.and_then(|text| text.parse().ok());
    match number.filter(|_| line[end + 1] == b'\n') {
        Some(number) => Ok(Some((number, start + 1 + end + 2))),
        None => Err(format!("Protocol error: invalid {what} length")),
    }
}

/// Appends a reply in version 2 or 3 of the protocol.
pub(super) fn encode(reply: Reply, version: u8, out: &mut BytesMut) {
    let encoded = match version {
        3 => resp3::encode::complete::extend_encode(out, &reply, false),
        _ => resp2::encode::extend_encode(out, &older(reply), false),
    };
    encoded.expect("the codec makes room, and replies are of kinds that it has");
}

/// The same in version 2.
fn older(reply: Reply) -> resp2::types::BytesFrame {
    use resp2::types::BytesFrame as Older;
    match reply {
        Reply::SimpleString { data, .. } => Older::SimpleString(data),
        Reply::SimpleError { data, .. } => Older::Error(data),
        Reply::Number { data, .. } => Older::Integer(data),
        Reply::BlobString { data, .. } => Older::BulkString(data),
        Reply::Array { data, .. } => Older::Array(data.into_iter().map(older).collect()),
        Reply::Map { data, .. } => {
            let pairs = data
                .into_iter()
                .flat_map(|(key, value)| [older(key), older(value)]);
            Older::Array(pairs.collect())
        }
        _ => Older::Null,
    }
}

pub(super) fn simple(text: &'static str) -> Reply {
    Reply::SimpleString {
        data: Bytes::from_static(text.as_bytes()),
        attributes: None,
    }
}

/// The codes of errors that are no mere `ERR`.
const CODES: [&str; 2] = ["NOPROTO ", "OOM "];

/// An error.
pub(super) fn error(text: impl Into<String>) -> Reply {
    let text = text.into().replace(['\r', '\n'], " ");
    let text = match CODES.iter().any(|code| text.starts_with(code)) {
        true => text,
        false => format!("ERR {text}"),
    };
    Reply::SimpleError {
        data: text.into(),
        attributes: None,
    }
}

pub(super) fn number_reply(data: i64) -> Reply {
    Reply::Number {
        data,
        attributes: None,
    }
}

pub(super) fn bulk(bytes: impl Into<Bytes>) -> Reply {
    Reply::BlobString {
        data: bytes.into(),
        attributes: None,
    }
}

pub(super) fn bulk_or_null(bytes: Option<Bytes>) -> Reply {
    bytes.map_or(Reply::Null, bulk)
}

pub(super) fn array(data: Vec<Reply>) -> Reply {
    Reply::Array {
        data,
        attributes: None,
    }
}

pub(super) fn map(pairs: impl IntoIterator<Item = (&'static str, Reply)>) -> Reply {
    Reply::Map {
        data: pairs
            .into_iter()
            .map(|(key, value)| (bulk(key), value))
            .collect(),
        attributes: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Vec<Vec<Bytes>>, String> {
        // All at once, and byte by byte.
        let mut all = Vec::new();
        let (mut parser, mut buffer) = (Parser::default(), BytesMut::from(bytes));
        let outcome = loop {
            match parser.next(&mut buffer) {
                Ok(Some(request)) => all.push(request),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let (mut parser, mut buffer, mut single) = (Parser::default(), BytesMut::new(), Vec::new());
        for byte in bytes {
            buffer.extend_from_slice(&[*byte]);
            match parser.next(&mut buffer) {
                Ok(request) => single.extend(request),
                Err(error) => {
                    assert_eq!(outcome, Err(error));
                    break;
                }
            }
        }
        assert_eq!(single, all);
        outcome.map(|()| all)
    }

    #[test]
    fn requests() {
        let requests =
            parse(b"*2\r\n$3\r\nGET\r\n$0\r\n\r\nPING  a\r\n*0\r\n*1\r\n$2\r\n\r\n\r\n*1\r\n$");
        let requests = requests.expect("is no error");
        let expected: [&[&[u8]]; 4] = [&[b"GET", b""], &[b"PING", b"a"], &[], &[b"\r\n"]];
        assert_eq!(requests, expected);
    }

    #[test]
    fn what_breaks_the_protocol() {
        for (bytes, error) in [
            ("*1\r\n:3\r\n", "expected '$', got ':'"),
            ("*1\r\n*1\r\n*1\r\n", "expected '$', got '*'"),
            ("*x\r\n", "invalid multibulk length"),
            ("*99999999\r\n", "invalid multibulk length"),
            ("*1\r\n$-1\r\n", "invalid bulk length"),
            ("*1\r\n$16777217\r\n", "invalid bulk length"),
            ("*1\r\n$1x\r\n", "invalid bulk length"),
            (
                "*11111111111111111111111111111111111111",
                "too big multibulk count string",
            ),
        ] {
            let error = format!("Protocol error: {error}");
            assert_eq!(parse(bytes.as_bytes()), Err(error), "{bytes:?}");
        }
        let argument = format!("$16777216\r\n{}\r\n", "x".repeat(MAX_VALUE));
        let large = format!("*3\r\n{argument}{argument}$16777216\r\n");
        let mut parser = Parser::default();
        let more = parser.next(&mut BytesMut::from(large.as_bytes()));
        assert!(more.is_err_and(|error| error.contains("more than")));
    }

    #[test]
    fn replies_in_both_versions() {
        let reply = || {
            let inner = map([("a", Reply::Null)]);
            array(vec![
                simple("OK"),
                number_reply(1),
                bulk("b"),
                error("no"),
                inner,
            ])
        };
        let encoded = |version| {
            let mut out = BytesMut::new();
            encode(reply(), version, &mut out);
            String::from_utf8(out.to_vec()).expect("is text")
        };
        let start = "*5\r\n+OK\r\n:1\r\n$1\r\nb\r\n-ERR no\r\n";
        assert_eq!(encoded(2), format!("{start}*2\r\n$1\r\na\r\n$-1\r\n"));
        assert_eq!(encoded(3), format!("{start}%1\r\n$1\r\na\r\n_\r\n"));
    }
}
