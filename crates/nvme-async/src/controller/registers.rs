//! The controller's registers, and waiting for them.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::registers::{
    AdminQueueAttributes, Capabilities, ControllerConfiguration, ControllerStatus, ReadyTimeouts,
    ShutdownNotification, ShutdownStatus, Version, offset,
};
use tokio::runtime::Handle;

use crate::device::{Device, DeviceError};
use crate::{Error, Fate};

/// Between two looks at a register that is waited for; grows from the first to the last.
const FIRST_LOOK: Duration = Duration::from_micros(100);
const LAST_LOOK: Duration = Duration::from_millis(10);

/// The registers of one controller.
#[derive(Clone)]
pub(crate) struct Registers {
    pub(crate) device: Arc<dyn Device>,
}

/// Where the admin queue's rings are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdminRings {
    pub(crate) entries: u16,
    /// I/O virtual addresses.
    pub(crate) submission: u64,
    pub(crate) completion: u64,
}

/// What a wait for a register may end with, besides success.
enum Stop {
    Device(DeviceError),
    Gone,
    Fatal(u32),
}

impl Registers {
    /// Accesses registers from a task: where another process answers, in a thread that may wait for
    /// it. That goes on when this is dropped.
    pub(crate) async fn access<R: Send + 'static>(
        &self,
        access: impl FnOnce(&Self) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        if !self.device.waits_for_peer() {
            return access(self);
        }
        let this = self.clone();
        apart(self.device.address(), move || access(&this)).await
    }

    pub(crate) fn capabilities(&self) -> Result<Capabilities, Error> {
        let bits = self.device.read64(offset::CAP)?;
        if bits == u64::MAX {
            return Err(self.removed());
        }
        Ok(Capabilities::from_bits(bits))
    }

    pub(crate) fn version(&self) -> Result<Version, Error> {
        Ok(Version::from_bits(self.device.read32(offset::VS)?))
    }

    /// How long the controller may take to become ready or to become disabled.
    pub(crate) fn ready_timeout(&self, capabilities: Capabilities) -> Result<Duration, Error> {
        // CRTO exists where CAP.CRMS says so, and counts in the same units, past CAP.TO's range.
        let longest = if capabilities.crms() == 0 {
            0
        } else {
            let timeouts = ReadyTimeouts::from_bits(self.device.read32(offset::CRTO)?);
            u64::from(timeouts.crwmt()) * 500
        };
        let stated = u64::from(capabilities.timeout_ms()).max(longest);
        Ok(Duration::from_millis(stated.max(500)))
    }

    pub(crate) fn configuration(&self) -> Result<ControllerConfiguration, Error> {
        Ok(ControllerConfiguration::from_bits(
            self.device.read32(offset::CC)?,
        ))
    }

    pub(crate) fn configure(&self, configuration: ControllerConfiguration) -> Result<(), Error> {
        Ok(self.device.write32(offset::CC, configuration.into_bits())?)
    }

    /// Disables the controller and waits until it is (NVMe base specification 2.0, section 3.1.3.5,
    /// CC.EN). Afterwards it accesses no host memory.
    pub(crate) async fn disable(&self, timeout: Duration) -> Result<(), Error> {
        self.access(Self::clear_enable).await?;
        self.wait("become disabled", timeout, false, |status| !status.rdy())
            .await
    }

    /// As [`disable`](Self::disable), for threads outside of a runtime.
    pub(crate) fn disable_blocking(&self, timeout: Duration) -> Result<(), Error> {
        self.clear_enable()?;
        let mut wait = Wait::new(timeout);
        loop {
            if self
                .look(false, |status| !status.rdy())
                .map_err(|stop| self.error(stop))?
                .is_none()
            {
                return Ok(());
            }
            match wait.pause() {
                Some(pause) => std::thread::sleep(pause),
                None => return Err(self.not_ready("become disabled", timeout)),
            }
        }
    }

    /// Waits until the controller is ready after it was enabled.
    pub(crate) async fn ready(&self, timeout: Duration) -> Result<(), Error> {
        self.wait("become ready", timeout, true, |status| status.rdy())
            .await
    }

    /// Announces a normal shutdown and waits until the controller has flushed what it must (NVMe
    /// base specification 2.0, section 3.6).
    pub(crate) async fn shut_down(&self, timeout: Duration) -> Result<(), Error> {
        let announce = |this: &Self| {
            this.configure(this.configuration()?.with_shn(ShutdownNotification::Normal))
        };
        self.access(announce).await?;
        self.wait("shut down", timeout, false, |status| {
            status.shst() == ShutdownStatus::Complete
        })
        .await
    }

    /// Tells the disabled controller where the admin queue is, and lets it access memory.
    pub(crate) fn set_up_admin(&self, rings: &AdminRings) -> Result<(), Error> {
        let attributes = AdminQueueAttributes::new()
            .with_asqs(rings.entries - 1)
            .with_acqs(rings.entries - 1);
        let device = &self.device;
        device.write32(offset::AQA, attributes.into_bits())?;
        device.write64(offset::ASQ, rings.submission)?;
        device.write64(offset::ACQ, rings.completion)?;
        Ok(device.set_bus_master(true)?)
    }

    /// Sets the configuration, and then CC.EN.
    pub(crate) fn enable(&self, configuration: ControllerConfiguration) -> Result<(), Error> {
        self.configure(configuration)?;
        self.configure(configuration.with_en(true))
    }

    /// CSTS, or nothing if there is no controller behind the registers: they can't be read, or are
    /// all ones, or all zeroes, which VS never is.
    pub(crate) fn live_status(&self) -> Option<u32> {
        let csts = self.device.read32(offset::CSTS).ok()?;
        let is_there = csts != 0 || self.device.read32(offset::VS).ok()? != 0;
        (csts != u32::MAX && is_there).then_some(csts)
    }

    /// Whether the controller is known to be disabled.
    pub(crate) fn is_disabled(&self) -> bool {
        let csts = self.live_status();
        csts.is_some_and(|csts| !ControllerStatus::from_bits(csts).rdy())
    }

    /// Resets the function; returns whether the controller is disabled afterwards. May block.
    pub(crate) fn reset_function(&self) -> bool {
        match self.device.reset() {
            Ok(()) => self.is_disabled(),
            Err(error) => {
                tracing::warn!(%error, "the function could not be reset");
                false
            }
        }
    }

    /// Clears CC.EN, if it is set.
    pub(crate) fn clear_enable(&self) -> Result<(), Error> {
        let configuration = self.configuration()?;
        if configuration.into_bits() == u32::MAX {
            return Err(self.removed());
        }
        if configuration.en() {
            let disabled = configuration
                .with_en(false)
                .with_shn(ShutdownNotification::None);
            self.configure(disabled)?;
        }
        Ok(())
    }

    async fn wait(
        &self,
        action: &'static str,
        timeout: Duration,
        fatal_matters: bool,
        done: fn(ControllerStatus) -> bool,
    ) -> Result<(), Error> {
        let look = move |this: &Self| {
            this.look(fatal_matters, done)
                .map_err(|stop| this.error(stop))
        };
        let mut wait = Wait::new(timeout);
        loop {
            if self.access(look).await?.is_none() {
                return Ok(());
            }
            match wait.pause() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => {
                    let late = move |this: &Self| Err(this.not_ready(action, timeout));
                    return self.access(late).await;
                }
            }
        }
    }

    /// Nothing once `done`.
    fn look(
        &self,
        fatal_matters: bool,
        done: impl Fn(ControllerStatus) -> bool,
    ) -> Result<Option<ControllerStatus>, Stop> {
        let bits = self.device.read32(offset::CSTS).map_err(Stop::Device)?;
        let status = ControllerStatus::from_bits(bits);
        if status.is_gone() {
            Err(Stop::Gone)
        } else if fatal_matters && status.cfs() {
            Err(Stop::Fatal(bits))
        } else {
            Ok((!done(status)).then_some(status))
        }
    }

    fn error(&self, stop: Stop) -> Error {
        match stop {
            Stop::Device(error) => error.into(),
            Stop::Gone => self.removed(),
            Stop::Fatal(csts) => Error::ControllerFailed {
                address: self.address(),
                csts,
                fate: Fate::NotExecuted,
            },
        }
    }

    pub(super) fn not_ready(&self, action: &'static str, waited: Duration) -> Error {
        let csts = self.device.read32(offset::CSTS).unwrap_or(u32::MAX);
        Error::NotReady {
            address: self.address(),
            action,
            waited,
            csts,
        }
    }

    pub(super) fn removed(&self) -> Error {
        Error::Removed {
            address: self.address(),
            fate: Fate::NotExecuted,
        }
    }

    fn address(&self) -> String {
        self.device.address().to_owned()
    }
}

/// Does something that may wait for another process, in a thread that may. That goes on when this is
/// dropped.
pub(crate) async fn apart<R: Send + 'static>(
    address: &str,
    work: impl FnOnce() -> Result<R, Error> + Send + 'static,
) -> Result<R, Error> {
    let gone = || Error::RuntimeGone {
        address: address.to_owned(),
        fate: Fate::NotExecuted,
    };
    let runtime = Handle::try_current().map_err(|_| gone())?;
    match runtime.spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => Err(gone()),
        },
    }
}

/// Paces the looks of one wait.
struct Wait {
    end: Instant,
    pause: Duration,
}

impl Wait {
    fn new(timeout: Duration) -> Self {
        Self {
            end: Instant::now() + timeout,
            pause: FIRST_LOOK,
        }
    }

    fn pause(&mut self) -> Option<Duration> {
        if Instant::now() >= self.end {
            return None;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LAST_LOOK);
        Some(pause)
    }
}
