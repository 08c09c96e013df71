//! A server of the tests' own, with the traps that real ones have: a software controller behind a
//! vfio-user socket.
//!
//! It serves one client at a time, and what a client leaves in the function is there for the next one.

mod function;
mod memory;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nvme_async::memory::SharedMemory;
use nvme_soft::store::MemoryStore;
use nvme_soft::{Config, NamespaceConfig, SoftController};
use vfio_user::socket::{MessageReader, Received};
use vfio_user::{Limits, Message, Request, error_reply};

use self::function::{Function, Irqs};
use self::memory::Dma;

/// Bytes of the namespace.
pub(crate) const SIZE: u64 = 6 << 20;
pub(crate) const BAR_SIZE: u64 = 0x4000;

/// How the server is.
#[derive(Clone, Copy)]
pub(crate) struct Traps {
    /// Doorbells can be mapped.
    pub(crate) maps_doorbells: bool,
    /// The file of the doorbells is too short for what the server says.
    pub(crate) short_file: bool,
    pub(crate) max_msg_fds: u32,
    pub(crate) max_dma_maps: u64,
    pub(crate) vectors: u16,
    /// How long each register takes.
    pub(crate) register_time: Duration,
    /// Memory is accessed by messages.
    pub(crate) asks_for_memory: bool,
    /// DEVICE_RESET disables the controller.
    pub(crate) reset_disables: bool,
    /// What a former client left in the PCI command register and in the MSI-X capability.
    pub(crate) command: u16,
    pub(crate) msix_control: u16,
    /// Interrupts come only while no head of a completion queue moves, and several at a time.
    pub(crate) adaptive_interrupts: bool,
}

impl Default for Traps {
    fn default() -> Self {
        Self {
            maps_doorbells: true,
            short_file: false,
            max_msg_fds: 8,
            max_dma_maps: 64,
            vectors: 32,
            register_time: Duration::ZERO,
            asks_for_memory: false,
            reset_disables: true,
            command: 0,
            msix_control: 0,
            adaptive_interrupts: false,
        }
    }
}

/// The controller, with the limits of SPDK's.
pub(crate) fn config() -> Config {
    let mut config = Config::default();
    let store = MemoryStore::new(SIZE).expect("a little memory");
    config.namespaces.push(NamespaceConfig::new(store, 512));
    config.max_queue_entries = 256;
    config.mdts = 5;
    config.doorbell_buffers = false;
    config.io_queue_pairs = 16;
    config
}

/// What the server does instead of answering a request honestly.
pub(crate) enum Act {
    Refuse(u32),
    /// Changes the honest reply.
    Edit(Change),
    /// Passes this file with the honest reply.
    Pass(File),
    Silence,
    Close,
}

type Change = Box<dyn FnOnce(&mut Vec<u8>) + Send>;
type Hook = Box<dyn FnMut(&Request<'_>) -> Option<Act> + Send>;

/// What happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The PCI command register was written.
    Command(u16),
    /// So was the message control of MSI-X.
    MsixControl(u16),
    /// So many vectors were given eventfds, from the first on.
    Vectors(u32, u32),
    /// A register was read.
    Read(u32),
    /// A register was written.
    Write(u32, u32),
    /// A doorbell came as a message.
    Doorbell(u32),
    Map(u64),
    Reset,
    Left,
}

pub(crate) struct Peer {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

pub(crate) struct Shared {
    pub(crate) function: Function,
    pub(crate) dma: Arc<Dma>,
    hook: Mutex<Option<Hook>>,
    client: Mutex<Option<UnixStream>>,
    ends: AtomicBool,
}

impl Peer {
    pub(crate) fn start(traps: Traps) -> Self {
        Self::with(traps, config())
    }

    pub(crate) fn with(traps: Traps, config: Config) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("nvme.sock");
        let listener = UnixListener::bind(&path).expect("listens");
        let dma = Arc::new(Dma::new(traps.asks_for_memory));
        let irqs = Arc::new(Irqs::new(&traps));
        let controller = SoftController::start(config, dma.clone(), irqs.clone());
        let controller = controller.expect("starts");
        controller.set_bus_master(false);
        let shared = Arc::new(Shared {
            function: Function::new(traps, controller, irqs),
            dma,
            hook: Mutex::default(),
            client: Mutex::default(),
            ends: AtomicBool::new(false),
        });
        let served = shared.clone();
        let thread = thread::spawn(move || {
            thread::scope(|scope| {
                scope.spawn(|| served.function.watch_doorbells(|| served.ends()));
                for client in listener.incoming() {
                    if served.ends() {
                        break;
                    }
                    served.serve(&client.expect("accepts"));
                }
            });
        });
        Self {
            path,
            shared,
            thread: Some(thread),
            _directory: directory,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn url(&self) -> String {
        format!("vfio-user:{}?ns=1", self.path.display())
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// From now on requests are answered as this says.
    pub(crate) fn hook(&self, hook: impl FnMut(&Request<'_>) -> Option<Act> + Send + 'static) {
        *lock(&self.shared.hook) = Some(Box::new(hook));
    }

    pub(crate) fn behave(&self) {
        *lock(&self.shared.hook) = None;
    }

    /// Closes the connection to the client that there is.
    pub(crate) fn hang_up(&self) {
        if let Some(client) = lock(&self.shared.client).take() {
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
    }

    /// What happened since the last call.
    pub(crate) fn events(&self) -> Vec<Event> {
        std::mem::take(&mut *lock(&self.shared.function.events))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
        self.hang_up();
        let _ = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the peer panicked");
        }
    }
}

impl Shared {
    fn ends(&self) -> bool {
        self.ends.load(Ordering::Acquire)
    }

    /// Serves one client until it leaves.
    fn serve(&self, client: &UnixStream) {
        *lock(&self.client) = Some(client.try_clone().expect("a descriptor"));
        let (requests, received) = mpsc::channel();
        thread::scope(|scope| {
            // What a request needs may be what the client has yet to answer.
            scope.spawn(move || self.answer_all(client, &received));
            self.read(client, requests);
        });
        self.function.forbid_memory();
        self.dma.clear();
        self.function.forget_vectors();
        self.function.note(Event::Left);
        *lock(&self.client) = None;
    }

    fn read(&self, client: &UnixStream, requests: Sender<Message>) {
        let limits = Limits {
            max_fds: self.function.traps.max_msg_fds as usize,
            ..Limits::default()
        };
        let mut reader = MessageReader::new(limits);
        self.dma.connect(client.try_clone().expect("a descriptor"));
        while let Ok(Received::Message(message)) = reader.read(client) {
            if message.header.is_reply() {
                self.dma.answered(message);
            } else if requests.send(message).is_err() {
                break;
            }
        }
        self.dma.disconnect();
    }

    fn answer_all(&self, client: &UnixStream, requests: &Receiver<Message>) {
        for message in requests {
            if self.answer(client, message).is_err() {
                // The other thread finds out too.
                let _ = client.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    }

    fn answer(&self, client: &UnixStream, mut message: Message) -> io::Result<()> {
        let fds = std::mem::take(&mut message.fds);
        let limits = Limits::default();
        let request = Request::decode(&message.header, &message.payload, fds.len(), &limits)
            .unwrap_or_else(|error| panic!("the client sent nonsense: {error}"));
        let act = lock(&self.hook).as_mut().and_then(|hook| hook(&request));
        let mut beside: Vec<OwnedFd> = Vec::new();
        let mut reply = match &act {
            Some(Act::Refuse(errno)) => error_reply(&message.header, *errno),
            Some(Act::Close) => return Err(io::ErrorKind::ConnectionAborted.into()),
            _ => match self
                .function
                .answer(&message.header, &request, fds, &self.dma)
            {
                Ok((reply, file)) => {
                    beside.extend(file);
                    reply
                }
                Err(errno) => error_reply(&message.header, errno),
            },
        };
        match act {
            Some(Act::Edit(edit)) => edit(&mut reply),
            Some(Act::Pass(file)) => beside = vec![file.into()],
            Some(Act::Silence) => return Ok(()),
            _ => {}
        }
        if !message.header.wants_reply() {
            return Ok(());
        }
        self.dma.send(client, &reply, &beside)
    }
}

/// A file of so many zeroes.
fn file(len: u64) -> File {
    let memory = SharedMemory::new(len as usize).expect("a little memory");
    File::from(memory.fd().try_clone_to_owned().expect("a descriptor"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panics")
}
