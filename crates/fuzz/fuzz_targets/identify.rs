//! What a device says in structures: each one from any bytes, and a controller that says so to the
//! driver.
#![no_main]

use std::fmt::Debug;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nvme_async_fuzz::program;
use nvme_async_fuzz::script::{Claims, Memory, Operation, Script, Step};
use nvme_spec::event::AsyncEvent;
use nvme_spec::identify::{
    ActiveNamespaces, IdentifyController, IdentifyNamespace, IdentifyNvmController,
    NamespaceDescriptors,
};
use nvme_spec::log::{ChangedNamespaces, ErrorEntry, FirmwareSlot, SmartHealth};
use nvme_spec::nvm::{BlockRange, CopyRequest};
use nvme_spec::registers::{
    Capabilities, CmbSize, ControllerConfiguration, ControllerStatus, Version,
};
use nvme_spec::sgl::SglDescriptor;
use nvme_spec::{Cqe, Sqe, Status};
use zerocopy::{FromBytes, Immutable, IntoBytes};

#[derive(Arbitrary, Debug)]
struct Input {
    /// For each structure.
    bytes: Vec<u8>,
    /// For a controller.
    claims: Claims,
}

fuzz_target!(|input: Input| {
    structures(&input.bytes);
    let operations = [
        Operation::Write(Memory::Pool, true, 0, 7),
        Operation::ReadInto(Memory::Many, 0, 15),
        Operation::Compare(Memory::Heap, 0, 7),
        Operation::Flush,
        Operation::WriteZeroes(0, 15),
        Operation::Discard(vec![(0, 7), (20, 15)]),
        Operation::Verify(0, 15),
        Operation::Copy(vec![(0, 7), (8, 15)], 100),
        Operation::Active,
        Operation::Open(2),
    ];
    let step = |operation| Step {
        polls: None,
        operation,
    };
    // Which errors there are is the device's choice; `run` panics at what must not be.
    let _ = program::run(&Script {
        claims: input.claims,
        program: vec![operations.map(step).to_vec()],
        ..Script::default()
    });
});

/// The structure that begins with these bytes and ends in zeroes, which is what they were.
fn structure<T: FromBytes + IntoBytes + Immutable + Debug>(bytes: &[u8]) -> Box<T> {
    let mut all = vec![0; size_of::<T>()];
    let len = bytes.len().min(all.len());
    all[..len].copy_from_slice(&bytes[..len]);
    let structure = Box::new(T::read_from_bytes(&all).expect("of its size"));
    assert_eq!(structure.as_bytes(), all);
    shown(&*structure);
    structure
}

fn shown(value: &(impl Debug + ?Sized)) {
    assert!(!format!("{value:?}").is_empty());
}

fn structures(bytes: &[u8]) {
    controller(&structure(bytes), bytes);
    namespace(&structure(bytes));
    structure::<IdentifyNvmController>(bytes);

    let active = structure::<ActiveNamespaces>(bytes);
    assert!(active.iter().count() <= ActiveNamespaces::ENTRIES);
    assert!(active.iter().all(|nsid| nsid != 0));
    let descriptors = structure::<NamespaceDescriptors>(bytes);
    let (mut count, mut failed) = (0, 0);
    for descriptor in descriptors.iter() {
        shown(&descriptor);
        count += 1;
        if let Err(error) = descriptor {
            failed += 1;
            assert!(!error.to_string().is_empty());
        }
    }
    assert!(count <= 4096 / 4 && failed <= 1, "nothing follows an error");

    let changed = structure::<ChangedNamespaces>(bytes);
    assert!(!changed.has_overflowed() || changed.iter().next().is_none());
    assert!(changed.iter().count() <= 1024);
    status(structure::<ErrorEntry>(bytes).status());
    shown(&structure::<SmartHealth>(bytes).warnings());
    let firmware = structure::<FirmwareSlot>(bytes);
    assert!(firmware.active_slot() < 8 && firmware.next_slot() != Some(0));

    let mut words = bytes.chunks_exact(4).map(|word| {
        let word: [u8; 4] = word.try_into().expect("4 bytes");
        u32::from_le_bytes(word)
    });
    let mut next = || words.next().unwrap_or(0);
    let entry = Cqe::from_dwords(std::array::from_fn(|_| next()));
    shown(&entry);
    status(entry.status());
    shown(&AsyncEvent::from_bits(entry.result()).event());
    command(&Sqe::from_dwords(std::array::from_fn(|_| next())));
}

fn controller(identify: &IdentifyController, bytes: &[u8]) {
    for text in [
        identify.serial_number(),
        identify.model_number(),
        identify.firmware_revision(),
    ] {
        assert!(text.is_ascii() && text.len() <= 40);
        assert!(!text.starts_with(' ') && !text.ends_with([' ', '\0']));
    }
    assert!(identify.subsystem_name().len() <= 256);
    assert!(!identify.version().to_string().is_empty());
    shown(&identify.optional_admin_commands());
    shown(&identify.optional_nvm_commands());
    shown(&identify.sgl_support());
    let _ = identify.supports_nvm_entry_sizes();
    let _ = identify.has_volatile_write_cache() | identify.flushes_all_namespaces();

    let mut register = [0; 8];
    let len = bytes.len().min(8);
    register[..len].copy_from_slice(&bytes[..len]);
    let register = u64::from_le_bytes(register);
    let capabilities = Capabilities::from_bits(register);
    shown(&capabilities);
    assert!((1..=0x1_0000).contains(&capabilities.max_queue_entries()));
    assert!(capabilities.min_page_size() >= 4096 && capabilities.max_page_size() >= 4096);
    assert!(capabilities.timeout_ms() <= 127_500);
    if let Some(most) = identify.max_transfer_bytes(capabilities.min_page_size()) {
        assert!(most > capabilities.min_page_size().into() && most.is_power_of_two());
    }
    shown(&ControllerConfiguration::from_bits(register as u32));
    let status = ControllerStatus::from_bits(register as u32);
    assert_eq!(status.is_gone(), register as u32 == u32::MAX);
    shown(&status);
    shown(&Version::from_bits(register as u32));
    shown(&CmbSize::from_bits(register as u32).bytes());
}

fn namespace(identify: &IdentifyNamespace) {
    let index = identify.format_index();
    assert!(index < 64);
    match identify.format() {
        Some(format) => {
            assert!(index <= identify.nlbaf.into());
            if let Some(size) = format.lba_size() {
                assert!(size >= 512 && size.is_power_of_two());
            }
        }
        None => assert!(index > identify.nlbaf.into()),
    }
    assert!((1..=256).contains(&identify.max_copy_ranges()));
    shown(&identify.features());
    shown(&identify.deallocated_read());
    let _ = identify.is_active() | identify.is_write_protected();
    let _ = identify.metadata_is_interleaved() | identify.write_zeroes_deallocates();
}

fn status(status: Status) {
    assert_eq!(Status::from_bits(status.to_bits()), status);
    assert!(!status.to_string().is_empty());
    assert!(status.is(status.without_modifiers()));
    assert!(status.crd() < 4);
    shown(&(status, status.code_type()));
}

fn command(command: &Sqe) {
    shown(command);
    let range = BlockRange::from_command(command);
    assert!((1..=0x1_0000).contains(&range.blocks));
    assert!((1..=256).contains(&CopyRequest::from_command(command).ranges));
    if let Err(error) = command.data_pointer() {
        status(error.status());
    }
    let dwords = command.dwords();
    let qword = |low: usize| u64::from(dwords[low + 1]) << 32 | u64::from(dwords[low]);
    let descriptor = SglDescriptor::from_qwords([qword(6), qword(8)]);
    shown(&descriptor);
    if let Err(error) = descriptor.decode() {
        status(error.status());
        assert!(!error.to_string().is_empty());
    }
}
