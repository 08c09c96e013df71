//! Builders for the admin commands (Base, section 5 "Admin Command Set").
//!
//! Each returns an entry with command identifier 0 and, where the command has data, an empty data
//! pointer for [`Sqe::with_data`]. Those that tell the controller of memory fill it in.

use crate::identify::Cns;
use crate::opcode::AdminOpcode;
use crate::sqe::{DataPointer, Sqe};

/// The namespace identifier that means "all namespaces".
pub const ALL_NAMESPACES: u32 = 0xffff_ffff;

/// The bytes of every Identify data structure.
pub const IDENTIFY_BYTES: usize = 4096;

/// Identify Controller, CNS 01h: [`IdentifyController`](crate::identify::IdentifyController)
/// (Base, section 5.17.2.1).
pub const fn identify_controller() -> Sqe {
    identify(Cns::CONTROLLER, 0, 0)
}

/// The NVM command set's Identify Controller, CNS 06h with CSI 0:
/// [`IdentifyNvmController`](crate::identify::IdentifyNvmController) (NVM, section 4.1.5).
pub const fn identify_nvm_controller() -> Sqe {
    identify(Cns::COMMAND_SET_CONTROLLER, 0, 0)
}

/// Identify Namespace, CNS 00h: [`IdentifyNamespace`](crate::identify::IdentifyNamespace)
/// (NVM, section 4.1.5.1).
///
/// `nsid` may be [`ALL_NAMESPACES`] to ask for what all have in common, if the controller supports
/// namespace management.
pub const fn identify_namespace(nsid: u32) -> Sqe {
    identify(Cns::NAMESPACE, nsid, 0)
}

/// Active Namespace ID list, CNS 02h: the identifiers greater than `after_nsid`, as
/// [`ActiveNamespaces`](crate::identify::ActiveNamespaces) (Base, section 5.17.2.2).
pub const fn active_namespaces(after_nsid: u32) -> Sqe {
    identify(Cns::ACTIVE_NAMESPACES, after_nsid, 0)
}

/// Namespace Identification Descriptor list, CNS 03h:
/// [`NamespaceDescriptors`](crate::identify::NamespaceDescriptors) (Base, section 5.17).
pub const fn namespace_descriptors(nsid: u32) -> Sqe {
    identify(Cns::NAMESPACE_DESCRIPTORS, nsid, 0)
}

/// Any Identify command, of the NVM command set where one is meant (CSI 0); `cntid` is 0 unless the
/// structure is of one particular controller (Base, section 5.17).
pub const fn identify(cns: Cns, nsid: u32, cntid: u16) -> Sqe {
    command(AdminOpcode::IDENTIFY)
        .with_nsid(nsid)
        .with_cdw10(cns.0 as u32 | ((cntid as u32) << 16))
}

/// Create I/O Completion Queue, physically contiguous at `iova` (Base, section 5.4).
///
/// `entries` counts from 1 (2 to 65,536; debug builds assert it, others clamp). `vector` is the
/// interrupt vector, `None` for a queue that never interrupts.
pub const fn create_completion_queue(
    queue_id: u16,
    entries: u32,
    iova: u64,
    vector: Option<u16>,
) -> Sqe {
    const PHYSICALLY_CONTIGUOUS: u32 = 1 << 0;
    const INTERRUPTS_ENABLED: u32 = 1 << 1;
    let interrupt = match vector {
        Some(vector) => INTERRUPTS_ENABLED | ((vector as u32) << 16),
        None => 0,
    };
    command(AdminOpcode::CREATE_IO_COMPLETION_QUEUE)
        .with_data(queue_memory(iova))
        .with_cdw10(queue_id as u32 | (zeroes_based(entries, 2) << 16))
        .with_cdw11(PHYSICALLY_CONTIGUOUS | interrupt)
}

/// Create I/O Submission Queue, physically contiguous at `iova`, completed on queue
/// `completion_queue_id` (Base, section 5.5).
///
/// `entries` counts from 1 (2 to 65,536; debug builds assert it, others clamp). `priority` counts
/// only with weighted round robin arbitration.
pub const fn create_submission_queue(
    queue_id: u16,
    entries: u32,
    iova: u64,
    completion_queue_id: u16,
    priority: QueuePriority,
) -> Sqe {
    const PHYSICALLY_CONTIGUOUS: u32 = 1 << 0;
    command(AdminOpcode::CREATE_IO_SUBMISSION_QUEUE)
        .with_data(queue_memory(iova))
        .with_cdw10(queue_id as u32 | (zeroes_based(entries, 2) << 16))
        .with_cdw11(
            PHYSICALLY_CONTIGUOUS | ((priority as u32) << 1) | ((completion_queue_id as u32) << 16),
        )
}

/// Delete I/O Submission Queue (Base, section 5.7).
pub const fn delete_submission_queue(queue_id: u16) -> Sqe {
    command(AdminOpcode::DELETE_IO_SUBMISSION_QUEUE).with_cdw10(queue_id as u32)
}

/// Delete I/O Completion Queue; its submission queues must be gone (Base, section 5.6).
pub const fn delete_completion_queue(queue_id: u16) -> Sqe {
    command(AdminOpcode::DELETE_IO_COMPLETION_QUEUE).with_cdw10(queue_id as u32)
}

/// Set Features: sets feature `feature_id` to `cdw11`, also across resets and power cycles if `save`
/// (Base, section 5.27). The identifiers and values are in [`feature`](crate::feature).
pub const fn set_features(feature_id: u8, cdw11: u32, save: bool) -> Sqe {
    const SAVE: u32 = 1 << 31;
    command(AdminOpcode::SET_FEATURES)
        .with_cdw10(feature_id as u32 | if save { SAVE } else { 0 })
        .with_cdw11(cdw11)
}

/// Get Features: the value that `select` names of feature `feature_id`, in dword 0 of the completion
/// for most of them (Base, section 5.15).
pub const fn get_features(feature_id: u8, select: FeatureSelect) -> Sqe {
    command(AdminOpcode::GET_FEATURES).with_cdw10(feature_id as u32 | ((select as u32) << 8))
}

/// Get Log Page: `bytes` of log page `log_page_id` from `offset` on (Base, section 5.16).
///
/// Both are multiples of 4, and `bytes` is at least 4: debug builds assert it, others round down (and
/// up to 4). `retain_async_event` leaves the event that this log page belongs to pending; reading
/// without it clears the event. `nsid` is 0 or [`ALL_NAMESPACES`] for pages of the controller.
pub const fn get_log_page(
    log_page_id: u8,
    nsid: u32,
    bytes: u32,
    offset: u64,
    retain_async_event: bool,
) -> Sqe {
    const RETAIN_ASYNC_EVENT: u32 = 1 << 15;
    debug_assert!(bytes >= 4 && bytes.is_multiple_of(4) && offset.is_multiple_of(4));
    let dwords = (bytes / 4).saturating_sub(1);
    let offset = offset & !0b11;
    command(AdminOpcode::GET_LOG_PAGE)
        .with_nsid(nsid)
        .with_cdw10(
            log_page_id as u32
                | if retain_async_event {
                    RETAIN_ASYNC_EVENT
                } else {
                    0
                }
                | ((dwords & 0xffff) << 16),
        )
        .with_cdw11(dwords >> 16)
        .with_cdw12(offset as u32)
        .with_cdw13((offset >> 32) as u32)
}

/// Abort command `cid` of submission queue `queue_id`; bit 0 of the completion's dword 0 is clear if it
/// was aborted (Base, section 5.1).
pub const fn abort(queue_id: u16, cid: u16) -> Sqe {
    command(AdminOpcode::ABORT).with_cdw10(queue_id as u32 | ((cid as u32) << 16))
}

/// Asynchronous Event Request, which completes when there is an event: an
/// [`AsyncEvent`](crate::event::AsyncEvent) in its completion (Base, section 5.2).
pub const fn async_event_request() -> Sqe {
    command(AdminOpcode::ASYNC_EVENT_REQUEST)
}

/// Doorbell Buffer Config: from its completion on the host writes doorbell values to the page at
/// `shadow`, and the controller says in the page at `event_index` which of them it wants to have in the
/// registers too (Base, section 5.8 and annex B.5). Both are aligned to the memory page size; where the
/// entries are says [`doorbell_buffer_offset`](crate::registers::doorbell_buffer_offset).
pub const fn doorbell_buffer_config(shadow: u64, event_index: u64) -> Sqe {
    command(AdminOpcode::DOORBELL_BUFFER_CONFIG).with_data(DataPointer::Prp {
        prp1: shadow,
        prp2: event_index,
    })
}

/// QPRIO of a submission queue (Base, section 5.5, figure "Create I/O Submission Queue - Command
/// Dword 11").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum QueuePriority {
    /// Before the weighted classes.
    #[default]
    Urgent = 0,
    /// High.
    High = 1,
    /// Medium.
    Medium = 2,
    /// Low.
    Low = 3,
}

/// SEL of Get Features: which value (Base, section 5.15, figure "Get Features - Command Dword 10").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FeatureSelect {
    /// The one in effect.
    #[default]
    Current = 0,
    /// The one after a reset without a saved one.
    Default = 1,
    /// The saved one.
    Saved = 2,
    /// No value: whether the feature is saveable, namespace specific and changeable
    /// ([`FeatureCapabilities`](crate::feature::FeatureCapabilities)).
    Supported = 3,
}

const fn command(opcode: AdminOpcode) -> Sqe {
    Sqe::new(opcode.0)
}

const fn queue_memory(iova: u64) -> DataPointer {
    DataPointer::Prp {
        prp1: iova,
        prp2: 0,
    }
}

/// A count of `least` to 65,536 as a 16-bit 0's based field.
pub(crate) const fn zeroes_based(count: u32, least: u32) -> u32 {
    debug_assert!(count >= least && count <= 0x1_0000);
    if count < least {
        least - 1
    } else if count > 0x1_0000 {
        0xffff
    } else {
        count - 1
    }
}

#[cfg(test)]
mod tests;
