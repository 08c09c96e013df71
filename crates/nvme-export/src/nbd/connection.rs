//! One client: the handshake, and then requests, many at a time.

use std::io;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use nvme_async::DmaBuf;
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::execute::{buffer, execute};
use super::log::Log;
use super::protocol::{
    Action, ClientFlags, Negotiation, Next, OptionHeader, Request, Session, Violation, greeting,
};
use super::server::Shared;
use crate::Export;

/// What is received ahead. Longer data goes to its buffer without a detour, but for its beginning.
const READ_AHEAD: usize = 4096;
/// Replies without data are sent together up to this many bytes.
const GATHERED: usize = 16 << 10;

/// Why a connection has ended, other than in order.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("{0}")]
    Violation(#[from] Violation),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the handshake takes too long")]
    Handshake,
    #[error("the client takes no replies")]
    NoReader,
    #[error("{0}")]
    Memory(#[from] nvme_async::Error),
}

pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for T {}

/// Serves one client until it leaves, or `stop` says so.
pub(super) async fn serve(
    shared: &Arc<Shared>,
    stream: impl Stream,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let agreed = tokio::select! {
        biased;
        () = stopped(&mut stop) => return Ok(()),
        agreed = timeout(shared.options.handshake_timeout, shake_hands(shared, stream)) => {
            agreed.map_err(|_| Ended::Handshake)??
        }
    };
    match agreed {
        Some((Channel::Plain(stream), agreed)) => transmit(shared, stream, agreed, stop).await,
        Some((Channel::Tls(stream), agreed)) => transmit(shared, *stream, agreed, stop).await,
        None => Ok(()),
    }
}

/// What requests come over.
enum Channel<S> {
    Plain(S),
    Tls(Box<tokio_rustls::server::TlsStream<S>>),
}

/// What the handshake agreed on.
struct Agreed {
    export: usize,
    session: Session,
}

/// From the greeting to the first request; nothing if the client leaves before.
async fn shake_hands<S: Stream>(
    shared: &Shared,
    mut stream: S,
) -> Result<Option<(Channel<S>, Agreed)>, Ended> {
    stream.write_all(&greeting()).await?;
    let mut flags = [0; ClientFlags::LEN];
    stream.read_exact(&mut flags).await?;
    let flags = ClientFlags::decode(flags)?;
    let tls = shared.options.tls.as_ref();
    let mut negotiation = Negotiation::new(&shared.descriptions, flags, tls.is_some());
    match (haggle(&mut negotiation, &mut stream).await?, tls) {
        (Haggled::Agreed(agreed), _) => Ok(Some((Channel::Plain(stream), agreed))),
        (Haggled::StartTls, Some(tls)) => {
            let mut stream = Box::new(tls.acceptor.accept(stream).await?);
            negotiation.tls_started();
            match haggle(&mut negotiation, &mut stream).await? {
                Haggled::Agreed(agreed) => Ok(Some((Channel::Tls(stream), agreed))),
                // TLS starts only once.
                Haggled::End | Haggled::StartTls => Ok(None),
            }
        }
        (Haggled::End | Haggled::StartTls, _) => Ok(None),
    }
}

enum Haggled {
    Agreed(Agreed),
    StartTls,
    End,
}

/// Answers options until that is over.
async fn haggle(
    negotiation: &mut Negotiation<'_>,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> Result<Haggled, Ended> {
    loop {
        let mut header = [0; OptionHeader::LEN];
        stream.read_exact(&mut header).await?;
        let header = OptionHeader::decode(&header)?;
        let mut data = vec![0; header.len as usize];
        stream.read_exact(&mut data).await?;
        let answer = negotiation.option(header, &data)?;
        stream.write_all(&answer.reply).await?;
        stream.flush().await?;
        match answer.next {
            Next::Option => {}
            Next::StartTls => return Ok(Haggled::StartTls),
            Next::Transmission { export, session } => {
                return Ok(Haggled::Agreed(Agreed { export, session }));
            }
            Next::End => {
                // The client may have left already.
                let _ = stream.shutdown().await;
                return Ok(Haggled::End);
            }
        }
    }
}

/// What requests share, while they are executed.
struct Context {
    export: Export,
    session: Session,
    replies: mpsc::UnboundedSender<Reply>,
    log: Arc<Log>,
}

/// A reply that is to be sent, and the room that its request takes until it was.
struct Reply {
    header: Vec<u8>,
    data: Bytes,
    _room: Room,
}

/// One of the requests, and its bytes, that a connection may have at a time.
struct Room {
    _request: OwnedSemaphorePermit,
    _bytes: Option<OwnedSemaphorePermit>,
}

/// Answers requests until the client leaves, and then those that are under way.
async fn transmit<S: Stream>(
    shared: &Arc<Shared>,
    stream: S,
    agreed: Agreed,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let (reader, writer) = tokio::io::split(stream);
    // As many as there is room for, which each reply takes along.
    let (replies, queue) = mpsc::unbounded_channel();
    // Of one task, which ends with this one.
    let mut writing = JoinSet::new();
    writing.spawn(write_replies(writer, queue));
    let mut requests = Requests {
        reader: BufReader::with_capacity(READ_AHEAD, reader),
        context: Arc::new(Context {
            export: shared.exports[agreed.export].pinned(),
            session: agreed.session,
            replies,
            log: shared.log.clone(),
        }),
        max_requests: shared.options.max_requests,
        count: Arc::new(Semaphore::new(shared.options.max_requests)),
        bytes: Arc::new(Semaphore::new(shared.options.max_bytes as usize)),
        tasks: JoinSet::new(),
    };
    let read = tokio::select! {
        biased;
        () = stopped(&mut stop) => Ok(()),
        // Only if the connection is broken.
        Some(written) = writing.join_next() => {
            written.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(Ended::from)
        }
        read = requests.read() => read,
    };
    // Devices have time limits of their own, and everything resolves.
    while requests.tasks.join_next().await.is_some() {}
    // The last sender, so that the writer ends.
    drop(requests.context);
    // That the connection broke is what reading it said too, if it was worth saying.
    match timeout(shared.options.drain_timeout, writing.join_next()).await {
        Ok(_) => read,
        Err(_) => read.and(Err(Ended::NoReader)),
    }
}

/// Receives requests.
struct Requests<S> {
    reader: BufReader<ReadHalf<S>>,
    context: Arc<Context>,
    max_requests: usize,
    count: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    tasks: JoinSet<()>,
}

impl<S: Stream> Requests<S> {
    /// Starts what is asked for, until the client leaves.
    async fn read(&mut self) -> Result<(), Ended> {
        loop {
            let mut header = [0; Request::LEN];
            // Without a request to disconnect, most clients that end leave so.
            if self.reader.read(&mut header[..1]).await? == 0 {
                return Ok(());
            }
            self.reader.read_exact(&mut header[1..]).await?;
            let request = Request::decode(&header)?;
            while self.tasks.try_join_next().is_some() {}
            match self.context.session.check(&request)? {
                Ok(Action::Disconnect) => return Ok(()),
                Ok(action) => self.start(request, action).await?,
                Err(refusal) => {
                    let room = self.room(0).await;
                    self.skip(request.payload()).await?;
                    self.context.reply(room, Bytes::new(), |session, header| {
                        session.failure(header, &request, refusal.errno, refusal.message, None);
                        false
                    });
                }
            }
        }
    }

    async fn start(&mut self, request: Request, action: Action) -> Result<(), Ended> {
        let bytes = match action {
            Action::Read { len, .. } | Action::Write { len, .. } => len,
            _ => 0,
        };
        let room = self.room(bytes).await;
        let data = match action {
            Action::Write { len, .. } => Some(self.receive(len).await?),
            _ => None,
        };
        let context = self.context.clone();
        self.tasks.spawn(async move {
            context.run(request, action, data, room).await;
        });
        Ok(())
    }

    /// Waits for room for a request with so many bytes.
    async fn room(&self, bytes: u32) -> Room {
        // Nobody closes these, and no request is larger than all there is.
        let some = |semaphore: &Arc<Semaphore>, count| {
            let semaphore = semaphore.clone();
            async move {
                match semaphore.acquire_many_owned(count).await {
                    Ok(permit) => permit,
                    Err(_) => unreachable!("a semaphore of the connection's own was closed"),
                }
            }
        };
        // Whoever gets all that are not to be used at present, and one more, may have that one.
        let fair = self.context.export.fair_depth();
        let withheld = self.max_requests.saturating_sub(fair) as u32;
        let mut requests = some(&self.count, withheld + 1).await;
        let request = requests.split(1).expect("it has one");
        drop(requests);
        Room {
            _request: request,
            _bytes: match bytes {
                0 => None,
                _ => Some(some(&self.bytes, bytes).await),
            },
        }
    }

    /// Receives the data of a write, to where the device will find it.
    async fn receive(&mut self, len: u32) -> Result<DmaBuf, Ended> {
        let mut data = buffer(&self.context.export, len)?;
        self.reader.read_exact(&mut data).await?;
        Ok(data)
    }

    async fn skip(&mut self, len: u32) -> Result<(), Ended> {
        let mut rest = (&mut self.reader).take(len.into());
        let skipped = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
        if skipped < len.into() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }
}

impl Context {
    async fn run(&self, request: Request, action: Action, data: Option<DmaBuf>, room: Room) {
        match execute(&self.export, action, data).await {
            Ok(data) => self.reply(room, data.clone(), |session, header| match action {
                Action::Read { .. } => session.data(header, &request, &data),
                Action::BlockStatus { .. } => {
                    session.block_status(header, &request);
                    false
                }
                _ => {
                    session.success(header, &request);
                    false
                }
            }),
            Err(fault) => {
                self.log.fault(&fault);
                let offset = fault.offset(&self.export);
                self.reply(room, Bytes::new(), |session, header| {
                    session.failure(header, &request, fault.errno(), fault.message(), offset);
                    false
                });
            }
        }
    }

    /// Sends a reply of what `header` appends, and `data` if it returns true.
    fn reply(&self, room: Room, data: Bytes, header: impl FnOnce(&Session, &mut Vec<u8>) -> bool) {
        let mut bytes = Vec::with_capacity(32);
        let has_data = header(&self.session, &mut bytes);
        // If the writer is gone, so is the client.
        let _ = self.replies.send(Reply {
            header: bytes,
            data: if has_data { data } else { Bytes::new() },
            _room: room,
        });
    }
}

/// Sends replies until no more can come, and says goodbye.
async fn write_replies<S: Stream>(
    mut writer: WriteHalf<S>,
    mut queue: mpsc::UnboundedReceiver<Reply>,
) -> io::Result<()> {
    let mut gathered = Vec::new();
    // Their requests are under way for as long as they were not sent.
    let mut rooms = Vec::new();
    loop {
        let reply = match queue.try_recv() {
            Ok(reply) if gathered.len() < GATHERED => reply,
            next => {
                writer.write_all(&gathered).await?;
                writer.flush().await?;
                gathered.clear();
                rooms.clear();
                match next.ok() {
                    Some(reply) => reply,
                    None => match queue.recv().await {
                        Some(reply) => reply,
                        None => break,
                    },
                }
            }
        };
        gathered.extend_from_slice(&reply.header);
        rooms.push(reply._room);
        if !reply.data.is_empty() {
            let mut all = Buf::chain(gathered.as_slice(), reply.data);
            writer.write_all_buf(&mut all).await?;
            gathered.clear();
            rooms.clear();
        }
    }
    writer.shutdown().await
}

/// Resolves when the server is to end, or nobody is left to say so.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the server is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}
