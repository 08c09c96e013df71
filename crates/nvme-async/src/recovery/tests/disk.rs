//! What reads may return, by what the host was told of its writes.

use super::model::BLOCKS;

/// What the host knows of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Nothing yet, or nothing for ever: its future was dropped.
    Unresolved,
    Done,
    /// It failed, and may have been executed, each block of it or not.
    Unknown,
    NotExecuted,
}

#[derive(Clone, Copy, Debug)]
struct Write {
    operation: u32,
    began: u64,
    ended: u64,
    known: Known,
}

impl Write {
    /// What blocks hold in the beginning.
    const NONE: Self = Self {
        operation: 0,
        began: 0,
        ended: 0,
        known: Known::Done,
    };
}

/// All writes of a history, by block.
#[derive(Default)]
pub(super) struct History {
    blocks: [Vec<Write>; BLOCKS],
}

impl History {
    pub(super) fn write_begins(&mut self, operation: u32, blocks: std::ops::Range<usize>, at: u64) {
        for block in &mut self.blocks[blocks] {
            block.push(Write {
                operation,
                began: at,
                ended: u64::MAX,
                known: Known::Unresolved,
            });
        }
    }

    pub(super) fn write_ends(
        &mut self,
        operation: u32,
        blocks: std::ops::Range<usize>,
        at: u64,
        known: Known,
    ) {
        for block in &mut self.blocks[blocks] {
            let writes = block.iter_mut().rev();
            for write in writes.filter(|write| write.operation == operation) {
                (write.ended, write.known) = (at, known);
            }
        }
    }

    /// Whether a read between `began` and `ended` may return what `found` says.
    pub(super) fn check(
        &self,
        block: usize,
        found: u32,
        began: u64,
        ended: u64,
    ) -> Result<(), String> {
        let writes = &self.blocks[block];
        let wrong = |why: &str| {
            Err(format!(
                "block {block} reads as of operation {found} between {began} and {ended}, {why}; \
                 its writes: {writes:?}"
            ))
        };
        let by = |write: &&Write| write.operation == found;
        let source = match found {
            0 => &Write::NONE,
            _ => match writes.iter().find(by) {
                Some(write) => write,
                None => return wrong("which never wrote it"),
            },
        };
        if source.known == Known::NotExecuted {
            return wrong("which was said not to have been executed");
        }
        if source.began > ended {
            return wrong("which had not begun");
        }
        let between = |write: &&Write| {
            write.known == Known::Done && write.began > source.ended && write.ended < began
        };
        match writes.iter().find(between) {
            Some(later) => wrong(&format!("after operation {}", later.operation)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_acknowledged_hides_what_was_before() {
        let mut history = History::default();
        history.check(0, 0, 0, 1).unwrap();
        history.check(0, 1, 0, 1).unwrap_err();
        history.write_begins(1, 0..2, 10);
        for found in [0, 1] {
            history.check(0, found, 11, 12).unwrap();
        }
        history.check(0, 1, 5, 9).unwrap_err();
        history.write_ends(1, 0..2, 20, Known::Done);
        history.check(0, 0, 19, 30).unwrap();
        history.check(0, 0, 21, 30).unwrap_err();
        history.check(1, 1, 21, 30).unwrap();
        history.check(2, 1, 21, 30).unwrap_err();
    }

    #[test]
    fn what_failed_is_old_or_new() {
        let mut history = History::default();
        history.write_begins(1, 0..1, 10);
        history.write_ends(1, 0..1, 20, Known::Unknown);
        history.write_begins(2, 0..1, 12);
        history.write_ends(2, 0..1, 22, Known::NotExecuted);
        for found in [0, 1] {
            history.check(0, found, 30, 40).unwrap();
        }
        history.check(0, 2, 30, 40).unwrap_err();
        history.write_begins(3, 0..1, 50);
        history.write_ends(3, 0..1, 60, Known::Done);
        for found in [0, 1] {
            history.check(0, found, 70, 80).unwrap_err();
        }
    }
}
