//! What is encoded is decoded as it was, and any bytes are decoded or refused.

use proptest::prelude::*;
use vfio_user::{
    Capabilities, DmaAccess, DmaMap, DmaUnmap, HEADER_SIZE, IrqAction, IrqData, Limits, Message,
    RegionAccess, RegionInfo, RegionWrite, Reply, Request, SetIrqs, SparseArea, TwinSocket,
    Version, WriteMulti, message,
};

fn version() -> impl Strategy<Value = Version> {
    let twin = proptest::option::of((any::<bool>(), any::<Option<u32>>()));
    let numbers = (any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>());
    let booleans = (any::<bool>(), any::<bool>());
    (any::<u16>(), any::<u16>(), numbers, booleans, twin).prop_map(
        |(major, minor, numbers, (write_multiple, msix_table_mappable), twin)| Version {
            major,
            minor,
            capabilities: Capabilities {
                max_msg_fds: numbers.0,
                max_data_xfer_size: numbers.1,
                pgsizes: numbers.2,
                max_dma_maps: numbers.3,
                write_multiple,
                twin_socket: twin.map(|(supported, fd_index)| TwinSocket {
                    supported,
                    fd_index,
                }),
                migration: false,
                msix_table_mappable,
            },
        },
    )
}

fn received(bytes: &[u8]) -> Message {
    message(bytes, &Limits::default()).expect("a message")
}

fn is_decoded(request: &Request<'_>) {
    let message = received(&request.encode(3, true));
    assert!(!message.header.wants_reply());
    assert_eq!(message.request(&Limits::default()).as_ref(), Ok(request));
}

proptest! {
    #[test]
    fn versions(version in version()) {
        is_decoded(&Request::Version(version.clone()));
        let asked = received(&Request::Version(version.clone()).encode(1, false));
        let reply = Reply::Version(version);
        let answer = received(&reply.encode(&asked.header));
        prop_assert_eq!(answer.reply(&Limits::default()), Ok(reply));
    }

    #[test]
    fn memory(
        address in any::<u64>(), offset in any::<u64>(), size in 1u64..,
        readable in any::<bool>(), writable in any::<bool>(),
    ) {
        let map = DmaMap { readable, writable, offset, address, size };
        let is_right = address.checked_add(size - 1).is_some() && offset.checked_add(size - 1).is_some();
        let message = received(&Request::DmaMap(map).encode(0, false));
        prop_assert_eq!(message.request(&Limits::default()).is_ok(), is_right);
        let unmap = DmaUnmap { all: false, address, size };
        let message = received(&Request::DmaUnmap(unmap).encode(0, false));
        prop_assert_eq!(
            message.request(&Limits::default()).is_ok(),
            address.checked_add(size - 1).is_some()
        );
    }

    #[test]
    fn accesses(
        region in any::<u32>(), offset in 0..u64::MAX / 2,
        data in proptest::collection::vec(any::<u8>(), 1..5000),
    ) {
        let count = data.len() as u32;
        let write = RegionWrite { region, offset, data: &data };
        let access = RegionAccess { region, offset, count };
        is_decoded(&Request::RegionWrite(write));
        is_decoded(&Request::RegionRead(access));
        is_decoded(&Request::DmaWrite { address: offset, data: &data });
        is_decoded(&Request::DmaRead(DmaAccess { address: offset, count: count.into() }));
        let asked = Request::RegionRead(access);
        let reply = Reply::RegionRead { region, offset, data: &data };
        let answer = received(&reply.encode(&received(&asked.encode(9, false)).header));
        let decoded = answer.reply(&Limits::default()).expect("decoded");
        prop_assert!(decoded.answers(&asked));
        let shifted = RegionAccess { offset: offset + 1, ..access };
        prop_assert!(!decoded.answers(&Request::RegionRead(shifted)));
        let small = Limits { max_transfer: count - 1, ..Limits::default() };
        prop_assert!(answer.reply(&small).is_err());
    }

    #[test]
    fn interrupts(
        index in any::<u32>(), start in 0..u32::MAX / 2, action in 0..3,
        bools in proptest::collection::vec(any::<u8>(), 0..100), is_bool in any::<bool>(),
    ) {
        let action =
            [IrqAction::Mask, IrqAction::Unmask, IrqAction::Trigger][usize::try_from(action).unwrap_or(0)];
        let data = if is_bool { IrqData::Bool(&bools) } else { IrqData::Eventfd };
        is_decoded(&Request::SetIrqs(SetIrqs { index, start, count: bools.len() as u32, action, data }));
    }

    #[test]
    fn several_writes(
        writes in proptest::collection::vec(
            (any::<u32>(), 0..u64::MAX / 2, proptest::collection::vec(any::<u8>(), 1..9)), 0..20),
    ) {
        let writes: Vec<_> = writes
            .iter()
            .map(|(region, offset, data)| RegionWrite { region: *region, offset: *offset, data })
            .collect();
        let multi = WriteMulti::new(&writes).expect("small");
        prop_assert_eq!(multi.iter().collect::<Vec<_>>(), writes);
        is_decoded(&Request::RegionWriteMulti(multi));
    }

    #[test]
    fn regions(
        index in any::<u32>(), offset in any::<u64>(), size in 1 << 32..u64::MAX,
        flags in any::<[bool; 3]>(),
        sparse in proptest::option::of(proptest::collection::vec((0..1u64 << 31, 0..1u64 << 31), 0..9)),
    ) {
        let info = RegionInfo {
            index, readable: flags[0], writable: flags[1], mappable: flags[2], size, offset,
            sparse: sparse.map(|areas| {
                areas.iter().map(|&(offset, size)| SparseArea { offset, size }).collect()
            }),
        };
        let asked = Request::RegionInfo { argsz: 32, index };
        let reply = Reply::RegionInfo(info.clone());
        let answer = received(&reply.encode(&received(&asked.encode(1, false)).header));
        prop_assert_eq!(answer.payload.len(), info.full_size() as usize);
        prop_assert_eq!(answer.reply(&Limits::default()), Ok(reply));
    }

    #[test]
    fn any_bytes(
        command in 0u16..20, flags in 0u32..0x40,
        payload in proptest::collection::vec(any::<u8>(), 0..100), fds in 0usize..4,
    ) {
        let limits = Limits::default();
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&1u16.to_ne_bytes());
        bytes.extend_from_slice(&command.to_ne_bytes());
        bytes.extend_from_slice(&((HEADER_SIZE + payload.len()) as u32).to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&payload);
        if let Ok(message) = message(&bytes, &limits) {
            let request = Request::decode(&message.header, &message.payload, fds, &limits);
            let reply = Reply::decode(&message.header, &message.payload, fds, &limits);
            prop_assert!(request.is_err() || reply.is_err());
        }
    }
}
