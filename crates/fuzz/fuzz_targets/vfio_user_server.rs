//! A client of the vfio-user server that says, and does to its memory, what the input says.
#![no_main]

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nvme_soft::store::MemoryStore;
use nvme_soft::{Config, NamespaceConfig};
use nvme_vfio_user::{Device, Doorbells, Options};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vfio_user::socket::{MessageReader, Received, send};
use vfio_user::{
    Capabilities, DmaAccess, DmaMap, DmaUnmap, IrqAction, IrqData, Limits, Message, RegionAccess,
    RegionWrite, Reply, Request, SetIrqs, TwinSocket, Version, error_reply, irq, message, region,
};

const PAGE: u64 = 4096;
/// The client's memory.
const MEMORY: u64 = 16 * PAGE;

#[derive(Arbitrary, Debug)]
struct Script {
    is_mapped: bool,
    is_sealed: bool,
    has_twin: bool,
    says_hello: bool,
    maps_memory: Option<bool>,
    /// How DMA_READ and DMA_WRITE are answered, one after the other.
    answers: Vec<Answer>,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Answer {
    Right,
    Error,
    /// With this much less data.
    Short(u8),
    OtherId,
    Nothing,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Descriptor {
    Memory,
    Eventfd,
    Socket,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// Bytes as they are.
    Raw(Vec<u8>),
    /// A message of these parts.
    Message {
        command: u8,
        flags: u8,
        payload: Vec<u8>,
        descriptors: Vec<Descriptor>,
    },
    Map {
        page: u8,
        pages: u8,
        offset: u8,
        readable: bool,
        writable: bool,
        descriptor: Option<Descriptor>,
    },
    Unmap {
        page: u8,
        pages: u8,
    },
    Irqs {
        index: u8,
        start: u8,
        count: u8,
        action: u8,
        bools: Option<Vec<u8>>,
        eventfds: u8,
    },
    Read {
        region: u8,
        offset: u16,
        count: u16,
    },
    Write {
        region: u8,
        offset: u16,
        data: Vec<u8>,
        no_reply: bool,
    },
    /// Sets up the admin queue, with these entries.
    Enable {
        entries: u8,
    },
    /// Puts bytes at the beginning of an entry of a submission queue.
    Submit {
        queue: u8,
        entry: u8,
        command: [u8; 24],
        page: u8,
    },
    Ring {
        doorbell: u8,
        value: u8,
    },
    Truncate {
        pages: u8,
    },
    Reset,
}

fuzz_target!(|script: Script| run(&script));

fn run(script: &Script) {
    let mut config = Config {
        io_queue_pairs: 4,
        spin: Duration::ZERO,
        ..Config::default()
    };
    let store = MemoryStore::new(64 << 10).expect("it is small");
    config.namespaces.push(NamespaceConfig::new(store, 512));
    let mut options = Options::default();
    if script.is_mapped {
        options.doorbells = Doorbells::Mapped;
    }
    let device = Device::new(config, &options).expect("a possible configuration");
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    thread::scope(|scope| {
        // However it ends: it may, but not by a panic.
        let served = scope.spawn(|| drop(device.serve(theirs)));
        Client::new(script, ours).play(script);
        // Not left to the scope, by whose end a thread still has what a search for leaks would find.
        served.join().expect("it does not panic");
    });
    is_as_new(&device);
}

/// The next client finds nothing of the last one.
fn is_as_new(device: &Device) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    thread::scope(|scope| {
        let served = scope.spawn(|| device.serve(theirs));
        let mut reader = MessageReader::new(Limits::default());
        let mut ask = |request: Request<'_>| {
            send(&ours, &request.encode(1, false), &[]).expect("sent");
            let Ok(Received::Message(message)) = reader.read(&ours) else {
                panic!("no answer to {request:?}");
            };
            match message.reply(&Limits::default()).expect("an answer") {
                Reply::RegionRead { data, .. } => data.to_vec(),
                _ => Vec::new(),
            }
        };
        let _ = ask(Request::Version(version(false)));
        for (region, offset, value) in [
            // CC, CSTS; Command, MSI-X Message Control; the first vector's control, pending bits.
            (region::BAR0, 0x14, 0),
            (region::BAR0, 0x1c, 0),
            (region::CONFIG, 4, 0x0010_0000),
            (region::CONFIG, 0x50, 0x0004_6011),
            (region::BAR0, 0x200c, 1),
            (region::BAR0, 0x3000, 0),
        ] {
            let access = RegionAccess {
                region,
                offset,
                count: 4,
            };
            let found = ask(Request::RegionRead(access));
            assert_eq!(found, u32::to_le_bytes(value), "{region} {offset:#x}");
        }
        ours.shutdown(Shutdown::Both).expect("it is open");
        let served = served.join().expect("it does not panic");
        served.expect("a client that means well");
    });
}

fn version(has_twin: bool) -> Version {
    Version {
        major: 0,
        minor: 1,
        capabilities: Capabilities {
            max_data_xfer_size: 512,
            twin_socket: has_twin.then_some(TwinSocket {
                supported: true,
                fd_index: None,
            }),
            ..Capabilities::default()
        },
    }
}

struct Client {
    stream: UnixStream,
    memory: File,
    /// What listens to the server.
    listener: Option<thread::JoinHandle<()>>,
}

impl Client {
    fn new(script: &Script, stream: UnixStream) -> Self {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = File::from(memfd_create("client", flags).expect("a memfd"));
        memory.set_len(MEMORY).expect("it is small");
        if script.is_sealed {
            fcntl_add_seals(&memory, SealFlags::SHRINK).expect("sealed");
        }
        let clone = stream.try_clone().expect("cloned");
        let ram = memory.try_clone().expect("cloned");
        let answers = script.answers.clone();
        Self {
            listener: Some(thread::spawn(move || listen(&clone, &ram, answers))),
            stream,
            memory,
        }
    }

    fn play(mut self, script: &Script) {
        if script.says_hello {
            self.ask(&Request::Version(version(script.has_twin)), false, &[]);
        }
        if let Some(has_file) = script.maps_memory {
            self.map(
                0,
                MEMORY,
                0,
                true,
                true,
                has_file.then_some(Descriptor::Memory),
            );
            // Bus master; MSI-X enable.
            self.write(region::CONFIG, 4, &[6, 4], true);
            self.write(region::CONFIG, 0x52, &[0, 0x80], true);
        }
        for step in &script.steps {
            self.step(step);
        }
        // All that was said is heard before the end is.
        let _ = self.stream.shutdown(Shutdown::Write);
        if let Some(listener) = self.listener.take() {
            listener.join().expect("it only listens");
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Raw(bytes) => self.say(bytes, &[]),
            Step::Message {
                command,
                flags,
                payload,
                descriptors,
            } => {
                let mut bytes = vec![1, 0, *command % 24, 0];
                bytes.extend_from_slice(&(16 + payload.len() as u32).to_ne_bytes());
                bytes.extend_from_slice(&u32::from(*flags & 0x30).to_ne_bytes());
                bytes.extend_from_slice(&[0; 4]);
                bytes.extend_from_slice(payload);
                self.say(&bytes, descriptors);
            }
            Step::Map {
                page,
                pages,
                offset,
                readable,
                writable,
                descriptor,
            } => {
                let address = u64::from(*page) * PAGE;
                let size = u64::from(*pages) * PAGE / 4;
                let offset = u64::from(*offset) * PAGE / 4;
                self.map(address, size, offset, *readable, *writable, *descriptor);
            }
            Step::Unmap { page, pages } => {
                let unmap = DmaUnmap {
                    all: *pages == 0,
                    address: u64::from(*page) * PAGE,
                    size: u64::from(*pages) * PAGE,
                };
                self.ask(&Request::DmaUnmap(unmap), false, &[]);
            }
            Step::Irqs {
                index,
                start,
                count,
                action,
                bools,
                eventfds,
            } => {
                let data = match bools {
                    Some(bools) => IrqData::Bool(bools),
                    None if *eventfds > 0 => IrqData::Eventfd,
                    None => IrqData::None,
                };
                let set = SetIrqs {
                    index: if *index < 200 {
                        irq::MSIX
                    } else {
                        (*index).into()
                    },
                    start: (*start % 8).into(),
                    count: (*count % 8).into(),
                    action: [IrqAction::Mask, IrqAction::Unmask, IrqAction::Trigger]
                        [usize::from(*action % 3)],
                    data,
                };
                let descriptors = vec![Descriptor::Eventfd; usize::from(*eventfds % 8)];
                self.ask(&Request::SetIrqs(set), false, &descriptors);
            }
            Step::Read {
                region,
                offset,
                count,
            } => {
                let access = RegionAccess {
                    region: (*region % 10).into(),
                    offset: (*offset).into(),
                    count: (*count).into(),
                };
                self.ask(&Request::RegionRead(access), false, &[]);
            }
            Step::Write {
                region,
                offset,
                data,
                no_reply,
            } => {
                let region = if *region < 128 {
                    region::BAR0
                } else {
                    region::CONFIG
                };
                self.write(region, (*offset).into(), data, *no_reply);
            }
            Step::Enable { entries } => {
                let entries = u32::from(*entries);
                let words = [
                    (0x24, entries << 16 | entries),
                    (0x28, 0),
                    (0x2c, 0),
                    (0x30, 0x1000),
                ];
                for (offset, value) in words {
                    self.write(region::BAR0, offset, &value.to_le_bytes(), true);
                }
                self.write(
                    region::BAR0,
                    0x14,
                    &(6_u32 << 16 | 4 << 20 | 1).to_le_bytes(),
                    false,
                );
            }
            Step::Submit {
                queue,
                entry,
                command,
                page,
            } => {
                let place = u64::from(*queue % 8) * 2 * PAGE + u64::from(*entry) * 64;
                // Opcode, namespace; PRP 1; the first command dwords.
                let mut bytes = [0; 64];
                bytes[..8].copy_from_slice(&command[..8]);
                bytes[24..32].copy_from_slice(&(u64::from(*page) * PAGE).to_le_bytes());
                bytes[40..56].copy_from_slice(&command[8..]);
                // Past the end the file only grows.
                let _ = self.memory.write_all_at(&bytes, place);
            }
            Step::Ring { doorbell, value } => {
                let offset = 0x1000 + u64::from(*doorbell % 12) * 4;
                self.write(region::BAR0, offset, &u32::from(*value).to_le_bytes(), true);
            }
            Step::Truncate { pages } => {
                // Not if it is sealed.
                let _ = self.memory.set_len(u64::from(*pages) * PAGE);
            }
            Step::Reset => self.ask(&Request::DeviceReset, false, &[]),
        }
    }

    fn map(
        &mut self,
        address: u64,
        size: u64,
        offset: u64,
        readable: bool,
        writable: bool,
        descriptor: Option<Descriptor>,
    ) {
        let map = DmaMap {
            readable,
            writable,
            offset,
            address,
            size,
        };
        let descriptors: Vec<_> = descriptor.into_iter().collect();
        self.ask(&Request::DmaMap(map), false, &descriptors);
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8], no_reply: bool) {
        let write = RegionWrite {
            region,
            offset,
            data,
        };
        self.ask(&Request::RegionWrite(write), no_reply, &[]);
    }

    fn ask(&mut self, request: &Request<'_>, no_reply: bool, descriptors: &[Descriptor]) {
        self.say(&request.encode(1, no_reply), descriptors);
    }

    /// Sends something. That the server has had enough is no failure.
    fn say(&mut self, bytes: &[u8], descriptors: &[Descriptor]) {
        let made: Vec<OwnedFd> = descriptors
            .iter()
            .take(20)
            .map(|descriptor| match descriptor {
                Descriptor::Memory => self.memory.try_clone().expect("cloned").into(),
                Descriptor::Eventfd => eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"),
                Descriptor::Socket => self.stream.try_clone().expect("cloned").into(),
            })
            .collect();
        let fds: Vec<BorrowedFd<'_>> = made.iter().map(AsFd::as_fd).collect();
        let _ = send(&self.stream, bytes, &fds);
    }
}

/// Reads what the server says until it has nothing to say any more, and answers what it asks.
fn listen(stream: &UnixStream, memory: &File, answers: Vec<Answer>) {
    let mut reader = MessageReader::new(Limits::default());
    let mut left = answers.iter().copied();
    let mut others = Vec::new();
    while let Ok(Received::Message(message)) = reader.read(stream) {
        if message.header.is_reply() {
            // The second socket, or else the page of doorbells, at which there is nothing to read.
            for fd in message.fds {
                let (memory, answers) = (memory.try_clone().expect("cloned"), answers.clone());
                others.push(thread::spawn(move || listen(&fd.into(), &memory, answers)));
            }
            continue;
        }
        let answer = left.next().unwrap_or(Answer::Right);
        if let Some(bytes) = reply(&message, memory, answer)
            && send(stream, &bytes, &[]).is_err()
        {
            break;
        }
    }
    for other in others {
        other.join().expect("it only listens");
    }
}

fn reply(asked: &Message, memory: &File, answer: Answer) -> Option<Vec<u8>> {
    let request = asked
        .request(&Limits::default())
        .expect("the server asks properly");
    let mut data = [0; 512];
    let reply = match request {
        Request::DmaRead(DmaAccess { address, count }) => {
            let data = &mut data[..count as usize];
            // Past the end it stays as it is.
            let _ = memory.read_at(data, address);
            let len = match answer {
                Answer::Short(less) => data.len().saturating_sub(less.into()),
                _ => data.len(),
            };
            Reply::DmaRead {
                address,
                data: &data[..len],
            }
        }
        Request::DmaWrite { address, data } => {
            let _ = memory.write_at(data, address % MEMORY);
            Reply::DmaWrite(DmaAccess {
                address,
                count: data.len() as u64,
            })
        }
        other => panic!("the server asks for {other:?}"),
    };
    let mut bytes = match answer {
        Answer::Error => error_reply(&asked.header, 14),
        _ => reply.encode(&asked.header),
    };
    match answer {
        Answer::OtherId => bytes[0] ^= 1,
        // The server waits until the client leaves.
        Answer::Nothing => return None,
        _ => {}
    }
    debug_assert!(message(&bytes, &Limits::default()).is_ok());
    Some(bytes)
}
