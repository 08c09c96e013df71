//! What the client has the controller do: queues, doorbells and commands.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nvme_spec::registers::{DoorbellKind, doorbell_offset, offset};
use nvme_spec::{Cqe, DataPointer, Sqe, admin};
use vfio_user::socket::send;
use vfio_user::{RegionWrite, Request, region};
use zerocopy::IntoBytes;

use crate::client::{BASE, Client, Memory};

/// Where data goes.
pub(crate) const DATA: u64 = BASE + 0x1_0000;
/// Where shadow doorbells and event indices are.
pub(crate) const SHADOW: u64 = BASE + 0x8000;
pub(crate) const EVENT_INDEX: u64 = BASE + 0x9000;
pub(crate) const ENTRIES: u32 = 16;

/// One queue pair.
#[derive(Default)]
pub(crate) struct Pair {
    tail: u32,
    head: u32,
    /// Whether the phase tag of new entries is 0.
    is_odd: bool,
    next_cid: u16,
}

impl Client {
    /// A client with its memory mapped, interrupts set up and the controller enabled, in the order that all
    /// servers take.
    pub(crate) fn up(stream: UnixStream, memory: Memory) -> Self {
        let mut client = Self::new(stream, memory);
        client.set_up();
        client
    }

    /// Does that for one that has agreed on a version.
    pub(crate) fn set_up(&mut self) {
        self.map_memory();
        // Bus master, interrupt disable; MSI-X enable.
        self.write(region::CONFIG, 4, &0x0406_u16.to_le_bytes());
        self.set_eventfds(2);
        self.write(region::CONFIG, 0x52, &0x8000_u16.to_le_bytes());
        self.map_doorbells();
        self.enable();
    }

    pub(crate) fn enable(&mut self) {
        self.pairs = Default::default();
        self.ram.write_all_at(&[0; 0x1000], 0x1000).unwrap();
        self.ram.write_all_at(&[0; 0x1000], 0x3000).unwrap();
        let entries = ENTRIES - 1;
        self.write32(offset::AQA, entries << 16 | entries);
        self.write(region::BAR0, offset::ASQ.into(), &BASE.to_le_bytes());
        let completions = BASE + 0x1000;
        self.write(region::BAR0, offset::ACQ.into(), &completions.to_le_bytes());
        self.write32(offset::CC, 6 << 16 | 4 << 20 | 1);
        self.wait("CSTS.RDY", |client| {
            (client.read32(offset::CSTS) & 1 != 0).then_some(())
        });
    }

    pub(crate) fn create_queues(&mut self) {
        let command = admin::create_completion_queue(1, ENTRIES, BASE + 0x3000, Some(1));
        self.admin_ok(command);
        let priority = admin::QueuePriority::Medium;
        let command = admin::create_submission_queue(1, ENTRIES, BASE + 0x2000, 1, priority);
        self.admin_ok(command);
    }

    fn ring(&mut self, id: u16, kind: DoorbellKind, old: u32, value: u32) {
        let offset = doorbell_offset(id, kind, 0);
        if self.shadow && id > 0 {
            let place = u64::from(offset - 0x1000);
            self.store(SHADOW + place, value);
            let event_index = self.load(EVENT_INDEX + place);
            let passed = value.wrapping_sub(event_index).wrapping_sub(1) as u16;
            if passed >= value.wrapping_sub(old) as u16 {
                return;
            }
        }
        if let Some(page) = &self.doorbells {
            page.write_all_at(&value.to_le_bytes(), offset.into())
                .unwrap();
            return;
        }
        self.register_writes += 1;
        // Nobody waits for the reply to that.
        let data = value.to_le_bytes();
        let write = RegionWrite {
            region: region::BAR0,
            offset: offset.into(),
            data: &data,
        };
        let bytes = Request::RegionWrite(write).encode(0, true);
        send(&self.stream, &bytes, &[]).unwrap();
    }

    /// Submits a command; returns its identifier.
    pub(crate) fn submit(&mut self, id: u16, command: Sqe) -> u16 {
        let queue = u64::from(id) * 0x2000;
        let pair = &mut self.pairs[usize::from(id)];
        let (cid, old) = (pair.next_cid, pair.tail);
        pair.next_cid = pair.next_cid.wrapping_add(1);
        pair.tail = (pair.tail + 1) % ENTRIES;
        let tail = pair.tail;
        let place = queue + u64::from(old) * 64;
        let command = command.with_cid(cid);
        self.ram.write_all_at(command.as_bytes(), place).unwrap();
        self.ring(id, DoorbellKind::SubmissionTail, old, tail);
        cid
    }

    /// The next completion, if it is there.
    pub(crate) fn look(&mut self, id: u16) -> Option<Cqe> {
        let pair = &self.pairs[usize::from(id)];
        let place = BASE + 0x1000 + u64::from(id) * 0x2000 + u64::from(pair.head) * 16;
        let last = self.load(place + 12);
        if (last >> 16 & 1 == 0) != pair.is_odd {
            return None;
        }
        let dwords = [0, 4, 8].map(|offset| self.load(place + offset));
        let entry = Cqe::from_dwords([dwords[0], dwords[1], dwords[2], last]);
        let pair = &mut self.pairs[usize::from(id)];
        let old = pair.head;
        pair.head = (pair.head + 1) % ENTRIES;
        pair.is_odd ^= pair.head == 0;
        let head = pair.head;
        self.ring(id, DoorbellKind::CompletionHead, old, head);
        Some(entry)
    }

    pub(crate) fn run(&mut self, id: u16, command: Sqe) -> Cqe {
        let cid = self.submit(id, command);
        let entry = self.wait("a completion", |client| client.look(id));
        assert_eq!((entry.cid(), entry.sq_id()), (cid, id));
        entry
    }

    pub(crate) fn admin_ok(&mut self, command: Sqe) {
        let entry = self.run(0, command);
        assert!(
            entry.status().is_success(),
            "{command:?}: {}",
            entry.status()
        );
    }

    pub(crate) fn io_ok(&mut self, command: Sqe) {
        let entry = self.run(1, command);
        assert!(
            entry.status().is_success(),
            "{command:?}: {}",
            entry.status()
        );
    }
}

pub(crate) fn prp(address: u64) -> DataPointer {
    DataPointer::Prp {
        prp1: address,
        prp2: 0,
    }
}
