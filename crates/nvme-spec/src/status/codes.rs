//! The one table of status codes: constant, type, code, the specification's name, what it means.

use super::Status;

macro_rules! status_codes {
    ($($constant:ident = ($code_type:literal, $code:literal) $name:literal: $text:literal;)*) => {
        impl Status {
            $(
                #[doc = concat!($name, " (SCT ", stringify!($code_type), ", SC ", stringify!($code), "). ", $text)]
                pub const $constant: Self = Self::new($code_type, $code);
            )*

            /// Every status that has a name, in the order of the specification's tables.
            #[cfg(test)]
            pub(super) const NAMED: &[Self] = &[$(Self::$constant),*];

            /// The specification's name, or what kind of unnamed code this is. Codes that are
            /// specific to a command set are read as the NVM command set's.
            pub const fn name(self) -> &'static str {
                match (self.code_type_bits(), self.code()) {
                    $(($code_type, $code) => $name,)*
                    (7, _) => "Vendor Specific Status",
                    (0..=3, 0xc0..) => "Vendor Specific Status",
                    (1, 0x70..=0x7f) => "Directive Specific Status",
                    _ => "Reserved Status",
                }
            }

            /// One sentence on what the status means, or an empty string for one without a name.
            pub const fn description(self) -> &'static str {
                match (self.code_type_bits(), self.code()) {
                    $(($code_type, $code) => $text,)*
                    _ => "",
                }
            }
        }
    };
}

status_codes! {
    SUCCESS = (0x0, 0x00) "Successful Completion": "The command completed without error.";
    INVALID_OPCODE = (0x0, 0x01) "Invalid Command Opcode": "The opcode is reserved or not supported.";
    INVALID_FIELD = (0x0, 0x02) "Invalid Field in Command": "A field of the command has a reserved or unsupported value.";
    COMMAND_ID_CONFLICT = (0x0, 0x03) "Command ID Conflict": "The command identifier is already in use on the queue.";
    DATA_TRANSFER_ERROR = (0x0, 0x04) "Data Transfer Error": "Data or metadata could not be transferred.";
    ABORTED_POWER_LOSS = (0x0, 0x05) "Commands Aborted due to Power Loss Notification": "Power is about to be lost.";
    INTERNAL_ERROR = (0x0, 0x06) "Internal Error": "The controller failed internally.";
    ABORT_REQUESTED = (0x0, 0x07) "Command Abort Requested": "An Abort command named this command.";
    ABORTED_SQ_DELETION = (0x0, 0x08) "Command Aborted due to SQ Deletion": "Its submission queue was deleted.";
    ABORTED_FAILED_FUSED = (0x0, 0x09) "Command Aborted due to Failed Fused Command": "The other command of the fused operation failed.";
    ABORTED_MISSING_FUSED = (0x0, 0x0a) "Command Aborted due to Missing Fused Command": "The other command of the fused operation is missing.";
    INVALID_NAMESPACE_OR_FORMAT = (0x0, 0x0b) "Invalid Namespace or Format": "The namespace, or its format, is not valid.";
    COMMAND_SEQUENCE_ERROR = (0x0, 0x0c) "Command Sequence Error": "A required earlier command of a sequence is missing.";
    INVALID_SGL_SEGMENT = (0x0, 0x0d) "Invalid SGL Segment Descriptor": "An SGL segment or last segment descriptor is not valid where it stands.";
    INVALID_SGL_COUNT = (0x0, 0x0e) "Invalid Number of SGL Descriptors": "A segment or last segment descriptor stands elsewhere than at the end of its segment.";
    DATA_SGL_LENGTH_INVALID = (0x0, 0x0f) "Data SGL Length Invalid": "The data SGL is too short, or too long for a controller that does not allow that.";
    METADATA_SGL_LENGTH_INVALID = (0x0, 0x10) "Metadata SGL Length Invalid": "The metadata SGL is too short, or too long for a controller that does not allow that.";
    SGL_TYPE_INVALID = (0x0, 0x11) "SGL Descriptor Type Invalid": "The type or subtype of an SGL descriptor is not supported.";
    INVALID_CMB_USE = (0x0, 0x12) "Invalid Use of Controller Memory Buffer": "The controller memory buffer does not support this use.";
    PRP_OFFSET_INVALID = (0x0, 0x13) "PRP Offset Invalid": "A PRP entry has an offset that it may not have.";
    ATOMIC_WRITE_UNIT_EXCEEDED = (0x0, 0x14) "Atomic Write Unit Exceeded": "The write is longer than what is atomic.";
    OPERATION_DENIED = (0x0, 0x15) "Operation Denied": "Access rights do not allow the command.";
    SGL_OFFSET_INVALID = (0x0, 0x16) "SGL Offset Invalid": "The offset of an SGL descriptor is not valid.";
    HOST_ID_INCONSISTENT = (0x0, 0x18) "Host Identifier Inconsistent Format": "Hosts use identifiers of different sizes.";
    KEEP_ALIVE_EXPIRED = (0x0, 0x19) "Keep Alive Timer Expired": "The keep alive timer expired.";
    KEEP_ALIVE_INVALID = (0x0, 0x1a) "Keep Alive Timeout Invalid": "The keep alive timeout is not valid.";
    ABORTED_PREEMPT = (0x0, 0x1b) "Command Aborted due to Preempt and Abort": "A reservation was preempted.";
    SANITIZE_FAILED = (0x0, 0x1c) "Sanitize Failed": "The last sanitize operation failed and was not recovered from.";
    SANITIZE_IN_PROGRESS = (0x0, 0x1d) "Sanitize In Progress": "A sanitize operation prevents the command.";
    SGL_GRANULARITY_INVALID = (0x0, 0x1e) "SGL Data Block Granularity Invalid": "The address or length of an SGL data block is not aligned as required.";
    NOT_SUPPORTED_IN_CMB_QUEUE = (0x0, 0x1f) "Command Not Supported for Queue in CMB": "A queue in controller memory does not support the command.";
    WRITE_PROTECTED = (0x0, 0x20) "Namespace is Write Protected": "The namespace may not be written.";
    COMMAND_INTERRUPTED = (0x0, 0x21) "Command Interrupted": "The controller could not complete the command now; it may be tried again.";
    TRANSIENT_TRANSPORT_ERROR = (0x0, 0x22) "Transient Transport Error": "A passing fault of the transport.";
    PROHIBITED_BY_LOCKDOWN = (0x0, 0x23) "Command Prohibited by Command and Feature Lockdown": "The command is locked down.";
    ADMIN_MEDIA_NOT_READY = (0x0, 0x24) "Admin Command Media Not Ready": "The command needs media that are not ready yet.";
    LBA_OUT_OF_RANGE = (0x0, 0x80) "LBA Out of Range": "A logical block is past the end of the namespace.";
    CAPACITY_EXCEEDED = (0x0, 0x81) "Capacity Exceeded": "The namespace has no free capacity.";
    NAMESPACE_NOT_READY = (0x0, 0x82) "Namespace Not Ready": "The namespace is not ready to be accessed.";
    RESERVATION_CONFLICT = (0x0, 0x83) "Reservation Conflict": "A reservation of another host prevents the command.";
    FORMAT_IN_PROGRESS = (0x0, 0x84) "Format In Progress": "The namespace is being formatted.";

    COMPLETION_QUEUE_INVALID = (0x1, 0x00) "Completion Queue Invalid": "The completion queue does not exist.";
    INVALID_QUEUE_ID = (0x1, 0x01) "Invalid Queue Identifier": "The queue identifier is out of range, in use, or names no queue.";
    INVALID_QUEUE_SIZE = (0x1, 0x02) "Invalid Queue Size": "The queue size is 0 or more than the controller supports.";
    ABORT_LIMIT_EXCEEDED = (0x1, 0x03) "Abort Command Limit Exceeded": "More Abort commands are outstanding than the controller allows.";
    ASYNC_EVENT_LIMIT_EXCEEDED = (0x1, 0x05) "Asynchronous Event Request Limit Exceeded": "More Asynchronous Event Requests are outstanding than the controller allows.";
    INVALID_FIRMWARE_SLOT = (0x1, 0x06) "Invalid Firmware Slot": "The firmware slot does not exist or is read only.";
    INVALID_FIRMWARE_IMAGE = (0x1, 0x07) "Invalid Firmware Image": "The firmware image is not valid.";
    INVALID_INTERRUPT_VECTOR = (0x1, 0x08) "Invalid Interrupt Vector": "The interrupt vector is not there.";
    INVALID_LOG_PAGE = (0x1, 0x09) "Invalid Log Page": "The log page is not supported.";
    INVALID_FORMAT = (0x1, 0x0a) "Invalid Format": "The LBA format is not supported.";
    FIRMWARE_NEEDS_CONVENTIONAL_RESET = (0x1, 0x0b) "Firmware Activation Requires Conventional Reset": "The firmware is active after a conventional reset.";
    INVALID_QUEUE_DELETION = (0x1, 0x0c) "Invalid Queue Deletion": "The completion queue still has submission queues.";
    FEATURE_NOT_SAVEABLE = (0x1, 0x0d) "Feature Identifier Not Saveable": "The feature has no saveable value.";
    FEATURE_NOT_CHANGEABLE = (0x1, 0x0e) "Feature Not Changeable": "The feature cannot be changed.";
    FEATURE_NOT_NAMESPACE_SPECIFIC = (0x1, 0x0f) "Feature Not Namespace Specific": "The feature holds for the whole controller.";
    FIRMWARE_NEEDS_SUBSYSTEM_RESET = (0x1, 0x10) "Firmware Activation Requires NVM Subsystem Reset": "The firmware is active after an NVM subsystem reset.";
    FIRMWARE_NEEDS_CONTROLLER_RESET = (0x1, 0x11) "Firmware Activation Requires Controller Level Reset": "The firmware is active after a controller level reset.";
    FIRMWARE_NEEDS_MAX_TIME_VIOLATION = (0x1, 0x12) "Firmware Activation Requires Maximum Time Violation": "Activating the firmware now would take longer than MTFA.";
    FIRMWARE_PROHIBITED = (0x1, 0x13) "Firmware Activation Prohibited": "The image is one that the controller does not activate.";
    OVERLAPPING_RANGE = (0x1, 0x14) "Overlapping Range": "Ranges overlap that may not.";
    NAMESPACE_INSUFFICIENT_CAPACITY = (0x1, 0x15) "Namespace Insufficient Capacity": "There is not enough free space to create the namespace.";
    NAMESPACE_ID_UNAVAILABLE = (0x1, 0x16) "Namespace Identifier Unavailable": "There are as many namespaces as are supported.";
    NAMESPACE_ALREADY_ATTACHED = (0x1, 0x18) "Namespace Already Attached": "The controller has the namespace already.";
    NAMESPACE_IS_PRIVATE = (0x1, 0x19) "Namespace Is Private": "The namespace is attached to another controller and is not shared.";
    NAMESPACE_NOT_ATTACHED = (0x1, 0x1a) "Namespace Not Attached": "The controller does not have the namespace.";
    THIN_PROVISIONING_NOT_SUPPORTED = (0x1, 0x1b) "Thin Provisioning Not Supported": "NCAP may not be less than NSZE.";
    CONTROLLER_LIST_INVALID = (0x1, 0x1c) "Controller List Invalid": "The controller list is not valid.";
    SELF_TEST_IN_PROGRESS = (0x1, 0x1d) "Device Self-test In Progress": "The controller tests itself.";
    BOOT_PARTITION_WRITE_PROHIBITED = (0x1, 0x1e) "Boot Partition Write Prohibited": "The boot partition is locked.";
    INVALID_CONTROLLER_ID = (0x1, 0x1f) "Invalid Controller Identifier": "The controller identifier is not valid.";
    INVALID_SECONDARY_CONTROLLER_STATE = (0x1, 0x20) "Invalid Secondary Controller State": "The secondary controller's state does not allow that.";
    INVALID_CONTROLLER_RESOURCES = (0x1, 0x21) "Invalid Number of Controller Resources": "The number of flexible resources is not valid.";
    INVALID_RESOURCE_ID = (0x1, 0x22) "Invalid Resource Identifier": "The resource identifier is not valid.";
    SANITIZE_PROHIBITED_PMR = (0x1, 0x23) "Sanitize Prohibited While Persistent Memory Region is Enabled": "The persistent memory region is enabled.";
    ANA_GROUP_ID_INVALID = (0x1, 0x24) "ANA Group Identifier Invalid": "The ANA group is not supported.";
    ANA_ATTACH_FAILED = (0x1, 0x25) "ANA Attach Failed": "The ANA state does not allow the controller to attach the namespace.";
    INSUFFICIENT_CAPACITY = (0x1, 0x26) "Insufficient Capacity": "There is not enough free space for the operation.";
    NAMESPACE_ATTACHMENT_LIMIT_EXCEEDED = (0x1, 0x27) "Namespace Attachment Limit Exceeded": "Too many namespaces would be attached.";
    LOCKDOWN_NOT_SUPPORTED = (0x1, 0x28) "Prohibition of Command Execution Not Supported": "The command cannot be locked down.";
    COMMAND_SET_NOT_SUPPORTED = (0x1, 0x29) "I/O Command Set Not Supported": "The controller does not have the I/O command set.";
    COMMAND_SET_NOT_ENABLED = (0x1, 0x2a) "I/O Command Set Not Enabled": "The I/O command set is not enabled.";
    COMMAND_SET_COMBINATION_REJECTED = (0x1, 0x2b) "I/O Command Set Combination Rejected": "The I/O command sets cannot be enabled together.";
    INVALID_COMMAND_SET = (0x1, 0x2c) "Invalid I/O Command Set": "The namespace's I/O command set is another.";
    IDENTIFIER_UNAVAILABLE = (0x1, 0x2d) "Identifier Unavailable": "There are as many endurance groups or NVM sets as are supported.";
    CONFLICTING_ATTRIBUTES = (0x1, 0x80) "Conflicting Attributes": "The attributes of the command conflict.";
    INVALID_PROTECTION_INFORMATION = (0x1, 0x81) "Invalid Protection Information": "The protection settings do not fit the namespace's format.";
    READ_ONLY_RANGE = (0x1, 0x82) "Attempted Write to Read Only Range": "The range holds read only blocks.";
    COMMAND_SIZE_LIMIT_EXCEEDED = (0x1, 0x83) "Command Size Limit Exceeded": "The command is larger than a limit that the controller gave.";

    WRITE_FAULT = (0x2, 0x80) "Write Fault": "The data could not be committed to the media.";
    UNRECOVERED_READ_ERROR = (0x2, 0x81) "Unrecovered Read Error": "The data could not be read from the media.";
    GUARD_CHECK_ERROR = (0x2, 0x82) "End-to-end Guard Check Error": "The guard does not fit the data.";
    APPLICATION_TAG_CHECK_ERROR = (0x2, 0x83) "End-to-end Application Tag Check Error": "The application tag is not the expected one.";
    REFERENCE_TAG_CHECK_ERROR = (0x2, 0x84) "End-to-end Reference Tag Check Error": "The reference tag is not the expected one.";
    COMPARE_FAILURE = (0x2, 0x85) "Compare Failure": "The data differ.";
    ACCESS_DENIED = (0x2, 0x86) "Access Denied": "The media may not be accessed.";
    DEALLOCATED_BLOCK = (0x2, 0x87) "Deallocated or Unwritten Logical Block": "A block was deallocated or never written, and the host asked for an error then.";
    STORAGE_TAG_CHECK_ERROR = (0x2, 0x88) "End-to-End Storage Tag Check Error": "The storage tag is not the expected one.";

    INTERNAL_PATH_ERROR = (0x3, 0x00) "Internal Path Error": "The controller's way to the media failed.";
    ANA_PERSISTENT_LOSS = (0x3, 0x01) "Asymmetric Access Persistent Loss": "The controller has lost access to the namespace for good.";
    ANA_INACCESSIBLE = (0x3, 0x02) "Asymmetric Access Inaccessible": "The namespace cannot be accessed through this controller.";
    ANA_TRANSITION = (0x3, 0x03) "Asymmetric Access Transition": "The way to the namespace is changing.";
    CONTROLLER_PATHING_ERROR = (0x3, 0x60) "Controller Pathing Error": "The controller found a fault of the path.";
    HOST_PATHING_ERROR = (0x3, 0x70) "Host Pathing Error": "The host found a fault of the path.";
    ABORTED_BY_HOST = (0x3, 0x71) "Command Aborted By Host": "The host gave the command up.";
}
