//! Asynchronous events: always asked for, acknowledged by reading their log page, and passed on.
//!
//! The admin queue tells of an event; one task at a time deals with them, in whatever runtime that
//! was. When that runtime ends in the middle, the next one goes on.

mod pace;
mod rescan;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::identify::IdentifyController;
use nvme_spec::log::{ChangedNamespaces, FirmwareSlot, SmartHealth, id};
use nvme_spec::{admin, feature};
use tokio::runtime::Handle;
use tokio::sync::{Notify, broadcast};

use self::pace::Pace;
use self::rescan::{Which, listed};
use super::admin::Admin;
use super::event_stream::{ControllerEvent, EventStream};
use super::logs::{Acknowledge, Logs};
use crate::engine::Notification;
use crate::namespace::registry::Registry;
use crate::{Controller, Error};

/// Asynchronous event requests that are kept outstanding, if the controller allows as many.
const REQUESTS: u8 = 4;
/// Enough of a log page of which nothing is known to clear its event.
const LOG_BYTES: usize = 512;
/// Events that a subscriber may leave unread.
const BACKLOG: usize = 256;
/// After this an event is dealt with again for which there was no memory.
const RETRY: Duration = Duration::from_millis(250);

/// The events of one controller.
pub(crate) struct Events {
    logs: Logs,
    /// The largest namespace identifier (NN).
    max_namespace: u32,
    /// Which events there are (OAES).
    supported: u32,
    /// How many requests are outstanding or about to be.
    requests: u8,
    namespaces: Registry,
    state: Mutex<State>,
    /// There is a new notice.
    wake: Arc<Notify>,
    /// Gone when the controller was shut down.
    sender: Mutex<Option<broadcast::Sender<ControllerEvent>>>,
}

/// What is to be dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The controller has reported an event.
    Event(AsyncEvent),
    /// All open namespaces may have changed, as after a reset of the controller.
    Rescan,
}

#[derive(Default)]
struct State {
    /// Each with the epoch in which it came. The first one stays until it was dealt with.
    notices: VecDeque<(Notice, u64)>,
    /// Requests end with a reset of the controller, so none is due for an event from before.
    epoch: u64,
    /// Events that were dealt with, for which no new request was made yet.
    owed: u8,
    pace: Pace,
    /// In a storm of events, not before this is more done for them.
    pause_until: Option<Instant>,
    /// Not before this is the first notice dealt with again.
    retry_at: Option<Instant>,
    is_worked_on: bool,
}

/// What is to be done next.
enum Step {
    DealWith(Notice, u64),
    Request(u8),
    Wait(Duration),
    Rest,
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

    /// Sees to it that there is a task if there is something to deal with. Outside of a runtime
    /// that is left to the next call.
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
        runtime.spawn(worker.run());
    }

    /// No more events: the controller was shut down.
    pub(super) fn close(&self) {
        self.sender().take();
    }

    fn subscribe(&self) -> EventStream {
        let receiver = self.sender().as_ref().map(broadcast::Sender::subscribe);
        EventStream::new(receiver)
    }

    fn publish(&self, event: ControllerEvent) {
        if let Some(sender) = &*self.sender() {
            // Nobody need listen.
            let _ = sender.send(event);
        }
    }

    fn request(&self, count: u8) {
        self.lock().pace.asked(Instant::now());
        self.logs.admin.queue.with(|state| {
            for _ in 0..count {
                state.request_event(Instant::now());
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
        if log_page != event.log_page() {
            let named = event.log_page();
            tracing::warn!(
                address,
                event = ?kind,
                "an event names log page {named:#04x} instead of {log_page:#04x}"
            );
        }
        match (kind, log_page) {
            (Event::NamespaceAttributeChanged, _) => {
                tracing::info!(address, "the controller reports a change of its namespaces");
                return self.namespaces_changed().await;
            }
            (Event::Other { .. }, _) => {
                tracing::warn!(address, event = ?kind, "the controller reports an event");
                self.other(event, log_page).await?;
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
                self.other(event, log_page).await?;
            }
        }
        Ok(())
    }

    async fn other(&self, event: AsyncEvent, log_page: u8) -> Result<(), Error> {
        let mut log = Vec::new();
        // 0 is no log page of an event.
        if log_page != 0 {
            let read = self.logs.read(
                log_page,
                admin::ALL_NAMESPACES,
                0,
                LOG_BYTES,
                Acknowledge::Yes,
            );
            match read.await {
                Ok(contents) => log = contents,
                Err(error @ Error::Command(_)) => {
                    tracing::warn!(%error, "the log page of an event could not be read");
                }
                Err(error) => return Err(error),
            }
        }
        self.publish(ControllerEvent::Other { event, log });
        Ok(())
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

impl State {
    fn begin_epoch(&mut self) {
        self.epoch += 1;
        self.owed = 0;
        self.pace = Pace::default();
        self.pause_until = None;
    }

    fn note(&mut self, notice: Notice, now: Instant) {
        match notice {
            Notice::Event(_) => {
                self.pace.came(now);
                self.notices.push_back((notice, self.epoch));
            }
            Notice::Rescan => {
                // Before all others but the one that is being dealt with. If that is a rescan too,
                // it may have begun before the reason for this one.
                let place = usize::from(self.is_worked_on).min(self.notices.len());
                if self.notices.get(place).map(|waiting| waiting.0) != Some(notice) {
                    self.notices.insert(place, (notice, self.epoch));
                }
            }
        }
    }

    fn has_work(&self) -> bool {
        !self.notices.is_empty() || self.owed > 0
    }

    /// The end of dealing with the first notice.
    fn end(&mut self, epoch: u64, again: bool) {
        if again {
            self.retry_at = Some(Instant::now() + RETRY);
            return;
        }
        let Some((notice, _)) = self.notices.pop_front() else {
            return;
        };
        if matches!(notice, Notice::Event(_)) && epoch == self.epoch {
            self.owed += 1;
            self.begin_pause();
        }
    }

    fn begin_pause(&mut self) {
        let pause = self.pace.pause();
        self.pause_until = (!pause.is_zero()).then(|| Instant::now() + pause);
    }

    fn next(&mut self) -> Step {
        let first = self.notices.front().copied();
        let wait_for = match first {
            Some((Notice::Rescan, _)) => self.retry_at,
            _ => self.retry_at.max(self.pause_until),
        };
        let now = Instant::now();
        if let Some(until) = wait_for
            && until > now
        {
            return Step::Wait(until - now);
        }
        if let Some((notice, epoch)) = first {
            self.retry_at = None;
            return Step::DealWith(notice, epoch);
        }
        if self.owed == 0 {
            self.is_worked_on = false;
            return Step::Rest;
        }
        // In a storm one at a time, so that there is a pause for each.
        self.begin_pause();
        let count = match self.pause_until {
            None => self.owed,
            Some(_) => 1,
        };
        self.owed -= count;
        Step::Request(count)
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
                    let again = matches!(result, Err(Error::Memory(_)));
                    if let Err(error) = result {
                        let address = &*events.logs.admin.address;
                        tracing::warn!(address, %error, "an event could not be dealt with");
                    }
                    events.lock().end(epoch, again);
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
            events.lock().is_worked_on = false;
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
