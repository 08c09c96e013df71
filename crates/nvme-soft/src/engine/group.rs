//! One sync for several commands that need one, as databases commit in groups.

use nvme_spec::Sqe;

use super::Engine;

/// Commands that are done except for a sync of their namespaces.
#[derive(Default)]
pub(crate) struct SyncGroup {
    open: bool,
    waiting: Vec<(u16, Sqe)>,
}

impl SyncGroup {
    /// Whether the command that is being served may join, instead of syncing by itself.
    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    pub(super) fn join(&mut self, submission_queue: u16, command: Sqe) {
        self.waiting.push((submission_queue, command));
    }
}

impl Engine {
    /// Opens the group for a batch of which several commands need a sync. A single one does
    /// better with a sync of its own, which covers only its range.
    pub(super) fn open_group(&mut self, id: u16, count: usize) {
        self.group.open = id != 0
            && count > 1
            && self.fetched[..count]
                .iter()
                .filter(|command| self.wants_sync(command))
                .count()
                > 1;
    }

    /// Syncs what the commands of the group need, and completes them.
    pub(super) fn close_group(&mut self) {
        self.group.open = false;
        if self.group.waiting.is_empty() {
            return;
        }
        let mut waiting = std::mem::take(&mut self.group.waiting);
        if !self.is_serving() {
            // The controller failed meanwhile: nothing completes any more.
            waiting.clear();
        }
        // Stable, so that commands of one namespace complete in the order of their submission.
        waiting.sort_by_key(|(_, command)| command.nsid());
        for group in waiting.chunk_by(|(_, one), (_, other)| one.nsid() == other.nsid()) {
            let outcome = self.sync(group[0].1.nsid()).map(|()| 0);
            for (submission_queue, command) in group {
                self.complete(*submission_queue, command, outcome);
            }
        }
        waiting.clear();
        self.group.waiting = waiting;
    }
}
