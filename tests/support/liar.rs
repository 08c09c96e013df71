//! A controller that answers admin commands with what it is told to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use nvme_async::device::soft::SoftDevice;
use nvme_async::nvme_spec::{DataPointer, Sqe};
use nvme_async::{Controller, OpenOptions};
use nvme_spec::admin::{self, FeatureSelect};
use nvme_spec::feature;
use nvme_spec::identify::Cns;
use nvme_spec::opcode::AdminOpcode;

use super::rig::Setup;
use super::tampered::{Mapper, Tampered};

/// A software controller, with lies in front of it.
pub(crate) struct Liar {
    pub(crate) soft: Arc<SoftDevice>,
    pub(crate) controller: Controller,
    device: Arc<Tampered>,
    lies: Arc<Mutex<Lies>>,
}

#[derive(Default)]
struct Lies {
    /// By log page, and what of it is written.
    logs: HashMap<u8, Vec<u8>>,
    /// By structure and namespace.
    namespaces: HashMap<(Cns, u32), Vec<u8>>,
    active: Option<Vec<u8>>,
    hold_at: Option<Cns>,
    seen: Vec<Sqe>,
}

impl Liar {
    pub(crate) async fn open(setup: Setup) -> Self {
        let (soft, options) = setup.start();
        Self::attach(soft, options).await
    }

    async fn attach(soft: Arc<SoftDevice>, options: OpenOptions) -> Self {
        let device = Tampered::new(soft.clone());
        let lies = Arc::<Mutex<Lies>>::default();
        let (told, held) = (lies.clone(), soft.clone());
        device.tamper_admin(move |command, memory| {
            let mut lies = told.lock().expect("no panics");
            if lies.is_held_at(&command) {
                held.controller().hold();
            }
            lies.answer(command, memory)
        });
        let controller = options.attach(device.clone()).await.expect("comes up");
        Self {
            soft,
            controller,
            device,
            lies,
        }
    }

    /// From now on this log page begins with these bytes and goes on with what was in memory.
    pub(crate) fn log_page(&self, log_page: u8, contents: impl Into<Vec<u8>>) {
        self.lies().logs.insert(log_page, contents.into());
    }

    /// From now on this is what Identify says of a namespace.
    pub(crate) fn namespace(&self, nsid: u32, contents: impl Into<Vec<u8>>) {
        let key = (Cns::NAMESPACE, nsid);
        self.lies().namespaces.insert(key, contents.into());
    }

    /// From now on these are the identifiers of a namespace.
    pub(crate) fn descriptors(&self, nsid: u32, contents: impl Into<Vec<u8>>) {
        let key = (Cns::NAMESPACE_DESCRIPTORS, nsid);
        self.lies().namespaces.insert(key, contents.into());
    }

    /// From now on this is the list of active namespaces.
    pub(crate) fn active(&self, nsids: &[u32]) {
        let list = nsids.iter().flat_map(|nsid| nsid.to_le_bytes());
        self.lies().active = Some(list.collect());
    }

    /// Holds the controller when it is asked for this structure the next time.
    pub(crate) fn hold_at(&self, cns: Cns) {
        self.lies().hold_at = Some(cns);
    }

    /// The truth from now on.
    pub(crate) fn be_honest(&self) {
        let mut lies = self.lies();
        lies.logs.clear();
        lies.namespaces.clear();
        lies.active = None;
    }

    /// The admin commands since the last call.
    pub(crate) fn take_seen(&self) -> Vec<Sqe> {
        std::mem::take(&mut self.lies().seen)
    }

    pub(crate) async fn close(self) {
        self.device.behave();
        self.controller.shutdown().await.expect("shuts down");
    }

    fn lies(&self) -> std::sync::MutexGuard<'_, Lies> {
        self.lies.lock().expect("no panics")
    }
}

impl Lies {
    fn is_held_at(&mut self, command: &Sqe) -> bool {
        let is_it = |cns: &mut Cns| {
            AdminOpcode(command.opcode()) == AdminOpcode::IDENTIFY
                && *cns == Cns(command.cdw10() as u8)
        };
        self.hold_at.take_if(is_it).is_some()
    }

    /// Writes the answer to a command in place of the controller, and returns what the controller
    /// gets instead.
    fn answer(&mut self, command: Sqe, memory: &Mapper) -> Sqe {
        self.seen.push(command);
        let Ok(DataPointer::Prp { prp1, .. }) = command.data_pointer() else {
            return command;
        };
        match AdminOpcode(command.opcode()) {
            AdminOpcode::GET_LOG_PAGE => {
                let Some(contents) = self.logs.get(&(command.cdw10() as u8)) else {
                    return command;
                };
                write(memory, prp1, contents);
                // The event is acknowledged all the same; past the end the page reads as zeroes.
                let len = u64::from((command.cdw10() >> 16) + 1) * 4;
                let numd = command.cdw10() & 0xffff;
                command
                    .with_cdw10(numd)
                    .with_cdw12(len as u32)
                    .with_data(DataPointer::Prp {
                        prp1: prp1 + len - 4,
                        prp2: 0,
                    })
            }
            AdminOpcode::IDENTIFY => {
                let contents = match Cns(command.cdw10() as u8) {
                    Cns::ACTIVE_NAMESPACES => self.active.as_ref(),
                    cns => self.namespaces.get(&(cns, command.nsid())),
                };
                let Some(contents) = contents else {
                    return command;
                };
                write(memory, prp1, contents);
                let harmless = feature::id::NUMBER_OF_QUEUES;
                admin::get_features(harmless, FeatureSelect::Current).with_cid(command.cid())
            }
            _ => command,
        }
    }
}

fn write(memory: &Mapper, iova: u64, contents: &[u8]) {
    for (iova, bytes) in (iova..).step_by(8).zip(contents.chunks(8)) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        memory.store_u64(iova, u64::from_le_bytes(word));
    }
}
