//! Everything that a controller may do wrong, and how that may end.

use std::time::Duration;

use nvme_soft::NamespaceChange;
use nvme_soft::fault::{
    Behaviour, Change, CompletionField, EnableRefusal, Fault, FaultKind, FaultStatus, Loss,
    TornBlocks, TornEnd,
};
use nvme_spec::Status;

use super::operations::Kind;

/// How a controller may end up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Live,
    Failed,
    Removed,
}

/// One thing that goes wrong.
#[derive(Clone, Debug)]
pub(super) struct Variant {
    /// What strikes a command.
    pub(super) then: Behaviour,
    /// How many commands it strikes.
    pub(super) times: u64,
    /// What strikes besides, once recovery has begun.
    pub(super) besides: Vec<Fault>,
    pub(super) end: End,
    /// What the device says of data can't be believed, and nobody can tell.
    pub(super) lies_about_data: bool,
    /// What was acknowledged and not flushed may be gone.
    pub(super) loses: bool,
    /// The driver rings doorbells of queues that have just ceased to be.
    pub(super) forgets_queues: bool,
    /// A shutdown does not succeed.
    pub(super) spoils_shutdown: bool,
}

impl Variant {
    fn new(then: Behaviour) -> Self {
        Self {
            then,
            times: 1,
            besides: Vec::new(),
            end: End::Live,
            lies_about_data: false,
            loses: false,
            forgets_queues: false,
            spoils_shutdown: false,
        }
    }

    fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }

    fn besides(mut self, fault: Fault) -> Self {
        self.besides.push(fault);
        self
    }

    fn end(mut self, end: End) -> Self {
        self.end = end;
        self
    }

    fn lies(mut self) -> Self {
        self.lies_about_data = true;
        self
    }

    fn loses(mut self) -> Self {
        self.loses = true;
        self.forgets_queues = true;
        self
    }

    fn spoils_shutdown(mut self) -> Self {
        self.spoils_shutdown = true;
        self
    }

    /// Whether it can strike such a command.
    pub(super) fn suits(&self, kind: Kind) -> bool {
        match self.then {
            Behaviour::CompleteEarly(_) => kind.has_data(),
            Behaviour::CorruptData { .. } | Behaviour::TruncateData(_) => kind.reads_data(),
            Behaviour::Tear { .. } => kind.changes_blocks() && kind != Kind::Discard,
            // It takes as long as a shutdown may, and no command is struck.
            Behaviour::Delay(_) if self.spoils_shutdown => kind == Kind::Write,
            _ => true,
        }
    }
}

const SOON: Duration = Duration::from_millis(5);
const TOO_LATE: Duration = Duration::from_millis(600);
const ALWAYS: u64 = 0;

/// What stops a controller so that only a reset helps.
const FAIL: Behaviour = Behaviour::Fail { serve: false };

fn corrupt(field: CompletionField, change: Change) -> Variant {
    Variant::new(Behaviour::CorruptCompletion { field, change })
}

fn status(status: Status) -> Variant {
    Variant::new(Behaviour::Status(FaultStatus::new(status)))
}

fn tear(blocks: TornBlocks, then: TornEnd) -> Variant {
    Variant::new(Behaviour::Tear { blocks, then })
}

fn besides(then: Behaviour, times: u64) -> Fault {
    Fault::new(then).times(times)
}

/// The variants of one kind.
pub(super) fn variants(kind: FaultKind) -> Vec<Variant> {
    use CompletionField::{Cid, Phase, Result, SqHead, SqId};
    match kind {
        FaultKind::Delay => vec![
            Variant::new(Behaviour::Delay(SOON)),
            Variant::new(Behaviour::Delay(TOO_LATE)),
            Variant::new(Behaviour::Delay(TOO_LATE)).times(ALWAYS),
        ],
        FaultKind::Swallow => vec![
            Variant::new(Behaviour::Swallow { execute: false }),
            Variant::new(Behaviour::Swallow { execute: true }),
            Variant::new(Behaviour::Swallow { execute: true }).times(5),
        ],
        FaultKind::Hold => vec![
            Variant::new(Behaviour::Hold),
            Variant::new(Behaviour::Hold).times(7),
        ],
        FaultKind::CompleteTwice => vec![
            Variant::new(Behaviour::CompleteTwice(Duration::ZERO)),
            Variant::new(Behaviour::CompleteTwice(SOON)),
        ],
        FaultKind::OutOfOrder => vec![Variant::new(Behaviour::OutOfOrder(1))],
        FaultKind::CompleteEarly => vec![Variant::new(Behaviour::CompleteEarly(SOON)).lies()],
        FaultKind::Status => vec![
            status(Status::INTERNAL_ERROR),
            status(Status::INTERNAL_ERROR).times(3),
            status(Status::UNRECOVERED_READ_ERROR.with_dnr(true)),
            Variant::new(Behaviour::Status(FaultStatus::after_execution(
                Status::WRITE_FAULT,
            ))),
        ],
        FaultKind::CorruptCompletion => vec![
            corrupt(Cid, Change::Xor(1)),
            corrupt(Cid, Change::Xor(0x8000)),
            corrupt(Cid, Change::Set(0xffff)),
            corrupt(SqId, Change::Set(0x77)),
            corrupt(SqHead, Change::Set(0x7fff)),
            corrupt(SqHead, Change::Xor(0x40)),
            corrupt(Phase, Change::Xor(1)),
            corrupt(Result, Change::Xor(0xffff_ffff)),
        ],
        FaultKind::FlipPhase => vec![Variant::new(Behaviour::FlipPhase)],
        FaultKind::CorruptData => vec![
            Variant::new(Behaviour::CorruptData {
                offset: 0,
                bytes: vec![0xff; 512],
            })
            .lies(),
        ],
        FaultKind::TruncateData => vec![
            Variant::new(Behaviour::TruncateData(0)).lies(),
            Variant::new(Behaviour::TruncateData(100)).lies(),
        ],
        FaultKind::LoseInterrupt => vec![
            Variant::new(Behaviour::LoseInterrupt),
            Variant::new(Behaviour::LoseInterrupt).times(ALWAYS),
        ],
        FaultKind::SpuriousInterrupt => vec![Variant::new(Behaviour::SpuriousInterrupt)],
        FaultKind::Tear => {
            let first = TornBlocks::First(1);
            let failure = FaultStatus::new(Status::INTERNAL_ERROR.with_dnr(true));
            vec![
                tear(first, TornEnd::Swallow),
                tear(TornBlocks::Random(7), TornEnd::Status(failure)),
                tear(first, TornEnd::PowerLoss(Loss::Random(3))).loses(),
            ]
        }
        FaultKind::PowerLoss => [Loss::All, Loss::Nothing, Loss::Random(11)]
            .map(|loss| Variant::new(Behaviour::PowerLoss(loss)).loses())
            .into(),
        FaultKind::Fail => vec![
            Variant::new(FAIL),
            Variant::new(Behaviour::Fail { serve: true }),
        ],
        FaultKind::Vanish => vec![
            Variant::new(Behaviour::Vanish(Loss::All))
                .loses()
                .end(End::Removed),
        ],
        FaultKind::ChangeNamespace => {
            let nsid = 1;
            [
                NamespaceChange::Resize {
                    nsid,
                    bytes: super::SIZE * 2,
                },
                NamespaceChange::Resize {
                    nsid,
                    bytes: super::USED,
                },
                NamespaceChange::Detach { nsid },
            ]
            .map(|change| Variant::new(Behaviour::ChangeNamespace(change)))
            .into()
        }
        FaultKind::AddNamespace => vec![Variant::new(Behaviour::AddNamespace {
            bytes: 1 << 20,
            lba_size: 4096,
        })],
        FaultKind::RefuseEnable => {
            let refuse = Behaviour::RefuseEnable;
            vec![
                Variant::new(FAIL).besides(besides(refuse(EnableRefusal::NeverReady), 1)),
                Variant::new(FAIL).besides(besides(refuse(EnableRefusal::Fail), 2)),
                Variant::new(FAIL)
                    .besides(besides(refuse(EnableRefusal::Fail), ALWAYS))
                    .end(End::Failed),
            ]
        }
        FaultKind::SlowReady => vec![
            Variant::new(FAIL)
                .besides(besides(Behaviour::SlowReady(Duration::from_millis(100)), 1)),
        ],
        FaultKind::HangDisable => {
            vec![Variant::new(FAIL).besides(besides(Behaviour::HangDisable, 1))]
        }
        FaultKind::FailReset => vec![
            Variant::new(FAIL)
                .besides(besides(Behaviour::HangDisable, ALWAYS))
                .besides(besides(Behaviour::FailReset, ALWAYS))
                .end(End::Failed),
        ],
        FaultKind::HangShutdown => vec![
            Variant::new(Behaviour::Delay(SOON))
                .besides(besides(Behaviour::HangShutdown, ALWAYS))
                .spoils_shutdown(),
        ],
        _ => panic!("{kind}: there are no variants of it"),
    }
}
