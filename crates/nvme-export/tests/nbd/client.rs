//! A client, which checks every byte that it is sent.

use std::collections::HashMap;
use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};

pub(crate) const EXPORT_NAME: u32 = 1;
pub(crate) const ABORT: u32 = 2;
pub(crate) const LIST: u32 = 3;
pub(crate) const STARTTLS: u32 = 5;
pub(crate) const INFO: u32 = 6;
pub(crate) const GO: u32 = 7;
pub(crate) const STRUCTURED_REPLY: u32 = 8;
pub(crate) const SET_META_CONTEXT: u32 = 10;

pub(crate) const ACK: u32 = 1;
pub(crate) const SERVER: u32 = 2;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const META_CONTEXT: u32 = 4;
pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
pub(crate) const ERR_POLICY: u32 = 0x8000_0002;
pub(crate) const ERR_TLS_REQD: u32 = 0x8000_0005;
pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1;
pub(crate) const DF: u16 = 4;

pub(crate) const EPERM: u32 = 1;
pub(crate) const EIO: u32 = 5;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;

/// A connection to a server.
pub(crate) struct Client<S = DuplexStream> {
    pub(crate) stream: S,
    structured: bool,
    next_cookie: u64,
    /// Lengths of reads that are under way, by cookie.
    reads: HashMap<u64, u32>,
}

/// What a request was answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Done,
    Data {
        offset: u64,
        data: Vec<u8>,
    },
    Hole {
        offset: u64,
        len: u32,
    },
    Extent {
        context: u32,
        len: u32,
        flags: u32,
    },
    Error {
        errno: u32,
        message: String,
        offset: Option<u64>,
    },
}

impl Reply {
    pub(crate) fn errno(&self) -> u32 {
        match self {
            Self::Error { errno, .. } => *errno,
            _ => 0,
        }
    }

    /// What was read, be it data or a hole.
    pub(crate) fn bytes(self) -> Vec<u8> {
        match self {
            Self::Data { data, .. } => data,
            Self::Hole { len, .. } => vec![0; len as usize],
            other => panic!("no data: {other:?}"),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            structured: false,
            next_cookie: 0x1000,
            reads: HashMap::new(),
        }
    }

    /// Reads the greeting and answers it.
    pub(crate) async fn greet(&mut self, flags: u32) -> io::Result<()> {
        let mut greeting = [0; 18];
        self.stream.read_exact(&mut greeting).await?;
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        self.stream.write_all(&flags.to_be_bytes()).await
    }

    pub(crate) async fn send_option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).await
    }

    /// Sends an option; returns all of its replies, the last of which is an acknowledgement or an error.
    pub(crate) async fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send_option(option, data).await.expect("sent");
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.u64().await, 0x0003_e889_0455_65a9);
            assert_eq!(self.u32().await, option);
            let (kind, len) = (self.u32().await, self.u32().await);
            let data = self.take(len as usize).await;
            replies.push((kind, data));
            if kind == ACK || kind >= 1 << 31 {
                return replies;
            }
        }
    }

    /// The last reply to an option.
    pub(crate) async fn outcome(&mut self, option: u32, data: &[u8]) -> u32 {
        let replies = self.option(option, data).await;
        replies.last().expect("one at least").0
    }

    /// From the greeting to structured replies of an export, with what block status needs.
    pub(crate) async fn go(mut self, name: &str) -> Self {
        self.greet(3).await.expect("greeted");
        self.go_on(name).await
    }

    /// The same once greeted.
    pub(crate) async fn go_on(mut self, name: &str) -> Self {
        assert_eq!(self.outcome(STRUCTURED_REPLY, b"").await, ACK);
        let mut query = string(name);
        query.extend_from_slice(&1_u32.to_be_bytes());
        query.extend_from_slice(&string("base:allocation"));
        let replies = self.option(SET_META_CONTEXT, &query).await;
        assert_eq!((replies.len(), replies[0].0), (2, META_CONTEXT));
        assert_eq!(self.outcome(GO, &info(name)).await, ACK);
        self.structured = true;
        self
    }

    /// By the old way, without structured replies. Returns size and flags.
    pub(crate) async fn export_name(&mut self, name: &str) -> (u64, u16) {
        self.send_option(EXPORT_NAME, name.as_bytes())
            .await
            .expect("sent");
        let size = self.u64().await;
        (size, self.u16().await)
    }

    /// Sends a request; returns its cookie.
    pub(crate) async fn send(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        if command == READ {
            self.reads.insert(cookie, len);
        }
        let bytes = request(command, flags, cookie, offset, len);
        self.stream.write_all(&bytes).await.expect("sent");
        self.stream.write_all(data).await.expect("sent");
        cookie
    }

    /// Receives the next reply, whichever request it is for.
    pub(crate) async fn reply(&mut self) -> (u64, Reply) {
        let magic = self.u32().await;
        if magic == 0x6744_6698 {
            let (errno, cookie) = (self.u32().await, self.u64().await);
            let read = self.reads.remove(&cookie);
            assert!(!self.structured || read.is_none(), "a read is structured");
            let reply = match (errno, read) {
                (0, Some(len)) => Reply::Data {
                    offset: 0,
                    data: self.take(len as usize).await,
                },
                (0, None) => Reply::Done,
                (errno, _) => Reply::Error {
                    errno,
                    message: String::new(),
                    offset: None,
                },
            };
            return (cookie, reply);
        }
        assert_eq!(magic, 0x668e_33ef);
        assert!(self.structured, "structured replies were not agreed on");
        let (flags, kind) = (self.u16().await, self.u16().await);
        let (cookie, len) = (self.u64().await, self.u32().await);
        assert_eq!(flags, 1, "each reply is one chunk");
        let wanted = self.reads.remove(&cookie);
        let reply = match kind {
            1 => Reply::Data {
                offset: self.u64().await,
                data: self.take(len as usize - 8).await,
            },
            2 => Reply::Hole {
                offset: self.u64().await,
                len: self.u32().await,
            },
            5 => {
                assert_eq!(len, 12);
                Reply::Extent {
                    context: self.u32().await,
                    len: self.u32().await,
                    flags: self.u32().await,
                }
            }
            0x8001 | 0x8002 => {
                let (errno, count) = (self.u32().await, self.u16().await);
                let text = self.take(count.into()).await;
                let offset = match kind {
                    0x8002 => Some(self.u64().await),
                    _ => None,
                };
                let rest = if offset.is_some() { 14 } else { 6 };
                assert_eq!(len, u32::from(count) + rest);
                Reply::Error {
                    errno,
                    message: String::from_utf8(text).expect("UTF-8"),
                    offset,
                }
            }
            other => panic!("a chunk of type {other}"),
        };
        let got = match &reply {
            Reply::Data { data, .. } => Some(data.len() as u32),
            Reply::Hole { len, .. } => Some(*len),
            _ => None,
        };
        if got.is_some() {
            assert_eq!(wanted, got);
        }
        (cookie, reply)
    }

    /// Sends a request and receives its reply; no other is under way.
    pub(crate) async fn ask(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> Reply {
        let cookie = self.send(command, flags, offset, len, data).await;
        let (answered, reply) = self.reply().await;
        assert_eq!(answered, cookie);
        reply
    }

    pub(crate) async fn write(&mut self, offset: u64, data: &[u8]) -> Reply {
        self.ask(WRITE, 0, offset, data.len() as u32, data).await
    }

    pub(crate) async fn read(&mut self, offset: u64, len: u32) -> Reply {
        self.ask(READ, 0, offset, len, b"").await
    }

    /// Nothing more comes: the server has ended the connection.
    pub(crate) async fn is_over(&mut self) {
        let mut rest = Vec::new();
        // It may also be reset, where something was under way.
        let _ = self.stream.read_to_end(&mut rest).await;
        assert_eq!(rest, b"");
    }

    pub(crate) async fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).await.expect("received");
        bytes
    }

    async fn u16(&mut self) -> u16 {
        self.stream.read_u16().await.expect("received")
    }

    async fn u32(&mut self) -> u32 {
        self.stream.read_u32().await.expect("received")
    }

    async fn u64(&mut self) -> u64 {
        self.stream.read_u64().await.expect("received")
    }
}

/// The bytes of a request.
pub(crate) fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

/// A string after its length.
pub(crate) fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// The data of GO and INFO, which asks for the name and for block sizes.
pub(crate) fn info(name: &str) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&[0, 2, 0, 1, 0, 3]);
    data
}
