//! Ways to wait for completions: where the time is spent, and how one is told of them.

use std::fmt;
use std::future::Future;

use nvme_async::{DmaBuf, LocalNamespace, Namespace, OpenOptions, PollMode};
use tokio::runtime::{Builder, LocalOptions, LocalRuntime, Runtime};
use tokio::task::{JoinHandle, JoinSet};

use crate::load::{Load, Slot};
use crate::spin::Spinning;

/// Where completions are waited for, and by which handle commands are submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The reaper, in a runtime of one thread.
    CurrentThread,
    /// Reapers, in a runtime of a thread for each core.
    MultiThread,
    /// The park hook of a runtime of `nvme_async::runtime::Builder`, with a `Namespace`.
    Hook,
    /// The same, with a `LocalNamespace`.
    LocalHook,
}

impl Place {
    pub(crate) const ALL: [Self; 4] = [
        Self::CurrentThread,
        Self::MultiThread,
        Self::Hook,
        Self::LocalHook,
    ];
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::CurrentThread => "current_thread",
            Self::MultiThread => "multi_thread",
            Self::Hook => "park hook",
            Self::LocalHook => "park hook, local",
        })
    }
}

/// How one is told of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Interrupts are masked while queues are polled, as is the default for a software controller.
    Adaptive,
    /// As adaptive, with interrupts that are never masked.
    Unmasked,
    Paired,
    /// Pure polling: the window has no end, and there are no interrupts.
    Busy,
    /// Pure interrupt.
    Interrupt,
    /// As adaptive, but by each read in its own poll: at depth 1, in a runtime of one thread, with a
    /// `LocalNamespace`.
    Spin,
}

impl Mode {
    /// Those that there are in every place.
    const COMMON: [Self; 5] = [
        Self::Adaptive,
        Self::Unmasked,
        Self::Paired,
        Self::Busy,
        Self::Interrupt,
    ];

    fn options(self) -> OpenOptions {
        let mode = match self {
            Self::Adaptive | Self::Unmasked | Self::Spin => PollMode::Adaptive,
            Self::Paired => PollMode::Paired,
            Self::Busy => PollMode::Busy,
            Self::Interrupt => PollMode::Interrupt,
        };
        OpenOptions::new()
            .poll_mode(mode)
            .mask_interrupts(self != Self::Unmasked)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Adaptive => "adaptive",
            Self::Unmasked => "unmasked",
            Self::Paired => "paired",
            Self::Busy => "busy",
            Self::Interrupt => "interrupt",
            Self::Spin => "in-poll spin",
        })
    }
}

/// One way to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) place: Place,
    pub(crate) mode: Mode,
}

impl Way {
    const SPIN: Self = Self {
        place: Place::CurrentThread,
        mode: Mode::Spin,
    };

    /// All of them.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let modes = |place| Mode::COMMON.map(|mode| Self { place, mode });
        [Self::SPIN]
            .into_iter()
            .chain(Place::ALL.into_iter().flat_map(modes))
    }

    /// Whether it is measured with so many reads outstanding.
    pub(crate) fn suits(self, depth: usize) -> bool {
        self != Self::SPIN || depth == 1
    }

    /// How a controller is opened; `depth` commands find room in each queue.
    pub(crate) fn options(self, depth: usize) -> OpenOptions {
        // One entry of a queue stays empty.
        let entries = (depth + 1).next_power_of_two().clamp(256, 4096);
        let options = self.mode.options().queue_entries(entries as u16);
        match self.place {
            Place::LocalHook => options.queues(1).local_queues(1),
            _ if self == Self::SPIN => options.queues(1).local_queues(1),
            Place::MultiThread => options.local_queues(0),
            // A single worker uses one queue, and what is no worker the other.
            Place::CurrentThread | Place::Hook => options.queues(2).local_queues(0),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.place, self.mode)
    }
}

/// The runtime of a way.
pub(crate) enum Host {
    Tokio(Runtime),
    Local(LocalRuntime),
}

impl Host {
    pub(crate) fn new(way: Way) -> Self {
        let built = match way.place {
            _ if way == Way::SPIN => {
                let mut builder = Builder::new_current_thread();
                let built = builder.enable_all().build_local(LocalOptions::default());
                return Self::Local(built.expect("a runtime"));
            }
            Place::CurrentThread => Builder::new_current_thread().enable_all().build(),
            Place::MultiThread => Builder::new_multi_thread().enable_all().build(),
            Place::Hook => nvme_async::runtime::Builder::new().build(),
            Place::LocalHook => {
                let built = nvme_async::runtime::Builder::new().build_local();
                return Self::Local(built.expect("a runtime"));
            }
        };
        Self::Tokio(built.expect("a runtime"))
    }

    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        match self {
            Self::Tokio(runtime) => runtime.block_on(future),
            Self::Local(runtime) => runtime.block_on(future),
        }
    }
}

/// What reads are submitted by.
pub(crate) enum Handle {
    Shared(Namespace),
    Local(LocalNamespace),
    Spinning(Spinning),
}

impl Handle {
    pub(crate) fn new(way: Way, namespace: Namespace) -> Self {
        let local = || namespace.local().expect("a queue pair is set apart");
        match way.place {
            _ if way == Way::SPIN => Self::Spinning(Spinning::new(local())),
            Place::LocalHook => Self::Local(local()),
            _ => Self::Shared(namespace),
        }
    }

    pub(crate) fn shared(&self) -> Namespace {
        match self {
            Self::Shared(namespace) => namespace.clone(),
            Self::Local(namespace) => namespace.shared(),
            Self::Spinning(spinning) => spinning.namespace.shared(),
        }
    }

    /// Spawns what the reads need besides, if anything; it has no end.
    pub(crate) fn attend(&self) -> Option<JoinHandle<()>> {
        match self {
            Self::Spinning(spinning) => Some(spinning.attend()),
            Self::Shared(_) | Self::Local(_) => None,
        }
    }

    /// Spawns a task that reads again and again.
    pub(crate) fn spawn(&self, tasks: &mut JoinSet<Slot>, slot: Slot, load: &Load) {
        match self {
            Self::Shared(namespace) => tasks.spawn(load.clone().work(namespace.clone(), slot)),
            Self::Local(namespace) => tasks.spawn_local(load.clone().work(namespace.clone(), slot)),
            Self::Spinning(spinning) => {
                tasks.spawn_local(load.clone().work(spinning.clone(), slot))
            }
        };
    }
}

/// All kinds of handles.
pub(crate) trait Reads: 'static {
    /// Reads at an offset.
    fn read(&self, offset: u64, buffer: DmaBuf) -> impl Future<Output = DmaBuf>;
}

impl Reads for Namespace {
    async fn read(&self, offset: u64, buffer: DmaBuf) -> DmaBuf {
        let read = self.read_into(offset, buffer).await;
        read.expect("the read succeeds")
    }
}

impl Reads for LocalNamespace {
    async fn read(&self, offset: u64, buffer: DmaBuf) -> DmaBuf {
        let read = self.read_into(offset, buffer).await;
        read.expect("the read succeeds")
    }
}
