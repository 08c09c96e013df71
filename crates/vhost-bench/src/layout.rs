//! Where things are in the memory that is shared: the virtqueue, and what each request has of its own.

/// Requests that can be in flight.
pub(crate) const MAX_SLOTS: u16 = 256;
/// Descriptors of a request: header, data, status.
pub(crate) const CHAIN: u16 = 3;
/// Descriptors of the queue: a power of two that has room for all requests.
pub(crate) const QUEUE_SIZE: u16 = 1024;
/// Bytes of a request's data.
pub(crate) const BLOCK: u64 = 4096;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;
/// Bytes between the headers of two requests, so that no two are in one cache line with the status of another.
const HEADER_STRIDE: u64 = 64;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0x1_0000;
const HEADERS: u64 = 0x1_8000;
const STATUSES: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;

/// Bytes of all of it.
pub(crate) const MEMORY: u64 = DATA + MAX_SLOTS as u64 * BLOCK;

/// The descriptor table.
pub(crate) const fn descriptor(index: u16) -> u64 {
    index as u64 * DESCRIPTOR
}

/// The available ring: flags, index, heads, and what index of the used ring is to interrupt.
pub(crate) const fn available() -> u64 {
    AVAILABLE
}

pub(crate) const fn available_index() -> u64 {
    AVAILABLE + 2
}

/// The entry for an index, which counts on without end.
pub(crate) const fn available_entry(index: u16) -> u64 {
    AVAILABLE + 4 + (index % QUEUE_SIZE) as u64 * 2
}

pub(crate) const fn used_event() -> u64 {
    AVAILABLE + 4 + QUEUE_SIZE as u64 * 2
}

/// The used ring: flags, index, heads with lengths, and what index of the available ring is to kick.
pub(crate) const fn used() -> u64 {
    USED
}

pub(crate) const fn used_index() -> u64 {
    USED + 2
}

/// The entry for an index, which counts on without end.
pub(crate) const fn used_entry(index: u16) -> u64 {
    USED + 4 + (index % QUEUE_SIZE) as u64 * 8
}

pub(crate) const fn available_event() -> u64 {
    USED + 4 + QUEUE_SIZE as u64 * 8
}

pub(crate) const fn header(slot: u16) -> u64 {
    HEADERS + slot as u64 * HEADER_STRIDE
}

pub(crate) const fn status(slot: u16) -> u64 {
    STATUSES + slot as u64 * HEADER_STRIDE
}

pub(crate) const fn data(slot: u16) -> u64 {
    DATA + slot as u64 * BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps() {
        let parts = [
            (0, descriptor(QUEUE_SIZE)),
            (available(), used_event() + 2),
            (used(), available_event() + 2),
            (header(0), header(MAX_SLOTS)),
            (status(0), status(MAX_SLOTS)),
            (data(0), MEMORY),
        ];
        for (one, next) in parts.iter().zip(&parts[1..]) {
            assert!(one.0 < one.1 && one.1 <= next.0, "{one:x?} {next:x?}");
        }
        assert!(MAX_SLOTS * CHAIN <= QUEUE_SIZE && QUEUE_SIZE.is_power_of_two());
        // Virtio 1.2, section 2.7: of 16, 2 and 4 bytes; and data as a page cache has it.
        assert_eq!((available() % 2, used() % 4, data(1) % BLOCK), (0, 0, 0));
    }

    #[test]
    fn entries_go_round() {
        assert_eq!(available_entry(QUEUE_SIZE), available_entry(0));
        assert_eq!(used_entry(u16::MAX), used_entry(QUEUE_SIZE - 1));
        assert_eq!(available_entry(QUEUE_SIZE - 1) + 2, used_event());
    }
}
