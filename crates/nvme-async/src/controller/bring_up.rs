//! From a device to a controller that takes commands (NVMe base specification 2.0, section 3.5.1).

mod queues;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::Poll;
use std::time::Duration;

use futures::future::{Either, select};
use iova::{AddressSpace, Retention};
use nvme_spec::feature;
use nvme_spec::identify::{IdentifyController, SglAlignment};
use nvme_spec::registers::{Capabilities, ControllerConfiguration};
use poll_window::Costs;
use zerocopy::IntoBytes;

use super::admin::Admin;
use super::events::Events;
use super::registers::{AdminRings, Registers};
use super::registry::Release;
use super::tenure::Tenure;
use super::{CommandLimits, ControllerInner, shutdown};
use crate::device::{Device, Notice};
use crate::engine::eventfd::Wakeups;
use crate::engine::{Failed, Failure, PollMode, QueueSettings, SharedQueue, State, price};
use crate::io::DmaContext;
use crate::memory::{DEVICE_PAGE, DmaBuf, Pool};
use crate::namespace::pinned::Pins;
use crate::queue::data_pointer::SglSupport;
use crate::recovery::{Plant, Settings, Supervision};
use crate::{CommandName, Error, Fate, OnRecovery, OpenOptions};

const ADMIN_ENTRIES: u16 = 64;
/// The sizes of queue entries, as powers of two (CC.IOSQES, CC.IOCQES).
const SQE_SIZE_LOG2: u8 = 6;
const CQE_SIZE_LOG2: u8 = 4;
/// The largest command that a PRP list of one block of the pool describes.
const LARGEST_TRANSFER: u64 = 16 << 20;

/// How long a command of a recovery may take when nothing says how long a command may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);
/// However much time commands have: none of those of a recovery takes as long.
const LONGEST_STEP_TIMEOUT: Duration = Duration::from_secs(600);
/// An Abort command need not do more than find the command; this is for controllers that are busy.
const ABORT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a command may take after it was aborted.
const GRACE: Duration = Duration::from_millis(500);
/// However little time commands have: with less, a loaded machine is taken for a broken device.
const LEAST_TIMEOUT: Duration = Duration::from_millis(50);
/// A controller that was reset so often in so long is broken.
const MAX_RESETS: usize = 8;
const RESET_WINDOW: Duration = Duration::from_secs(60);

/// What a bring-up knows before there is a controller.
struct BringUp<'a> {
    options: &'a OpenOptions,
    registers: Registers,
    capabilities: Capabilities,
    address: Arc<str>,
    pool: Pool,
    costs: Costs,
}

/// Resets the controller behind `device` and makes it ready, unless it goes away meanwhile.
pub(super) async fn bring_up(
    device: Arc<dyn Device>,
    options: &OpenOptions,
    release: Release,
) -> Result<Arc<ControllerInner>, Error> {
    check_runtime(&*device)?;
    let removed = Error::Removed {
        address: device.address().to_owned(),
        fate: Fate::NotExecuted,
    };
    let gone = gone(&device)?;
    let brought_up = bring_up_present(device, options, release);
    // In this order: where both have happened, what the controller itself said is of no use.
    match select(pin!(gone), pin!(brought_up)).await {
        Either::Left(_) => Err(removed),
        Either::Right((brought_up, _)) => brought_up,
    }
}

/// Resolves when the transport says that the device is gone.
fn gone(device: &Arc<dyn Device>) -> Result<impl Future<Output = ()> + use<>, Error> {
    let notices = device.notices();
    let descriptor = notices.iter().find(|(notice, _)| *notice == Notice::Gone);
    let watched = descriptor.map(|(_, descriptor)| Wakeups::register(descriptor));
    let watched = watched.transpose();
    let mut watched = watched.map_err(|failure| no_runtime(&**device, failure))?;
    Ok(poll_fn(move |context| {
        // It is not read: whoever looks later is told too.
        let told = watched
            .as_mut()
            .map(|notice| notice.poll_interrupt(context));
        if told == Some(true) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }))
}

async fn bring_up_present(
    device: Arc<dyn Device>,
    options: &OpenOptions,
    release: Release,
) -> Result<Arc<ControllerInner>, Error> {
    let address: Arc<str> = device.address().into();
    let registers = Registers {
        device: device.clone(),
    };
    let about = |registers: &Registers| {
        let capabilities = registers.capabilities()?;
        check_capabilities(registers.device.address(), capabilities)?;
        let version = registers.version()?;
        let ready_timeout = registers.ready_timeout(capabilities)?;
        Ok((capabilities, version, ready_timeout))
    };
    let (capabilities, version, ready_timeout) = registers.access(about).await?;
    registers.disable(ready_timeout).await?;

    let retention = Retention {
        bytes: options.retained_bytes,
        ..Retention::default()
    };
    let space = AddressSpace::with_retention(device.mapper(), retention)?;
    let pool = Pool::new(space.clone(), options.pool_limit);
    if device.waits_for_peer() {
        let pool = pool.clone();
        registers.access(move |_| Ok(pool.map_all()?)).await?;
    }
    let this = BringUp {
        options,
        registers: registers.clone(),
        capabilities,
        address,
        pool,
        costs: price_of_a_sleep(options).await,
    };
    let (admin, admin_rings, configuration, mut guard) =
        this.enable(ready_timeout, release).await?;
    let identify = admin.identify_controller().await?;
    if !identify.supports_nvm_entry_sizes() {
        return Err(this.unusable("its queue entries are not of 64 and 16 bytes".to_owned()));
    }
    let limits = this.limits(&admin, &identify).await;
    let dma = DmaContext::new(
        space,
        this.pool.clone(),
        sgl_support(&identify),
        options.isolate,
        device.waits_for_peer(),
        limits.max_transfer as usize,
    )?;
    let retry_delays = [&identify.crdt1, &identify.crdt2, &identify.crdt3]
        .map(|units| Duration::from_millis(u64::from(units.get()) * 100));
    let host_behavior = this.enable_retry_delays(&admin, retry_delays).await?;
    let coalescing = this.coalesce_interrupts(&admin).await;
    let doorbell_buffers = this.share_doorbells(&admin, &identify).await?;
    let queues = this
        .create_queues(&admin, retry_delays, doorbell_buffers.as_ref())
        .await?;
    // The second one of a pair is reached by the first one.
    let step = if options.poll_mode == PollMode::Paired {
        2
    } else {
        1
    };
    let firsts = queues.iter().step_by(step);
    let mut shared_queues: Vec<_> = firsts.map(|(_, queue)| queue.clone()).collect();
    let shared = usize::from(options.queues).min(shared_queues.len());
    let local_queues = shared_queues.split_off(shared);
    let events = Events::new(admin.clone(), &identify);
    let tenure = guard.tenure.clone();
    let plant = Plant {
        tenure: tenure.clone(),
        configuration,
        admin_rings,
        admin: admin.queue.clone(),
        queues,
        coalescing,
        doorbell_buffers,
        identify: this.pool.alloc(DEVICE_PAGE)?,
        // VID, SSVID and SN, the first fields.
        identity: identify.as_bytes()[..24].into(),
        host_behavior,
        events: events.configuration(),
        event_requests: events.requests(),
    };
    let settings = this.recovery_settings(&identify, plant.host_behavior.is_some(), ready_timeout);
    let settings = Settings {
        queues: plant.queues.len() as u16,
        coalescing: plant.coalescing.is_some(),
        doorbell_buffers: plant.doorbell_buffers.is_some(),
        ..settings
    };
    let supervision = match Supervision::start(plant, settings, device.notices()) {
        Ok(supervision) => supervision,
        Err(source) => {
            return Err(Error::Open {
                address: admin.address.to_string(),
                reason: Box::new(source),
            });
        }
    };
    let inner = Arc::new(ControllerInner {
        tenure,
        software_thread: device.software_thread(),
        capabilities,
        version,
        events,
        admin: admin.clone(),
        pins: Pins::new(shared_queues.len()),
        queues: shared_queues,
        local_queues,
        dma,
        limits,
        ready_timeout,
        timeout: options.timeout,
        repeat_writes: options.repeat_writes,
        closing: AtomicBool::new(false),
        ending: tokio::sync::Mutex::default(),
        supervision,
        identify,
    });
    guard.defuse();
    inner.events.arm().await;
    tracing::debug!(
        address = &*inner.admin.address,
        model = inner.identify.model_number(),
        queues = inner.queues.len(),
        local_queues = inner.local_queues.len(),
        "controller is ready"
    );
    Ok(inner)
}

/// Only some queues ask for it.
async fn price_of_a_sleep(options: &OpenOptions) -> Costs {
    if !matches!(options.poll_mode, PollMode::Adaptive | PollMode::Paired) {
        return Costs::default();
    }
    let measured = tokio::task::spawn_blocking(price::of_a_sleep).await;
    // There is none when the runtime ends.
    measured.unwrap_or_default()
}

/// The runtime has what completions need.
pub(super) fn check_runtime(device: &dyn Device) -> Result<(), Error> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(no_runtime(device, Failure::RuntimeGone));
    }
    let Some(vector) = device.vectors().first() else {
        return Err(Error::Unusable {
            address: device.address().to_owned(),
            reason: "it has no interrupt vectors".to_owned(),
        });
    };
    let registered = Wakeups::register(vector).map(drop);
    registered.map_err(|failure| no_runtime(device, failure))
}

/// What the runtime lacks.
fn no_runtime(device: &dyn Device, failure: Failure) -> Error {
    let name = CommandName {
        address: device.address().to_owned(),
        name: "open",
        nsid: None,
        blocks: None,
    };
    Failed::from(failure).into_error(name)
}

fn check_capabilities(address: &str, capabilities: Capabilities) -> Result<(), Error> {
    let unusable = |reason: String| {
        Err(Error::Unusable {
            address: address.to_owned(),
            reason,
        })
    };
    if !capabilities.supports_nvm_command_set() {
        return unusable("it does not support the NVM command set (CAP.CSS)".to_owned());
    }
    if capabilities.min_page_size() as usize > DEVICE_PAGE {
        return unusable(format!(
            "its smallest memory page is {} bytes (CAP.MPSMIN); this driver uses {DEVICE_PAGE}",
            capabilities.min_page_size()
        ));
    }
    if capabilities.max_queue_entries() < 2 {
        return unusable("its queues hold a single entry (CAP.MQES)".to_owned());
    }
    Ok(())
}

/// A controller that is enabled and has no owner yet.
///
/// When a bring-up fails or is dropped, the controller must be disabled before the memory that it
/// may access goes. That memory is all of one pool, which the admin queue keeps alive.
struct Enabled {
    tenure: Arc<Tenure>,
    ready_timeout: Duration,
    admin: Option<Admin>,
}

impl Enabled {
    /// Leaves the controller to a new owner.
    fn defuse(&mut self) {
        self.admin = None;
    }
}

impl Drop for Enabled {
    fn drop(&mut self) {
        if let Some(admin) = self.admin.take() {
            // Taken away from its reaper, which would keep it for as long as its runtime lives.
            let keep = (admin.queue.take(), admin);
            shutdown::stop_and_drop(&self.tenure, self.ready_timeout, keep, None);
        }
    }
}

impl BringUp<'_> {
    fn unusable(&self, reason: String) -> Error {
        Error::Unusable {
            address: self.address.to_string(),
            reason,
        }
    }

    /// Sets up the admin queue and enables the controller.
    async fn enable(
        &self,
        ready_timeout: Duration,
        release: Release,
    ) -> Result<(Admin, AdminRings, ControllerConfiguration, Enabled), Error> {
        let device = &self.registers.device;
        let (submission, completion) = self.ring_memory(ADMIN_ENTRIES)?;
        let rings = AdminRings {
            entries: ADMIN_ENTRIES,
            submission: submission.iova(),
            completion: completion.iova(),
        };
        let settings = QueueSettings {
            // Admin commands are few, and some take long.
            mode: PollMode::Interrupt,
            max_window: Duration::ZERO,
            ..self.queue_settings([Duration::ZERO; 3])
        };
        let core = self.core(0, ADMIN_ENTRIES, submission, completion, None)?;
        let vector = device.vectors()[0].clone();
        let admin = Admin {
            address: self.address.clone(),
            queue: SharedQueue::new(State::new(core, settings), vector),
            pool: self.pool.clone(),
            timeout: self.options.timeout,
        };
        // CC.CSS: 000b is the NVM command set, 110b all that are supported (of which it is one).
        let css = if self.capabilities.supports_all_command_sets() {
            0b110
        } else {
            0b000
        };
        let configuration = ControllerConfiguration::new()
            .with_css(css)
            .with_iosqes(SQE_SIZE_LOG2)
            .with_iocqes(CQE_SIZE_LOG2);
        let guard = Enabled {
            tenure: Tenure::new(self.registers.clone(), release),
            ready_timeout,
            admin: Some(admin.clone()),
        };
        // It goes on when this is dropped, but not after the controller was stopped because of that.
        let tenure = guard.tenure.clone();
        let enable = move |registers: &Registers| {
            let enabled = tenure.while_held(|_| {
                registers.set_up_admin(&rings)?;
                registers.enable(configuration)
            });
            enabled.unwrap_or_else(|| Err(registers.removed()))
        };
        self.registers.access(enable).await?;
        self.registers.ready(ready_timeout).await?;
        Ok((admin, rings, configuration, guard))
    }

    fn queue_settings(&self, retry_delays: [Duration; 3]) -> QueueSettings {
        QueueSettings {
            mode: self.options.poll_mode,
            costs: self.costs,
            max_window: self.options.max_window,
            coalescing_time: Duration::from_micros(100) * self.options.coalescing.time().into(),
            retries: self.options.retries,
            fails_fast: self.options.on_recovery == OnRecovery::Fail,
            retry_delays,
        }
    }

    /// Tells a controller that would like commands to be sent again later that we know how (Advanced
    /// Command Retry Enable); returns what it is told by, to be told again after a reset.
    async fn enable_retry_delays(
        &self,
        admin: &Admin,
        retry_delays: [Duration; 3],
    ) -> Result<Option<DmaBuf>, Error> {
        if retry_delays.iter().all(Duration::is_zero) {
            return Ok(None);
        }
        let behavior = feature::HostBehaviorSupport {
            acre: 1,
            ..Default::default()
        };
        let mut buffer = self.pool.alloc(size_of_val(&behavior))?;
        buffer.copy_from_slice(behavior.as_bytes());
        match admin
            .set_feature(feature::id::HOST_BEHAVIOR_SUPPORT, buffer)
            .await
        {
            Ok(buffer) => Ok(Some(buffer)),
            Err(error) => {
                tracing::debug!(%error, "the controller does not ask for delays before retries");
                Ok(None)
            }
        }
    }

    /// For a controller without I/O queues.
    fn recovery_settings(
        &self,
        identify: &IdentifyController,
        host_behavior: bool,
        ready_timeout: Duration,
    ) -> Settings {
        let timeout = self.options.timeout.unwrap_or(STEP_TIMEOUT);
        Settings {
            queues: 0,
            abort_limit: usize::from(identify.acl) + 1,
            abort_timeout: timeout.clamp(LEAST_TIMEOUT, ABORT_TIMEOUT),
            grace: timeout.clamp(LEAST_TIMEOUT, GRACE),
            step_timeout: timeout.clamp(LEAST_TIMEOUT, LONGEST_STEP_TIMEOUT),
            ready_timeout,
            max_resets: MAX_RESETS,
            reset_window: RESET_WINDOW,
            host_behavior,
            coalescing: false,
            doorbell_buffers: false,
        }
    }

    async fn limits(&self, admin: &Admin, identify: &IdentifyController) -> CommandLimits {
        let page = u64::from(self.capabilities.min_page_size());
        let by_device = identify
            .max_transfer_bytes(self.capabilities.min_page_size())
            .unwrap_or(u64::MAX);
        let max_transfer = by_device
            .min(self.options.max_transfer as u64)
            .min(LARGEST_TRANSFER);
        // Not all controllers have this data structure; without it these limits do not exist.
        let nvm = match admin.identify_nvm_controller().await {
            Ok(nvm) => Some(nvm),
            Err(error) => {
                tracing::debug!(%error, "no NVM command set specific identify data");
                None
            }
        };
        let or_max = |limit: u64| if limit == 0 { u64::MAX } else { limit };
        let nvm = nvm.as_ref();
        // A power of two in pages; 0, and what exceeds all sizes, is no limit.
        let in_pages = |exponent: u8| match exponent {
            0 => None,
            exponent => page.checked_mul(1u64.checked_shl(exponent.into())?),
        };
        CommandLimits {
            max_transfer: max_transfer - max_transfer % DEVICE_PAGE as u64,
            write_zeroes_bytes: nvm.and_then(|nvm| in_pages(nvm.wzsl)),
            verify_bytes: nvm.and_then(|nvm| in_pages(nvm.vsl)),
            discard_ranges: nvm
                .filter(|nvm| nvm.dmrl != 0)
                .map_or(256, |nvm| usize::from(nvm.dmrl)),
            discard_range_blocks: nvm
                .map_or(u64::MAX, |nvm| or_max(nvm.dmrsl.get().into()))
                .min(u32::MAX.into()),
            discard_blocks: nvm.map_or(u64::MAX, |nvm| or_max(nvm.dmsl.get())),
        }
    }
}

fn sgl_support(identify: &IdentifyController) -> SglSupport {
    match identify.sgl_support().alignment() {
        SglAlignment::Byte => SglSupport::Any,
        SglAlignment::Dword => SglSupport::DwordAligned,
        _ => SglSupport::None,
    }
}
