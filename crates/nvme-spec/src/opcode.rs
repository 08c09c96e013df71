//! Opcodes: the lowest byte of a command (Base, figures "Opcodes for Admin Commands" and "Opcodes
//! for I/O Commands"; NVM, figure "Opcodes for NVM Commands").

use core::fmt;

macro_rules! opcodes {
    ($(#[$attributes:meta])* $type:ident { $($constant:ident = $value:literal $name:literal;)* }) => {
        $(#[$attributes])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(pub u8);

        impl $type {
            $(
                #[doc = concat!($name, ", ", stringify!($value), ".")]
                pub const $constant: Self = Self($value);
            )*

            /// The specification's name, if it has one for this opcode.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$constant => Some($name),)*
                    _ => None,
                }
            }
        }

        impl From<u8> for $type {
            fn from(opcode: u8) -> Self {
                Self(opcode)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "opcode {:#04x}", self.0),
                }
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($type), "({:#04x}: {})"), self.0, self.name().unwrap_or("?"))
            }
        }
    };
}

opcodes! {
    /// An opcode of a command on the admin queue. Any value may occur; those of the specification
    /// are named.
    AdminOpcode {
        DELETE_IO_SUBMISSION_QUEUE = 0x00 "Delete I/O Submission Queue";
        CREATE_IO_SUBMISSION_QUEUE = 0x01 "Create I/O Submission Queue";
        GET_LOG_PAGE = 0x02 "Get Log Page";
        DELETE_IO_COMPLETION_QUEUE = 0x04 "Delete I/O Completion Queue";
        CREATE_IO_COMPLETION_QUEUE = 0x05 "Create I/O Completion Queue";
        IDENTIFY = 0x06 "Identify";
        ABORT = 0x08 "Abort";
        SET_FEATURES = 0x09 "Set Features";
        GET_FEATURES = 0x0a "Get Features";
        ASYNC_EVENT_REQUEST = 0x0c "Asynchronous Event Request";
        NAMESPACE_MANAGEMENT = 0x0d "Namespace Management";
        FIRMWARE_COMMIT = 0x10 "Firmware Commit";
        FIRMWARE_IMAGE_DOWNLOAD = 0x11 "Firmware Image Download";
        DEVICE_SELF_TEST = 0x14 "Device Self-test";
        NAMESPACE_ATTACHMENT = 0x15 "Namespace Attachment";
        KEEP_ALIVE = 0x18 "Keep Alive";
        DIRECTIVE_SEND = 0x19 "Directive Send";
        DIRECTIVE_RECEIVE = 0x1a "Directive Receive";
        VIRTUALIZATION_MANAGEMENT = 0x1c "Virtualization Management";
        NVME_MI_SEND = 0x1d "NVMe-MI Send";
        NVME_MI_RECEIVE = 0x1e "NVMe-MI Receive";
        CAPACITY_MANAGEMENT = 0x20 "Capacity Management";
        LOCKDOWN = 0x24 "Lockdown";
        DOORBELL_BUFFER_CONFIG = 0x7c "Doorbell Buffer Config";
        FABRICS = 0x7f "Fabrics Commands";
        FORMAT_NVM = 0x80 "Format NVM";
        SECURITY_SEND = 0x81 "Security Send";
        SECURITY_RECEIVE = 0x82 "Security Receive";
        SANITIZE = 0x84 "Sanitize";
        GET_LBA_STATUS = 0x86 "Get LBA Status";
    }
}

opcodes! {
    /// An opcode of a command of the NVM command set on an I/O queue. Any value may occur; those of
    /// the specification are named.
    NvmOpcode {
        FLUSH = 0x00 "Flush";
        WRITE = 0x01 "Write";
        READ = 0x02 "Read";
        WRITE_UNCORRECTABLE = 0x04 "Write Uncorrectable";
        COMPARE = 0x05 "Compare";
        WRITE_ZEROES = 0x08 "Write Zeroes";
        DATASET_MANAGEMENT = 0x09 "Dataset Management";
        VERIFY = 0x0c "Verify";
        RESERVATION_REGISTER = 0x0d "Reservation Register";
        RESERVATION_REPORT = 0x0e "Reservation Report";
        RESERVATION_ACQUIRE = 0x11 "Reservation Acquire";
        RESERVATION_RELEASE = 0x15 "Reservation Release";
        COPY = 0x19 "Copy";
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn named_and_unnamed_opcodes() {
        assert_eq!(AdminOpcode(0x06), AdminOpcode::IDENTIFY);
        assert_eq!(
            AdminOpcode::from(0x0c).to_string(),
            "Asynchronous Event Request"
        );
        assert_eq!(AdminOpcode(0xc0).name(), None);
        assert_eq!(AdminOpcode(0xc0).to_string(), "opcode 0xc0");
        assert_eq!(NvmOpcode::from(0x09).to_string(), "Dataset Management");
        assert_eq!(
            std::format!("{:?}", NvmOpcode::COPY),
            "NvmOpcode(0x19: Copy)"
        );
    }
}
