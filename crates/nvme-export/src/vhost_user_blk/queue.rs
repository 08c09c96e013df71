//! The task of one virtqueue.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, Stream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use vm_memory::{Bytes, GuestAddress};

use super::device::QueueDevice;
use super::eventfd::{Kick, Signal};
use super::memory::{Regions, SharedRegions};
use super::request::{Done, Request};
use super::ring::{Ring, RingError};
use super::window::Window;

/// Chains that are taken before others get their turn.
const BURST: usize = 32;
/// How often a queue is looked at that has no kicks, which the front end may want.
const KICKLESS: Duration = Duration::from_millis(1);

/// What a queue needs.
#[derive(Debug)]
pub(super) struct QueueParts {
    pub(super) device: Arc<QueueDevice>,
    pub(super) index: u16,
    pub(super) regions: Arc<SharedRegions>,
    pub(super) ring: Ring,
    /// What was agreed on with the driver.
    pub(super) features: u64,
    pub(super) kick: Option<Kick>,
    pub(super) call: Arc<Signal>,
    pub(super) broken: Arc<Signal>,
}

/// A queue that runs. Dropping it lets it finish what it has taken, and end.
#[derive(Debug)]
pub(super) struct RunningQueue {
    stop: oneshot::Sender<()>,
    task: JoinHandle<u16>,
}

impl RunningQueue {
    /// To be called in a runtime.
    pub(super) fn start(parts: QueueParts) -> Self {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(run(parts, stopped));
        Self { stop, task }
    }

    /// Takes no more requests, waits for those that were taken, and returns where in the available ring to go on.
    ///
    /// # Errors
    ///
    /// The runtime ends.
    pub(super) async fn stop(self) -> io::Result<u16> {
        drop(self.stop);
        Ok(self.task.await?)
    }
}

/// What is looked at.
enum State {
    /// Requests are taken, given back, or both.
    Busy,
    /// There was nothing to do.
    Idle,
    /// All that was taken is done, and nothing is taken any more.
    Ended,
}

struct Looker {
    parts: QueueParts,
    stop: oneshot::Receiver<()>,
    /// The front end wants it to end.
    is_stopped: bool,
    /// The ring can't be believed any more.
    is_broken: bool,
    /// As many requests run as its share of a queue pair has room for.
    is_full: bool,
}

async fn run(parts: QueueParts, stop: oneshot::Receiver<()>) -> u16 {
    let mut looker = Looker {
        parts,
        stop,
        is_stopped: false,
        is_broken: false,
        is_full: false,
    };
    let mut running = FuturesUnordered::new();
    let mut window = Window::default();
    let mut last_busy = Instant::now();
    // An interrupt may be missing of what an earlier process gave back last.
    looker.parts.call.send();
    loop {
        let state = poll_fn(|cx| {
            let state = looker.look(&mut running, start, cx);
            Poll::Ready(looker.settle(state))
        });
        match state.await {
            State::Ended => break,
            State::Busy => {
                last_busy = Instant::now();
                again().await;
            }
            State::Idle if looker.takes() && window.is_open(last_busy.elapsed()) => {
                again().await;
            }
            State::Idle => {
                if looker.prepare_to_sleep() {
                    last_busy = Instant::now();
                    continue;
                }
                let before = Instant::now();
                looker.sleep(&mut running).await;
                window.woken_after(before.elapsed());
                last_busy = Instant::now();
            }
        }
    }
    // A broken queue is the front end's until it says that it is to stop.
    poll_fn(|cx| looker.poll_stop(cx)).await;
    looker.parts.ring.base()
}

/// Begins a request.
fn start(request: Request, head: u16, parts: &QueueParts) -> impl Future<Output = Done> + use<> {
    let device = parts.device.clone();
    let is_durable = device.device.is_durable(parts.features);
    request.execute(device, head, is_durable)
}

impl Looker {
    /// Whether requests are taken.
    fn takes(&self) -> bool {
        !self.is_stopped && !self.is_broken
    }

    /// Resolves when the front end wants it to end, each time.
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // The sender is dropped, or sends nothing.
        if !self.is_stopped && Pin::new(&mut self.stop).poll(cx).is_ready() {
            self.is_stopped = true;
        }
        match self.is_stopped {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    /// Takes what is available and gives back what is done.
    fn look<F: Future<Output = Done>>(
        &mut self,
        running: &mut FuturesUnordered<F>,
        start: impl Fn(Request, u16, &QueueParts) -> F,
        cx: &mut Context<'_>,
    ) -> Result<State, RingError> {
        let mut regions = self.parts.regions.get();
        let mut is_busy = false;
        let _ = self.poll_stop(cx);
        if self.takes() {
            self.parts.ring.do_not_ask(&regions)?;
        }
        if !self.is_broken {
            // What is in flight is to be done before the end.
            let count = self.parts.ring.available(&regions, self.is_stopped)?;
            // What is available may be in memory that was not there before.
            if count > 0 {
                regions = self.parts.regions.get();
            }
            // What is more waits in the ring, and not before the requests of other queues.
            let fair = self.parts.device.export.fair_depth();
            let room = fair.saturating_sub(running.len());
            for _ in 0..count.min(BURST).min(room) {
                let (head, chain) = self.parts.ring.take(&regions)?;
                let QueueDevice { device, export } = &*self.parts.device;
                let request = Request::read(export, &device.id, &regions, chain)?;
                running.push(start(request, head, &self.parts));
                is_busy = true;
            }
            self.is_full = running.len() >= fair;
        }
        let mut gave_back = false;
        while let Poll::Ready(Some(done)) = Pin::new(&mut *running).poll_next(cx) {
            self.give_back(&regions, done)?;
            gave_back = true;
        }
        if gave_back && self.parts.ring.wants_interrupt(&regions)? {
            self.parts.call.send();
        }
        Ok(match (is_busy || gave_back, running.is_empty()) {
            (true, _) => State::Busy,
            (false, true) if !self.takes() => State::Ended,
            (false, _) => State::Idle,
        })
    }

    fn give_back(&mut self, regions: &Regions, done: Done) -> Result<(), RingError> {
        let Done {
            head,
            status,
            status_at,
            written,
        } = done;
        // Where it is not in memory, there is nobody to be told.
        write_status(regions, status, status_at);
        self.parts.ring.give_back(regions, head, written)
    }

    /// What follows from an error: it is the end of this queue, but for what was taken.
    fn settle(&mut self, state: Result<State, RingError>) -> State {
        state.unwrap_or_else(|error| {
            let QueueParts { device, index, .. } = &self.parts;
            if let Some(left_out) = device.device.log_limit.pass() {
                tracing::warn!(%error, queue = index, left_out, "a queue of a guest is broken and stops");
            }
            self.is_broken = true;
            self.parts.broken.send();
            State::Busy
        })
    }

    /// Asks to be told of requests. Returns whether there are some.
    fn prepare_to_sleep(&mut self) -> bool {
        // Where there is no room, the next request that is done is what to wait for.
        if !self.takes() || self.is_full {
            return false;
        }
        let regions = self.parts.regions.get();
        match self.parts.ring.ask(&regions) {
            Ok(has_more) => has_more,
            Err(error) => {
                self.settle(Err(error));
                true
            }
        }
    }

    /// Waits for a kick, for a request that is done, or for the end.
    async fn sleep<F: Future<Output = Done>>(&mut self, running: &mut FuturesUnordered<F>) {
        let mut timer = pin!(tokio::time::sleep(KICKLESS));
        let mut done = None;
        let woken = poll_fn(|cx| {
            if !running.is_empty()
                && let Poll::Ready(result) = Pin::new(&mut *running).poll_next(cx)
            {
                done = result;
                return Poll::Ready(Ok(()));
            }
            if !self.takes() {
                return Poll::Pending;
            }
            if self.poll_stop(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            match &self.parts.kick {
                Some(kick) => kick.poll(cx),
                None => timer.as_mut().poll(cx).map(Ok),
            }
        });
        if let Err(error) = woken.await {
            let QueueParts { device, index, .. } = &self.parts;
            if let Some(left_out) = device.device.log_limit.pass() {
                tracing::warn!(%error, queue = index, left_out, "waiting for a kick");
            }
            self.is_broken = true;
        }
        if let Some(done) = done {
            let regions = self.parts.regions.get();
            let given = self.give_back(&regions, done);
            let state = given.and_then(|()| {
                if self.parts.ring.wants_interrupt(&regions)? {
                    self.parts.call.send();
                }
                Ok(State::Busy)
            });
            self.settle(state);
        }
    }
}

fn write_status(regions: &Regions, status: u8, at: GuestAddress) {
    if let Err(error) = regions.write_obj(status, at) {
        tracing::debug!(%error, "a status outside of memory");
    }
}

/// Lets every task that can run do so. Unlike Tokio's `yield_now` it does not look for sockets and timers each time.
async fn again() {
    let mut is_first = true;
    poll_fn(|cx| {
        if std::mem::take(&mut is_first) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    })
    .await;
}
