//! What can go wrong, and how often it does in one history.

use std::cell::Cell;

use fastrand::Rng;
use nvme_spec::feature;
use nvme_spec::opcode::AdminOpcode;

use crate::recovery::action::Place;

macro_rules! faults {
    ($($(#[$doc:meta])* $kind:ident: $place:ident $most:literal,)*) => {
        /// A kind of thing that a controller, its transport or its host does wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub(super) enum Fault {
            $($(#[$doc])* $kind,)*
        }

        impl Fault {
            pub(super) const ALL: &[Self] = &[$(Self::$kind),*];

            /// When it may strike, and of how many thousand such chances it takes at most.
            fn occasion(self) -> (Occasion, u32) {
                match self {
                    $(Self::$kind => (Occasion::$place, $most),)*
                }
            }
        }
    };
}

/// When a fault may strike.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// At an I/O command, its completion or its doorbell.
    Command,
    /// At some time, a few times in a history.
    Moment,
    /// At a step of a recovery.
    Recovery,
}

faults! {
    /// A command is not completed until it is aborted.
    NeverDone: Command 20,
    /// A command is never completed, and can't be aborted.
    NeverDoneNorAborted: Command 15,
    /// A command is completed after its deadline.
    Late: Command 20,
    /// A command is executed and completed although an Abort command has found it.
    DoneAfterAbort: Command 20,
    /// An error status that lets hope for another try, at once.
    ErrorRetry: Command 60,
    /// The same, after a delay that the controller asks for.
    ErrorDelayed: Command 200,
    /// An error status with Do Not Retry.
    ErrorFinal: Command 60,
    /// An error status after a part was executed.
    ErrorPartial: Command 60,
    LostInterrupt: Command 60,
    LostTail: Command 25,
    LostHead: Command 25,

    LieUnknownCommand: Moment 0,
    LieDuplicate: Moment 0,
    LieStale: Moment 0,
    LieWrongQueue: Moment 0,
    LieSubmissionHead: Moment 0,
    LiePhase: Moment 0,
    /// CSTS.CFS, and nothing works any more.
    Fatal: Moment 0,
    /// CSTS.CFS, and commands go on.
    FatalAndAlive: Moment 0,
    AllOnes: Moment 0,
    AllOnesForAWhile: Moment 0,
    AllZeroes: Moment 0,
    RegistersUnreadable: Moment 0,
    /// The controller is reset by itself.
    StateLost: Moment 0,
    NoticeRelease: Moment 0,
    NoticeFailed: Moment 0,
    /// An asynchronous event, which is no fault.
    Event: Moment 0,
    /// Nobody polls any task of the runtime for a while.
    RuntimeStands: Moment 0,
    /// The runtime ends, and another one goes on after a while.
    RuntimeEnds: Moment 0,

    AbortRefused: Recovery 700,
    AbortLimit: Recovery 900,
    AbortFails: Recovery 700,
    AbortUnanswered: Recovery 500,
    DeleteSubmissionQueueFails: Recovery 600,
    DeleteSubmissionQueueUnanswered: Recovery 600,
    DeleteCompletionQueueFails: Recovery 600,
    DeleteCompletionQueueUnanswered: Recovery 600,
    DisableHangs: Recovery 700,
    DisableIsSlow: Recovery 700,
    FunctionResetFails: Recovery 700,
    FunctionResetWithoutEffect: Recovery 700,
    EnableFatal: Recovery 600,
    EnableHangs: Recovery 600,
    EnableIsSlow: Recovery 700,
    IdentifyFails: Recovery 500,
    IdentifyUnanswered: Recovery 500,
    IdentifyWithoutData: Recovery 500,
    AnotherIdentity: Recovery 500,
    HostBehaviorFails: Recovery 500,
    HostBehaviorUnanswered: Recovery 500,
    CoalescingFails: Recovery 500,
    CoalescingUnanswered: Recovery 500,
    DoorbellBuffersFail: Recovery 500,
    DoorbellBuffersUnanswered: Recovery 500,
    QueueCountFails: Recovery 500,
    QueueCountUnanswered: Recovery 500,
    FewerQueues: Recovery 500,
    CreateCompletionQueueFails: Recovery 400,
    CreateCompletionQueueUnanswered: Recovery 400,
    CreateSubmissionQueueFails: Recovery 400,
    CreateSubmissionQueueUnanswered: Recovery 400,
    EventsFail: Recovery 500,
    EventsUnanswered: Recovery 500,
    EventRequestFails: Recovery 300,
    /// Any admin command is answered late, but in time.
    SlowAnswer: Recovery 400,
    BusMasterStays: Recovery 900,
}

/// Places of a recovery that something may happen at, and what.
const PLACES: &[Place] = &[
    Place::Aborting,
    Place::Deleting,
    Place::Creating,
    Place::Disabling,
    Place::Enabling,
    Place::SettingUp,
    Place::Releasing,
    Place::Live,
];
const MEDDLING: &[Fault] = &[
    Fault::NoticeFailed,
    Fault::AllOnes,
    Fault::StateLost,
    Fault::Fatal,
    Fault::LieUnknownCommand,
    Fault::LiePhase,
    Fault::RuntimeStands,
    Fault::RuntimeEnds,
];

/// The set of faults as bits.
pub(super) type FaultSet = u128;

impl Fault {
    pub(super) fn bit(self) -> FaultSet {
        1 << self as u8
    }

    /// That an admin command fails, and that it is never answered.
    pub(super) fn of_admin(opcode: AdminOpcode, feature_id: u8) -> Option<[Self; 2]> {
        Some(match (opcode, feature_id) {
            (AdminOpcode::DELETE_IO_SUBMISSION_QUEUE, _) => [
                Self::DeleteSubmissionQueueFails,
                Self::DeleteSubmissionQueueUnanswered,
            ],
            (AdminOpcode::DELETE_IO_COMPLETION_QUEUE, _) => [
                Self::DeleteCompletionQueueFails,
                Self::DeleteCompletionQueueUnanswered,
            ],
            (AdminOpcode::CREATE_IO_COMPLETION_QUEUE, _) => [
                Self::CreateCompletionQueueFails,
                Self::CreateCompletionQueueUnanswered,
            ],
            (AdminOpcode::CREATE_IO_SUBMISSION_QUEUE, _) => [
                Self::CreateSubmissionQueueFails,
                Self::CreateSubmissionQueueUnanswered,
            ],
            (AdminOpcode::IDENTIFY, _) => [Self::IdentifyFails, Self::IdentifyUnanswered],
            (AdminOpcode::SET_FEATURES, feature::id::HOST_BEHAVIOR_SUPPORT) => {
                [Self::HostBehaviorFails, Self::HostBehaviorUnanswered]
            }
            (AdminOpcode::SET_FEATURES, feature::id::INTERRUPT_COALESCING) => {
                [Self::CoalescingFails, Self::CoalescingUnanswered]
            }
            (AdminOpcode::DOORBELL_BUFFER_CONFIG, _) => {
                [Self::DoorbellBuffersFail, Self::DoorbellBuffersUnanswered]
            }
            (AdminOpcode::SET_FEATURES, feature::id::NUMBER_OF_QUEUES) => {
                [Self::QueueCountFails, Self::QueueCountUnanswered]
            }
            (AdminOpcode::SET_FEATURES, feature::id::ASYNC_EVENT_CONFIGURATION) => {
                [Self::EventsFail, Self::EventsUnanswered]
            }
            (AdminOpcode::ABORT, _) => [Self::AbortFails, Self::AbortUnanswered],
            _ => return None,
        })
    }

    /// Whether the device says what it may not say.
    pub(super) fn is_lie(self) -> bool {
        (Self::LieUnknownCommand..=Self::LiePhase).contains(&self)
    }
}

/// What goes wrong in one history.
pub(super) struct Plan {
    rates: [u16; Fault::ALL.len()],
    /// At which moments what happens, in microseconds.
    moments: Vec<(u64, Fault)>,
    /// What happens while a recovery is at some place.
    meddling: Option<(Place, Fault)>,
    /// Whether it is over.
    calm: bool,
    struck: Cell<FaultSet>,
}

impl Plan {
    /// A plan for a history of about `length` microseconds.
    pub(super) fn new(rng: &mut Rng, length: u64) -> Self {
        let mut plan = Self {
            rates: [0; Fault::ALL.len()],
            moments: Vec::new(),
            meddling: None,
            calm: false,
            struck: Cell::new(0),
        };
        let of = |occasion| {
            let is_it = move |fault: &&Fault| fault.occasion().0 == occasion;
            Fault::ALL.iter().filter(is_it).copied().collect::<Vec<_>>()
        };
        let mut pick = |occasion, most: usize| {
            let kinds = of(occasion);
            let count = rng.usize(0..=most);
            for _ in 0..count {
                let fault = kinds[rng.usize(0..kinds.len())];
                if occasion == Occasion::Moment {
                    for _ in 0..rng.usize(1..=3) {
                        plan.moments.push((rng.u64(0..length), fault));
                    }
                } else {
                    let most = fault.occasion().1;
                    plan.rates[fault as usize] = rng.u32(1..=most) as u16;
                }
            }
        };
        pick(Occasion::Command, 3);
        pick(Occasion::Moment, 3);
        pick(Occasion::Recovery, 4);
        if rng.u8(0..3) == 0 {
            let place = *rng.choice(PLACES).expect("not empty");
            let release = Some(Fault::NoticeRelease).filter(|_| rng.u8(0..3) == 0);
            let fault = release.or_else(|| rng.choice(MEDDLING).copied());
            plan.meddling = fault.map(|fault| (place, fault));
        }
        plan.provoke(rng);
        plan
    }

    /// Sees to it that what goes wrong in a recovery has one to go wrong in.
    fn provoke(&mut self, rng: &mut Rng) {
        let rates = self.rates;
        let goes_wrong = |from: Fault, to: Fault| {
            let mut rates = rates[from as usize..=to as usize].iter();
            rates.any(|rate| *rate > 0)
        };
        let of_queue = goes_wrong(Fault::AbortRefused, Fault::DeleteCompletionQueueUnanswered);
        let of_reset = goes_wrong(Fault::DisableHangs, Fault::BusMasterStays);
        let place = self.meddling.map(|(place, _)| place);
        let of_queue = of_queue || matches!(place, Some(Place::Deleting | Place::Creating));
        if of_queue {
            self.rates[Fault::NeverDoneNorAborted as usize] = rng.u16(5..20);
        } else if of_reset {
            if goes_wrong(Fault::FunctionResetFails, Fault::FunctionResetWithoutEffect) {
                self.rates[Fault::DisableHangs as usize] = 500;
            }
            let provocations = [Fault::StateLost, Fault::NoticeFailed, Fault::Fatal];
            let at = rng.u64(0..200_000);
            if rng.u8(0..4) == 0 {
                self.rates[Fault::SlowAnswer as usize] = 800;
            }
            let provocation = rng.choice(provocations).expect("not empty");
            self.moments.push((at, provocation));
        }
    }

    /// What happens as a recovery comes to `place`, if something does.
    pub(super) fn meddles(&self, rng: &mut Rng, place: Place) -> Option<Fault> {
        let (when, fault) = self.meddling.filter(|_| !self.calm)?;
        (when == place && rng.bool()).then_some(fault)
    }

    pub(super) fn moments(&self) -> &[(u64, Fault)] {
        &self.moments
    }

    /// Whether `fault` strikes now.
    pub(super) fn strikes(&self, rng: &mut Rng, fault: Fault) -> bool {
        let rate = self.rates[fault as usize];
        let strikes = rate > 0 && !self.calm && rng.u16(0..1000) < rate;
        if strikes {
            self.note(fault);
        }
        strikes
    }

    /// Records that `fault` has struck.
    pub(super) fn note(&self, fault: Fault) {
        self.struck.set(self.struck.get() | fault.bit());
    }

    pub(super) fn has_struck(&self, fault: Fault) -> bool {
        self.struck.get() & fault.bit() != 0
    }

    pub(super) fn struck(&self) -> FaultSet {
        self.struck.get()
    }

    /// From now on all goes well.
    pub(super) fn calm(&mut self) {
        self.calm = true;
    }

    pub(super) fn is_calm(&self) -> bool {
        self.calm
    }
}
