//! A front end that speaks as Linux's virtio_uml does in Linux 6.1: the table of regions has room for one more, and
//! interrupts go to a socket.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::guest::{DATA, Driver, IN, OK, OUT, RAM, Ram, USER, memfd};
use crate::host::{Host, Served};

const QUEUE_SIZE: u16 = 128;
/// Version 1, and whether an acknowledgement is wanted.
const PLAIN: u32 = 1;
const NEED_REPLY: u32 = 9;

struct FrontEnd(UnixStream);

impl FrontEnd {
    /// Connects, and agrees on features, which are returned.
    fn connect(served: &Served) -> (Self, u64) {
        let stream = UnixStream::connect(&served.socket).expect("connects");
        let limit = Some(Duration::from_secs(60));
        stream.set_read_timeout(limit).expect("limited");
        let mut front_end = Self(stream);
        front_end.send(FrontendReq::SET_OWNER, PLAIN, &[], &[]);
        let features = front_end.ask(FrontendReq::GET_FEATURES);
        let offered = front_end.ask(FrontendReq::GET_PROTOCOL_FEATURES);
        let wanted = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ;
        let wanted = wanted.bits();
        assert_eq!(offered & wanted, wanted);
        front_end.say(FrontendReq::SET_PROTOCOL_FEATURES, &wanted.to_ne_bytes());
        front_end.say(FrontendReq::SET_FEATURES, &features.to_ne_bytes());
        (front_end, features)
    }

    fn send(&self, request: FrontendReq, flags: u32, payload: &[u8], files: &[BorrowedFd<'_>]) {
        let len = u32::try_from(payload.len()).expect("short");
        let mut message: Vec<u8> = [request.into(), flags, len]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect();
        message.extend(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        }
        let parts = [IoSlice::new(&message)];
        let sent = sendmsg(&self.0, &parts, &mut control, SendFlags::empty());
        assert_eq!(sent.expect("sent"), message.len());
    }

    /// The number that a request is answered with; none if the connection is closed.
    fn answer(&mut self, request: FrontendReq) -> Option<u64> {
        let mut answer = [0; 20];
        self.0.read_exact(&mut answer).ok()?;
        let header = [request.into(), 5, 8].map(u32::to_ne_bytes).concat();
        assert_eq!(answer[..12], header);
        Some(u64::from_ne_bytes(answer[12..].try_into().expect("eight")))
    }

    fn ask(&mut self, request: FrontendReq) -> u64 {
        self.send(request, PLAIN, &[], &[]);
        self.answer(request).expect("answered")
    }

    fn say(&mut self, request: FrontendReq, payload: &[u8]) {
        self.send(request, NEED_REPLY, payload, &[]);
        assert_eq!(self.answer(request), Some(0));
    }

    fn say_with(&mut self, request: FrontendReq, payload: &[u8], file: impl AsFd) {
        self.send(request, NEED_REPLY, payload, &[file.as_fd()]);
        assert_eq!(self.answer(request), Some(0));
    }
}

/// The payload of SET_MEM_TABLE: room for two regions, and one of these bytes in it.
fn table(size: u64) -> Vec<u8> {
    let fields = [1, 0, size, USER, 0, 0, 0, 0, 0];
    fields.into_iter().flat_map(u64::to_ne_bytes).collect()
}

fn file(ram: &Ram) -> &File {
    let region = ram.memory.find_region(GuestAddress(0)).expect("there");
    region.file_offset().expect("of a file").file()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[test]
fn a_guest_in_user_mode_linux() {
    let host = Host::new();
    let served = host.serve();
    let ram = Ram::new();
    let (mut front_end, features) = FrontEnd::connect(&served);
    let (mut requests, theirs) = UnixStream::pair().expect("sockets");
    front_end.say_with(FrontendReq::SET_BACKEND_REQ_FD, &[], &theirs);
    drop(theirs);
    front_end.say_with(FrontendReq::SET_MEM_TABLE, &table(RAM), file(&ram));

    let mut driver = Driver::new(&ram, 0, QUEUE_SIZE, features);
    let (mut interrupts, theirs) = UnixStream::pair().expect("sockets");
    let limit = Some(Duration::from_secs(60));
    interrupts.set_read_timeout(limit).expect("limited");
    front_end.say_with(FrontendReq::SET_VRING_CALL, &[0; 8], &theirs);
    drop(theirs);
    let size = words(&[0, QUEUE_SIZE.into()]);
    front_end.say(FrontendReq::SET_VRING_NUM, &size);
    front_end.say(FrontendReq::SET_VRING_BASE, &[0; 8]);
    let places = driver.places();
    let addresses = [
        places.desc_table_addr,
        places.used_ring_addr,
        places.avail_ring_addr,
        u64::MAX,
    ];
    let mut payload = vec![0; 8];
    payload.extend(addresses.into_iter().flat_map(u64::to_ne_bytes));
    front_end.say(FrontendReq::SET_VRING_ADDR, &payload);
    let kick = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    front_end.say_with(FrontendReq::SET_VRING_KICK, &[0; 8], &kick);
    front_end.say(FrontendReq::SET_VRING_ENABLE, &words(&[0, 1]));

    let data: Vec<u8> = (0..4096_u32).map(|index| (index % 251) as u8).collect();
    ram.write(DATA, &data);
    for (kind, address) in [(OUT, DATA), (IN, DATA + 4096)] {
        let head = driver.prepare(kind, 8, &[(address, 4096)]);
        driver.want_interrupts(true);
        rustix::io::write(&kick, &1_u64.to_ne_bytes()).expect("kicked");
        while driver.next_used().is_none() {
            let mut one = [0; 8];
            interrupts.read_exact(&mut one).expect("interrupted");
            assert_eq!(u64::from_ne_bytes(one), 1);
        }
        assert_eq!(driver.status(head), OK);
    }
    assert_eq!(ram.read(DATA + 4096, 4096), data);
    assert_eq!(host.read(4096, 4096), data);
    assert_eq!(host.bounced(), 0);

    requests.set_nonblocking(true).expect("set");
    let nothing = requests.read(&mut [0]).expect_err("nothing is requested");
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock, "it is still open");
    // Memory is replaced while the queue runs.
    front_end.say_with(FrontendReq::SET_MEM_TABLE, &table(RAM), file(&ram));
    drop(front_end);
    host.end([served]);
}

#[test]
fn tables_that_make_no_sense() {
    let host = Host::new();
    let served = host.serve();
    let sealed = memfd(RAM, true);
    let open = memfd(RAM, false);
    let ask = |table: &[u8], files: &[&File]| {
        let (mut front_end, _) = FrontEnd::connect(&served);
        let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        front_end.send(FrontendReq::SET_MEM_TABLE, NEED_REPLY, table, &files);
        // What can't be done is told of, and ends the connection, as what can't be read does.
        let answer = front_end.answer(FrontendReq::SET_MEM_TABLE);
        if answer != Some(0) {
            let read = front_end.0.read(&mut [0]);
            assert_eq!(read.unwrap_or(0), 0, "it is closed");
        }
        answer
    };
    assert_eq!(ask(&table(RAM), &[&sealed]), Some(0));
    assert_eq!(ask(&table(RAM), &[]), None, "a region without a file");
    assert_eq!(ask(&table(RAM), &[&sealed, &sealed]), None, "another file");
    let many = vec![&sealed; 4];
    assert_eq!(ask(&table(RAM), &many), None, "many files");
    assert_eq!(ask(&table(RAM), &[&open]), Some(1), "memory that may go");
    assert_eq!(ask(&table(RAM + 1), &[&sealed]), Some(1), "no pages");
    assert_eq!(ask(&table(0), &[&sealed]), Some(1), "no memory");
    assert_eq!(ask(&table(u64::MAX), &[&sealed]), Some(1), "too much");
    // Of no region, and of more than there can be.
    for count in [0, 33, u32::MAX] {
        let mut wrong = table(RAM);
        wrong[..4].copy_from_slice(&count.to_ne_bytes());
        assert_ne!(ask(&wrong, &[&sealed]), Some(0), "{count} regions");
    }
    // Half of one.
    let (front_end, _) = FrontEnd::connect(&served);
    let mut half = words(&[FrontendReq::SET_MEM_TABLE.into(), NEED_REPLY, 72, 1, 0]);
    half.extend([0; 20]);
    std::io::Write::write_all(&mut &front_end.0, &half).expect("sent");
    drop(front_end);
    host.end([served]);
}
