//! From a device to a controller that takes commands (NVMe base specification 2.0, section 3.5.1).

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iova::{AddressSpace, Retention};
use nvme_spec::admin;
use nvme_spec::identify::{IdentifyController, SglAlignment};
use nvme_spec::registers::{
    AdminQueueAttributes, Capabilities, ControllerConfiguration, DoorbellKind, doorbell_offset,
    offset,
};

use super::admin::Admin;
use super::registers::Registers;
use super::registry::Release;
use super::{CommandLimits, ControllerInner, events, shutdown};
use crate::device::Device;
use crate::engine::eventfd::Wakeups;
use crate::engine::state::Core;
use crate::engine::{Failure, PollMode, QueueSettings, SharedQueue, State};
use crate::io::DmaContext;
use crate::memory::{DEVICE_PAGE, DmaWords, Pool};
use crate::queue::data_pointer::SglSupport;
use crate::queue::{CompletionRing, QueueCore, SubmissionRing};
use crate::{CommandName, Error, OpenOptions};

const ADMIN_ENTRIES: u16 = 64;
/// Asynchronous event requests that are kept outstanding, if the controller allows as many.
const EVENT_REQUESTS: u8 = 4;
/// The sizes of queue entries, as powers of two (CC.IOSQES, CC.IOCQES).
const SQE_SIZE_LOG2: u8 = 6;
const CQE_SIZE_LOG2: u8 = 4;
/// The largest command that a PRP list of one block of the pool describes.
const LARGEST_TRANSFER: u64 = 16 << 20;

/// What a bring-up knows before there is a controller.
struct BringUp<'a> {
    options: &'a OpenOptions,
    registers: Registers,
    capabilities: Capabilities,
    address: Arc<str>,
    pool: Pool,
}

/// Resets the controller behind `device` and makes it ready.
pub(super) async fn bring_up(
    device: Arc<dyn Device>,
    options: &OpenOptions,
    release: Release,
) -> Result<Arc<ControllerInner>, Error> {
    let address: Arc<str> = device.address().into();
    check_runtime(&*device)?;
    let registers = Registers {
        device: device.clone(),
    };
    let capabilities = registers.capabilities()?;
    check_capabilities(&address, capabilities)?;
    let version = registers.version()?;
    let ready_timeout = registers.ready_timeout(capabilities)?;
    registers.disable(ready_timeout).await?;

    let retention = Retention {
        bytes: options.retained_bytes,
        ..Retention::default()
    };
    let space = AddressSpace::with_retention(device.mapper(), retention)?;
    let pool = Pool::new(space.clone(), options.pool_limit);
    let this = BringUp {
        options,
        registers: registers.clone(),
        capabilities,
        address,
        pool,
    };
    let (admin, mut guard) = this.enable(ready_timeout, release).await?;
    let identify = admin.identify_controller().await?;
    if !identify.supports_nvm_entry_sizes() {
        return Err(this.unusable("its queue entries are not of 64 and 16 bytes".to_owned()));
    }
    let limits = this.limits(&admin, &identify).await;
    let dma = DmaContext::new(
        space,
        this.pool.clone(),
        DEVICE_PAGE as u64,
        sgl_support(&identify),
        options.isolate,
        limits.max_transfer as usize,
    )?;
    let mut queues = this.create_queues(&admin).await?;
    let shared = usize::from(options.queues).min(queues.len());
    let local_queues = queues.split_off(shared);
    let inner = Arc::new(ControllerInner {
        registers: Mutex::new(Some(registers)),
        software_thread: device.software_thread(),
        capabilities,
        version,
        admin: admin.clone(),
        queues,
        local_queues,
        dma,
        limits,
        ready_timeout,
        timeout: options.timeout,
        closing: AtomicBool::new(false),
        ending: tokio::sync::Mutex::default(),
        release: Mutex::new(guard.defuse()),
        identify,
    });
    events::arm(
        &inner,
        EVENT_REQUESTS.min(inner.identify.aerl.saturating_add(1)),
    )
    .await;
    tracing::debug!(
        address = &*inner.admin.address,
        model = inner.identify.model_number(),
        queues = inner.queues.len(),
        local_queues = inner.local_queues.len(),
        "controller is ready"
    );
    Ok(inner)
}

/// The runtime has what completions need.
pub(super) fn check_runtime(device: &dyn Device) -> Result<(), Error> {
    let none = |failure: Failure| {
        let name = CommandName {
            address: device.address().to_owned(),
            name: "open",
            nsid: None,
            blocks: None,
        };
        failure.into_error(name)
    };
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(none(Failure::RuntimeGone));
    }
    let Some(vector) = device.vectors().first() else {
        return Err(Error::Unusable {
            address: device.address().to_owned(),
            reason: "it has no interrupt vectors".to_owned(),
        });
    };
    Wakeups::register(vector).map(drop).map_err(none)
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
    registers: Registers,
    ready_timeout: Duration,
    keep: Option<(Admin, Release)>,
}

impl Enabled {
    /// Leaves the controller to a new owner.
    fn defuse(&mut self) -> Option<Release> {
        self.keep.take().map(|(_, release)| release)
    }
}

impl Drop for Enabled {
    fn drop(&mut self) {
        if let Some((admin, release)) = self.keep.take() {
            // Taken away from its reaper, which would keep it for as long as its runtime lives.
            let keep = (admin.queue.take(), admin);
            let registers = self.registers.clone();
            shutdown::stop_and_drop(registers, self.ready_timeout, keep, Some(release));
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
    ) -> Result<(Admin, Enabled), Error> {
        let device = &self.registers.device;
        let (submission, completion) = self.ring_memory(ADMIN_ENTRIES)?;
        let attributes = AdminQueueAttributes::new()
            .with_asqs(ADMIN_ENTRIES - 1)
            .with_acqs(ADMIN_ENTRIES - 1);
        device.write32(offset::AQA, attributes.into_bits())?;
        device.write64(offset::ASQ, submission.iova())?;
        device.write64(offset::ACQ, completion.iova())?;
        device.set_bus_master(true)?;
        let settings = QueueSettings {
            // Admin commands are few, and some take long.
            mode: PollMode::Interrupt,
            max_window: Duration::ZERO,
        };
        let core = self.core(0, ADMIN_ENTRIES, submission, completion)?;
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
        self.registers.configure(configuration)?;
        let guard = Enabled {
            registers: self.registers.clone(),
            ready_timeout,
            keep: Some((admin.clone(), release)),
        };
        self.registers.configure(configuration.with_en(true))?;
        self.registers.ready(ready_timeout).await?;
        Ok((admin, guard))
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
        CommandLimits {
            max_transfer: max_transfer - max_transfer % DEVICE_PAGE as u64,
            write_zeroes_bytes: nvm
                .filter(|nvm| nvm.wzsl != 0)
                .and_then(|nvm| page.checked_mul(1u64.checked_shl(nvm.wzsl.into())?)),
            discard_ranges: nvm
                .filter(|nvm| nvm.dmrl != 0)
                .map_or(256, |nvm| usize::from(nvm.dmrl)),
            discard_range_blocks: nvm
                .map_or(u64::MAX, |nvm| or_max(nvm.dmrsl.get().into()))
                .min(u32::MAX.into()),
            discard_blocks: nvm.map_or(u64::MAX, |nvm| or_max(nvm.dmsl.get())),
        }
    }

    /// Creates as many I/O queue pairs as are wanted and granted.
    async fn create_queues(&self, admin: &Admin) -> Result<Vec<Arc<SharedQueue>>, Error> {
        let wanted = self
            .options
            .queues
            .saturating_add(self.options.local_queues);
        let granted = admin.request_queue_pairs(wanted).await?;
        let entries = self
            .capabilities
            .max_queue_entries()
            .min(self.options.queue_entries.into())
            .min(u16::MAX.into()) as u16;
        let vectors = self.registers.device.vectors();
        let settings = QueueSettings {
            mode: self.options.poll_mode,
            max_window: self.options.max_window,
        };
        let mut queues = Vec::with_capacity(granted.into());
        for id in 1..=granted {
            let (submission, completion) = self.ring_memory(entries)?;
            // Vector 0 is the admin queue's, and shared only if there is no other.
            let vector = match vectors.len() {
                1 => 0,
                count => 1 + usize::from(id - 1) % (count - 1),
            };
            let interrupt = (settings.mode != PollMode::Busy).then_some(vector as u16);
            let (sq, cq) = (submission.iova(), completion.iova());
            let core = self.core(id, entries, submission, completion)?;
            queues.push(SharedQueue::new(
                State::new(core, settings),
                vectors[vector].clone(),
            ));
            admin
                .run(admin::create_completion_queue(
                    id,
                    entries.into(),
                    cq,
                    interrupt,
                ))
                .await?;
            admin
                .run(admin::create_submission_queue(
                    id,
                    entries.into(),
                    sq,
                    id,
                    Default::default(),
                ))
                .await?;
        }
        Ok(queues)
    }

    fn ring_memory(&self, entries: u16) -> Result<(DmaWords, DmaWords), Error> {
        let submission = DmaWords::new(&self.pool, usize::from(entries) * 16)?;
        let completion = DmaWords::new(&self.pool, usize::from(entries) * 4)?;
        Ok((submission, completion))
    }

    fn core(
        &self,
        id: u16,
        entries: u16,
        submission: DmaWords,
        completion: DmaWords,
    ) -> Result<Core, Error> {
        let doorbell = |kind| {
            self.registers
                .device
                .doorbell(doorbell_offset(id, kind, self.capabilities.dstrd()))
        };
        Ok(QueueCore::new(
            id,
            entries,
            SubmissionRing::new(submission, doorbell(DoorbellKind::SubmissionTail)?, entries),
            CompletionRing::new(completion, doorbell(DoorbellKind::CompletionHead)?, entries),
        ))
    }
}

fn sgl_support(identify: &IdentifyController) -> SglSupport {
    match identify.sgl_support().alignment() {
        SglAlignment::Byte => SglSupport::Any,
        SglAlignment::Dword => SglSupport::DwordAligned,
        _ => SglSupport::None,
    }
}
