//! The admin commands of the model device: those by which a controller is brought up and used.

use nvme_spec::identify::{
    ActiveNamespaces, Cns, IdentifyController, IdentifyNamespace, IdentifyNvmController, LbaFormat,
    NamespaceDescriptor, NamespaceDescriptors,
};
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::{DataPointer, Sqe, Status, feature};
use zerocopy::IntoBytes;

use super::device::{BLOCK_SHIFT, BLOCKS, Completion, State, Submission, VERSION};
use super::memory::Iommu;

/// The one namespace.
const NSID: u32 = 1;
/// IEN in command dword 11 of Create I/O Completion Queue.
const INTERRUPTS: u32 = 1 << 1;

/// Executes a command; returns what it is completed with, if it is.
pub(super) fn execute(state: &mut State, iommu: &Iommu, command: &Sqe) -> Option<(Status, u32)> {
    let outcome = match AdminOpcode(command.opcode()) {
        AdminOpcode::IDENTIFY => identify(iommu, command),
        AdminOpcode::SET_FEATURES => set_features(command),
        AdminOpcode::CREATE_IO_COMPLETION_QUEUE => create_completion_queue(state, command),
        AdminOpcode::CREATE_IO_SUBMISSION_QUEUE => create_submission_queue(state, command),
        AdminOpcode::DELETE_IO_SUBMISSION_QUEUE => {
            let deleted = state.submissions.remove(&queue_id(command));
            deleted.map(|_| 0).ok_or(Status::INVALID_QUEUE_ID)
        }
        AdminOpcode::DELETE_IO_COMPLETION_QUEUE => {
            let deleted = state.completions.remove(&queue_id(command));
            deleted.map(|_| 0).ok_or(Status::INVALID_QUEUE_ID)
        }
        // There are never events.
        AdminOpcode::ASYNC_EVENT_REQUEST => return None,
        _ => Err(Status::INVALID_OPCODE),
    };
    Some(match outcome {
        Ok(result) => (Status::SUCCESS, result),
        Err(status) => (status, 0),
    })
}

fn identify(iommu: &Iommu, command: &Sqe) -> Result<u32, Status> {
    let nsid = command.nsid();
    match Cns(command.cdw10() as u8) {
        Cns::CONTROLLER => answer(iommu, command, controller().as_bytes()),
        Cns::COMMAND_SET_CONTROLLER => {
            let data = IdentifyNvmController::default();
            answer(iommu, command, data.as_bytes())
        }
        Cns::NAMESPACE if nsid == NSID => answer(iommu, command, namespace().as_bytes()),
        Cns::NAMESPACE_DESCRIPTORS if nsid == NSID => {
            let command_set = [NamespaceDescriptor::CommandSet(0)];
            let data = NamespaceDescriptors::from_descriptors(&command_set);
            answer(iommu, command, data.as_bytes())
        }
        Cns::NAMESPACE | Cns::NAMESPACE_DESCRIPTORS => Err(Status::INVALID_NAMESPACE_OR_FORMAT),
        Cns::ACTIVE_NAMESPACES => {
            let mut data = ActiveNamespaces::default();
            if nsid < NSID {
                data.entries[0] = NSID.into();
            }
            answer(iommu, command, data.as_bytes())
        }
        _ => Err(Status::INVALID_FIELD),
    }
}

fn controller() -> IdentifyController {
    let mut data = IdentifyController {
        ver: VERSION.into(),
        cntrltype: 1,
        aerl: 3,
        sqes: 0x66,
        cqes: 0x44,
        nn: NSID.into(),
        ..IdentifyController::default()
    };
    data.mn.fill(b' ');
    data.mn[..5].copy_from_slice(b"model");
    data
}

fn namespace() -> IdentifyNamespace {
    let mut data = IdentifyNamespace {
        nsze: BLOCKS.into(),
        ncap: BLOCKS.into(),
        nuse: BLOCKS.into(),
        ..IdentifyNamespace::default()
    };
    data.lbaf[0] = LbaFormat {
        lbads: BLOCK_SHIFT,
        ..LbaFormat::default()
    };
    data
}

/// Writes a page of data to where the command wants it.
fn answer(iommu: &Iommu, command: &Sqe, data: &[u8]) -> Result<u32, Status> {
    let Ok(DataPointer::Prp { prp1, .. }) = command.data_pointer() else {
        return Err(Status::INVALID_FIELD);
    };
    let words: Vec<u32> = data
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u32::from_le_bytes(*bytes))
        .collect();
    let stored = iommu.store(prp1, &words);
    stored.map(|()| 0).ok_or(Status::DATA_TRANSFER_ERROR)
}

fn set_features(command: &Sqe) -> Result<u32, Status> {
    match command.cdw10() as u8 {
        // As many as are asked for.
        feature::id::NUMBER_OF_QUEUES => Ok(command.cdw11()),
        feature::id::ASYNC_EVENT_CONFIGURATION => Ok(0),
        _ => Err(Status::INVALID_FIELD),
    }
}

fn create_completion_queue(state: &mut State, command: &Sqe) -> Result<u32, Status> {
    let vector = (command.cdw11() & INTERRUPTS != 0).then_some((command.cdw11() >> 16) as u16);
    let queue = Completion::new(address(command)?, entries(command), vector);
    state.completions.insert(queue_id(command), queue);
    Ok(0)
}

fn create_submission_queue(state: &mut State, command: &Sqe) -> Result<u32, Status> {
    let completion = (command.cdw11() >> 16) as u16;
    if !state.completions.contains_key(&completion) {
        return Err(Status::COMPLETION_QUEUE_INVALID);
    }
    let queue = Submission::new(address(command)?, entries(command), completion);
    state.submissions.insert(queue_id(command), queue);
    Ok(0)
}

/// QID in command dword 10.
fn queue_id(command: &Sqe) -> u16 {
    command.cdw10() as u16
}

/// QSIZE in command dword 10, as a count.
fn entries(command: &Sqe) -> u32 {
    (command.cdw10() >> 16) + 1
}

/// Where the memory of a new queue is.
fn address(command: &Sqe) -> Result<u64, Status> {
    match command.data_pointer() {
        Ok(DataPointer::Prp { prp1, .. }) => Ok(prp1),
        _ => Err(Status::INVALID_FIELD),
    }
}
