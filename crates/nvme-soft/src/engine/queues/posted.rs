//! What was posted and may call for an interrupt.

use super::Queues;

/// Entries of a completion queue with an interrupt vector.
pub(crate) struct Posted {
    pub(crate) completion_queue: u16,
    pub(crate) vector: u16,
    pub(crate) entries: u32,
}

impl Queues {
    /// What was posted to the next completion queue that has an interrupt vector.
    pub(crate) fn next_posted(&mut self) -> Option<Posted> {
        while let Some(id) = self.unsignalled.pop() {
            if let Some(queue) = self.completion(id) {
                let entries = std::mem::take(&mut queue.unsignalled);
                if let Some(vector) = queue.vector {
                    return Some(Posted {
                        completion_queue: id,
                        vector,
                        entries,
                    });
                }
            }
        }
        None
    }

    /// Whether a completion queue uses this vector.
    pub(crate) fn uses_vector(&self, vector: u16) -> bool {
        let mut queues = self.completion.iter().flatten();
        queues.any(|queue| queue.vector == Some(vector))
    }
}
