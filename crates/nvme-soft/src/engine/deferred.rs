//! What is done about fetched commands later.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use nvme_spec::opcode::AdminOpcode;
use nvme_spec::{Sqe, Status};

use super::queues::Completion;
use super::{Engine, MAX_INTERRUPT_DELAY, Outcome};

/// A command for which something is to be done when its time has come.
pub(super) struct Deferred {
    due: Instant,
    submission_queue: u16,
    command: Sqe,
    task: Task,
}

#[derive(Clone, Copy)]
pub(super) enum Task {
    /// Serve and complete it.
    Serve,
    /// Complete it; its work is done.
    Complete(Outcome),
    /// Post this, though it is complete.
    CompleteAgain(Completion),
    /// Do its work, though it is complete.
    Work,
}

impl Engine {
    /// Serves a command once the latency of its queue, and `more`, have passed.
    pub(super) fn serve_after(&mut self, more: Duration, submission_queue: u16, command: &Sqe) {
        let latency = match submission_queue {
            0 => more,
            _ => more.saturating_add(self.config.latency),
        };
        if latency.is_zero() {
            self.serve_command(submission_queue, command);
        } else {
            self.defer(latency, submission_queue, *command, Task::Serve);
        }
    }

    pub(super) fn defer(
        &mut self,
        after: Duration,
        submission_queue: u16,
        command: Sqe,
        task: Task,
    ) {
        let now = Instant::now();
        let due = now.checked_add(after).unwrap_or(now + FAR_AWAY);
        // Nearly always at the end: there is one latency for all.
        let index = match self.deferred.back() {
            Some(last) if last.due > due => self
                .deferred
                .partition_point(|deferred| deferred.due <= due),
            _ => self.deferred.len(),
        };
        self.deferred.insert(
            index,
            Deferred {
                due,
                submission_queue,
                command,
                task,
            },
        );
    }

    /// When the first task is due.
    pub(super) fn first_due(&self) -> Option<Instant> {
        self.deferred.front().map(|deferred| deferred.due)
    }

    /// Does what is due; returns whether there was anything.
    pub(super) fn serve_due(&mut self) -> bool {
        let mut since = None;
        while let Some(due) = self.first_due()
            && self.is_serving()
            && let now = Instant::now()
            && due <= now
            && let Some(Deferred {
                submission_queue,
                command,
                task,
                ..
            }) = self.deferred.pop_front()
        {
            if now - *since.get_or_insert(now) > MAX_INTERRUPT_DELAY {
                self.signal();
                since = Some(now);
            }
            self.admin.begin_batch();
            match task {
                Task::Serve => self.serve_command(submission_queue, &command),
                Task::Complete(outcome) => self.complete(submission_queue, &command, outcome),
                Task::CompleteAgain(completion) => self.post(completion),
                Task::Work => self.work_late(submission_queue, &command),
            }
        }
        self.signal();
        since.is_some()
    }

    /// Executes a command whose completion was posted before it, and said that it succeeded. What it
    /// does to memory is a race with whoever believed that, and known by this name to who looks for
    /// races.
    #[inline(never)]
    fn work_late(&mut self, submission_queue: u16, command: &Sqe) {
        let _ = self.work(submission_queue, command);
    }

    /// Takes a command back that waits for its time, or for nothing but this. Returns whether it
    /// was there.
    pub(crate) fn abort_waiting(&mut self, submission_queue: u16, cid: u16) -> bool {
        let deferred = self.deferred.iter().position(|deferred| {
            deferred.submission_queue == submission_queue
                && deferred.command.cid() == cid
                && matches!(deferred.task, Task::Serve)
        });
        let command = match deferred {
            Some(index) => self.deferred.remove(index).map(|deferred| deferred.command),
            None => self
                .background
                .take(submission_queue, cid)
                .or_else(|| self.take_held(submission_queue, cid)),
        };
        let Some(command) = command else {
            return false;
        };
        self.forget_mark(submission_queue, cid);
        self.complete(submission_queue, &command, Err(Status::ABORT_REQUESTED));
        true
    }

    /// Completes the commands of a queue that is about to be deleted, except those that never
    /// complete: those that wait as aborted, others once their work is done.
    pub(crate) fn abort_queue(&mut self, submission_queue: u16) {
        let (mine, kept) = std::mem::take(&mut self.deferred)
            .into_iter()
            .partition::<VecDeque<_>, _>(|deferred| deferred.submission_queue == submission_queue);
        self.deferred = kept;
        let deferred = mine
            .into_iter()
            .filter(|deferred| matches!(deferred.task, Task::Serve))
            .map(|deferred| deferred.command);
        let aborted: Vec<Sqe> = deferred
            .chain(self.background.take_queue(submission_queue))
            .chain(self.end_queue(submission_queue))
            .collect();
        for command in aborted {
            self.complete(submission_queue, &command, Err(Status::ABORTED_SQ_DELETION));
        }
        self.background.wait();
        self.serve_finished();
    }

    /// Abort commands that are outstanding and not being served.
    pub(crate) fn waiting_aborts(&self) -> usize {
        let deferred = self
            .deferred
            .iter()
            .filter(|deferred| matches!(deferred.task, Task::Serve | Task::Complete(_)))
            .map(|deferred| (deferred.submission_queue, &deferred.command));
        deferred
            .chain(self.faulty_commands())
            .filter(|(queue, command)| {
                *queue == 0 && AdminOpcode(command.opcode()) == AdminOpcode::ABORT
            })
            .count()
    }
}

/// Stands for a time that the clock cannot count to.
const FAR_AWAY: Duration = Duration::from_secs(1 << 31);
