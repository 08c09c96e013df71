//! What the device does with commands.

use iova::Direction;
use nvme_spec::identify::{
    ActiveNamespaces, Cns, IdentifyController, IdentifyNamespace, IdentifyNvmController,
    OptionalNvmCommands,
};
use nvme_spec::nvm::BlockRange;
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use nvme_spec::registers::offset;
use nvme_spec::sgl::{Sgl, SglDescriptor};
use nvme_spec::{Cqe, DataPointer, Sqe, Status, copy, dsm, feature};
use zerocopy::{FromBytes, IntoBytes};

use super::memory::Refused;
use super::{Completion, Fetched, FuzzDevice, State, Submission};
use crate::script::{Move, Place};

const PAGE: u64 = 4096;
/// No command has more data.
const MOST_DATA: u64 = 1 << 20;

/// What a command is answered with.
struct Answer {
    status: Status,
    result: u32,
}

impl Answer {
    const SUCCESS: Self = Self {
        status: Status::SUCCESS,
        result: 0,
    };
}

impl FuzzDevice {
    /// A doorbell was rung.
    pub(super) fn rung(&self, offset: u32, value: u32) {
        let state = &mut *self.state();
        let index = (offset - offset::DOORBELLS) / state.stride();
        // Of completion queues nothing is learned: they are as long as their submission queues.
        if !index.is_multiple_of(2) {
            return;
        }
        let queue = (index / 2) as u16;
        self.check_withheld(state);
        while state.is_serving()
            && let Some(fetched) = self.fetch(state, queue, value)
        {
            match state.next_move() {
                None => self.complete_rightly(state, fetched, true),
                Some(scripted) => self.follow(state, fetched, scripted),
            }
        }
    }

    fn fetch(&self, state: &mut State, queue: u16, tail: u32) -> Option<Fetched> {
        let has_misled = state.has_misled;
        let submission = state.submissions.get_mut(&queue)?;
        assert!(
            tail < submission.entries || has_misled,
            "the driver rings {tail:#x}"
        );
        if submission.head == tail || tail >= submission.entries {
            return None;
        }
        let address = submission.address + u64::from(submission.head) * 64;
        submission.head = (submission.head + 1) % submission.entries;
        let head = submission.head;
        let mut bytes = [0; 64];
        let read = self.mapper.read(address, &mut bytes);
        state.check(read, "a submission queue")?;
        let command = Sqe::read_from_bytes(&bytes).ok()?;
        Some(Fetched {
            command,
            queue,
            head,
        })
    }

    /// The memory of commands that were not completed is still the device's, whatever became of their
    /// futures.
    fn check_withheld(&self, state: &State) {
        if state.has_forged || !state.is_serving() {
            return;
        }
        for held in &state.withheld {
            for (address, len) in self.data(state, held).unwrap_or_default() {
                let direction = direction(held);
                let reached = self.mapper.reach(address, len as usize, direction);
                state.check(reached, "the data of a command that is outstanding");
            }
        }
    }

    fn follow(&self, state: &mut State, fetched: Fetched, scripted: Move) {
        match scripted {
            Move::Complete(wrong) => {
                state.has_forged = true;
                let status = Status::from_bits(wrong.status);
                let entry = Cqe::new(fetched.command.cid() ^ wrong.cid, status)
                    .with_sq(
                        fetched.queue ^ wrong.sq_id,
                        fetched.head as u16 ^ wrong.sq_head,
                    )
                    .with_result(wrong.result);
                for _ in 0..wrong.times % 4 {
                    self.post(state, fetched.queue, entry, wrong.stale, wrong.interrupt);
                }
            }
            Move::Withhold => state.withheld.push(fetched),
            Move::Late(index) => {
                self.complete_rightly(state, fetched, true);
                if let Some(index) = usize::from(index).checked_rem(state.withheld.len()) {
                    let late = state.withheld.remove(index);
                    if state.has_forged {
                        // The driver may have its data back for all we know.
                        self.answer(state, late, &Answer::SUCCESS, true);
                    } else {
                        self.complete_rightly(state, late, true);
                    }
                }
            }
            Move::Data(start, bytes) => {
                let pieces = self.data(state, &fetched);
                let answer = self.execute(state, fetched);
                if let Some((address, len)) = pieces.and_then(|pieces| pieces.first().copied()) {
                    let start = u64::from(start).min(len);
                    let room = (len - start).min(bytes.len() as u64) as usize;
                    // A command that sends data has memory that is not for us to write.
                    let _ = self.mapper.write(address + start, &bytes[..room]);
                }
                if let Some(answer) = answer {
                    self.answer(state, fetched, &answer, true);
                }
            }
            Move::Scribble(place, start, bytes) => {
                let pointer = fetched.command.dwords();
                let qword =
                    |low: usize| u64::from(pointer[low + 1]) << 32 | u64::from(pointer[low]);
                let address = match place {
                    Place::Submission(index) => {
                        nth(state.submissions.values(), index).map(|queue| queue.address)
                    }
                    Place::Completion(index) => {
                        nth(state.completions.values(), index).map(|queue| queue.address)
                    }
                    Place::Prp1 => Some(qword(6)),
                    Place::Prp2 => Some(qword(8)),
                    Place::Mapping(index) => self.mapper.address_of(index.into()),
                };
                self.complete_rightly(state, fetched, true);
                if let Some(address) = address.and_then(|at| at.checked_add(start.into())) {
                    (state.has_scribbled, state.has_forged) = (true, true);
                    let _ = self.mapper.write(address, &bytes);
                }
            }
            Move::Entry {
                queue,
                after,
                dwords,
            } => {
                self.complete_rightly(state, fetched, true);
                state.has_forged = true;
                if let Some(queue) = nth(state.completions.values(), queue) {
                    let slot = (queue.tail + u32::from(after)) % queue.entries;
                    let address = queue.address + u64::from(slot) * 16;
                    let _ = self.mapper.write(address, dwords.as_bytes());
                }
            }
            Move::Interrupt(vector) => {
                self.complete_rightly(state, fetched, true);
                self.signal(vector.into());
            }
            Move::Silent => self.complete_rightly(state, fetched, false),
            Move::Event(result) => {
                self.complete_rightly(state, fetched, true);
                if let Some(request) = state.events.pop_front() {
                    let answer = Answer {
                        result,
                        ..Answer::SUCCESS
                    };
                    self.answer(state, request, &answer, true);
                }
            }
            Move::Status(status) => {
                self.complete_rightly(state, fetched, true);
                state.registers.status = Some(status);
            }
            Move::Vanish => state.has_vanished = true,
        }
    }

    fn complete_rightly(&self, state: &mut State, fetched: Fetched, interrupt: bool) {
        if let Some(answer) = self.execute(state, fetched) {
            self.answer(state, fetched, &answer, interrupt);
        }
    }

    fn answer(&self, state: &mut State, fetched: Fetched, answer: &Answer, interrupt: bool) {
        let entry = Cqe::new(fetched.command.cid(), answer.status)
            .with_sq(fetched.queue, fetched.head as u16)
            .with_result(answer.result);
        self.post(state, fetched.queue, entry, false, interrupt);
    }

    /// Posts an entry where the completions of a submission queue go.
    fn post(&self, state: &mut State, queue: u16, entry: Cqe, stale: bool, interrupt: bool) {
        let Some(submission) = state.submissions.get(&queue) else {
            return;
        };
        let Some(completion) = state.completions.get_mut(&submission.completion) else {
            return;
        };
        let entry = entry.with_phase(completion.phase != stale);
        let address = completion.address + u64::from(completion.tail) * 16;
        completion.tail += 1;
        if completion.tail == completion.entries {
            completion.tail = 0;
            completion.phase = !completion.phase;
        }
        let vector = completion.vector.filter(|_| interrupt);
        let written = self.mapper.write(address, entry.dwords().as_bytes());
        state.check(written, "a completion queue");
        if let Some(vector) = vector {
            self.signal(vector);
        }
    }

    /// Does what the command says; nothing if it is not to be answered yet.
    fn execute(&self, state: &mut State, fetched: Fetched) -> Option<Answer> {
        let command = &fetched.command;
        if fetched.queue != 0 {
            self.move_data(state, &fetched);
            return Some(Answer::SUCCESS);
        }
        let low = (command.cdw10() & 0xffff) as u16;
        let entries = (command.cdw10() >> 16) + 1;
        let address = match command.data_pointer() {
            Ok(DataPointer::Prp { prp1, .. }) => prp1,
            _ => 0,
        };
        let mut result = 0;
        match AdminOpcode(command.opcode()) {
            AdminOpcode::IDENTIFY | AdminOpcode::GET_LOG_PAGE => self.move_data(state, &fetched),
            AdminOpcode::SET_FEATURES if low as u8 == feature::id::NUMBER_OF_QUEUES => {
                result = state.claims.queues.unwrap_or(command.cdw11());
            }
            AdminOpcode::CREATE_IO_COMPLETION_QUEUE => {
                let vector = (command.cdw11() >> 16) as u16;
                let completion = Completion {
                    address,
                    entries,
                    tail: 0,
                    phase: true,
                    vector: (command.cdw11() & 0b10 != 0).then_some(vector),
                };
                state.completions.insert(low, completion);
            }
            AdminOpcode::CREATE_IO_SUBMISSION_QUEUE => {
                let submission = Submission {
                    address,
                    entries,
                    head: 0,
                    completion: (command.cdw11() >> 16) as u16,
                };
                state.submissions.insert(low, submission);
            }
            AdminOpcode::DELETE_IO_SUBMISSION_QUEUE => {
                state.submissions.remove(&low);
                state.withheld.retain(|withheld| withheld.queue != low);
            }
            AdminOpcode::DELETE_IO_COMPLETION_QUEUE => {
                state.completions.remove(&low);
            }
            AdminOpcode::ABORT => {
                let cid = (command.cdw10() >> 16) as u16;
                let is_it = |held: &Fetched| held.queue == low && held.command.cid() == cid;
                let index = state.withheld.iter().position(is_it);
                // Bit 0: it was not aborted.
                result = index.is_none().into();
                if let Some(index) = index {
                    let aborted = state.withheld.remove(index);
                    let answer = Answer {
                        status: Status::ABORT_REQUESTED,
                        result: 0,
                    };
                    self.answer(state, aborted, &answer, true);
                }
            }
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                state.events.push_back(fetched);
                return None;
            }
            _ => {}
        }
        Some(Answer {
            result,
            ..Answer::SUCCESS
        })
    }

    /// Transfers the command's data: what is identified, or anything.
    fn move_data(&self, state: &mut State, fetched: &Fetched) {
        let Some(pieces) = self.data(state, fetched) else {
            return;
        };
        let identified = match fetched.queue {
            0 => state.identify(&fetched.command),
            _ => Vec::new(),
        };
        let mut done = 0;
        for (address, len) in pieces {
            let len = len as usize;
            let mut bytes = vec![0xa5; len];
            if let Some(rest) = identified.get(done..) {
                let now = rest.len().min(len);
                bytes[..now].copy_from_slice(&rest[..now]);
            }
            let moved = match direction(fetched) {
                Direction::ToDevice => self.mapper.read(address, &mut bytes),
                _ => self.mapper.write(address, &bytes),
            };
            state.check(moved, "data");
            done += len;
        }
    }

    /// Where the command's data is; nothing if it has none that can be found.
    fn data(&self, state: &State, fetched: &Fetched) -> Option<Vec<(u64, u64)>> {
        let len = state.data_len(fetched).filter(|&len| len > 0)?;
        let found = match fetched.command.data_pointer() {
            Ok(DataPointer::Prp { prp1, prp2 }) => self.prps(prp1, prp2, len),
            Ok(DataPointer::Sgl(descriptor)) => self.sgl(descriptor),
            Err(_) => return None,
        };
        state.check(found, "a list of data")
    }

    fn prps(&self, prp1: u64, prp2: u64, len: u64) -> Result<Vec<(u64, u64)>, Refused> {
        let first = (PAGE - prp1 % PAGE).min(len);
        let mut pieces = vec![(prp1, first)];
        let mut left = len - first;
        if left > PAGE {
            let mut next = prp2;
            while left > 0 {
                let mut entry = [0; 8];
                self.mapper.read(next, &mut entry)?;
                let entry = u64::from_le_bytes(entry);
                next += 8;
                if next.is_multiple_of(PAGE) && left > PAGE {
                    next = entry;
                    continue;
                }
                let now = left.min(PAGE);
                pieces.push((entry, now));
                left -= now;
            }
        } else if left > 0 {
            pieces.push((prp2, left));
        }
        Ok(pieces)
    }

    fn sgl(&self, first: SglDescriptor) -> Result<Vec<(u64, u64)>, Refused> {
        let mut pieces = Vec::new();
        let (address, len) = match first.decode() {
            Ok(Sgl::DataBlock { address, length }) => return Ok(vec![(address, length.into())]),
            Ok(Sgl::LastSegment { address, length } | Sgl::Segment { address, length }) => {
                (address, u64::from(length).min(PAGE))
            }
            _ => return Ok(pieces),
        };
        for index in 0..len / 16 {
            let mut bytes = [0; 16];
            self.mapper.read(address + index * 16, &mut bytes)?;
            let Ok(descriptor) = SglDescriptor::read_from_bytes(&bytes) else {
                continue;
            };
            if let Ok(Sgl::DataBlock { address, length }) = descriptor.decode() {
                pieces.push((address, u64::from(length).min(MOST_DATA)));
            }
        }
        Ok(pieces)
    }
}

impl State {
    fn is_serving(&self) -> bool {
        !self.has_vanished && self.registers.bus_master && self.registers.configuration.en()
    }

    /// What the script has for the next command.
    fn next_move(&mut self) -> Option<Move> {
        let (left, _) = self.moves.front_mut()?;
        match left.checked_sub(1) {
            Some(fewer) => {
                *left = fewer;
                None
            }
            None => self.moves.pop_front().map(|(_, scripted)| scripted),
        }
    }

    /// An access that the IOMMU refuses is the driver's fault, unless the device has changed the
    /// driver's memory.
    fn check<T>(&self, access: Result<T, Refused>, what: &str) -> Option<T> {
        assert!(
            access.is_ok() || self.has_scribbled,
            "the driver gave the device memory that it has not mapped: {what}"
        );
        access.ok()
    }

    fn data_len(&self, fetched: &Fetched) -> Option<u64> {
        let command = &fetched.command;
        let len = match (fetched.queue, command.opcode()) {
            (0, opcode) => match AdminOpcode(opcode) {
                AdminOpcode::IDENTIFY => PAGE,
                AdminOpcode::GET_LOG_PAGE => u64::from((command.cdw10() >> 16) + 1) * 4,
                _ => 0,
            },
            (_, opcode) => match NvmOpcode(opcode) {
                NvmOpcode::READ | NvmOpcode::WRITE | NvmOpcode::COMPARE => {
                    let block = self.namespace().format()?.lba_size()?;
                    u64::from(BlockRange::from_command(command).blocks) * u64::from(block)
                }
                NvmOpcode::DATASET_MANAGEMENT => {
                    u64::from((command.cdw10() & 0xff) + 1) * size_of::<dsm::Range>() as u64
                }
                NvmOpcode::COPY => {
                    u64::from((command.cdw12() & 0xff) + 1) * size_of::<copy::SourceRange>() as u64
                }
                _ => 0,
            },
        };
        (len <= MOST_DATA).then_some(len)
    }

    fn identify(&self, command: &Sqe) -> Vec<u8> {
        if AdminOpcode(command.opcode()) != AdminOpcode::IDENTIFY {
            return Vec::new();
        }
        match Cns(command.cdw10() as u8) {
            Cns::CONTROLLER => {
                let sound = IdentifyController {
                    mdts: 5,
                    acl: 3,
                    aerl: 3,
                    sqes: 0x66,
                    cqes: 0x44,
                    nn: 4.into(),
                    oncs: OptionalNvmCommands::from_bits(0x01ff).into_bits().into(),
                    vwc: 1,
                    ..IdentifyController::default()
                };
                changed(sound.as_bytes(), &self.claims.controller)
            }
            Cns::NAMESPACE => self.namespace().as_bytes().to_vec(),
            Cns::COMMAND_SET_CONTROLLER => changed(
                IdentifyNvmController::default().as_bytes(),
                &self.claims.nvm_controller,
            ),
            Cns::ACTIVE_NAMESPACES => {
                let mut list = ActiveNamespaces::default();
                list.entries[0].set(1);
                for (entry, &nsid) in list.entries.iter_mut().zip(&self.claims.namespaces) {
                    entry.set(nsid);
                }
                list.as_bytes().to_vec()
            }
            _ => Vec::new(),
        }
    }

    fn namespace(&self) -> IdentifyNamespace {
        let mut sound = IdentifyNamespace {
            nsze: 2048.into(),
            ncap: 2048.into(),
            dlfeat: 0b1001,
            mssrl: 16.into(),
            mcl: 32.into(),
            msrc: 3,
            ..IdentifyNamespace::default()
        };
        sound.lbaf[0].lbads = 9;
        let bytes = changed(sound.as_bytes(), &self.claims.namespace);
        IdentifyNamespace::read_from_bytes(&bytes).unwrap_or(sound)
    }
}

/// Which way the data of a command goes.
fn direction(fetched: &Fetched) -> Direction {
    match (fetched.queue, NvmOpcode(fetched.command.opcode())) {
        (0, _) | (_, NvmOpcode::READ) => Direction::FromDevice,
        _ => Direction::ToDevice,
    }
}

/// A structure with other bytes in some places.
fn changed(sound: &[u8], changes: &[(u16, u8)]) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for &(at, value) in changes {
        bytes[usize::from(at) % sound.len()] = value;
    }
    bytes
}

fn nth<T>(mut of: impl ExactSizeIterator<Item = T>, index: u8) -> Option<T> {
    usize::from(index)
        .checked_rem(of.len())
        .and_then(|index| of.nth(index))
}
