//! The PCI function: configuration space, registers, interrupts, doorbells.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use nvme_soft::{Interrupts, SoftController};
use nvme_spec::registers::{ControllerConfiguration, ControllerStatus, offset};
use vfio_user::{
    Capabilities, DeviceInfo, Header, IrqAction, IrqData, IrqInfo, RegionAccess, RegionInfo,
    RegionWrite, Reply, Request, SetIrqs, SparseArea, Version, irq, region,
};

use super::memory::Dma;
use super::{BAR_SIZE, Event, Traps, file, lock};

const CONFIG_SIZE: u64 = 0x100;
/// Where the MSI-X capability is.
const MSIX: usize = 0x40;
const INTX_DISABLE: u16 = 1 << 10;
const BUS_MASTER: u16 = 1 << 2;
const MSIX_ENABLE: u16 = 1 << 15;
/// What can be written of either.
const COMMAND_BITS: u16 = 0x7 | INTX_DISABLE;
const MSIX_BITS: u16 = 0xc000;

/// A message, and the file beside it.
type Answer = Result<(Vec<u8>, Option<OwnedFd>), u32>;

pub(crate) struct Function {
    pub(super) traps: Traps,
    pub(crate) controller: SoftController,
    pub(super) events: Mutex<Vec<Event>>,
    irqs: Arc<Irqs>,
    /// BAR 0 as far as it can be mapped.
    bar: File,
}

/// Interrupts, which fail the controller where nobody takes them.
pub(super) struct Irqs {
    command: AtomicU16,
    msix_control: AtomicU16,
    eventfds: Mutex<Vec<Option<File>>>,
    fatal: AtomicBool,
    /// The vectors that are to be raised when no head of a completion queue moves, if the server waits for that.
    waiting: Option<Mutex<BTreeSet<u16>>>,
}

impl Irqs {
    pub(super) fn new(traps: &Traps) -> Self {
        let count = usize::from(traps.vectors);
        Self {
            command: AtomicU16::new(traps.command),
            msix_control: AtomicU16::new(traps.msix_control),
            eventfds: Mutex::new((0..count).map(|_| None).collect()),
            fatal: AtomicBool::new(false),
            waiting: traps.adaptive_interrupts.then(Mutex::default),
        }
    }

    fn fire(&self, vector: u16) {
        let command = self.command.load(Ordering::Acquire);
        let enabled = self.msix_control.load(Ordering::Acquire) & MSIX_ENABLE != 0;
        let mut eventfds = lock(&self.eventfds);
        match eventfds.get_mut(usize::from(vector)) {
            Some(Some(eventfd)) if enabled => {
                let _ = eventfd.write(&1_u64.to_ne_bytes());
            }
            _ if enabled || command & INTX_DISABLE == 0 => {
                self.fatal.store(true, Ordering::Release);
            }
            _ => {}
        }
    }

    /// No head of a completion queue has moved since the last look.
    fn heads_are_still(&self) {
        if let Some(waiting) = &self.waiting {
            let vectors = std::mem::take(&mut *lock(waiting));
            vectors.into_iter().for_each(|vector| self.fire(vector));
        }
    }
}

impl Interrupts for Irqs {
    fn count(&self) -> u16 {
        lock(&self.eventfds).len() as u16
    }

    fn raise(&self, vector: u16) {
        match &self.waiting {
            Some(waiting) => {
                lock(waiting).insert(vector);
            }
            None => self.fire(vector),
        }
    }
}

impl Function {
    pub(super) fn new(traps: Traps, controller: SoftController, irqs: Arc<Irqs>) -> Self {
        let len = if traps.short_file { 0x1000 } else { 0x2000 };
        Self {
            traps,
            controller,
            events: Mutex::default(),
            irqs,
            bar: file(len),
        }
    }

    pub(super) fn note(&self, event: Event) {
        lock(&self.events).push(event);
    }

    pub(super) fn forbid_memory(&self) {
        self.controller.set_bus_master(false);
    }

    pub(super) fn forget_vectors(&self) {
        lock(&self.irqs.eventfds)
            .iter_mut()
            .for_each(|eventfd| *eventfd = None);
    }

    /// Rings the controller's doorbells when their words change.
    pub(super) fn watch_doorbells(&self, ends: impl Fn() -> bool) {
        let mut before = vec![0; 0x1000];
        while !ends() {
            let mut words = vec![0; 0x1000];
            let mut head_moved = false;
            if self.bar.read_exact_at(&mut words, 0x1000).is_ok() {
                for (index, (old, new)) in before.chunks(4).zip(words.chunks(4)).enumerate() {
                    if old != new {
                        let value = u32::from_le_bytes(new.try_into().expect("4 bytes"));
                        self.controller.write32(0x1000 + 4 * index as u32, value);
                        // The doorbells of submission and completion queues take turns.
                        head_moved |= index % 2 == 1;
                    }
                }
                before = words;
            }
            if !head_moved {
                self.irqs.heads_are_still();
            }
            thread::sleep(Duration::from_micros(50));
        }
    }

    pub(super) fn answer(
        &self,
        header: &Header,
        request: &Request<'_>,
        fds: Vec<OwnedFd>,
        dma: &Dma,
    ) -> Answer {
        let reply = match request {
            Request::Version(version) => self.version(version),
            Request::DeviceInfo { .. } => Reply::DeviceInfo(DeviceInfo {
                resets: true,
                is_pci: true,
                regions: region::COUNT,
                irqs: irq::COUNT,
            }),
            Request::RegionInfo { argsz, index } => {
                let (reply, file) = self.region_info(*argsz, *index);
                return Ok((reply.encode(header), file));
            }
            Request::IrqInfo { index, .. } => Reply::IrqInfo(IrqInfo {
                index: *index,
                count: if *index == irq::MSIX {
                    self.traps.vectors.into()
                } else {
                    0
                },
                eventfd: true,
                maskable: false,
                automasked: false,
                noresize: true,
            }),
            Request::SetIrqs(set) => {
                self.set_irqs(set, fds)?;
                Reply::SetIrqs
            }
            Request::RegionRead(access) => {
                let data = self.read(access).ok_or(libc::EINVAL as u32)?;
                let reply = Reply::RegionRead {
                    region: access.region,
                    offset: access.offset,
                    data: &data,
                };
                return Ok((reply.encode(header), None));
            }
            Request::RegionWrite(write) => {
                self.write(write).ok_or(libc::EINVAL as u32)?;
                Reply::RegionWrite(write.access())
            }
            Request::DmaMap(map) => {
                self.note(Event::Map(map.size));
                dma.map(*map, fds.into_iter().next())?;
                Reply::DmaMap
            }
            Request::DmaUnmap(unmap) => {
                dma.unmap(unmap.address, unmap.size)?;
                Reply::DmaUnmap(*unmap)
            }
            Request::DeviceReset => {
                self.note(Event::Reset);
                if self.traps.reset_disables {
                    self.controller.reset().map_err(|_| libc::EIO as u32)?;
                    self.clear_doorbells();
                }
                Reply::DeviceReset
            }
            _ => return Err(libc::EOPNOTSUPP as u32),
        };
        Ok((reply.encode(header), None))
    }

    fn version(&self, asked: &Version) -> Reply<'static> {
        Reply::Version(Version {
            capabilities: Capabilities {
                max_msg_fds: self.traps.max_msg_fds,
                max_dma_maps: self.traps.max_dma_maps,
                ..Capabilities::default()
            },
            ..asked.clone()
        })
    }

    fn region_info(&self, argsz: u32, index: u32) -> (Reply<'static>, Option<OwnedFd>) {
        let is_bar = index == region::BAR0;
        let mappable = is_bar && self.traps.maps_doorbells;
        let area = SparseArea {
            offset: 0x1000,
            size: 0x1000,
        };
        let info = RegionInfo {
            index,
            readable: true,
            writable: true,
            mappable,
            size: match index {
                region::BAR0 => BAR_SIZE,
                region::CONFIG => CONFIG_SIZE,
                _ => 0,
            },
            offset: 0,
            sparse: mappable.then(|| vec![area]),
        };
        let needed = info.full_size();
        if argsz < needed {
            let info = RegionInfo {
                sparse: None,
                ..info
            };
            return (
                Reply::RegionInfoCut {
                    info,
                    argsz: needed,
                },
                None,
            );
        }
        let file = mappable.then(|| self.bar.try_clone().expect("a descriptor").into());
        (Reply::RegionInfo(info), file)
    }

    fn set_irqs(&self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<(), u32> {
        let mut eventfds = lock(&self.irqs.eventfds);
        let (start, count) = (set.start as usize, set.count as usize);
        if set.index != irq::MSIX || start + count > eventfds.len() {
            return Err(libc::EINVAL as u32);
        }
        if (set.action, set.data) == (IrqAction::Trigger, IrqData::Eventfd) {
            self.note(Event::Vectors(set.start, set.count));
            for (eventfd, fd) in eventfds[start..start + count].iter_mut().zip(fds) {
                *eventfd = Some(File::from(fd));
            }
        }
        Ok(())
    }

    fn config(&self) -> [u8; CONFIG_SIZE as usize] {
        let mut config = [0; CONFIG_SIZE as usize];
        config[..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
        let command = self.irqs.command.load(Ordering::Acquire);
        config[4..6].copy_from_slice(&command.to_le_bytes());
        config[6] = 0x10;
        config[9..12].copy_from_slice(&[0x02, 0x08, 0x01]);
        config[0x34] = MSIX as u8;
        let control = self.irqs.msix_control.load(Ordering::Acquire);
        let control = control & MSIX_BITS | (self.traps.vectors - 1);
        config[MSIX] = 0x11;
        config[MSIX + 2..MSIX + 4].copy_from_slice(&control.to_le_bytes());
        // The table and the pending bits are in other BARs.
        config[MSIX + 4] = 4;
        config[MSIX + 8] = 5;
        config
    }

    fn read(&self, access: &RegionAccess) -> Option<Vec<u8>> {
        thread::sleep(self.traps.register_time);
        let (start, len) = (usize::try_from(access.offset).ok()?, access.count as usize);
        match access.region {
            region::CONFIG => Some(self.config().get(start..start + len)?.to_vec()),
            region::BAR0 if len == 4 && start.is_multiple_of(4) && start < 0x1000 => {
                let register = start as u32;
                self.note(Event::Read(register));
                let mut value = self.controller.read32(register);
                if register == offset::CSTS && self.irqs.fatal.load(Ordering::Acquire) {
                    value |= ControllerStatus::new().with_cfs(true).into_bits();
                }
                Some(value.to_le_bytes().to_vec())
            }
            _ => None,
        }
    }

    fn write(&self, write: &RegionWrite<'_>) -> Option<()> {
        thread::sleep(self.traps.register_time);
        let offset = u32::try_from(write.offset).ok()?;
        match (write.region, offset, write.data) {
            (region::CONFIG, 4, &[low, high]) => {
                let command = u16::from_le_bytes([low, high]) & COMMAND_BITS;
                self.note(Event::Command(command));
                self.irqs.command.store(command, Ordering::Release);
                self.controller.set_bus_master(command & BUS_MASTER != 0);
            }
            (region::CONFIG, at, &[low, high]) if at as usize == MSIX + 2 => {
                let control = u16::from_le_bytes([low, high]) & MSIX_BITS;
                self.note(Event::MsixControl(control));
                self.irqs.msix_control.store(control, Ordering::Release);
            }
            (region::BAR0, at, &[a, b, c, d]) if at.is_multiple_of(4) => {
                let value = u32::from_le_bytes([a, b, c, d]);
                if at >= 0x1000 {
                    self.note(Event::Doorbell(at));
                } else {
                    self.note(Event::Write(at, value));
                }
                if at == offset::CC && !ControllerConfiguration::from_bits(value).en() {
                    self.irqs.fatal.store(false, Ordering::Release);
                    self.clear_doorbells();
                }
                self.controller.write32(at, value);
            }
            _ => return None,
        }
        Some(())
    }

    /// The controller's doorbells are all 0.
    fn clear_doorbells(&self) {
        if !self.traps.short_file {
            self.bar
                .write_all_at(&[0; 0x1000], 0x1000)
                .expect("its own file");
        }
    }
}
