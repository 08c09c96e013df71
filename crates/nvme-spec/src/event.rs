//! Asynchronous events: what the completion of an Asynchronous Event Request reports (Base, section
//! 5.2).

use bitfield_struct::bitfield;

use crate::log;

/// Dword 0 of the completion of an Asynchronous Event Request (Base, section 5.2, figure "Completion
/// Queue Entry Dword 0").
///
/// A controller sends no further event of the same type until the host has read the log page (without
/// Retain Asynchronous Event).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AsyncEvent {
    /// Asynchronous Event Type: 0 error, 1 SMART / health, 2 notice, 3 immediate, 6 I/O command
    /// specific, 7 vendor specific.
    #[bits(3)]
    pub event_type: u8,
    #[bits(5)]
    __: u8,
    /// Asynchronous Event Information: which event of that type.
    #[bits(8)]
    pub information: u8,
    /// Log Page Identifier: the log page to read ([`log::id`]).
    #[bits(8)]
    pub log_page: u8,
    #[bits(8)]
    __: u8,
}

macro_rules! events {
    ($($(#[$attributes:meta])* $event:ident = ($event_type:literal, $information:literal, $log_page:expr);)*) => {
        /// An event, decoded (Base, section 5.2, figures "Asynchronous Event Information").
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Event {
            $($(#[$attributes])* $event,)*
            /// Anything else: vendor specific, of another command set, or newer.
            Other {
                /// Asynchronous Event Type.
                event_type: u8,
                /// Asynchronous Event Information.
                information: u8,
            },
        }

        impl AsyncEvent {
            /// Which event this is, by type and information.
            pub const fn event(self) -> Event {
                match (self.event_type(), self.information()) {
                    $(($event_type, $information) => Event::$event,)*
                    (event_type, information) => Event::Other { event_type, information },
                }
            }

            /// The report of `event` with the log page that the specification assigns to it, for a
            /// controller to answer with. [`Event::Other`] gets log page 0, and only the lowest 3 bits
            /// of its type count.
            pub const fn report(event: Event) -> Self {
                let (event_type, information, log_page) = match event {
                    $(Event::$event => ($event_type, $information, $log_page),)*
                    Event::Other { event_type, information } => (event_type & 0b111, information, 0),
                };
                Self::new()
                    .with_event_type(event_type)
                    .with_information(information)
                    .with_log_page(log_page)
            }
        }

        #[cfg(test)]
        const NAMED: &[Event] = &[$(Event::$event),*];
    };
}

events! {
    /// The host wrote a doorbell of a queue that does not exist.
    InvalidDoorbellRegister = (0, 0x00, log::id::ERROR);
    /// The host wrote a value that the doorbell cannot have.
    InvalidDoorbellValue = (0, 0x01, log::id::ERROR);
    /// The controller found a failure in a diagnosis.
    DiagnosticFailure = (0, 0x02, log::id::ERROR);
    /// The controller failed, and no reset helps.
    PersistentInternalError = (0, 0x03, log::id::ERROR);
    /// The controller failed for a moment and goes on.
    TransientInternalError = (0, 0x04, log::id::ERROR);
    /// The firmware image could not be loaded.
    FirmwareImageLoadError = (0, 0x05, log::id::ERROR);
    /// The reliability of the NVM subsystem is compromised.
    SubsystemReliability = (1, 0x00, log::id::SMART_HEALTH);
    /// A temperature crossed its threshold.
    TemperatureThreshold = (1, 0x01, log::id::SMART_HEALTH);
    /// The spare capacity fell below its threshold.
    SpareBelowThreshold = (1, 0x02, log::id::SMART_HEALTH);
    /// A namespace's Identify data changed, or a namespace came or went.
    NamespaceAttributeChanged = (2, 0x00, log::id::CHANGED_NAMESPACES);
    /// The controller starts to activate firmware.
    FirmwareActivationStarting = (2, 0x01, log::id::FIRMWARE_SLOT);
    /// The controller saved telemetry data.
    TelemetryLogChanged = (2, 0x02, log::id::TELEMETRY_CONTROLLER);
    /// The asymmetric access state of a namespace changed.
    AsymmetricAccessChanged = (2, 0x03, log::id::ASYMMETRIC_ACCESS);
    /// The predictable latency event aggregate log changed.
    PredictableLatencyLogChanged = (2, 0x04, log::id::PREDICTABLE_LATENCY_EVENTS);
    /// Logical blocks may not be readable any more.
    LbaStatusAlert = (2, 0x05, log::id::LBA_STATUS);
    /// The endurance group event aggregate log changed.
    EnduranceGroupLogChanged = (2, 0x06, log::id::ENDURANCE_GROUP_EVENTS);
    /// The NVM subsystem is being shut down normally.
    NormalSubsystemShutdown = (3, 0x00, 0);
    /// The reservation notification log has something new.
    ReservationLogAvailable = (6, 0x00, log::id::RESERVATION_NOTIFICATION);
    /// A sanitize operation ended.
    SanitizeCompleted = (6, 0x01, log::id::SANITIZE_STATUS);
    /// A sanitize operation ended and deallocated blocks although it was not to.
    SanitizeCompletedWithDeallocation = (6, 0x02, log::id::SANITIZE_STATUS);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_namespace_by_hand() {
        let event = AsyncEvent::from_bits(0x0004_0002);
        assert_eq!(event.event(), Event::NamespaceAttributeChanged);
        assert_eq!(event.log_page(), 0x04);
        assert_eq!(
            AsyncEvent::report(Event::SpareBelowThreshold).into_bits(),
            0x0002_0201
        );
    }

    #[test]
    fn named_events_come_back() {
        for &event in NAMED {
            assert_eq!(AsyncEvent::report(event).event(), event);
        }
    }

    #[test]
    fn unnamed_events_are_kept() {
        let event = AsyncEvent::from_bits(0x00c0_1207);
        let decoded = Event::Other {
            event_type: 7,
            information: 0x12,
        };
        assert_eq!(event.event(), decoded);
        assert_eq!(AsyncEvent::report(decoded).into_bits(), 0x0000_1207);
    }
}
