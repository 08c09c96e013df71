//! Messages byte by byte, as the specification's tables have them, on a little-endian host.

#![cfg(target_endian = "little")]

use vfio_user::{
    Capabilities, Command, DecodeError, DeviceInfo, DmaAccess, DmaMap, DmaUnmap, IrqAction,
    IrqData, IrqInfo, Limits, RegionAccess, RegionInfo, RegionWrite, Reply, ReplyError, Request,
    SetIrqs, SparseArea, TwinSocket, Version, WriteMulti, error_reply, message,
};

/// Bytes from hexadecimal digits.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|byte| (byte as char).to_digit(16).expect("a digit") as u8)
        .collect();
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

fn is_request(bytes: &str, request: &Request<'_>) {
    let limits = Limits::default();
    let bytes = hex(bytes);
    assert_eq!(request.encode(0x1234, false), bytes);
    let message = message(&bytes, &limits).expect("a message");
    assert_eq!(message.header.id(), 0x1234);
    assert!(message.header.wants_reply());
    // Those with data for which descriptors stand are tested with them elsewhere.
    assert_eq!(&message.request(&limits).expect("decoded"), request);
}

/// A command with id 1234h to reply to.
fn asked(command: Command) -> vfio_user::Header {
    let bytes = Request::Other(command).encode(0x1234, false);
    message(&bytes, &Limits::default())
        .expect("a message")
        .header
}

fn is_reply(bytes: &str, reply: &Reply<'_>, command: Command) {
    let limits = Limits::default();
    let bytes = hex(bytes);
    assert_eq!(reply.encode(&asked(command)), bytes);
    let message = message(&bytes, &limits).expect("a message");
    assert!(message.header.is_reply());
    assert_eq!(&message.reply(&limits).expect("decoded"), reply);
}

fn refused(bytes: &str, descriptors: usize) -> DecodeError {
    let limits = Limits::default();
    let message = message(&hex(bytes), &limits).expect("a message");
    Request::decode(&message.header, &message.payload, descriptors, &limits).expect_err("refused")
}

#[test]
fn requests() {
    is_request(
        "3412 0200 30000000 00000000 00000000
         20000000 03000000 0010000000000000 0000000100000000 0000200000000000",
        &Request::DmaMap(DmaMap {
            readable: true,
            writable: true,
            offset: 0x1000,
            address: 0x100_0000,
            size: 0x20_0000,
        }),
    );
    is_request(
        "3412 0300 28000000 00000000 00000000
         18000000 00000000 0000000100000000 0000200000000000",
        &Request::DmaUnmap(DmaUnmap {
            all: false,
            address: 0x100_0000,
            size: 0x20_0000,
        }),
    );
    is_request(
        "3412 0400 20000000 00000000 00000000 10000000 00000000 00000000 00000000",
        &Request::DeviceInfo { argsz: 16 },
    );
    is_request(
        "3412 0500 30000000 00000000 00000000
         40000000 00000000 07000000 00000000 0000000000000000 0000000000000000",
        &Request::RegionInfo {
            argsz: 64,
            index: 7,
        },
    );
    is_request(
        "3412 0600 20000000 00000000 00000000 10000000 00000000 01000000 00000000",
        &Request::RegionIoFds {
            argsz: 16,
            index: 1,
        },
    );
    is_request(
        "3412 0700 20000000 00000000 00000000 10000000 00000000 02000000 00000000",
        &Request::IrqInfo {
            argsz: 16,
            index: 2,
        },
    );
    is_request(
        "3412 0800 24000000 00000000 00000000
         14000000 21000000 02000000 00000000 00000000",
        &Request::SetIrqs(SetIrqs {
            index: 2,
            start: 0,
            count: 0,
            action: IrqAction::Trigger,
            data: IrqData::None,
        }),
    );
    is_request(
        "3412 0800 27000000 00000000 00000000
         17000000 0a000000 02000000 05000000 03000000 010001",
        &Request::SetIrqs(SetIrqs {
            index: 2,
            start: 5,
            count: 3,
            action: IrqAction::Mask,
            data: IrqData::Bool(&[1, 0, 1]),
        }),
    );
    is_request(
        "3412 0900 20000000 00000000 00000000 1400000000000000 00000000 04000000",
        &Request::RegionRead(RegionAccess {
            region: 0,
            offset: 0x14,
            count: 4,
        }),
    );
    is_request(
        "3412 0a00 24000000 00000000 00000000 1400000000000000 00000000 04000000 01006000",
        &Request::RegionWrite(RegionWrite {
            region: 0,
            offset: 0x14,
            data: &[1, 0, 0x60, 0],
        }),
    );
    is_request(
        "3412 0b00 20000000 00000000 00000000 0010000000000000 4000000000000000",
        &Request::DmaRead(DmaAccess {
            address: 0x1000,
            count: 64,
        }),
    );
    is_request(
        "3412 0c00 22000000 00000000 00000000 0010000000000000 0200000000000000 abcd",
        &Request::DmaWrite {
            address: 0x1000,
            data: &[0xab, 0xcd],
        },
    );
    is_request(
        "3412 0d00 10000000 00000000 00000000",
        &Request::DeviceReset,
    );
    let write = |offset, data| RegionWrite {
        region: 0,
        offset,
        data,
    };
    let writes = [
        write(0x1000, &[5, 0, 0, 0]),
        write(0x28, &[1, 2, 3, 4, 5, 6, 7, 8]),
    ];
    is_request(
        "3412 0f00 48000000 00000000 00000000 0200000000000000
         0010000000000000 00000000 04000000 0500000000000000
         2800000000000000 00000000 08000000 0102030405060708",
        &Request::RegionWriteMulti(WriteMulti::new(&writes).expect("small")),
    );
}

#[test]
fn versions() {
    let text = |json: &str| {
        let size = 16 + 4 + json.len() as u32 + u32::from(!json.is_empty());
        let mut bytes = hex("3412 0100 00000000 00000000 00000000 0000 0100");
        bytes[4..8].copy_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(json.as_bytes());
        if !json.is_empty() {
            bytes.push(0);
        }
        let message = message(&bytes, &Limits::default()).expect("a message");
        match message.request(&Limits::default()) {
            Ok(Request::Version(version)) => Ok(version),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        }
    };
    let default = Version {
        major: 0,
        minor: 1,
        capabilities: Capabilities::default(),
    };
    assert_eq!(text(""), Ok(default.clone()));
    assert_eq!(text("{}"), Ok(default.clone()));
    assert_eq!(text(r#"{"capabilities":{}}"#), Ok(default.clone()));
    let all = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":65536,"pgsizes":2097152,
        "max_dma_maps":64,"migration":{"pgsize":4096},"write_multiple":true,
        "twin_socket":{"supported":true,"fd_index":0},"msix_table_mappable":true,"another":[1]}}"#;
    let capabilities = Capabilities {
        max_msg_fds: 8,
        max_data_xfer_size: 65536,
        pgsizes: 2 << 20,
        max_dma_maps: 64,
        write_multiple: true,
        twin_socket: Some(TwinSocket {
            supported: true,
            fd_index: Some(0),
        }),
        migration: true,
        msix_table_mappable: true,
    };
    assert_eq!(text(all).expect("all of them").capabilities, capabilities);
    for wrong in [
        "{",
        "[]x",
        r#"{"capabilities":{"max_msg_fds":-1}}"#,
        r#"{"capabilities":{"max_msg_fds":"8"}}"#,
        r#"{"capabilities":{"max_data_xfer_size":4294967296}}"#,
    ] {
        assert!(
            matches!(text(wrong), Err(DecodeError::Capabilities(_))),
            "{wrong}"
        );
    }
    // Without the NUL.
    let bytes = hex("3412 0100 16000000 00000000 00000000 0000 0100 7b7d");
    let message = message(&bytes, &Limits::default()).expect("a message");
    assert!(matches!(
        message.request(&Limits::default()),
        Err(DecodeError::Capabilities(_))
    ));
}

#[test]
fn replies() {
    is_reply(
        "3412 0200 10000000 01000000 00000000",
        &Reply::DmaMap,
        Command::DMA_MAP,
    );
    is_reply(
        "3412 0300 28000000 01000000 00000000
         18000000 00000000 0000000100000000 0000200000000000",
        &Reply::DmaUnmap(DmaUnmap {
            all: false,
            address: 0x100_0000,
            size: 0x20_0000,
        }),
        Command::DMA_UNMAP,
    );
    is_reply(
        "3412 0400 20000000 01000000 00000000 10000000 03000000 09000000 05000000",
        &Reply::DeviceInfo(DeviceInfo {
            resets: true,
            is_pci: true,
            regions: 9,
            irqs: 5,
        }),
        Command::DEVICE_GET_INFO,
    );
    let bar = RegionInfo {
        index: 0,
        readable: true,
        writable: true,
        mappable: true,
        size: 0x4000,
        offset: 0x10000,
        sparse: Some(vec![SparseArea {
            offset: 0x1000,
            size: 0x1000,
        }]),
    };
    is_reply(
        "3412 0500 50000000 01000000 00000000
         40000000 0f000000 00000000 20000000 0040000000000000 0000010000000000
         0100 0100 00000000 01000000 00000000 0010000000000000 0010000000000000",
        &Reply::RegionInfo(bar.clone()),
        Command::DEVICE_GET_REGION_INFO,
    );
    is_reply(
        "3412 0500 30000000 01000000 00000000
         40000000 07000000 00000000 00000000 0040000000000000 0000010000000000",
        &Reply::RegionInfoCut {
            info: RegionInfo {
                sparse: None,
                ..bar
            },
            argsz: 64,
        },
        Command::DEVICE_GET_REGION_INFO,
    );
    is_reply(
        "3412 0700 20000000 01000000 00000000 10000000 09000000 02000000 41000000",
        &Reply::IrqInfo(IrqInfo {
            index: 2,
            count: 65,
            eventfd: true,
            maskable: false,
            automasked: false,
            noresize: true,
        }),
        Command::DEVICE_GET_IRQ_INFO,
    );
    is_reply(
        "3412 0800 10000000 01000000 00000000",
        &Reply::SetIrqs,
        Command::DEVICE_SET_IRQS,
    );
    is_reply(
        "3412 0900 24000000 01000000 00000000 1c00000000000000 00000000 04000000 01000000",
        &Reply::RegionRead {
            region: 0,
            offset: 0x1c,
            data: &[1, 0, 0, 0],
        },
        Command::REGION_READ,
    );
    is_reply(
        "3412 0a00 20000000 01000000 00000000 1400000000000000 00000000 04000000",
        &Reply::RegionWrite(RegionAccess {
            region: 0,
            offset: 0x14,
            count: 4,
        }),
        Command::REGION_WRITE,
    );
    is_reply(
        "3412 0f00 18000000 01000000 00000000 0200000000000000",
        &Reply::RegionWriteMulti { count: 2 },
        Command::REGION_WRITE_MULTI,
    );
    is_reply(
        "3412 0b00 22000000 01000000 00000000 0010000000000000 0200000000000000 abcd",
        &Reply::DmaRead {
            address: 0x1000,
            data: &[0xab, 0xcd],
        },
        Command::DMA_READ,
    );
    is_reply(
        "3412 0c00 20000000 01000000 00000000 0010000000000000 0200000000000000",
        &Reply::DmaWrite(DmaAccess {
            address: 0x1000,
            count: 2,
        }),
        Command::DMA_WRITE,
    );
    is_reply(
        "3412 0d00 10000000 01000000 00000000",
        &Reply::DeviceReset,
        Command::DEVICE_RESET,
    );
}

#[test]
fn errors_come_as_a_header_alone() {
    let bytes = error_reply(&asked(Command::DMA_UNMAP), 22);
    assert_eq!(bytes, hex("3412 0300 10000000 21000000 16000000"));
    let message = message(&bytes, &Limits::default()).expect("a message");
    let error = message.reply(&Limits::default()).expect_err("an error");
    assert_eq!(
        error,
        ReplyError::Peer {
            command: Command::DMA_UNMAP,
            errno: 22
        }
    );
    assert_eq!(
        error.to_string(),
        "DMA_UNMAP: refused by the peer: Invalid argument (os error 22)"
    );
}

#[test]
fn malformed_requests_are_refused() {
    // A size that is too small, too large; a type that is none.
    for header in [
        "3412 0d00 0f000000 00000000 00000000",
        "3412 0d00 ffffffff 00000000 00000000",
        "3412 0d00 10000000 02000000 00000000",
    ] {
        assert!(
            message(&hex(header), &Limits::default()).is_err(),
            "{header}"
        );
    }
    let wrong = [
        // DMA_MAP: too short, too long, argsz, flags, an empty range, one that wraps, an offset that does.
        "3412 0200 14000000 00000000 00000000 20000000",
        "3412 0200 34000000 00000000 00000000 20000000 03000000 0000000000000000 0000000000000000
         0010000000000000 00000000",
        "3412 0200 30000000 00000000 00000000 1f000000 03000000 0000000000000000 0000000000000000
         0010000000000000",
        "3412 0200 30000000 00000000 00000000 20000000 07000000 0000000000000000 0000000000000000
         0010000000000000",
        "3412 0200 30000000 00000000 00000000 20000000 03000000 0000000000000000 0000000000000000
         0000000000000000",
        "3412 0200 30000000 00000000 00000000 20000000 03000000 0000000000000000 00f0ffffffffffff
         0020000000000000",
        "3412 0200 30000000 00000000 00000000 20000000 03000000 00f0ffffffffffff 0000000000000000
         0020000000000000",
        // DMA_UNMAP: of everything, but with a range; a bitmap of dirty pages.
        "3412 0300 28000000 00000000 00000000 18000000 02000000 0000000000000000 0010000000000000",
        "3412 0300 28000000 00000000 00000000 18000000 01000000 0000000000000000 0010000000000000",
        // No room for the reply.
        "3412 0400 20000000 00000000 00000000 0f000000 00000000 00000000 00000000",
        "3412 0500 30000000 00000000 00000000 1f000000 00000000 07000000 00000000 0000000000000000
         0000000000000000",
        // DEVICE_SET_IRQS: two kinds of data, two actions, none, a range that wraps, too few booleans.
        "3412 0800 24000000 00000000 00000000 14000000 23000000 02000000 00000000 00000000",
        "3412 0800 24000000 00000000 00000000 14000000 31000000 02000000 00000000 00000000",
        "3412 0800 24000000 00000000 00000000 14000000 01000000 02000000 00000000 00000000",
        "3412 0800 24000000 00000000 00000000 14000000 20000000 02000000 00000000 00000000",
        "3412 0800 24000000 00000000 00000000 14000000 61000000 02000000 00000000 00000000",
        "3412 0800 24000000 00000000 00000000 14000000 21000000 02000000 ffffffff 01000000",
        "3412 0800 26000000 00000000 00000000 14000000 22000000 02000000 00000000 03000000 0101",
        // REGION_READ: nothing, too much, with data, a range that wraps.
        "3412 0900 20000000 00000000 00000000 0000000000000000 00000000 00000000",
        "3412 0900 20000000 00000000 00000000 0000000000000000 00000000 01001000",
        "3412 0900 24000000 00000000 00000000 0000000000000000 00000000 04000000 00000000",
        "3412 0900 20000000 00000000 00000000 ffffffffffffffff 00000000 04000000",
        // REGION_WRITE: less data than is said, and more.
        "3412 0a00 22000000 00000000 00000000 0000000000000000 00000000 04000000 0000",
        "3412 0a00 26000000 00000000 00000000 0000000000000000 00000000 04000000 000000000000",
        // DMA_READ: more than 64 bits of addresses, and of a count.
        "3412 0b00 20000000 00000000 00000000 0010000000000000 ffffffffffffffff",
        // REGION_WRITE_MULTI: fewer writes than is said, a count that overflows, a write of 9 bytes.
        "3412 0f00 18000000 00000000 00000000 0100000000000000",
        "3412 0f00 18000000 00000000 00000000 abaaaaaaaaaaaa0a",
        "3412 0f00 30000000 00000000 00000000 0100000000000000
         0010000000000000 00000000 09000000 0500000000000000",
        // DEVICE_RESET with a payload.
        "3412 0d00 14000000 00000000 00000000 00000000",
    ];
    for bytes in wrong {
        let _ = refused(bytes, 0);
    }
    // Descriptors: two for one region, one for what takes none, one for two interrupts.
    for (bytes, count) in [
        (
            "3412 0200 30000000 00000000 00000000 20000000 03000000 0000000000000000
             0000000000000000 0010000000000000",
            2,
        ),
        ("3412 0d00 10000000 00000000 00000000", 1),
        (
            "3412 0800 24000000 00000000 00000000 14000000 24000000 02000000 00000000 02000000",
            1,
        ),
        (
            "3412 0800 24000000 00000000 00000000 14000000 21000000 02000000 00000000 02000000",
            2,
        ),
    ] {
        assert!(matches!(
            refused(bytes, count),
            DecodeError::Descriptors { .. }
        ));
    }
    // A reply where a command is expected.
    assert_eq!(
        refused("3412 0d00 10000000 01000000 00000000", 0),
        DecodeError::Direction(Command::DEVICE_RESET)
    );
}

#[test]
fn malformed_capabilities_are_refused() {
    let head = "3412 0500 50000000 01000000 00000000
         40000000 0f000000 00000000 CAPOFFST 0040000000000000 0000000000000000";
    for (offset, rest) in [
        // Into the fixed part, past the end, to itself, too many areas, an area outside, one that wraps.
        (
            "08000000",
            "0100 0100 00000000 01000000 00000000 0010000000000000 0010000000000000",
        ),
        (
            "41000000",
            "0100 0100 00000000 01000000 00000000 0010000000000000 0010000000000000",
        ),
        (
            "20000000",
            "0200 0100 20000000 01000000 00000000 0010000000000000 0010000000000000",
        ),
        (
            "20000000",
            "0100 0100 00000000 02000000 00000000 0010000000000000 0010000000000000",
        ),
        (
            "20000000",
            "0100 0100 00000000 01000000 00000000 0040000000000000 0100000000000000",
        ),
        (
            "20000000",
            "0100 0100 00000000 01000000 00000000 ffffffffffffffff 0200000000000000",
        ),
    ] {
        let bytes = hex(&format!("{} {rest}", head.replace("CAPOFFST", offset)));
        let message = message(&bytes, &Limits::default()).expect("a message");
        assert!(
            message.reply(&Limits::default()).is_err(),
            "{offset} {rest}"
        );
    }
}
