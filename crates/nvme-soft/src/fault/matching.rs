//! Which commands and events a fault strikes.

use std::ops::Range;

use nvme_spec::Sqe;
use nvme_spec::nvm::BlockRange;
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use serde::{Deserialize, Serialize};

/// What a command must be to be struck, and which of those are. The default matches everything,
/// once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// The submission queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<FaultQueue>,
    /// The opcode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opcode: Option<Opcode>,
    /// The namespace identifier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nsid: Option<u32>,
    /// Logical blocks of which the command's range has at least one. Commands whose range is not in
    /// the command itself do not match, except that of a Copy the first destination block counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lba: Option<Range<u64>>,
    /// The first one that is struck of those that match, from 1.
    pub nth: u64,
    /// How many are struck.
    pub times: Times,
    /// The probability with which each is struck; `None` for always.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probability: Option<f64>,
    /// Decides, where there is a probability.
    pub seed: u64,
}

impl Default for Match {
    fn default() -> Self {
        Self {
            queue: None,
            opcode: None,
            nsid: None,
            lba: None,
            nth: 1,
            times: Times::default(),
            probability: None,
            seed: 0,
        }
    }
}

impl Match {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The first key that asks for a command.
    pub(super) fn command_key(&self) -> Option<&'static str> {
        [
            ("queue", self.queue.is_some()),
            ("opcode", self.opcode.is_some()),
            ("nsid", self.nsid.is_some()),
            ("lba", self.lba.is_some()),
        ]
        .into_iter()
        .find_map(|(key, is_given)| is_given.then_some(key))
    }

    /// Whether a command of this submission queue is one of those that are counted.
    pub(super) fn selects(&self, submission_queue: u16, command: &Sqe) -> bool {
        self.queue.is_none_or(|queue| queue.is(submission_queue))
            && self
                .opcode
                .is_none_or(|opcode| opcode.is_of(submission_queue, command))
            && self.nsid.is_none_or(|nsid| nsid == command.nsid())
            && self.lba.as_ref().is_none_or(|lba| {
                blocks_of(submission_queue, command)
                    .is_some_and(|blocks| blocks.start < lba.end && lba.start < blocks.end)
            })
    }
}

/// The logical blocks of a command, as far as it names them itself.
fn blocks_of(submission_queue: u16, command: &Sqe) -> Option<Range<u64>> {
    if submission_queue == 0 {
        return None;
    }
    let range = BlockRange::from_command(command);
    let blocks = match NvmOpcode(command.opcode()) {
        NvmOpcode::READ
        | NvmOpcode::WRITE
        | NvmOpcode::COMPARE
        | NvmOpcode::VERIFY
        | NvmOpcode::WRITE_ZEROES
        | NvmOpcode::WRITE_UNCORRECTABLE => range.blocks.into(),
        NvmOpcode::COPY => 1,
        _ => return None,
    };
    Some(range.slba..range.slba.saturating_add(blocks))
}

/// A submission queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultQueue {
    /// The admin queue.
    Admin,
    /// Any I/O queue.
    Io,
    /// The queue with this identifier.
    Id(u16),
}

impl FaultQueue {
    fn is(self, submission_queue: u16) -> bool {
        match self {
            Self::Admin => submission_queue == 0,
            Self::Io => submission_queue != 0,
            Self::Id(id) => submission_queue == id,
        }
    }
}

/// An opcode, of one kind of queue or of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    /// Of an admin command.
    Admin(AdminOpcode),
    /// Of an I/O command.
    Io(NvmOpcode),
    /// Of any command.
    Any(u8),
}

impl Opcode {
    fn is_of(self, submission_queue: u16, command: &Sqe) -> bool {
        match self {
            Self::Admin(AdminOpcode(opcode)) => submission_queue == 0 && opcode == command.opcode(),
            Self::Io(NvmOpcode(opcode)) => submission_queue != 0 && opcode == command.opcode(),
            Self::Any(opcode) => opcode == command.opcode(),
        }
    }
}

impl From<AdminOpcode> for Opcode {
    fn from(opcode: AdminOpcode) -> Self {
        Self::Admin(opcode)
    }
}

impl From<NvmOpcode> for Opcode {
    fn from(opcode: NvmOpcode) -> Self {
        Self::Io(opcode)
    }
}

/// How often a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// That often.
    Limited(u64),
    /// Always.
    Always,
}

impl Default for Times {
    fn default() -> Self {
        Self::Limited(1)
    }
}

impl From<u64> for Times {
    /// 0 stands for always.
    fn from(times: u64) -> Self {
        match times {
            0 => Self::Always,
            times => Self::Limited(times),
        }
    }
}

impl Times {
    pub(super) fn is_left_after(self, hits: u64) -> bool {
        match self {
            Self::Limited(times) => hits < times,
            Self::Always => true,
        }
    }
}
