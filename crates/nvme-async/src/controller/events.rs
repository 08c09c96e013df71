//! Asynchronous events: always asked for, acknowledged by reading their log page, and passed on.
//!
//! The admin queue tells of an event; one task at a time deals with them, in whatever runtime that
//! was. When that runtime ends in the middle, the next one goes on.

mod notices;
mod pace;
mod rescan;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::identify::IdentifyController;
use nvme_spec::log::{ChangedNamespaces, FirmwareSlot, SmartHealth, id};
use nvme_spec::{admin, feature};
use tokio::runtime::Handle;
use tokio::sync::{Notify, broadcast};

pub(crate) use self::notices::Notice;
use self::notices::{Attempt, State, Step};
use self::rescan::{Which, listed};
use super::admin::Admin;
use super::event_stream::{ControllerEvent, EventStream};
use super::logs::{Acknowledge, Logs};
use crate::engine::Notification;
use crate::engine::eventfd::Wakeups;
use crate::namespace::registry::Registry;
use crate::{Controller, Error};

/// Asynchronous event requests that are kept outstanding, if the controller allows as many.
const REQUESTS: u8 = 4;
/// VER: major, minor and tertiary version.
const VERSION_1_3: u32 = 0x0001_0300;
/// Enough of a log page of which nothing is known to clear its event.
const LOG_BYTES: usize = 512;
/// Events that a subscriber may leave unread.
const BACKLOG: usize = 256;

/// The events of one controller.
pub(crate) struct Events {
    logs: Logs,
    /// The largest namespace identifier (NN).
    max_namespace: u32,
    /// Which events there are (OAES).
    supported: u32,
    /// Whether namespaces have lists of identifiers, as since version 1.3.
    has_descriptors: bool,
    /// How many requests are outstanding or about to be.
    requests: u8,
    namespaces: Registry,
    state: Mutex<State>,
    /// There is a new notice.
    wake: Arc<Notify>,
    /// Gone when the controller was shut down.
    sender: Mutex<Option<broadcast::Sender<ControllerEvent>>>,
}

impl Events {
    pub(super) fn new(admin: Admin, identify: &IdentifyController) -> Arc<Self> {
        Arc::new(Self {
            logs: Logs {
                admin,
                attributes: identify.lpa,
                error_entries: usize::from(identify.elpe) + 1,
            },
            max_namespace: identify.nn.get(),
            supported: identify.oaes.get(),
            has_descriptors: identify.ver.get() >= VERSION_1_3,
            requests: REQUESTS.min(identify.aerl.saturating_add(1)),
            namespaces: Registry::default(),
            state: Mutex::default(),
            wake: Arc::default(),
            sender: Mutex::new(Some(broadcast::Sender::new(BACKLOG))),
        })
    }

    pub(crate) fn namespaces(&self) -> &Registry {
        &self.namespaces
    }

    pub(super) fn logs(&self) -> &Logs {
        &self.logs
    }

    /// The events that are wanted, of those that the controller has, as Asynchronous Event
    /// Configuration takes them.
    pub(super) fn configuration(&self) -> u32 {
        let wanted = feature::AsyncEventConfiguration::new()
            .with_smart_critical_warnings(0x3f)
            .with_namespace_attributes(true)
            .with_firmware_activation(true);
        // Critical warnings need no support.
        wanted.into_bits() & (self.supported | 0xff)
    }

    /// How many requests are kept outstanding.
    pub(super) fn requests(&self) -> u8 {
        self.requests
    }

    /// Switches events on and keeps requests outstanding (NVMe base specification 2.0,
    /// "Asynchronous Event Request command"). To be called once; recovery does the same after it has
    /// reset the controller.
    pub(super) async fn arm(self: &Arc<Self>) {
        let wanted = self.configuration();
        let set = admin::set_features(feature::id::ASYNC_EVENT_CONFIGURATION, wanted, false);
        if let Err(error) = self.logs.admin.run(set).await {
            tracing::debug!(%error, "asynchronous events keep their default configuration");
        }
        let weak = Arc::downgrade(self);
        self.logs.admin.queue.set_on_event(Box::new(move |what| {
            if let Some(events) = weak.upgrade() {
                match what {
                    Notification::Event(event) => events.notify(Notice::Event(event)),
                    Notification::Reset => events.begin_anew(),
                }
            }
        }));
        if let Err(error) = self.note_active().await {
            tracing::debug!(%error, "the active namespaces are not known");
        }
        self.request(self.requests);
    }

    /// The controller was reset, and has new requests: what changed meanwhile was not reported, or
    /// the report was lost.
    fn begin_anew(self: &Arc<Self>) {
        self.lock().begin_epoch();
        self.notify(Notice::Rescan);
    }

    /// Takes note of something to deal with, in a task of the current runtime.
    pub(crate) fn notify(self: &Arc<Self>, notice: Notice) {
        self.lock().note(notice, Instant::now());
        self.wake.notify_one();
        self.resume();
    }

    /// Sees to it that there is a task if there is something to deal with. Outside of a runtime, and
    /// in one without drivers, that is left to the next call.
    pub(crate) fn resume(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        {
            let mut state = self.lock();
            if state.is_worked_on || !state.has_work() {
                return;
            }
            state.is_worked_on = true;
        }
        let worker = Worker {
            events: Arc::downgrade(self),
        };
        // In a runtime without I/O and timers the worker would be of no use; the next one has them.
        if Wakeups::register(self.logs.admin.queue.vector()).is_ok() {
            runtime.spawn(worker.run());
        }
    }

    /// No more events: the controller was shut down.
    pub(super) fn close(&self) {
        let sender = self.sender().take();
        // Wakes those who listen, without the lock.
        drop(sender);
    }

    fn subscribe(&self) -> EventStream {
        let receiver = self.sender().as_ref().map(broadcast::Sender::subscribe);
        EventStream::new(receiver)
    }

    fn publish(&self, event: ControllerEvent) {
        let sender = self.sender().clone();
        // Wakes those who listen, without the lock.
        if let Some(sender) = sender {
            // Nobody need listen.
            let _ = sender.send(event);
        }
    }

    fn request(&self, count: u8) {
        self.lock().pace.asked(Instant::now());
        self.logs.admin.queue.with(|state| {
            for _ in 0..count {
                state.request_event();
            }
        });
    }

    async fn deal_with(&self, notice: Notice) -> Result<(), Error> {
        match notice {
            Notice::Event(event) => self.acknowledge(event).await,
            Notice::Rescan => self.rescan(Which::Unknown).await,
        }
    }

    /// Reads the log page of an event, without which the controller sends no other of its type, and
    /// passes on what it says.
    async fn acknowledge(&self, event: AsyncEvent) -> Result<(), Error> {
        let address = &*self.logs.admin.address;
        let kind = event.event();
        let log_page = match kind {
            Event::Other { .. } => event.log_page(),
            _ => AsyncEvent::report(kind).log_page(),
        };
        match (kind, log_page) {
            (Event::Other { .. }, _) => {
                tracing::warn!(address, event = ?kind, "the controller reports an event");
                let log = self.read_any(log_page).await?;
                self.publish(ControllerEvent::Other { event, log });
            }
            (_, id::CHANGED_NAMESPACES) => {
                tracing::info!(address, "the controller reports a change of its namespaces");
                self.namespaces_changed().await?;
            }
            (_, id::ERROR) => {
                tracing::warn!(address, event = ?kind, "the controller reports an error");
                let entries = self.logs.errors(Acknowledge::Yes).await?;
                self.publish(ControllerEvent::Error {
                    event: kind,
                    entries,
                });
            }
            (_, id::SMART_HEALTH) => {
                let health: Box<SmartHealth> =
                    self.logs.read_as(log_page, Acknowledge::Yes).await?;
                let warnings = health.warnings();
                tracing::warn!(address, event = ?kind, ?warnings, "the controller reports its health");
                self.publish(ControllerEvent::Smart {
                    event: kind,
                    health,
                });
            }
            (_, id::FIRMWARE_SLOT) => {
                tracing::warn!(address, "the controller activates firmware");
                let slots: Box<FirmwareSlot> =
                    self.logs.read_as(log_page, Acknowledge::Yes).await?;
                self.publish(ControllerEvent::Firmware { slots });
            }
            _ => {
                tracing::info!(address, event = ?kind, "the controller reports an event");
                let log = self.read_any(log_page).await?;
                self.publish(ControllerEvent::Other { event, log });
            }
        }
        if log_page != event.log_page() {
            let named = event.log_page();
            tracing::warn!(
                address,
                event = ?kind,
                "an event named log page {named:#04x} instead of {log_page:#04x}"
            );
            // Which of the two it waits for to be read, nobody knows.
            self.read_any(named).await?;
        }
        Ok(())
    }

    /// Reads a log page of which nothing is known; empty if that is not possible.
    async fn read_any(&self, log_page: u8) -> Result<Vec<u8>, Error> {
        match log_page {
            // No event has it.
            id::SUPPORTED_LOG_PAGES => return Ok(Vec::new()),
            // To read it clears it.
            id::CHANGED_NAMESPACES => {
                self.namespaces_changed().await?;
                return Ok(Vec::new());
            }
            _ => {}
        }
        let read = self.logs.read(
            log_page,
            admin::ALL_NAMESPACES,
            0,
            LOG_BYTES,
            Acknowledge::Yes,
        );
        match read.await {
            Err(error @ Error::Command(_)) => {
                tracing::warn!(%error, "the log page of an event could not be read");
                Ok(Vec::new())
            }
            read => read,
        }
    }

    async fn namespaces_changed(&self) -> Result<(), Error> {
        let list = self
            .logs
            .read_as::<ChangedNamespaces>(id::CHANGED_NAMESPACES, Acknowledge::Yes)
            .await;
        let which = match list {
            Ok(list) => listed(&self.logs.admin.address, &list, self.max_namespace),
            Err(error @ Error::Command(_)) => {
                tracing::warn!(%error, "the list of changed namespaces could not be read");
                Which::Unknown
            }
            Err(error) => return Err(error),
        };
        self.rescan(which).await
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sender(&self) -> MutexGuard<'_, Option<broadcast::Sender<ControllerEvent>>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task that deals with events. It does not keep the controller open.
struct Worker {
    events: Weak<Events>,
}

impl Worker {
    async fn run(mut self) {
        while let Some(events) = self.events.upgrade() {
            // Not as the scrutinee, where the lock would live on.
            let step = events.lock().next();
            match step {
                Step::DealWith(notice, epoch) => {
                    let result = events.deal_with(notice).await;
                    if let Err(Error::RuntimeGone { .. } | Error::NoRuntime { .. }) = result {
                        // Left to the next runtime.
                        return;
                    }
                    let attempt = match result {
                        Err(Error::Memory(_)) => Attempt::NoMemory,
                        Err(Error::TimedOut { .. } | Error::Recovering { .. }) => Attempt::NoAnswer,
                        _ => Attempt::Done,
                    };
                    if let Err(error) = result {
                        let address = &*events.logs.admin.address;
                        tracing::warn!(address, %error, "an event could not be dealt with");
                    }
                    events.lock().end(epoch, attempt);
                }
                Step::Request(count) => events.request(count),
                Step::Wait(time) => {
                    let wake = events.wake.clone();
                    drop(events);
                    // Whether there is something new or not, the next step follows from the state.
                    let _ = tokio::time::timeout(time, wake.notified()).await;
                }
                Step::Rest => {
                    // There may be another one already.
                    self.events = Weak::new();
                }
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // At the end of its runtime this is the last thing to happen.
        if let Some(events) = self.events.upgrade() {
            events.lock().leave();
        }
    }
}

impl Controller {
    /// Looks at once at which namespaces there are and whether those that are open have changed,
    /// for controllers that do not report that (OAES bit 8). Open handles and
    /// [event streams](Self::events) learn of it.
    ///
    /// # Errors
    ///
    /// [`Error::Command`] with the status when the controller refuses, and those of a controller
    /// that is gone.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped, some handles may have been updated and others not.
    pub async fn rescan(&self) -> Result<(), Error> {
        self.inner.events.rescan(Which::Unknown).await
    }

    /// The events that the controller reports from now on: changes of namespaces, its health,
    /// errors that belong to no command, and so on, each with the log page about it. There can be
    /// any number of streams; each gets all events.
    ///
    /// A stream that is not read keeps the last 256 events or so, and then tells how many it
    /// [lost](ControllerEvent::Lost). A controller that reports event after event is slowed down,
    /// to one in 1.6 seconds at last.
    pub fn events(&self) -> EventStream {
        self.inner.events.resume();
        self.inner.events.subscribe()
    }
}
