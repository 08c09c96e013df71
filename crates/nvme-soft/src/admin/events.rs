//! Asynchronous events (base specification 2.0, section 5.2).

use std::collections::VecDeque;

use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::log::id;
use nvme_spec::{Sqe, Status};

use crate::engine::{Engine, Reply};

/// Events that wait for a request. More are dropped, since an event only says where to look.
const MAX_QUEUED: usize = 16;
/// The log pages that there are, which a host reads to be told of further events.
const EVENT_LOGS: [u8; 4] = [
    id::ERROR,
    id::SMART_HEALTH,
    id::FIRMWARE_SLOT,
    id::CHANGED_NAMESPACES,
];

/// Requests that wait for events, and events that wait for requests.
pub(crate) struct Events {
    limit: usize,
    requests: VecDeque<Sqe>,
    queued: VecDeque<AsyncEvent>,
    /// By type: the log page of the event that was reported, which the host has not read yet.
    masked: [Option<u8>; 8],
}

impl Events {
    pub(super) fn new(limit: u16) -> Self {
        Self {
            limit: limit.into(),
            requests: VecDeque::new(),
            queued: VecDeque::new(),
            masked: [None; 8],
        }
    }

    fn raise(&mut self, event: AsyncEvent) {
        if !self.queued.contains(&event) && self.queued.len() < MAX_QUEUED {
            self.queued.push_back(event);
        }
    }

    /// The next request that can be answered, and dword 0 of its completion.
    pub(crate) fn next_delivery(&mut self) -> Option<(Sqe, u32)> {
        let masked = &self.masked;
        let index = self
            .queued
            .iter()
            .position(|event| masked[usize::from(event.event_type())].is_none())?;
        let request = self.requests.pop_front()?;
        let event = self.queued.remove(index)?;
        // What has no log page to read can't wait for that.
        if EVENT_LOGS.contains(&event.log_page()) {
            self.masked[usize::from(event.event_type())] = Some(event.log_page());
        }
        Some((request, event.into_bits()))
    }

    /// The host has read a log page: events of the types that wait for it are reported again.
    pub(super) fn log_page_read(&mut self, log_page: u8) {
        for masked in &mut self.masked {
            masked.take_if(|waits_for| *waits_for == log_page);
        }
    }

    /// Takes a request back.
    pub(super) fn abort(&mut self, cid: u16) -> Option<Sqe> {
        let index = self
            .requests
            .iter()
            .position(|request| request.cid() == cid)?;
        self.requests.remove(index)
    }
}

impl Engine {
    pub(super) fn async_event_request(&mut self, command: &Sqe) -> Reply {
        if command.fuse() != 0 || command.psdt() != 0 {
            return Reply::Now(Err(Status::INVALID_FIELD));
        }
        let events = &mut self.admin.events;
        if events.requests.len() >= events.limit {
            return Reply::Now(Err(Status::ASYNC_EVENT_LIMIT_EXCEEDED));
        }
        events.requests.push_back(*command);
        self.deliver_events();
        Reply::Later
    }

    pub(crate) fn invalid_doorbell_register(&mut self) {
        self.admin.errors.note_event();
        self.raise_event(AsyncEvent::report(Event::InvalidDoorbellRegister));
    }

    pub(crate) fn invalid_doorbell_value(&mut self) {
        self.admin.errors.note_event();
        self.raise_event(AsyncEvent::report(Event::InvalidDoorbellValue));
    }

    /// Reports an event, or keeps it until the host asks.
    pub(crate) fn raise_event(&mut self, event: AsyncEvent) {
        self.admin.events.raise(event);
        self.deliver_events();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(cid: u16) -> Sqe {
        nvme_spec::admin::async_event_request().with_cid(cid)
    }

    #[test]
    fn an_event_waits_for_a_request_and_masks_its_type() {
        let mut events = Events::new(4);
        events.raise(AsyncEvent::report(Event::InvalidDoorbellValue));
        assert_eq!(events.next_delivery(), None);
        events.requests.extend([request(1), request(2)]);
        assert_eq!(events.next_delivery(), Some((request(1), 0x0001_0100)));
        events.raise(AsyncEvent::report(Event::InvalidDoorbellRegister));
        events.raise(AsyncEvent::report(Event::InvalidDoorbellRegister));
        assert_eq!(events.next_delivery(), None);
        events.log_page_read(id::SMART_HEALTH);
        assert_eq!(events.next_delivery(), None);
        events.log_page_read(id::ERROR);
        assert_eq!(events.next_delivery(), Some((request(2), 0x0001_0000)));
        assert_eq!(events.next_delivery(), None);
    }
}
