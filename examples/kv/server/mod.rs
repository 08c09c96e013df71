//! A server that speaks RESP 2 and 3, as Redis does, in front of a store.

mod commands;
mod glob;
mod info;
mod protocol;

use std::io;
use std::mem::replace;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use self::commands::Answer;
use self::protocol::{Parser, Reply};
use crate::store::{Figures, MAX_VALUE, Store};

/// What is read of a connection at a time, and kept for it without being asked.
const CHUNK: usize = 64 << 10;
/// Most requests of a connection that are answered together.
const MAX_TOGETHER: usize = 1024;
/// How long clients have to take their last replies.
const FAREWELL: Duration = Duration::from_secs(10);

const TOO_MUCH_MEMORY: &str = "OOM too much memory is used by pending requests, try again later";

/// What clients may use.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Limits {
    /// Most connections
    #[arg(
        long = "max-clients",
        value_name = "MAX_CLIENTS",
        default_value_t = 1000
    )]
    pub(crate) connections: usize,
    /// Bytes of requests that are large, of all clients together.
    #[arg(skip = 256usize << 20)]
    pub(crate) pending: usize,
}

/// What connections share.
struct Server {
    store: Store,
    limits: Limits,
    started: Instant,
    connections: AtomicU64,
    places: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    latencies: Mutex<Latencies>,
}

/// Microseconds from when the first of those requests was begun that were answered together, until all were
/// finished; of each request.
#[derive(Default)]
struct Latencies {
    reads: Figures,
    others: Figures,
}

/// What a connection has said of itself.
struct Session {
    id: u64,
    /// Of the protocol.
    version: u8,
    /// It is not served any more.
    quits: bool,
}

/// Serves clients until `stop` resolves; then replies to what was asked, and returns.
///
/// # Errors
///
/// Those of the listener. Errors of connections end these.
pub(crate) async fn serve(
    store: Store,
    listener: TcpListener,
    limits: Limits,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let server = Arc::new(Server {
        store,
        limits,
        started: Instant::now(),
        connections: AtomicU64::new(0),
        places: Arc::new(Semaphore::new(limits.connections)),
        memory: Arc::new(Semaphore::new(limits.pending)),
        latencies: Mutex::default(),
    });
    let (stopping, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let (server, stopped) = (server.clone(), stopped.clone());
                    connections.spawn(async move {
                        if let Err(error) = connect(&server, stream, stopped).await {
                            tracing::debug!(%error, "a connection ends");
                        }
                    });
                }
                // Such as too many open files: it may pass.
                Err(error) => {
                    tracing::warn!(%error, "a connection can't be accepted");
                    sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    stopping.send_replace(true);
    let all = async { while connections.join_next().await.is_some() {} };
    if timeout(FAREWELL, all).await.is_err() {
        let left = connections.len();
        tracing::warn!(left, "clients do not take their replies");
    }
    Ok(())
}

async fn connect(
    server: &Arc<Server>,
    mut stream: TcpStream,
    mut stopped: watch::Receiver<bool>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let id = server.connections.fetch_add(1, Ordering::Relaxed) + 1;
    let Ok(_place) = server.places.clone().try_acquire_owned() else {
        let refusal = b"-ERR max number of clients reached\r\n";
        return stream.write_all(refusal).await;
    };
    let mut connection = Connection {
        server,
        session: Session {
            id,
            version: 2,
            quits: false,
        },
        parser: Parser::default(),
        input: BytesMut::new(),
        output: BytesMut::new(),
        memory: None,
    };
    loop {
        connection.answer(&mut stream).await?;
        if connection.session.quits || *stopped.borrow() {
            return stream.shutdown().await;
        }
        connection.input.reserve(CHUNK);
        tokio::select! {
            read = stream.read_buf(&mut connection.input) => if read? == 0 {
                return Ok(());
            },
            _ = stopped.changed() => {}
        }
    }
}

struct Connection<'a> {
    server: &'a Arc<Server>,
    session: Session,
    parser: Parser,
    input: BytesMut,
    output: BytesMut,
    /// For what is kept beyond a chunk.
    memory: Option<OwnedSemaphorePermit>,
}

/// Requests that were begun, each with the version of the protocol of its reply.
type Begun = Vec<(u8, Answer)>;

/// Reads what was found, all at the same time. Then no place in the store is held any more.
async fn read(begun: &mut Begun) {
    let finds = begun.iter_mut().filter(|(_, answer)| answer.is_read());
    let reads = finds.map(async |(_, answer)| {
        let found = replace(answer, Answer::from(Reply::Null));
        *answer = found.reply().await.into();
    });
    join_all(reads).await;
}

impl Connection<'_> {
    /// Answers all requests that have arrived, in their order.
    async fn answer(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        let mut left = Ok(true);
        while left == Ok(true) && !self.session.quits {
            left = self.answer_some().await;
            stream.write_all(&self.output).await?;
            self.output.clear();
        }
        if let Err(complaint) = left.and_then(|_| self.keep()) {
            self.session.quits = true;
            Reply::Error(complaint).encode(self.session.version, &mut self.output);
            stream.write_all(&self.output).await?;
        }
        Ok(())
    }

    /// Answers requests that are begun one after the other, and then finished together: so what a pipeline
    /// writes becomes durable in one batch. Returns whether more may be left.
    ///
    /// # Errors
    ///
    /// What broke the protocol after them.
    async fn answer_some(&mut self) -> Result<bool, String> {
        let start = Instant::now();
        let (mut begun, mut reads, mut bytes) = (Begun::new(), 0, 0);
        let left = loop {
            if begun.len() >= MAX_TOGETHER || bytes >= MAX_VALUE || self.session.quits {
                break Ok(true);
            }
            match self.parser.next(&mut self.input) {
                Ok(Some(request)) if request.is_empty() => {}
                Ok(Some(request)) => {
                    let answer = self.begin(&request, &mut begun).await;
                    reads += u64::from(answer.is_read());
                    bytes += answer.size();
                    begun.push((self.session.version, answer));
                }
                end => break end.map(|_| false),
            }
        };
        let others = begun.len() as u64 - reads;
        read(&mut begun).await;
        for (version, answer) in begun {
            // What waits for a batch waits for one that is under way.
            let reply = answer.reply().await;
            reply.encode(version, &mut self.output);
        }
        let time = start.elapsed().as_micros() as u64;
        let latencies = self.server.latencies.lock();
        let mut latencies = latencies.expect("no one panics with it");
        latencies.reads.record(time, reads);
        latencies.others.record(time, others);
        left
    }

    /// Begins a request after others.
    async fn begin(&mut self, request: &[Bytes], others: &mut Begun) -> Answer {
        let answer = commands::execute(self.server, &mut self.session, request);
        let mut answer = pin!(answer);
        if let Poll::Ready(answer) = futures::poll!(answer.as_mut()) {
            return answer;
        }
        // It may wait for room that there is not before the others have been read.
        read(others).await;
        answer.await
    }

    /// Sees to it that there is memory for the request of which a part has arrived.
    fn keep(&mut self) -> Result<(), String> {
        let wanted = self.parser.end.max(self.input.len());
        let held = self.memory.as_ref();
        let held = held.map_or(0, OwnedSemaphorePermit::num_permits);
        if wanted <= CHUNK {
            self.memory = None;
        } else if wanted > held {
            let memory = self.server.memory.clone();
            let more = memory.try_acquire_many_owned((wanted - held) as u32);
            let more = more.map_err(|_| TOO_MUCH_MEMORY)?;
            match &mut self.memory {
                Some(memory) => memory.merge(more),
                memory => *memory = Some(more),
            }
        }
        Ok(())
    }
}
