//! What a controller reports by itself, for those who want to know.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use futures::stream;
use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::log::{ErrorEntry, FirmwareSlot, SmartHealth};
use tokio::sync::broadcast::{self, error::RecvError};

/// Something that the controller reported, with what was read about it (NVMe base specification
/// 2.0, "Asynchronous Event Request command").
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ControllerEvent {
    /// A namespace came, went or changed. Open handles know of it already.
    NamespaceChanged {
        /// The namespace.
        nsid: u32,
        /// What has changed.
        change: NamespaceChange,
    },
    /// Namespaces may have changed of which the controller does not say which, because they are too
    /// many. Open handles know of it already; of the others nothing was read.
    ManyNamespacesChanged,
    /// Something about the controller's health: a temperature, the spare capacity, the reliability.
    Smart {
        /// What.
        event: Event,
        /// The log page about it.
        health: Box<SmartHealth>,
    },
    /// An error that belongs to no command, such as a failed diagnosis.
    Error {
        /// What.
        event: Event,
        /// The error log at that time, the newest entry first; it may be empty.
        entries: Vec<ErrorEntry>,
    },
    /// The controller activates other firmware, and may not answer for a while.
    Firmware {
        /// The log page about it.
        slots: Box<FirmwareSlot>,
    },
    /// Anything else.
    Other {
        /// What.
        event: AsyncEvent,
        /// The first 512 bytes of the log page that belongs to it; empty if there is none or it
        /// could not be read.
        log: Vec<u8>,
    },
    /// The stream was not read for so long that events were dropped.
    Lost {
        /// How many.
        count: u64,
    },
}

/// What has changed about a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NamespaceChange {
    /// It is active now.
    Attached {
        /// In bytes.
        capacity: u64,
    },
    /// It is not active any more.
    Detached,
    /// Its size.
    Resized {
        /// In bytes.
        from: u64,
        /// In bytes.
        to: u64,
    },
    /// Its format.
    Reformatted {
        /// The logical block size now, in bytes.
        block_size: u32,
        /// Bytes of metadata with each block now.
        metadata: u16,
    },
    /// It is another one than before, by its NGUID, EUI64 or UUID.
    Replaced,
    /// Something else in its identify data; or anything, if it was never open.
    Other,
}

/// The events of a controller from the moment on at which this was made; see
/// [`Controller::events`](crate::Controller::events).
///
/// It ends when the controller is shut down or its last handle is dropped.
#[must_use = "streams do nothing unless polled"]
pub struct EventStream {
    events: Pin<Box<dyn Stream<Item = ControllerEvent> + Send + Sync>>,
}

impl EventStream {
    /// The events of `receiver`; none without one.
    pub(super) fn new(receiver: Option<broadcast::Receiver<ControllerEvent>>) -> Self {
        let next = async |receiver: Option<broadcast::Receiver<ControllerEvent>>| {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Ok(event) => Some((event, Some(receiver))),
                Err(RecvError::Lagged(count)) => {
                    Some((ControllerEvent::Lost { count }, Some(receiver)))
                }
                Err(RecvError::Closed) => None,
            }
        };
        Self {
            events: Box::pin(stream::unfold(receiver, next)),
        }
    }
}

impl Stream for EventStream {
    type Item = ControllerEvent;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().events.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}
