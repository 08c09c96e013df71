//! How a VMM gives a device that it drives the memory of its guest: all of it is mapped, a request
//! is translated, memory is plugged, and memory is unplugged while a request still uses it.
//!
//! ```text
//! cargo run -p iova --features vm-memory,testing --example guest_memory
//! ```
//!
//! The mapper is the one for tests, so neither a device nor privileges are needed. With a device it
//! would be that of its transport, and nothing else would change.

use std::error::Error;
use std::sync::Arc;

use iova::guest::GuestMappings;
use iova::testing::TestMapper;
use iova::{AddressSpace, Direction, Geometry, IovaRange, Mapped};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

const MIB: usize = 1 << 20;
/// Guest memory goes on above the window for PCI devices, APICs and MSIs.
const ABOVE_4G: u64 = 1 << 32;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    // What a PC's IOMMU offers: everything but the MSI window.
    let mapper = Arc::new(TestMapper::new(Geometry {
        usable: vec![
            IovaRange {
                first: 0,
                last: 0xfedf_ffff,
            },
            IovaRange {
                first: 0xfef0_0000,
                last: (1 << 39) - 1,
            },
        ],
        page_sizes: 0x4020_1000,
        max_mappings: Some(65_535),
        unmaps_runs: true,
    }));
    let space = AddressSpace::new(mapper.clone())?;

    // The guest boots with two regions.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0), 128 * MIB),
        (GuestAddress(ABOVE_4G), 64 * MIB),
    ])?;
    let mut mappings = GuestMappings::of(&space, &memory, Direction::Bidirectional)?;
    println!("The guest boots:");
    print_regions(&mappings, &memory);
    // Virtual devices, each in its thread, take snapshots of this.
    let memory = GuestMemoryAtomic::new(memory);

    // Memory is plugged, right after the other. The device has to reach it before the guest knows.
    let start = ABOVE_4G + 64 * MIB as u64;
    let plugged = GuestRegionMmap::from_range(GuestAddress(start), 32 * MIB, None)?;
    let larger = memory.memory().insert_region(Arc::new(plugged))?;
    mappings.sync(&larger)?.await?;
    println!(
        "\nMemory is plugged (map calls so far: {}):",
        mapper.map_calls()
    );
    print_regions(&mappings, &larger);
    memory
        .lock()
        .map_err(|error| error.to_string())?
        .replace(larger);

    // The guest asks for a read into 16 KiB that begin in one region and end in the next.
    let request = translate(&space, &memory, GuestAddress(start - 0x1000), 0x4000)?;
    println!(
        "\nA request for 0x4000 bytes at guest address {:#x}:",
        start - 0x1000
    );
    for piece in &request {
        println!("  {:#x} bytes at IOVA {:#x}", piece.len(), piece.iova());
    }
    // Guests can ask for anything.
    for (addr, len) in [(0x7ff_f000, 0x2000), (u64::MAX, 1)] {
        if let Err(error) = translate(&space, &memory, GuestAddress(addr), len) {
            println!("A request for {len:#x} bytes at guest address {addr:#x}: {error}");
        }
    }

    // The memory is unplugged while the device still works on that request.
    let (smaller, region) = memory
        .memory()
        .remove_region(GuestAddress(start), 32 * MIB as u64)?;
    memory
        .lock()
        .map_err(|error| error.to_string())?
        .replace(smaller);
    let mut removal = mappings.remove(&region).ok_or("it was mapped")?;
    drop(region);
    println!("\nIt is unplugged. Mapped regions: {}", mapper.live().len());
    tokio::select! {
        biased;
        _ = &mut removal => println!("  gone at once"),
        () = tokio::task::yield_now() => println!("  a request uses it: the device still reaches it"),
    }
    drop(request);
    removal.await?;
    println!(
        "The request is done. Mapped regions: {}",
        mapper.live().len()
    );
    print_regions(&mappings, &memory.memory());

    mappings.remove_all().await?;
    println!(
        "\nThe guest is shut down. Mapped regions: {}",
        mapper.live().len()
    );
    Ok(())
}

/// What a virtual device does for each buffer of a request: guards with I/O addresses for the
/// device's command, to be kept until the device is done.
fn translate(
    space: &AddressSpace,
    memory: &GuestMemoryAtomic<GuestMemoryMmap>,
    addr: GuestAddress,
    len: usize,
) -> Result<Vec<Mapped>, iova::guest::LookUpError> {
    let snapshot = memory.memory();
    let pieces = space.look_up_guest(&*snapshot, addr, len, Direction::FromDevice);
    pieces.collect()
}

fn print_regions(mappings: &GuestMappings, memory: &GuestMemoryMmap) {
    for region in memory.iter() {
        let (start, last) = (region.start_addr().0, region.last_addr().0);
        let Some(mapping) = mappings.mapping(region) else {
            println!("  guest {start:#011x}..={last:#011x} is not mapped");
            continue;
        };
        println!(
            "  guest {start:#011x}..={last:#011x} at IOVA {:#011x} (host address {:p})",
            mapping.iova(),
            region.as_ptr()
        );
    }
}
