//! Commands that wait for a medium: the pool does their work meanwhile, and what overlaps them waits.

use std::collections::VecDeque;
use std::sync::Arc;

use nvme_spec::Sqe;

use super::{BATCH, Engine};
use crate::doorbells::Doorbells;
use crate::nvm::Footprint;
use crate::pool::{Done, MAX_JOBS, Pool, Work};

/// With so many commands that wait no more are fetched from I/O queues. The last batch may exceed it.
const MAX_WAITING: usize = BATCH;

/// What the pool has to do, and the commands that wait for that.
pub(crate) struct Background {
    pool: Pool,
    /// Commands whose work is in the pool, by its key there.
    in_flight: [Option<InFlight>; MAX_JOBS],
    count: usize,
    /// In the order in which they were fetched.
    waiting: VecDeque<(u16, Sqe)>,
    /// Buffers of writes, to be used again.
    buffers: Vec<Vec<u8>>,
    finished: Vec<Done>,
    /// The command that is being served came alone.
    pub(super) is_alone: bool,
    /// Commands came while the controller's thread waited for a medium, so that it should not.
    is_wanted: bool,
    /// I/O commands that had been fetched when the last work was submitted.
    fetched: u64,
}

/// Where a command waits for the medium.
pub(crate) enum Place<S> {
    /// On the controller's thread, to be [noted](Engine::has_blocked) if nothing else is known to wait.
    Here { is_alone: bool },
    /// In the pool.
    Pool(S),
    /// Nowhere now.
    Nowhere,
}

/// A command whose work is in the pool.
struct InFlight {
    submission_queue: u16,
    command: Sqe,
    footprint: Option<Footprint>,
}

impl Background {
    pub(super) fn new(doorbells: Arc<Doorbells>) -> Self {
        Self {
            pool: Pool::new(doorbells),
            in_flight: [const { None }; MAX_JOBS],
            count: 0,
            waiting: VecDeque::new(),
            buffers: Vec::new(),
            finished: Vec::new(),
            is_alone: false,
            is_wanted: false,
            fetched: 0,
        }
    }

    /// Whether a command has to be looked at before it is served.
    pub(super) fn is_busy(&self) -> bool {
        self.count > 0
    }

    pub(super) fn has_finished(&self) -> bool {
        self.is_busy() && self.pool.has_finished()
    }

    /// Whether so many commands wait that further ones are to stay in their queues.
    pub(super) fn is_congested(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    /// Leaves a command for when the pool has finished something.
    pub(super) fn put_off(&mut self, submission_queue: u16, command: &Sqe) {
        self.waiting.push_back((submission_queue, *command));
    }

    /// A buffer for the data of a write.
    pub(crate) fn buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = self.buffers.pop().unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }

    fn conflicts(&self, footprint: &Footprint) -> bool {
        let in_flight = self.in_flight.iter().flatten();
        in_flight
            .filter_map(|in_flight| in_flight.footprint.as_ref())
            .any(|other| other.conflicts(footprint))
            || self
                .waiting
                .iter()
                .filter_map(|(_, command)| Footprint::of(command))
                .any(|other| other.conflicts(footprint))
    }

    /// Returns when the pool has nothing to do.
    pub(super) fn wait(&self) {
        if self.is_busy() {
            self.pool.wait();
        }
    }

    /// Forgets all commands, of which none has work that is not done.
    pub(super) fn forget(&mut self) {
        if self.is_busy() {
            self.pool.wait();
            self.pool.take_finished(&mut self.finished);
            self.finished.clear();
            self.in_flight = [const { None }; MAX_JOBS];
            self.count = 0;
            self.waiting.clear();
        }
    }

    /// Takes the commands of a queue that wait.
    pub(super) fn take_queue(&mut self, submission_queue: u16) -> Vec<Sqe> {
        let (mine, others) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<VecDeque<_>, _>(|(queue, _)| *queue == submission_queue);
        self.waiting = others;
        mine.into_iter().map(|(_, command)| command).collect()
    }

    /// Takes a command that waits.
    pub(super) fn take(&mut self, submission_queue: u16, cid: u16) -> Option<Sqe> {
        let index = self
            .waiting
            .iter()
            .position(|(queue, command)| *queue == submission_queue && command.cid() == cid)?;
        self.waiting.remove(index).map(|(_, command)| command)
    }
}

impl Engine {
    /// Puts an I/O command off if it overlaps one in the pool, or one that waits already. Returns
    /// whether it did.
    pub(super) fn puts_off(&mut self, submission_queue: u16, command: &Sqe) -> bool {
        let must_wait =
            Footprint::of(command).is_some_and(|footprint| self.background.conflicts(&footprint));
        if must_wait {
            self.background.put_off(submission_queue, command);
        }
        must_wait
    }

    /// Says where a command is to wait for the medium, if its store can be used by other threads as
    /// `concurrent`. The controller's thread does it itself, which is faster, as long as nothing else
    /// comes meanwhile.
    pub(crate) fn place<S>(&self, concurrent: Option<S>) -> Place<S> {
        let background = &self.background;
        match concurrent {
            Some(store) if self.faults.is_none() => {
                if !background.is_wanted && !background.is_busy() && background.is_alone {
                    Place::Here { is_alone: true }
                } else if background.count == MAX_JOBS {
                    Place::Nowhere
                } else {
                    Place::Pool(store)
                }
            }
            _ => Place::Here { is_alone: false },
        }
    }

    /// Hands the work of a command over to the pool.
    pub(super) fn hand_over(&mut self, submission_queue: u16, command: &Sqe, work: Box<Work>) {
        let footprint = match (work.bytes(), self.namespaces.find(command.nsid())) {
            (Some(bytes), Ok(namespace)) => {
                let blocks = bytes.start >> namespace.lba_shift..bytes.end >> namespace.lba_shift;
                Some(Footprint::of_write(command, blocks))
            }
            _ => Footprint::of(command),
        };
        let background = &mut self.background;
        let Some(key) = background.in_flight.iter().position(Option::is_none) else {
            return background.put_off(submission_queue, command);
        };
        background.in_flight[key] = Some(InFlight {
            submission_queue,
            command: *command,
            footprint,
        });
        background.count += 1;
        background.fetched = self.shared.counters.commands.get();
        background.pool.submit(key, work);
    }

    /// The controller's thread itself has waited for a medium.
    pub(crate) fn has_blocked(&mut self) {
        self.background.is_wanted |= self
            .queues
            .has_work(&self.doorbells, |id| self.may_fetch(id));
    }

    /// Completes what the pool is done with, and serves what has waited for that; returns whether
    /// there was anything.
    pub(super) fn serve_finished(&mut self) -> bool {
        if !self.background.has_finished() {
            return false;
        }
        let mut finished = std::mem::take(&mut self.background.finished);
        self.background.pool.take_finished(&mut finished);
        for Done { key, result, data } in finished.drain(..) {
            let Some(in_flight) = self.background.in_flight[key].take() else {
                continue;
            };
            self.background.count -= 1;
            let (id, command) = (in_flight.submission_queue, in_flight.command);
            if self.is_serving() {
                let reply = self.work_done(&command, result, data.len() as u64);
                self.follow(id, &command, reply);
            }
            if data.capacity() > 0 {
                self.background.buffers.push(data);
            }
        }
        self.background.finished = finished;
        if !self.background.is_busy() {
            self.background.is_wanted =
                self.shared.counters.commands.get() != self.background.fetched;
        }
        let waiting = std::mem::take(&mut self.background.waiting);
        self.background.is_alone = waiting.len() == 1;
        for (id, command) in waiting {
            if self.is_serving() {
                self.serve_command(id, &command);
            }
        }
        self.signal();
        true
    }

    /// Completes all that is in the pool and all that waits for that. If bus mastering is off it
    /// completes later, but its work is done too.
    pub(crate) fn settle(&mut self) {
        while self.is_serving() && self.background.is_busy() {
            self.background.wait();
            self.serve_finished();
        }
        self.background.wait();
    }
}
