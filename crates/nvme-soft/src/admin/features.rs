//! Set Features and Get Features (base specification 2.0, sections 5.15 and 5.27; NVM command set
//! specification 1.0, section 4.1.3).

use std::collections::BTreeSet;

use nvme_spec::feature::{
    AsyncEventConfiguration, ErrorRecovery, FeatureCapabilities, InterruptCoalescing,
    InterruptVectorConfiguration, NumberOfQueues, PowerManagement, TemperatureThreshold,
    VolatileWriteCache, id,
};
use nvme_spec::{Sqe, Status, admin};

use crate::config::Config;
use crate::engine::{Engine, Outcome};

/// The composite temperature from which on there is a warning (WCTEMP), in kelvins: 70 °C.
pub(super) const WARNING_TEMPERATURE: u16 = 343;

/// The values of all features. None is saved across resets.
#[derive(Clone, Debug)]
pub(crate) struct Features {
    arbitration: u32,
    power_management: u32,
    over_temperature: u16,
    under_temperature: u16,
    /// By namespace, the first one's first.
    error_recovery: Vec<u32>,
    has_write_cache: bool,
    write_cache_enabled: bool,
    queues: NumberOfQueues,
    max_queue_pairs: u16,
    interrupt_coalescing: InterruptCoalescing,
    vectors: u16,
    /// Vectors without coalescing.
    uncoalesced: BTreeSet<u16>,
    write_atomicity: u32,
    async_events: AsyncEventConfiguration,
}

impl Features {
    pub(crate) fn new(config: &Config, namespaces: u32, vectors: u16) -> Self {
        Self {
            arbitration: 0,
            power_management: 0,
            over_temperature: WARNING_TEMPERATURE,
            under_temperature: 0,
            error_recovery: vec![0; namespaces as usize],
            has_write_cache: config.volatile_write_cache,
            write_cache_enabled: config.volatile_write_cache,
            queues: NumberOfQueues::pairs(config.io_queue_pairs),
            max_queue_pairs: config.io_queue_pairs,
            interrupt_coalescing: InterruptCoalescing::new(),
            vectors,
            uncoalesced: BTreeSet::new(),
            write_atomicity: 0,
            async_events: AsyncEventConfiguration::new(),
        }
    }

    /// The same after a controller reset.
    pub(super) fn defaults(&self, config: &Config) -> Self {
        Self::new(config, self.error_recovery.len() as u32, self.vectors)
    }

    /// Whether writes may complete before they are durable.
    pub(crate) fn volatile_write_cache(&self) -> bool {
        self.write_cache_enabled
    }

    /// The largest identifier that an I/O submission queue may have.
    pub(super) fn submission_queues(&self) -> u32 {
        self.queues.submission_queues()
    }

    /// The largest identifier that an I/O completion queue may have.
    pub(super) fn completion_queues(&self) -> u32 {
        self.queues.completion_queues()
    }

    /// Whether a temperature is outside of what the host has set.
    pub(super) fn is_out_of_range(&self, temperature: u16) -> bool {
        temperature >= self.over_temperature || temperature <= self.under_temperature
    }

    /// When interrupts of I/O queues may wait for more completions.
    pub(crate) fn interrupt_coalescing(&self) -> InterruptCoalescing {
        self.interrupt_coalescing
    }

    /// Whether that holds for a vector.
    pub(crate) fn is_coalesced(&self, vector: u16) -> bool {
        !self.uncoalesced.contains(&vector)
    }

    /// Which events the host has asked for.
    pub(crate) fn async_events(&self) -> AsyncEventConfiguration {
        self.async_events
    }

    /// The value as Get Features returns it. `nsid` and dword 11 select among several.
    fn value(&self, feature: u8, nsid: u32, dword11: u32) -> Outcome {
        Ok(match feature {
            id::ARBITRATION => self.arbitration,
            id::POWER_MANAGEMENT => self.power_management,
            id::TEMPERATURE_THRESHOLD => {
                let selected = TemperatureThreshold::from_bits(dword11);
                let threshold = match (selected.tmpsel(), selected.thsel()) {
                    (0, 0) => self.over_temperature,
                    (0, 1) => self.under_temperature,
                    // There are no sensors besides the composite one.
                    _ => return Err(Status::INVALID_FIELD),
                };
                threshold.into()
            }
            id::ERROR_RECOVERY => *nsid
                .checked_sub(1)
                .and_then(|index| self.error_recovery.get(index as usize))
                .ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?,
            id::VOLATILE_WRITE_CACHE if self.has_write_cache => VolatileWriteCache::new()
                .with_wce(self.write_cache_enabled)
                .into_bits(),
            id::NUMBER_OF_QUEUES => self.queues.into_bits(),
            id::INTERRUPT_COALESCING => self.interrupt_coalescing.into_bits(),
            id::INTERRUPT_VECTOR_CONFIGURATION => {
                let vector = InterruptVectorConfiguration::from_bits(dword11).iv();
                self.check_vector(vector)?;
                InterruptVectorConfiguration::new()
                    .with_iv(vector)
                    .with_cd(self.uncoalesced.contains(&vector))
                    .into_bits()
            }
            id::WRITE_ATOMICITY => self.write_atomicity,
            id::ASYNC_EVENT_CONFIGURATION => self.async_events.into_bits(),
            // The one combination of command sets that there is.
            id::COMMAND_SET_PROFILE => 0,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    /// Sets a value; the result is dword 0 of the completion.
    fn set(&mut self, feature: u8, nsid: u32, value: u32) -> Outcome {
        match feature {
            id::ARBITRATION => self.arbitration = value,
            id::POWER_MANAGEMENT => {
                // There is one power state.
                if PowerManagement::from_bits(value).ps() != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                self.power_management = value;
            }
            id::TEMPERATURE_THRESHOLD => self.set_temperature_threshold(value)?,
            id::ERROR_RECOVERY => self.set_error_recovery(nsid, value)?,
            id::VOLATILE_WRITE_CACHE if self.has_write_cache => {
                self.write_cache_enabled = VolatileWriteCache::from_bits(value).wce();
            }
            id::NUMBER_OF_QUEUES => {
                let asked = NumberOfQueues::from_bits(value);
                if asked.nsq() == 0xffff || asked.ncq() == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                let most = self.max_queue_pairs - 1;
                self.queues = NumberOfQueues::new()
                    .with_nsq(asked.nsq().min(most))
                    .with_ncq(asked.ncq().min(most));
                return Ok(self.queues.into_bits());
            }
            id::INTERRUPT_COALESCING => {
                self.interrupt_coalescing = InterruptCoalescing::from_bits(value & 0xffff);
            }
            id::INTERRUPT_VECTOR_CONFIGURATION => {
                let vector = InterruptVectorConfiguration::from_bits(value);
                self.check_vector(vector.iv())?;
                if vector.cd() {
                    self.uncoalesced.insert(vector.iv());
                } else {
                    self.uncoalesced.remove(&vector.iv());
                }
            }
            id::WRITE_ATOMICITY => self.write_atomicity = value & 1,
            id::ASYNC_EVENT_CONFIGURATION => {
                self.async_events = AsyncEventConfiguration::from_bits(value);
            }
            id::COMMAND_SET_PROFILE if value & 0x1ff == 0 => {}
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }

    fn check_vector(&self, vector: u16) -> Result<(), Status> {
        if vector < self.vectors {
            Ok(())
        } else {
            Err(Status::INVALID_FIELD)
        }
    }

    fn set_temperature_threshold(&mut self, value: u32) -> Result<(), Status> {
        /// TMPSEL: all sensors that there are.
        const ALL: u8 = 0xf;
        let threshold = TemperatureThreshold::from_bits(value);
        match (threshold.tmpsel(), threshold.thsel()) {
            (0 | ALL, 0) => self.over_temperature = threshold.tmpth(),
            (0 | ALL, 1) => self.under_temperature = threshold.tmpth(),
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(())
    }

    fn set_error_recovery(&mut self, nsid: u32, value: u32) -> Result<(), Status> {
        // Errors for deallocated blocks are not supported (NSFEAT bit 2).
        if ErrorRecovery::from_bits(value).dulbe() {
            return Err(Status::INVALID_FIELD);
        }
        if nsid == admin::ALL_NAMESPACES {
            self.error_recovery.fill(value);
            return Ok(());
        }
        let current = nsid
            .checked_sub(1)
            .and_then(|index| self.error_recovery.get_mut(index as usize))
            .ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?;
        *current = value;
        Ok(())
    }
}

impl Engine {
    pub(super) fn set_features(&mut self, command: &Sqe) -> Outcome {
        /// SV in command dword 10.
        const SAVE: u32 = 1 << 31;
        let feature = command.cdw10() as u8;
        let (nsid, value) = (command.nsid(), command.cdw11());
        // What is not supported is refused as such, whatever else is wrong.
        self.capabilities(feature)?;
        if command.cdw10() & SAVE != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        if feature != id::ERROR_RECOVERY && nsid != 0 && nsid != admin::ALL_NAMESPACES {
            return Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC);
        }
        if feature == id::NUMBER_OF_QUEUES && self.queues.has_io() {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        let had_cache = self.admin.features.volatile_write_cache();
        let result = self.admin.features.set(feature, nsid, value)?;
        match feature {
            // What is in the cache does not become durable by itself.
            id::VOLATILE_WRITE_CACHE
                if had_cache && !self.admin.features.volatile_write_cache() =>
            {
                self.flush_all()?;
            }
            id::TEMPERATURE_THRESHOLD | id::ASYNC_EVENT_CONFIGURATION => self.check_health(),
            id::INTERRUPT_COALESCING | id::INTERRUPT_VECTOR_CONFIGURATION => {
                self.configure_coalescing();
            }
            _ => {}
        }
        Ok(result)
    }

    pub(super) fn get_features(&mut self, command: &Sqe) -> Outcome {
        let feature = command.cdw10() as u8;
        let (nsid, dword11) = (command.nsid(), command.cdw11());
        match command.cdw10() >> 8 & 0b111 {
            0 => self.admin.features.value(feature, nsid, dword11),
            // What cannot be saved has its default as saved value.
            1 | 2 => self
                .admin
                .features
                .defaults(&self.config)
                .value(feature, nsid, dword11),
            3 => self
                .capabilities(feature)
                .map(FeatureCapabilities::into_bits),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// What can be done with a feature; an error for one that is not supported.
    fn capabilities(&self, feature: u8) -> Result<FeatureCapabilities, Status> {
        let supported = match feature {
            id::VOLATILE_WRITE_CACHE => self.config.volatile_write_cache,
            _ => matches!(
                feature,
                id::ARBITRATION
                    | id::POWER_MANAGEMENT
                    | id::TEMPERATURE_THRESHOLD
                    | id::ERROR_RECOVERY
                    | id::NUMBER_OF_QUEUES
                    | id::INTERRUPT_COALESCING
                    | id::INTERRUPT_VECTOR_CONFIGURATION
                    | id::WRITE_ATOMICITY
                    | id::ASYNC_EVENT_CONFIGURATION
                    | id::COMMAND_SET_PROFILE
            ),
        };
        if !supported {
            return Err(Status::INVALID_FIELD);
        }
        Ok(FeatureCapabilities::new()
            .with_namespace_specific(feature == id::ERROR_RECOVERY)
            .with_changeable(feature != id::COMMAND_SET_PROFILE))
    }
}
