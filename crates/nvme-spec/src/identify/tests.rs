use std::vec::Vec;

use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::*;

/// 4096 zeroes but for `fields`: (offset, bytes).
fn data(fields: &[(usize, &[u8])]) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    for (offset, field) in fields {
        bytes[*offset..*offset + field.len()].copy_from_slice(field);
    }
    bytes
}

#[test]
fn a_controller_by_hand() {
    let bytes = data(&[
        (0, &[0x36, 0x1b]),
        (4, b"SERIAL-1            "),
        (24, b"A model of something                    "),
        (64, b"1.0     "),
        (77, &[5]),
        (78, &[0x34, 0x12]),
        (80, &[0, 0, 2, 0]),
        (88, &[0x40, 0x42, 0x0f, 0]),
        (92, &[0, 1, 0, 0]),
        (256, &[0x0a, 0x01]),
        (258, &[3]),
        (259, &[4]),
        (280, &[0, 0, 0, 0, 1]),
        (512, &[0x66]),
        (513, &[0x44]),
        (516, &[16, 0, 0, 0]),
        (520, &[0x5d, 0x01]),
        (525, &[0x07]),
        (526, &[0x7f, 0x00]),
        (528, &[0x0f, 0x00]),
        (536, &[0x01, 0x00, 0x09, 0x00]),
        (768, b"nqn.2014-08.org.nvmexpress:uuid:x\0"),
    ]);
    let controller = IdentifyController::read_from_bytes(&bytes).unwrap();
    assert_eq!(controller.vid.get(), 0x1b36);
    assert_eq!(controller.serial_number(), "SERIAL-1");
    assert_eq!(controller.model_number(), "A model of something");
    assert_eq!(controller.firmware_revision(), "1.0");
    assert_eq!(controller.mdts, 5);
    assert_eq!(controller.max_transfer_bytes(4096), Some(128 << 10));
    assert_eq!(controller.cntlid.get(), 0x1234);
    assert_eq!(
        (controller.version().major(), controller.version().minor()),
        (2, 0)
    );
    assert_eq!(controller.rtd3e.get(), 1_000_000);
    assert_eq!(controller.oaes.get(), 0x100);
    let admin = controller.optional_admin_commands();
    assert!(admin.format_nvm() && admin.namespace_management() && admin.doorbell_buffer_config());
    assert_eq!((controller.acl, controller.aerl), (3, 4));
    assert_eq!(controller.tnvmcap.get(), 1 << 32);
    assert!(controller.supports_nvm_entry_sizes());
    assert_eq!(controller.nn.get(), 16);
    let nvm = controller.optional_nvm_commands();
    assert!(
        nvm.compare() && nvm.dataset_management() && nvm.write_zeroes() && nvm.save_and_select()
    );
    assert!(nvm.timestamp() && nvm.copy() && !nvm.verify() && !nvm.write_uncorrectable());
    assert!(controller.has_volatile_write_cache() && controller.flushes_all_namespaces());
    assert_eq!(
        (controller.awun.get(), controller.awupf.get()),
        (0x7f, 0x0f)
    );
    let sgl = controller.sgl_support();
    assert_eq!(sgl.alignment(), SglAlignment::Byte);
    assert!(sgl.bit_bucket() && sgl.metadata_sgl() && !sgl.metadata_buffer() && !sgl.keyed());
    assert_eq!(
        controller.subsystem_name(),
        "nqn.2014-08.org.nvmexpress:uuid:x"
    );
}

#[test]
fn a_controller_that_says_nothing_or_nonsense() {
    let mut controller = IdentifyController::default();
    assert_eq!(controller.max_transfer_bytes(4096), None);
    assert!(!controller.supports_nvm_entry_sizes());
    assert!(!controller.has_volatile_write_cache());
    controller.mdts = 0xff;
    assert_eq!(controller.max_transfer_bytes(1 << 27), None);
    controller.mdts = 31;
    assert_eq!(controller.max_transfer_bytes(1 << 27), Some(1 << 58));
    controller.sn = [0xff; 20];
    assert_eq!(controller.serial_number(), "");
    controller.sqes = 0x57;
    assert!(!controller.supports_nvm_entry_sizes());
    controller.subnqn = [b'a'; 256];
    assert_eq!(controller.subsystem_name().len(), 256);
}

#[test]
fn the_nvm_part_of_a_controller_by_hand() {
    let bytes = data(&[(0, &[1, 2, 3, 4, 5, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0x80])]);
    let controller = IdentifyNvmController::read_from_bytes(&bytes).unwrap();
    assert_eq!(
        (controller.vsl, controller.wzsl, controller.wusl),
        (1, 2, 3)
    );
    assert_eq!((controller.dmrl, controller.dmrsl.get()), (4, 5));
    assert_eq!(controller.dmsl.get(), 0x8000_0000_0000_0006);
}

#[test]
fn a_namespace_by_hand() {
    let bytes = data(&[
        (0, &[0, 0, 0x20]),
        (8, &[0, 0, 0x20]),
        (16, &[1]),
        (24, &[0b1_1010]),
        (25, &[1]),
        (26, &[1]),
        (33, &[0b1001]),
        (40, &[0xff]),
        (46, &[0x00, 0x01]),
        (68, &[7, 0]),
        (70, &[3, 0]),
        (74, &[0x80, 0]),
        (76, &[0x00, 0x10, 0, 0]),
        (80, &[127]),
        (99, &[1]),
        (120, &[0x52, 0x54, 0, 1, 2, 3, 4, 5]),
        (128, &[0, 0, 9, 0]),
        (132, &[8, 0, 12, 1]),
    ]);
    let namespace = IdentifyNamespace::read_from_bytes(&bytes).unwrap();
    assert!(namespace.is_active());
    assert_eq!(namespace.nsze.get(), 0x20_0000);
    assert_eq!(namespace.nuse.get(), 1);
    let features = namespace.features();
    assert!(
        !features.thin_provisioning() && features.atomic_fields() && !features.deallocated_error()
    );
    assert!(features.unique_identifiers() && features.optimal_performance());
    let format = namespace.format().unwrap();
    assert_eq!(
        (format.lba_size(), format.ms.get(), format.rp),
        (Some(4096), 8, 1)
    );
    assert!(!namespace.metadata_is_interleaved());
    assert_eq!(namespace.deallocated_read(), DeallocatedRead::Zeroes);
    assert!(namespace.write_zeroes_deallocates() && namespace.is_write_protected());
    assert_eq!(
        (namespace.nabsn.get(), namespace.noiob.get()),
        (0xff, 0x100)
    );
    assert_eq!((namespace.npdg.get(), namespace.npda.get()), (7, 3));
    assert_eq!(
        (
            namespace.mssrl.get(),
            namespace.mcl.get(),
            namespace.max_copy_ranges()
        ),
        (0x80, 0x1000, 128)
    );
    assert_eq!(namespace.eui64, [0x52, 0x54, 0, 1, 2, 3, 4, 5]);
}

#[test]
fn the_format_index_has_two_more_bits_with_many_formats() {
    let mut namespace = IdentifyNamespace::default();
    assert!(!namespace.is_active());
    namespace.flbas = 0b0110_0010;
    namespace.nlbaf = 15;
    assert_eq!(namespace.format_index(), 2);
    namespace.nlbaf = 63;
    assert_eq!(namespace.format_index(), 0x32);
    assert!(namespace.format().is_some());
    namespace.nlbaf = 0x31;
    assert_eq!(namespace.format(), None);
    namespace.flbas = 0xff;
    namespace.nlbaf = 0xff;
    assert_eq!(namespace.format(), Some(LbaFormat::default()));
    assert!(namespace.metadata_is_interleaved());
}

#[test]
fn lba_sizes_outside_of_the_specification() {
    let size = |lbads| {
        LbaFormat {
            lbads,
            ..LbaFormat::default()
        }
        .lba_size()
    };
    assert_eq!(size(0), None);
    assert_eq!(size(8), None);
    assert_eq!(size(9), Some(512));
    assert_eq!(size(31), Some(1 << 31));
    assert_eq!(size(32), None);
    assert_eq!(size(255), None);
}

#[test]
fn active_namespaces_end_at_the_first_zero() {
    let bytes = data(&[(0, &[1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 9])]);
    let list = ActiveNamespaces::read_from_bytes(&bytes).unwrap();
    assert_eq!(list.iter().collect::<Vec<_>>(), [1, 3]);
    let full = ActiveNamespaces::read_from_bytes(&[1; 4096]).unwrap();
    assert_eq!(full.iter().count(), ActiveNamespaces::ENTRIES);
    assert_eq!(ActiveNamespaces::default().iter().count(), 0);
}

#[test]
fn namespace_descriptors_by_hand() {
    let bytes = data(&[
        (0, &[1, 8, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (12, &[4, 1, 0, 0, 2]),
        (17, &[0x7f, 2, 0, 0, 0xaa, 0xbb]),
        (23, &[3, 16, 0, 0]),
        (27, &[9; 16]),
    ]);
    let list = NamespaceDescriptors::read_from_bytes(&bytes).unwrap();
    assert_eq!(
        list.iter().collect::<Vec<_>>(),
        [
            Ok(NamespaceDescriptor::Eui64([1, 2, 3, 4, 5, 6, 7, 8])),
            Ok(NamespaceDescriptor::CommandSet(2)),
            Ok(NamespaceDescriptor::Other {
                kind: 0x7f,
                length: 2
            }),
            Ok(NamespaceDescriptor::Uuid([9; 16])),
        ]
    );
}

#[test]
fn broken_namespace_descriptors_end_the_list() {
    let bytes = data(&[(0, &[2, 8, 0, 0]), (12, &[4, 1, 0, 0, 2])]);
    let list = NamespaceDescriptors::read_from_bytes(&bytes).unwrap();
    let error = DescriptorError::Length { kind: 2, length: 8 };
    assert_eq!(list.iter().collect::<Vec<_>>(), [Err(error)]);

    let mut bytes = [0xff; 4096];
    bytes[1] = 0xff;
    let list = NamespaceDescriptors::read_from_bytes(&bytes).unwrap();
    assert_eq!(list.iter().last(), Some(Err(DescriptorError::Truncated)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn descriptors_come_back(eui64: [u8; 8], nguid: [u8; 16], uuid: [u8; 16], csi: u8) {
        let descriptors = [
            NamespaceDescriptor::Uuid(uuid),
            NamespaceDescriptor::Nguid(nguid),
            NamespaceDescriptor::Eui64(eui64),
            NamespaceDescriptor::CommandSet(csi),
        ];
        let list = NamespaceDescriptors::from_descriptors(&descriptors);
        let decoded: Result<Vec<_>, _> = list.iter().collect();
        prop_assert_eq!(decoded.unwrap(), descriptors);
    }

    #[test]
    fn what_does_not_fit_is_left_out(count in 0usize..400) {
        let descriptors = std::vec![NamespaceDescriptor::Nguid([1; 16]); count];
        let list = NamespaceDescriptors::from_descriptors(&descriptors);
        prop_assert!(list.iter().all(|descriptor| descriptor.is_ok()));
        prop_assert_eq!(list.iter().count(), count.min(4096 / 20));
    }

    #[test]
    fn arbitrary_data_is_decoded_without_a_panic(seed: u64) {
        let mut state = seed | 1;
        let mut bytes = [0; 4096];
        for byte in &mut bytes {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
        let namespace = IdentifyNamespace::read_from_bytes(&bytes).unwrap();
        let _ = namespace.format().and_then(|format| format.lba_size());
        prop_assert!(namespace.as_bytes() == bytes);
        let controller = IdentifyController::read_from_bytes(&bytes).unwrap();
        let _ = (controller.serial_number(), controller.max_transfer_bytes(u32::MAX));
        prop_assert!(controller.as_bytes() == bytes);
        let list = NamespaceDescriptors::read_from_bytes(&bytes).unwrap();
        prop_assert!(list.iter().count() <= 1024);
    }
}
