//! The controller's health, as the embedder sets it, and the events about it (base specification
//! 2.0, sections 5.2 and 5.16.1.3).

use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::log::CriticalWarning;

use crate::engine::Engine;

/// The composite temperature at the start in kelvins: 37 °C.
const COMPOSITE_TEMPERATURE: u16 = 310;

/// It stays across resets, except for what was reported.
pub(crate) struct Health {
    /// The composite temperature in kelvins.
    pub(crate) temperature: u16,
    /// Warnings besides those that follow from the temperature.
    pub(crate) warning: CriticalWarning,
    /// Warnings that the host was told of, until they end.
    reported: CriticalWarning,
    pub(super) power_cycles: u64,
    /// Losses of power without a shutdown before.
    pub(super) unsafe_shutdowns: u64,
}

impl Health {
    pub(super) fn new() -> Self {
        Self {
            temperature: COMPOSITE_TEMPERATURE,
            warning: CriticalWarning::new(),
            reported: CriticalWarning::new(),
            power_cycles: 1,
            unsafe_shutdowns: 0,
        }
    }

    /// Power is lost, and will be back.
    pub(crate) fn lose_power(&mut self, is_shut_down: bool) {
        self.power_cycles += 1;
        self.unsafe_shutdowns += u64::from(!is_shut_down);
    }

    pub(super) fn reset(&mut self) {
        self.reported = CriticalWarning::new();
    }
}

impl Engine {
    /// All critical warnings that there are now.
    pub(super) fn critical_warnings(&self) -> CriticalWarning {
        let health = &self.admin.health;
        let too_hot_or_cold = self.admin.features.is_out_of_range(health.temperature);
        let warning = health.warning;
        warning.with_temperature(warning.temperature() || too_hot_or_cold)
    }

    /// Reports warnings that are new to a host that asked for them.
    pub(crate) fn check_health(&mut self) {
        let wanted = self.admin.features.async_events().smart_critical_warnings();
        let now = self.critical_warnings().into_bits() & wanted;
        let new = CriticalWarning::from_bits(now & !self.admin.health.reported.into_bits());
        self.admin.health.reported = CriticalWarning::from_bits(now);
        let others = new.with_spare(false).with_temperature(false);
        let events = [
            (new.spare(), Event::SpareBelowThreshold),
            (new.temperature(), Event::TemperatureThreshold),
            (others.into_bits() != 0, Event::SubsystemReliability),
        ];
        for (is_new, event) in events {
            if is_new {
                self.raise_event(AsyncEvent::report(event));
            }
        }
    }
}
