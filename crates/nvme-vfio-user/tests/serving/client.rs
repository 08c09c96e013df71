//! A client in a few lines: messages, memory in a file, and waiting by looking.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nvme_vfio_user::{Device, Options};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vfio_user::socket::{MessageReader, Received, send};
use vfio_user::{
    Capabilities, DmaMap, IrqAction, IrqData, Limits, Message, RegionAccess, RegionWrite, Reply,
    Request, SetIrqs, SparseArea, TwinSocket, Version, irq, message, region,
};

use crate::queues::{DATA, Pair};

/// Where the client's memory begins for the device.
pub(crate) const BASE: u64 = 0x1_0000_0000;
/// The size of the client's memory.
pub(crate) const MEMORY: u64 = 1 << 20;
/// Long enough for any machine; only a test that fails waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How the server gets at the client's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// A memfd that can't become shorter.
    Sealed,
    /// A memfd that can.
    Unsealed,
    /// By messages on the one socket.
    Messages,
    /// By messages on a second socket.
    Twin,
}

pub(crate) const MEMORIES: [Memory; 4] = [
    Memory::Sealed,
    Memory::Unsealed,
    Memory::Messages,
    Memory::Twin,
];

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    reader: MessageReader,
    twin: Option<(UnixStream, MessageReader)>,
    pub(crate) memory: Memory,
    pub(crate) ram: File,
    pub(crate) doorbells: Option<File>,
    /// What it has mapped of the MSI-X table.
    pub(crate) table: Option<File>,
    pub(crate) shadow: bool,
    pub(crate) register_writes: u32,
    pub(crate) eventfds: Vec<OwnedFd>,
    /// What DMA_READ and DMA_WRITE are answered with instead.
    pub(crate) dma_error: Option<u32>,
    pub(crate) pairs: [Pair; 2],
    next_id: u16,
}

/// A memfd of the size of the client's memory.
pub(crate) fn memfd(is_sealed: bool) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("client", flags).unwrap());
    file.set_len(MEMORY).unwrap();
    if is_sealed {
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    }
    file
}

/// The last page of all addresses, where [`DATA`] is once more.
pub(crate) const LAST_PAGE: u64 = u64::MAX - 4095;

/// Where an address is in the client's memory.
fn place(address: u64) -> u64 {
    match address.checked_sub(LAST_PAGE) {
        Some(offset) => DATA - BASE + offset,
        None => address - BASE,
    }
}

pub(crate) fn map(address: u64, offset: u64, size: u64) -> DmaMap {
    DmaMap {
        readable: true,
        writable: true,
        offset,
        address,
        size,
    }
}

/// Runs `play` as the client of `device`, with a thread that serves it.
pub(crate) fn with<T>(device: &Device, play: impl FnOnce(UnixStream) -> T) -> T {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| device.serve(theirs));
        let outcome = play(ours);
        // Not left to the scope, whose end ThreadSanitizer does not see. However it has ended.
        drop(served.join().unwrap());
        outcome
    })
}

/// A device with 1 MiB of memory in blocks of 512 bytes.
pub(crate) fn device(options: &Options) -> Device {
    let store = nvme_soft::store::MemoryStore::new(1 << 20).unwrap();
    let mut config = nvme_soft::Config::default();
    config
        .namespaces
        .push(nvme_soft::NamespaceConfig::new(store, 512));
    Device::new(config, options).unwrap()
}

impl Client {
    /// A client that has said nothing.
    pub(crate) fn silent(stream: UnixStream, memory: Memory) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            reader: MessageReader::new(Limits::default()),
            twin: None,
            memory,
            ram: memfd(memory == Memory::Sealed),
            doorbells: None,
            table: None,
            shadow: false,
            register_writes: 0,
            eventfds: Vec::new(),
            dma_error: None,
            pairs: Default::default(),
            next_id: 0,
        }
    }

    /// A client that has agreed on a version.
    pub(crate) fn new(stream: UnixStream, memory: Memory) -> Self {
        // So that pages are transferred in parts.
        Self::of_transfer(stream, memory, 1000)
    }

    /// A client that takes so many bytes by one message.
    pub(crate) fn of_transfer(stream: UnixStream, memory: Memory, max_data_xfer_size: u32) -> Self {
        Self::agreed(stream, memory, max_data_xfer_size, false)
    }

    /// A client that masks vectors by stores.
    pub(crate) fn masking(stream: UnixStream) -> Self {
        let mut client = Self::agreed(stream, Memory::Sealed, 1000, true);
        client.set_up();
        client
    }

    fn agreed(
        stream: UnixStream,
        memory: Memory,
        max_data_xfer_size: u32,
        msix_table_mappable: bool,
    ) -> Self {
        let mut client = Self::silent(stream, memory);
        let request = Request::Version(Version {
            major: 0,
            minor: 1,
            capabilities: Capabilities {
                max_msg_fds: 16,
                max_data_xfer_size,
                write_multiple: true,
                twin_socket: (memory == Memory::Twin).then_some(TwinSocket {
                    supported: true,
                    fd_index: None,
                }),
                msix_table_mappable,
                ..Capabilities::default()
            },
        });
        let mut answer = client.ask(&request, &[]);
        let Ok(Reply::Version(version)) = answer.reply(&Limits::default()) else {
            panic!("{answer:?}");
        };
        assert_eq!((version.major, version.minor), (0, 1));
        assert!(!version.capabilities.migration);
        assert_eq!(
            version.capabilities.msix_table_mappable,
            msix_table_mappable
        );
        assert_eq!(version.capabilities.max_msg_fds, 16);
        assert_eq!(answer.fds.len(), usize::from(memory == Memory::Twin));
        if let Some(twin) = answer.fds.pop() {
            let limits = Limits::default();
            client.twin = Some((twin.into(), MessageReader::new(limits)));
        }
        client
    }

    pub(crate) fn map_memory(&mut self) {
        let ram = self.ram.try_clone().unwrap();
        let fds = match self.memory {
            Memory::Sealed | Memory::Unsealed => vec![ram.as_fd()],
            Memory::Messages | Memory::Twin => vec![],
        };
        let request = Request::DmaMap(map(BASE, 0, MEMORY));
        self.ask_ok(&request, &fds);
    }

    pub(crate) fn set_eventfds(&mut self, count: u32) {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let eventfds: Vec<_> = (0..count).map(|_| eventfd(0, flags).unwrap()).collect();
        let fds: Vec<_> = eventfds.iter().map(AsFd::as_fd).collect();
        let request = Request::SetIrqs(SetIrqs {
            index: irq::MSIX,
            start: 0,
            count,
            action: IrqAction::Trigger,
            data: IrqData::Eventfd,
        });
        self.ask_ok(&request, &fds);
        self.eventfds = eventfds;
    }

    pub(crate) fn map_doorbells(&mut self) {
        let index = region::BAR0;
        let short = self.ask(&Request::RegionInfo { argsz: 32, index }, &[]);
        let argsz = match short.reply(&Limits::default()).unwrap() {
            Reply::RegionInfo(info) => {
                assert!(!info.mappable && info.sparse.is_none());
                return;
            }
            Reply::RegionInfoCut { argsz, .. } => argsz,
            other => panic!("{other:?}"),
        };
        let mut answer = self.ask(&Request::RegionInfo { argsz, index }, &[]);
        let Ok(Reply::RegionInfo(info)) = answer.reply(&Limits::default()) else {
            panic!("{answer:?}");
        };
        let mut areas = info.sparse.unwrap();
        assert_eq!((info.size, info.offset), (0x4000, 0));
        let file = File::from(answer.fds.pop().unwrap());
        let mut page = |offset| {
            let size = 0x1000;
            let place = areas
                .iter()
                .position(|area| *area == SparseArea { offset, size });
            place.map(|place| {
                areas.remove(place);
                file.try_clone().unwrap()
            })
        };
        self.doorbells = page(0x1000);
        self.table = page(0x2000);
        assert_eq!(areas, []);
    }

    /// Sends bytes as they are.
    pub(crate) fn send_raw(&mut self, bytes: &[u8], fds: &[&OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send(&self.stream, bytes, &fds).unwrap();
    }

    /// The next reply; serves what the server asks for meanwhile.
    pub(crate) fn receive(&mut self) -> Message {
        loop {
            match self.reader.read(&self.stream).unwrap() {
                Received::Message(message) if message.header.is_reply() => return message,
                Received::Message(message) => self.serve(&message),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Whether the server has closed the connection.
    pub(crate) fn is_over(&mut self) -> bool {
        loop {
            match self.reader.read(&self.stream) {
                Ok(Received::Message(_)) => {}
                Ok(Received::Pending) => return false,
                Ok(Received::Closed) | Err(_) => return true,
            }
        }
    }

    /// Answers DMA_READ or DMA_WRITE.
    fn serve(&mut self, message: &Message) {
        let mut data = Vec::new();
        let reply = match message.request(&Limits::default()).unwrap() {
            Request::DmaRead(access) => {
                assert!(access.count <= 1000);
                data.resize(access.count as usize, 0);
                let place = place(access.address);
                self.ram.read_exact_at(&mut data, place).unwrap();
                Reply::DmaRead {
                    address: access.address,
                    data: &data,
                }
            }
            Request::DmaWrite { address, data } => {
                self.ram.write_all_at(data, place(address)).unwrap();
                Reply::DmaWrite(vfio_user::DmaAccess {
                    address,
                    count: data.len() as u64,
                })
            }
            other => panic!("{other:?}"),
        };
        let bytes = match self.dma_error {
            None => reply.encode(&message.header),
            Some(errno) => vfio_user::error_reply(&message.header, errno),
        };
        let stream = self.twin.as_ref().map_or(&self.stream, |twin| &twin.0);
        send(stream, &bytes, &[]).unwrap();
    }

    /// Serves what the server asks for right now.
    fn pump(&mut self) {
        if let Some((stream, mut reader)) = self.twin.take() {
            stream.set_nonblocking(true).unwrap();
            let received = reader.read(&stream).unwrap();
            stream.set_nonblocking(false).unwrap();
            self.twin = Some((stream, reader));
            if let Received::Message(message) = received {
                self.serve(&message);
            }
        } else if self.memory == Memory::Messages {
            self.stream.set_nonblocking(true).unwrap();
            let received = self.reader.read(&self.stream).unwrap();
            self.stream.set_nonblocking(false).unwrap();
            if let Received::Message(message) = received {
                self.serve(&message);
            }
        }
    }

    pub(crate) fn ask(
        &mut self,
        request: &Request<'_>,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Message {
        self.next_id = self.next_id.wrapping_add(1);
        let bytes = request.encode(self.next_id, false);
        send(&self.stream, &bytes, fds).unwrap();
        // With a second socket what the answer waits for may be asked for there.
        while self.twin.is_some() && !is_readable(&self.stream, Duration::ZERO) {
            self.pump();
        }
        let answer = self.receive();
        assert_eq!(answer.header.id(), self.next_id);
        assert_eq!(answer.header.command(), request.command());
        answer
    }

    /// The error number that a command is answered with.
    pub(crate) fn errno(&mut self, request: &Request<'_>) -> u32 {
        let answer = self.ask(request, &[]);
        assert!(answer.header.is_error(), "{answer:?}");
        answer.header.errno()
    }

    pub(crate) fn ask_ok(&mut self, request: &Request<'_>, fds: &[std::os::fd::BorrowedFd<'_>]) {
        let answer = self.ask(request, fds);
        let reply = answer.reply(&Limits::default()).unwrap();
        assert!(reply.answers(request), "{reply:?}");
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        let access = RegionAccess {
            region,
            offset,
            count,
        };
        let answer = self.ask(&Request::RegionRead(access), &[]);
        match answer.reply(&Limits::default()).unwrap() {
            Reply::RegionRead { data, .. } => data.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let write = RegionWrite {
            region,
            offset,
            data,
        };
        self.ask_ok(&Request::RegionWrite(write), &[]);
    }

    pub(crate) fn read32(&mut self, offset: u32) -> u32 {
        let data = self.read(region::BAR0, offset.into(), 4);
        u32::from_le_bytes(data.try_into().unwrap())
    }

    pub(crate) fn write32(&mut self, offset: u32, value: u32) {
        self.write(region::BAR0, offset.into(), &value.to_le_bytes());
    }

    pub(crate) fn config16(&mut self, offset: u64) -> u16 {
        let data = self.read(region::CONFIG, offset, 2);
        u16::from_le_bytes(data.try_into().unwrap())
    }

    /// Looks until there is something, and serves what the server asks for meanwhile.
    pub(crate) fn wait<T>(
        &mut self,
        what: &str,
        mut look: impl FnMut(&mut Self) -> Option<T>,
    ) -> T {
        let start = Instant::now();
        loop {
            self.pump();
            if let Some(found) = look(self) {
                return found;
            }
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
            std::thread::yield_now();
        }
    }

    pub(crate) fn store(&self, address: u64, value: u32) {
        let bytes = value.to_le_bytes();
        self.ram.write_all_at(&bytes, address - BASE).unwrap();
    }

    pub(crate) fn load(&self, address: u64) -> u32 {
        let mut bytes = [0; 4];
        self.ram.read_exact_at(&mut bytes, address - BASE).unwrap();
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn is_signalled(&self, vector: usize) -> bool {
        let eventfd = &self.eventfds[vector];
        is_readable(eventfd, PATIENCE) && rustix::io::read(eventfd, &mut [0; 8]).is_ok()
    }
}

pub(crate) fn is_readable(fd: impl AsFd, patience: Duration) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let limit = rustix::event::Timespec {
        tv_sec: patience.as_secs() as i64,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&limit)).unwrap() > 0
}

/// A message of these parts, with the size that it has.
pub(crate) fn raw(command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&7_u16.to_ne_bytes());
    bytes.extend_from_slice(&command.to_ne_bytes());
    bytes.extend_from_slice(&(16 + payload.len() as u32).to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(payload);
    let parsed = message(&bytes, &Limits::default());
    assert!(flags > 1 || parsed.is_ok());
    bytes
}
