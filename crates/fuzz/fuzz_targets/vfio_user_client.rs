//! A vfio-user server that follows a script: for each message of the client it says whether the answer is
//! honest, and what comes before it. Then the server goes.
#![no_main]

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use arbitrary::Arbitrary;
use iova::{Direction, HostMemory};
use libfuzzer_sys::fuzz_target;
use nvme_async::device::Device;
use nvme_async::device::vfio_user::{VfioUserDevice, VfioUserOptions};
use nvme_async::memory::SharedMemory;
use vfio_user::socket::{MessageReader, Received, send};
use vfio_user::{
    Capabilities, DeviceInfo, DmaAccess, Header, IrqInfo, Limits, RegionInfo, Reply, Request,
    SparseArea, Version, error_reply, irq, region,
};

/// What a server does.
#[derive(Arbitrary, Clone, Debug)]
struct Script {
    /// At each message of the client. When they are used up, the server goes.
    steps: Vec<Step>,
    max_msg_fds: u8,
    max_dma_maps: u16,
    vectors: u16,
    areas: Vec<(u16, u16)>,
    bar_pages: u8,
    file_pages: u8,
    /// Configuration space.
    config: Vec<u8>,
}

#[derive(Arbitrary, Clone, Debug)]
enum Step {
    Honest,
    /// The honest answer with these bytes changed, of this length.
    Tampered {
        changes: Vec<(u8, u8)>,
        len: Option<u8>,
    },
    Refuse(u32),
    /// Bytes that may be anything, instead.
    Raw(Vec<u8>),
    /// A request first.
    Ask {
        reads: bool,
        offset: i32,
        count: u16,
        no_reply: bool,
    },
    /// Files beside the answer.
    Files(u8),
    Silent,
}

/// I/O virtual address and length of what the client maps.
const IOVA: u64 = 0x10_0000;
const LEN: usize = 0x2000;

// Which errors there are is the server's choice; `run` panics where memory was changed that the server may
// not write.
fuzz_target!(|script: Script| run(&script));

/// Runs a client against a server with this script.
fn run(script: &Script) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let threads_before = threads();
    thread::scope(|scope| {
        let served = scope.spawn(move || serve(script, &theirs));
        let mut options = VfioUserOptions::default();
        options.vectors = 4;
        // A server that goes is noticed before; one that says nothing costs no more than this.
        options.connect_timeout = Duration::from_millis(20);
        options.reply_timeout = Duration::from_millis(20);
        if let Ok(device) = VfioUserDevice::over(ours, "fuzz", &options) {
            use_device(&device);
        }
        // Not left to the scope, by whose end a thread still has what a search for leaks would find.
        served.join().expect("the server does not panic");
    });
    // For the same reason: the client's own ends when it sees that the server has gone.
    while threads() > threads_before {
        thread::yield_now();
    }
}

/// How many threads this process has.
fn threads() -> usize {
    fs::read_dir("/proc/self/task")
        .expect("procfs is mounted")
        .count()
}

/// What a driver does with a device, with a page behind what is mapped that must stay as it is.
fn use_device(device: &VfioUserDevice) {
    let memory = SharedMemory::new(2 * LEN).expect("a little memory");
    let file = File::from(memory.fd().try_clone_to_owned().expect("a descriptor"));
    let mapper = device.mapper();
    let host = HostMemory::new(memory.addr(), LEN).with_file(memory.fd(), 0);
    // SAFETY: the memory lives until the device, which is dropped or closed before it, is gone, and nobody
    // has a reference to it.
    let mapped = unsafe { mapper.map(IOVA, &host, Direction::Bidirectional) };
    for offset in [0x1000, 0x1004, 0x2000, 0x4000] {
        if let Ok(doorbell) = device.doorbell(offset) {
            doorbell.ring(1);
            doorbell.ring(2);
        }
    }
    let _ = device.read32(0x1c);
    let _ = device.write32(0x14, 1);
    let _ = device.set_bus_master(true);
    let _ = device.reset();
    if mapped.is_ok() {
        let _ = mapper.unmap(IOVA, LEN as u64);
    }
    let _ = device.set_bus_master(false);
    device.close();
    let mut behind = [0xff; LEN];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut behind, LEN as u64).expect("reads");
    assert!(behind.iter().all(|&byte| byte == 0), "a stray write");
}

fn serve(script: &Script, client: &UnixStream) {
    let mut reader = MessageReader::new(Limits::default());
    let mut steps = script.steps.iter();
    while let Ok(Received::Message(message)) = reader.read(client) {
        if message.header.is_reply() {
            continue;
        }
        let Ok(request) = message.request(&Limits::default()) else {
            panic!("the client sent nonsense: {message:?}");
        };
        // An opening takes this many messages; a script that says less is honest about the rest.
        let step = match steps.next() {
            Some(step) => step,
            None if script.steps.len() < 64 => &Step::Honest,
            None => return,
        };
        let Some(sent) = answer(script, step, client, &message.header, &request) else {
            return;
        };
        if sent.is_err() {
            return;
        }
    }
}

fn answer(
    script: &Script,
    step: &Step,
    mut client: &UnixStream,
    header: &Header,
    request: &Request<'_>,
) -> Option<std::io::Result<()>> {
    let is_bar = matches!(request, Request::RegionInfo { index: 0, .. });
    let mut files = Vec::new();
    if is_bar && script.file_pages > 0 {
        files.push(file(script.file_pages));
    }
    let mut bytes = honest(script, header, request);
    match step {
        Step::Honest => {}
        Step::Tampered { changes, len } => {
            if let Some(len) = len {
                bytes.resize((*len).into(), 0);
            }
            for &(at, change) in changes {
                if let Some(byte) = bytes.get_mut(usize::from(at)) {
                    *byte ^= change;
                }
            }
        }
        Step::Refuse(errno) => bytes = error_reply(header, *errno),
        Step::Raw(raw) => bytes = raw.clone(),
        &Step::Ask {
            reads,
            offset,
            count,
            no_reply,
        } => {
            let address = IOVA.wrapping_add_signed(offset.into());
            let data = vec![0xee; count.into()];
            let ask = if reads {
                Request::DmaRead(DmaAccess {
                    address,
                    count: count.into(),
                })
            } else {
                Request::DmaWrite {
                    address,
                    data: &data,
                }
            };
            if let Err(error) = client.write_all(&ask.encode(1, no_reply)) {
                return Some(Err(error));
            }
        }
        Step::Files(count) => files.extend((0..*count % 20).map(|_| file(1))),
        Step::Silent => return Some(Ok(())),
    }
    if bytes.is_empty() || !header.wants_reply() {
        return Some(Ok(()));
    }
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    Some(send(client, &bytes, &fds))
}

fn file(pages: u8) -> File {
    let memory = SharedMemory::new(usize::from(pages) << 12).expect("a little memory");
    File::from(memory.fd().try_clone_to_owned().expect("a descriptor"))
}

fn honest(script: &Script, header: &Header, request: &Request<'_>) -> Vec<u8> {
    let reply = match request {
        Request::Version(version) => Reply::Version(Version {
            capabilities: Capabilities {
                max_msg_fds: script.max_msg_fds.into(),
                max_dma_maps: script.max_dma_maps.into(),
                ..Capabilities::default()
            },
            ..version.clone()
        }),
        Request::DeviceInfo { .. } => Reply::DeviceInfo(DeviceInfo {
            resets: true,
            is_pci: true,
            regions: region::COUNT,
            irqs: irq::COUNT,
        }),
        Request::RegionInfo { argsz, index } => {
            let size = match *index {
                region::BAR0 => u64::from(script.bar_pages) << 12,
                _ => 0x100,
            };
            let areas = script.areas.iter().map(|&(offset, size)| SparseArea {
                offset: u64::from(offset) << 4,
                size: u64::from(size) << 4,
            });
            let info = RegionInfo {
                index: *index,
                readable: true,
                writable: true,
                mappable: script.file_pages > 0,
                size,
                offset: 0,
                sparse: (!script.areas.is_empty()).then(|| areas.collect()),
            };
            let needed = info.full_size();
            if *argsz < needed {
                let info = RegionInfo {
                    sparse: None,
                    ..info
                };
                let cut = Reply::RegionInfoCut {
                    info,
                    argsz: needed,
                };
                return cut.encode(header);
            }
            Reply::RegionInfo(info)
        }
        Request::IrqInfo { index, .. } => Reply::IrqInfo(IrqInfo {
            index: *index,
            count: script.vectors.into(),
            eventfd: true,
            maskable: script.vectors % 2 == 1,
            automasked: false,
            noresize: false,
        }),
        Request::SetIrqs(_) => Reply::SetIrqs,
        Request::RegionRead(access) => {
            let data = registers(script, access.region, access.offset, access.count);
            let reply = Reply::RegionRead {
                region: access.region,
                offset: access.offset,
                data: &data,
            };
            return reply.encode(header);
        }
        Request::RegionWrite(write) => Reply::RegionWrite(write.access()),
        Request::DmaMap(_) => Reply::DmaMap,
        Request::DmaUnmap(unmap) => Reply::DmaUnmap(*unmap),
        Request::DeviceReset => Reply::DeviceReset,
        _ => return error_reply(header, 95),
    };
    reply.encode(header)
}

/// Configuration space is what the script says, but for what opens the way to what follows: the class,
/// and a command register that has taken what was written. Registers are 0.
fn registers(script: &Script, index: u32, offset: u64, count: u32) -> Vec<u8> {
    let mut config = [0; 0x110];
    let len = script.config.len().min(0x100);
    config[..len].copy_from_slice(&script.config[..len]);
    config[4..6].copy_from_slice(&0x402_u16.to_le_bytes());
    config[9..12].copy_from_slice(&[0x02, 0x08, 0x01]);
    let from = usize::try_from(offset).unwrap_or(0).min(0x100);
    let count = (count as usize).min(16);
    match index {
        region::CONFIG => config[from..from + count].to_vec(),
        _ => vec![0; count],
    }
}
