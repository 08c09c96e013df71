//! A guest whose virtqueue, and the memory that it points to, is what the input says.
#![no_main]

use std::fs::File;
use std::future::pending;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nvme_export::Export;
use nvme_export::vhost_user_blk::{Device, Options};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tokio::runtime::{Builder, Runtime};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Two regions of guest memory, side by side.
const REGION: u64 = 64 << 10;
/// Where the front end says that it has them.
const USER: u64 = 1 << 40;
/// Descriptors of the queue.
const SIZE: u16 = 16;
/// Where the queue is: its table, its rings, and tables for the input to use.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const TABLES: u64 = 0x3000;
/// Where headers are, and what else requests are made of.
const HEADERS: u64 = 0x4000;
/// How long a queue may take for anything.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Arbitrary, Debug)]
struct Script {
    has_indirect: bool,
    has_event_index: bool,
    is_read_only: bool,
    has_inflight: bool,
    base: u16,
    /// In the queue's table, and in memory.
    table: [Descriptor; SIZE as usize],
    tables: [Descriptor; SIZE as usize],
    headers: [Header; 8],
    /// What is available, and how much is said to be.
    heads: [u8; SIZE as usize],
    count: Count,
    /// For the used ring to be overwritten with, and the in-flight states.
    used: u16,
    inflight: Vec<u8>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Count {
    Right(u8),
    Any(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Descriptor {
    place: Place,
    len: Len,
    flags: u8,
    next: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Header(u8),
    Table(u8),
    Page(u8),
    Byte(u16),
    /// Around the end of a region: the first one, or all.
    End(bool, i8),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Len {
    Header,
    Blocks(u8),
    Entries(u8),
    Few(u8),
    Any(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Header {
    kind: u8,
    sector: Sector,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Sector {
    Near(u8),
    Any(u64),
}

impl Descriptor {
    fn bytes(self) -> [u8; 16] {
        let address = match self.place {
            Place::Header(index) => HEADERS + u64::from(index % 8) * 16,
            Place::Table(index) => TABLES + u64::from(index % 16) * 16,
            Place::Page(page) => u64::from(page) * 4096,
            Place::Byte(address) => address.into(),
            Place::End(all, offset) => {
                let end = if all { 2 * REGION } else { REGION };
                end.wrapping_add_signed(offset.into())
            }
            Place::Any(address) => address,
        };
        let len: u32 = match self.len {
            Len::Header => 16,
            Len::Blocks(blocks) => u32::from(blocks) * 512,
            Len::Entries(entries) => u32::from(entries) * 16,
            Len::Few(bytes) => bytes.into(),
            Len::Any(len) => len,
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12] = self.flags;
        bytes[14] = self.next % (SIZE as u8 + 2);
        bytes
    }
}

impl Header {
    fn bytes(self) -> [u8; 16] {
        let sector = match self.sector {
            Sector::Near(sector) => sector.into(),
            Sector::Any(sector) => sector,
        };
        let mut bytes = [0; 16];
        bytes[0] = self.kind % 18;
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }
}

/// What all guests share: a runtime, and a disk of 64 KiB, once to write and once to read.
struct Host {
    runtime: Runtime,
    devices: [Device; 2],
}

fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(|| {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let namespace = runtime
            .block_on(nvme_async::open("mem:?size=64K"))
            .expect("it is small");
        let export = Export::new(namespace).expect("it is there");
        let options = Options::default();
        let devices = [export.clone(), export.read_only()].map(|it| Device::new(it, &options));
        Host { runtime, devices }
    })
}

fuzz_target!(|script: Script| run(&script));

fn run(script: &Script) {
    let host = host();
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let device = host.devices[usize::from(script.is_read_only)].clone();
    let served = host
        .runtime
        .spawn(async move { device.serve(theirs, pending()).await });
    play(script, ours);
    // However it ends: it may, but not by a panic.
    drop(host.runtime.block_on(served).expect("it does not panic"));
}

fn play(script: &Script, stream: UnixStream) {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = File::from(memfd_create("guest", flags).expect("a memfd"));
    memory.set_len(2 * REGION).expect("it is small");
    fcntl_add_seals(&memory, SealFlags::SHRINK).expect("sealed");
    let available = write_queue(script, &memory);

    let mut messages = Frontend::from_stream(stream, 1);
    messages.set_owner().expect("said");
    let mut features = messages.get_features().expect("answered");
    for (is_wanted, bit) in [(script.has_indirect, 28), (script.has_event_index, 29)] {
        if !is_wanted {
            features &= !(1 << bit);
        }
    }
    messages.set_features(features).expect("said");
    let protocol = messages.get_protocol_features().expect("answered");
    messages.set_protocol_features(protocol).expect("said");
    messages.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let regions = [0, REGION].map(|start| VhostUserMemoryRegionInfo {
        guest_phys_addr: start,
        memory_size: REGION,
        userspace_addr: USER + start,
        mmap_offset: start,
        mmap_handle: memory.as_raw_fd(),
    });
    messages.set_mem_table(&regions).expect("taken");
    if script.has_inflight {
        let wanted = vhost::vhost_user::message::VhostUserInflight::new(0, 0, 1, SIZE);
        let (described, file) = messages.get_inflight_fd(&wanted).expect("made");
        let len = script.inflight.len().min(512);
        file.write_all_at(&script.inflight[..len], 0)
            .expect("written");
        messages
            .set_inflight_fd(&described, file.as_raw_fd())
            .expect("taken");
    }
    let eventfd = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let (kick, call, broken) = (eventfd(), eventfd(), eventfd());
    let places = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: USER + TABLE,
        used_ring_addr: USER + USED,
        avail_ring_addr: USER + AVAILABLE,
        log_addr: None,
    };
    messages.set_vring_num(0, SIZE).expect("taken");
    messages.set_vring_base(0, script.base).expect("taken");
    messages.set_vring_addr(0, &places).expect("taken");
    messages.set_vring_call(0, &call).expect("taken");
    messages.set_vring_err(0, &broken).expect("taken");
    messages.set_vring_kick(0, &kick).expect("taken");
    // Kept in-flight states that are none are refused.
    if messages.set_vring_enable(0, true).is_err() {
        return;
    }
    // Either all that is available is given back, or the queue is broken; a guest that has its own
    // queue overwritten may see neither.
    let until = Instant::now() + PATIENCE;
    let mut looks = 0;
    while broken.read().is_err() && used_index(&memory) != available {
        looks += 1;
        if looks > 200 && is_odd(script) {
            break;
        }
        assert!(Instant::now() < until, "the queue does nothing: {script:?}");
        thread::sleep(Duration::from_micros(50));
    }
    messages.get_vring_base(0).expect("stopped");
}

/// Whether the rings may not mean what they say: data is written there, or what is in flight is made up.
fn is_odd(script: &Script) -> bool {
    let writes_low = |descriptor: &Descriptor| descriptor.flags & 2 != 0;
    let mut all = script.table.iter().chain(&script.tables);
    script.has_inflight || all.any(writes_low)
}

/// Writes everything into memory; returns the index up to which chains are available.
fn write_queue(script: &Script, memory: &File) -> u16 {
    let write = |at: u64, bytes: &[u8]| memory.write_all_at(bytes, at).expect("inside");
    for (index, descriptor) in script.table.iter().enumerate() {
        write(TABLE + index as u64 * 16, &descriptor.bytes());
    }
    for (index, descriptor) in script.tables.iter().enumerate() {
        write(TABLES + index as u64 * 16, &descriptor.bytes());
    }
    for (index, header) in script.headers.iter().enumerate() {
        write(HEADERS + index as u64 * 16, &header.bytes());
    }
    for (index, head) in script.heads.iter().enumerate() {
        let head = u16::from(head % (SIZE as u8 + 1));
        write(AVAILABLE + 4 + index as u64 * 2, &head.to_le_bytes());
    }
    let index = match script.count {
        Count::Right(count) => script.base.wrapping_add(u16::from(count) % (SIZE + 1)),
        Count::Any(index) => index,
    };
    write(AVAILABLE + 2, &index.to_le_bytes());
    // As a driver that has used its queue before: what was taken was given back.
    let used = match script.has_inflight {
        true => script.used,
        false => script.base,
    };
    write(USED + 2, &used.to_le_bytes());
    index
}

fn used_index(memory: &File) -> u16 {
    let mut index = [0; 2];
    memory.read_exact_at(&mut index, USED + 2).expect("inside");
    u16::from_le_bytes(index)
}
