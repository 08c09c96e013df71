//! Requests from bytes, and replies to bytes.

use bytes::{Buf, Bytes, BytesMut};
use redis_protocol::resp2::types::BytesFrame as Frame2;
use redis_protocol::resp3::types::BytesFrame as Frame3;
use redis_protocol::{resp2, resp3};

use crate::store::{MAX_KEY, MAX_VALUE};

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
    /// Where in the buffer the last argument ends whose size is known: so many bytes have to be kept.
    pub(super) end: usize,
    /// Arguments whose sizes are not known yet.
    left: usize,
}

/// An error is what breaks the protocol, or nothing if more has to come first.
type Parsed<T> = Result<T, Option<String>>;

impl Parser {
    /// The next request: a command and its arguments. An empty one is to be passed over.
    ///
    /// # Errors
    ///
    /// Redis's words for what breaks the protocol, after which nothing makes sense any more.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Vec<Bytes>>, String> {
        match self.parse(buffer) {
            Ok(request) => Ok(Some(request)),
            Err(None) => Ok(None),
            Err(Some(what)) => Err(format!("Protocol error: {what}")),
        }
    }

    fn parse(&mut self, buffer: &mut BytesMut) -> Parsed<Vec<Bytes>> {
        if self.end == 0 {
            if buffer.first().is_some_and(|byte| *byte != b'*') {
                return inline(buffer);
            }
            let (count, end) = number(buffer, 0, "multibulk")?;
            if count > MAX_ARGUMENTS as i64 {
                return Err(Some("invalid multibulk length".to_owned()));
            }
            if count <= 0 {
                buffer.advance(end);
                return Ok(Vec::new());
            }
            (self.end, self.left) = (end, count as usize);
        }
        let invalid = || Some("invalid bulk length".to_owned());
        while self.left > 0 {
            let first = char::from(*buffer.get(self.end).ok_or(None)?);
            if first != '$' {
                return Err(Some(format!("expected '$', got '{first}'")));
            }
            let (len, start) = number(buffer, self.end, "bulk")?;
            if !(0..=MAX_VALUE as i64).contains(&len) {
                return Err(invalid());
            }
            self.end = start + len as usize + 2;
            self.left -= 1;
            if self.end > MAX_REQUEST {
                return Err(Some(format!("a request has more than {MAX_REQUEST} bytes")));
            }
        }
        if buffer.len() < self.end {
            return Err(None);
        }
        self.end = 0;
        let decoded = resp2::decode::decode_bytes_mut(buffer);
        let Ok(Some((Frame2::Array(frames), ..))) = decoded else {
            return Err(invalid());
        };
        let arguments = frames.into_iter().map(|frame| match frame {
            Frame2::BulkString(bytes) => Ok(bytes),
            _ => Err(invalid()),
        });
        arguments.collect()
    }
}

/// A request as a person types it.
fn inline(buffer: &mut BytesMut) -> Parsed<Vec<Bytes>> {
    let Some(end) = buffer.iter().position(|byte| *byte == b'\n') else {
        let is_too_long = buffer.len() > MAX_LINE;
        return Err(is_too_long.then(|| "too big inline request".to_owned()));
    };
    let line = buffer.split_to(end + 1).freeze();
    let words = line.split(u8::is_ascii_whitespace);
    let words = words.filter(|word| !word.is_empty());
    Ok(words.map(|word| line.slice_ref(word)).collect())
}

/// The number in the line at `start`, after its first byte, and where the line ends.
fn number(buffer: &[u8], start: usize, what: &str) -> Parsed<(i64, usize)> {
    let line = buffer.get(start + 1..).unwrap_or_default();
    let Some(end) = line.iter().take(32).position(|byte| *byte == b'\r') else {
        let is_too_long = line.len() >= 32;
        return Err(is_too_long.then(|| format!("too big {what} count string")));
    };
    let last = *line.get(end + 1).ok_or(None)?;
    let text = std::str::from_utf8(&line[..end]).ok();
    let number = text.and_then(|text| text.parse().ok());
    match number.filter(|_| last == b'\n') {
        Some(number) => Ok((number, start + 1 + end + 2)),
        None => Err(Some(format!("invalid {what} length"))),
    }
}

/// What a client is told.
#[derive(Clone, Debug)]
pub(super) enum Reply {
    Simple(&'static str),
    /// Without a code it is a mere `ERR`.
    Error(String),
    Number(i64),
    Bulk(Bytes),
    Null,
    Array(Vec<Self>),
    Map(Vec<(&'static str, Self)>),
}

pub(super) const OK: Reply = Reply::Simple("OK");

/// The codes of errors that are no mere `ERR`.
const CODES: [&str; 2] = ["NOPROTO ", "OOM "];

impl Reply {
    pub(super) fn bulk(bytes: impl Into<Bytes>) -> Self {
        Self::Bulk(bytes.into())
    }

    /// Bytes that it holds.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Bulk(bytes) => bytes.len(),
            Self::Array(items) => items.iter().map(Self::size).sum(),
            _ => 0,
        }
    }

    /// Appends it in version 2 or 3 of the protocol.
    pub(super) fn encode(self, version: u8, out: &mut BytesMut) {
        let encoded = match version {
            3 => resp3::encode::complete::extend_encode(out, &self.into(), false),
            _ => resp2::encode::extend_encode(out, &self.into(), false),
        };
        encoded.expect("the codec makes room, and has these kinds of frames");
    }
}

/// The text of an error as it is sent.
fn coded(text: &str) -> String {
    let has_code = CODES.iter().any(|code| text.starts_with(code));
    let code = if has_code { "" } else { "ERR " };
    format!("{code}{}", text.replace(['\r', '\n'], " "))
}

impl From<Reply> for Frame2 {
    fn from(reply: Reply) -> Self {
        match reply {
            Reply::Simple(text) => Self::SimpleString(text.into()),
            Reply::Error(text) => Self::Error(coded(&text).into()),
            Reply::Number(number) => Self::Integer(number),
            Reply::Bulk(bytes) => Self::BulkString(bytes),
            Reply::Null => Self::Null,
            Reply::Array(items) => Self::Array(items.into_iter().map(Self::from).collect()),
            Reply::Map(pairs) => {
                let items = pairs.into_iter().flat_map(|(k, v)| [Reply::bulk(k), v]);
                Self::Array(items.map(Self::from).collect())
            }
        }
    }
}

impl From<Reply> for Frame3 {
    fn from(reply: Reply) -> Self {
        let attributes = None;
        match reply {
            Reply::Simple(text) => {
                let data = text.into();
                Self::SimpleString { data, attributes }
            }
            Reply::Error(text) => {
                let data = coded(&text).into();
                Self::SimpleError { data, attributes }
            }
            Reply::Number(data) => Self::Number { data, attributes },
            Reply::Bulk(data) => Self::BlobString { data, attributes },
            Reply::Null => Self::Null,
            Reply::Array(items) => {
                let data = items.into_iter().map(Self::from).collect();
                Self::Array { data, attributes }
            }
            Reply::Map(pairs) => {
                let pairs = pairs.into_iter();
                let data = pairs.map(|(k, v)| (Reply::bulk(k).into(), v.into()));
                let data = data.collect();
                Self::Map { data, attributes }
            }
        }
    }
}

impl From<i64> for Reply {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<usize> for Reply {
    fn from(number: usize) -> Self {
        Self::Number(number as i64)
    }
}

impl From<Option<Bytes>> for Reply {
    fn from(value: Option<Bytes>) -> Self {
        value.map_or(Self::Null, Self::Bulk)
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
        let reply = Reply::Array(vec![
            OK,
            Reply::Number(1),
            Reply::bulk("b"),
            Reply::Error("no".to_owned()),
            Reply::Map(vec![("a", Reply::Null)]),
        ]);
        let encoded = |version| {
            let mut out = BytesMut::new();
            reply.clone().encode(version, &mut out);
            String::from_utf8(out.to_vec()).expect("is text")
        };
        let start = "*5\r\n+OK\r\n:1\r\n$1\r\nb\r\n-ERR no\r\n";
        assert_eq!(encoded(2), format!("{start}*2\r\n$1\r\na\r\n$-1\r\n"));
        assert_eq!(encoded(3), format!("{start}%1\r\n$1\r\na\r\n_\r\n"));
    }
}
