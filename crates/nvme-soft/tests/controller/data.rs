//! Where data is: PRP entries and lists, SGLs.

use nvme_spec::sgl::SglDescriptor;
use nvme_spec::{DataPointer, Sqe, Status, admin, nvm};
use zerocopy::IntoBytes;

use crate::host::{Host, PAGE, config, pattern, prp, usual_configuration, wait_for};

/// Room for transfers of several hundred pages.
fn large_host() -> Host {
    let mut config = config(512);
    config.mdts = 0;
    config.namespaces.clear();
    let store = nvme_soft::store::MemoryStore::new(8 << 20).unwrap();
    config
        .namespaces
        .push(nvme_soft::NamespaceConfig::new(store, 512));
    Host::ready(config)
}

/// Writes from one place and reads back to another; both in the form that `describe` gives.
fn round_trip(host: &mut Host, len: u64, describe: fn(&mut Host, u64) -> (DataPointer, Vec<u64>)) {
    let mark = host.mark();
    let data = pattern(len, len as usize);
    let blocks = (len / 512) as u32;
    let (pointer, pages) = describe(host, len);
    scatter(host, &pages, &data);
    host.io_ok(nvm::write(1, 3, blocks, false).with_data(pointer));
    let (pointer, pages) = describe(host, len);
    host.io_ok(nvm::read(1, 3, blocks, false).with_data(pointer));
    assert!(gather(host, &pages, len as usize) == data, "{len}");
    host.free_to(mark);
}

/// Writes data over pages, of which the first may have an offset.
fn scatter(host: &Host, pages: &[u64], mut data: &[u8]) {
    for &page in pages {
        let (now, rest) = data.split_at(data.len().min((PAGE - page % PAGE) as usize));
        host.memory.set(page, now);
        data = rest;
    }
}

fn gather(host: &Host, pages: &[u64], len: usize) -> Vec<u8> {
    let mut data = Vec::new();
    for &page in pages {
        let part = (len - data.len()).min((PAGE - page % PAGE) as usize);
        data.extend(host.memory.get(page, part));
    }
    data
}

/// Pages in the reverse order of their addresses, so that no two are contiguous.
fn scattered_pages(host: &mut Host, len: u64, offset: u64) -> Vec<u64> {
    let count = (offset + len).div_ceil(PAGE);
    let start = host.allocate(count * PAGE);
    let mut pages: Vec<_> = (0..count).rev().map(|page| start + page * PAGE).collect();
    pages[0] += offset;
    pages
}

fn prps(host: &mut Host, len: u64, offset: u64) -> (DataPointer, Vec<u64>) {
    let pages = scattered_pages(host, len, offset);
    let prp2 = match &pages[1..] {
        [] => 0xdead_beef,
        [second] => *second,
        list => host.prp_list(list),
    };
    (
        DataPointer::Prp {
            prp1: pages[0],
            prp2,
        },
        pages,
    )
}

#[test]
fn prps_of_every_length() {
    let mut host = large_host();
    for len in [
        512,
        1024,
        3584,
        4096,
        4608,
        8192,
        8704,
        12288,
        65536,
        66048,
        1 << 20,
    ] {
        round_trip(&mut host, len, |host, len| prps(host, len, 0));
        round_trip(&mut host, len, |host, len| prps(host, len, 512));
        round_trip(&mut host, len, |host, len| prps(host, len, 4092));
    }
    assert_eq!(host.controller.counters().refused_accesses, 0);
}

#[test]
fn prp_lists_chain_at_the_end_of_a_page() {
    let mut host = large_host();
    // One page comes from PRP1, 512 entries fill a page: just fitting, one more, several lists.
    for pages in [512, 513, 514, 1023, 1024, 1025, 1540] {
        round_trip(&mut host, pages * PAGE, |host, len| prps(host, len, 0));
    }
}

#[test]
fn a_prp_list_may_begin_within_its_page() {
    let mut host = large_host();
    let len = 8 * PAGE;
    let data = pattern(5, len as usize);
    let pages = scattered_pages(&mut host, len, 0);
    scatter(&host, &pages, &data);
    // Room for three entries, the last of which points to the next list.
    let first = host.allocate(PAGE) + PAGE - 24;
    let second = host.prp_list(&pages[3..]);
    for (index, entry) in [pages[1], pages[2], second].into_iter().enumerate() {
        host.memory
            .set(first + index as u64 * 8, &entry.to_le_bytes());
    }
    let pointer = DataPointer::Prp {
        prp1: pages[0],
        prp2: first,
    };
    host.io_ok(nvm::write(1, 0, 64, false).with_data(pointer));
    let buffer = host.allocate(len);
    let pointer = host.prps(buffer, len);
    host.io_ok(nvm::read(1, 0, 64, false).with_data(pointer));
    assert!(host.memory.get(buffer, len as usize) == data);
}

#[test]
fn prp_offsets_are_checked() {
    let mut host = large_host();
    let page = host.allocate(16 * PAGE);
    let mut refused = |prp1, prp2, blocks| {
        let command = nvm::read(1, 0, blocks, false).with_data(DataPointer::Prp { prp1, prp2 });
        host.io_refused(command, Status::PRP_OFFSET_INVALID);
    };
    // The first entry: whole dwords.
    refused(page + 2, 0, 1);
    // The second page: no offset.
    refused(page, page + PAGE + 8, 16);
    // A list: whole entries.
    refused(page, page + 4, 32);
    let list = host.prp_list(&[page, page + 512, page]);
    let command = nvm::read(1, 0, 32, false);
    let in_list = command.with_data(DataPointer::Prp {
        prp1: page,
        prp2: list,
    });
    host.io_refused(in_list, Status::PRP_OFFSET_INVALID);
    // A following list begins with its page.
    let last = host.allocate(PAGE) + PAGE - 8;
    host.memory.set(last, &(list + 8).to_le_bytes());
    let chained = command.with_data(DataPointer::Prp {
        prp1: page,
        prp2: last,
    });
    host.io_refused(chained, Status::PRP_OFFSET_INVALID);
}

#[test]
fn memory_that_is_refused_fails_the_transfer() {
    let mut host = large_host();
    let buffer = host.allocate(4 * PAGE);
    host.memory.set(buffer, &[1; 4096 * 4]);
    let pointer = host.prps(buffer, 4 * PAGE);
    host.io_ok(nvm::write(1, 0, 32, false).with_data(pointer));
    host.memory.set(buffer, &[2; 4096 * 4]);
    host.memory.forbid(buffer + 3 * PAGE, PAGE);
    for command in [nvm::write(1, 0, 32, false), nvm::read(1, 0, 32, false)] {
        let entry = host.io(command.with_data(pointer));
        assert!(entry.status().is(Status::DATA_TRANSFER_ERROR));
    }
    // Nothing of the write was stored.
    let good = host.allocate(4 * PAGE);
    let pointer = host.prps(good, 4 * PAGE);
    host.io_ok(nvm::read(1, 0, 32, false).with_data(pointer));
    assert!(host.memory.get(good, 4 * 4096) == [1; 4 * 4096]);
    // A list that is out of reach, and addresses that wrap.
    let command = nvm::read(1, 0, 32, false);
    for prp2 in [0, 0xffff_ffff_ffff_f000] {
        let command = command.with_data(DataPointer::Prp { prp1: good, prp2 });
        host.io_refused(command, Status::DATA_TRANSFER_ERROR);
    }
    let top = nvm::read(1, 0, 8, false).with_data(prp(0xffff_ffff_ffff_f000));
    host.io_refused(top, Status::DATA_TRANSFER_ERROR);
    let counters = host.controller.counters();
    assert_eq!(counters.refused_accesses, 5);
}

/// Descriptors in host memory; returns where.
fn descriptors(host: &mut Host, descriptors: &[SglDescriptor]) -> u64 {
    let address = host.allocate(descriptors.len() as u64 * 16);
    host.memory.set(address, descriptors.as_bytes());
    address
}

fn sgl(descriptor: SglDescriptor) -> DataPointer {
    DataPointer::Sgl(descriptor)
}

fn bytes(count: usize) -> u32 {
    count as u32 * 16
}

/// Odd lengths at odd addresses, in segments of at most 3 descriptors.
fn odd_sgl(host: &mut Host, len: u64) -> (DataPointer, Vec<(u64, u64)>) {
    let start = host.allocate(len * 2);
    let mut pieces = Vec::new();
    let mut left = len;
    while left > 0 {
        let part = (1 + left * 3 / 7).min(left);
        pieces.push((start + 2 * (len - left) + 1, part));
        left -= part;
    }
    let mut blocks: Vec<_> = pieces
        .iter()
        .map(|&(address, part)| SglDescriptor::data_block(address, part as u32))
        .collect();
    blocks.insert(1, SglDescriptor::data_block(0, 0));
    let mut chunks: Vec<_> = blocks.chunks(3).map(<[_]>::to_vec).collect();
    let last = chunks.pop().unwrap();
    let address = descriptors(host, &last);
    let mut next = SglDescriptor::last_segment(address, bytes(last.len())).unwrap();
    while let Some(mut chunk) = chunks.pop() {
        chunk.push(next);
        let address = descriptors(host, &chunk);
        next = SglDescriptor::segment(address, bytes(chunk.len())).unwrap();
    }
    (sgl(next), pieces)
}

#[test]
fn sgls_describe_any_memory() {
    let mut host = large_host();
    for len in [512_u64, 4096, 5120, 65536] {
        let data = pattern(len, len as usize);
        let (pointer, pieces) = odd_sgl(&mut host, len);
        let mut position = 0;
        for (address, part) in pieces {
            host.memory
                .set(address, &data[position..position + part as usize]);
            position += part as usize;
        }
        let blocks = (len / 512) as u32;
        host.io_ok(nvm::write(1, 7, blocks, false).with_data(pointer));
        let (pointer, pieces) = odd_sgl(&mut host, len);
        host.io_ok(nvm::read(1, 7, blocks, false).with_data(pointer));
        let read: Vec<_> = pieces
            .iter()
            .flat_map(|&(address, part)| host.memory.get(address, part as usize))
            .collect();
        assert!(read == data);
    }
    // One descriptor in the command itself.
    let buffer = host.allocate(512);
    let single = sgl(SglDescriptor::data_block(buffer, 512));
    host.io_ok(nvm::read(1, 7, 1, false).with_data(single));
    assert!(host.memory.get(buffer, 512) == pattern(65536, 512));
}

#[test]
fn bit_buckets_swallow_what_is_read() {
    let mut host = large_host();
    let buffer = host.allocate(1024);
    host.memory.set(buffer, &pattern(1, 1024));
    host.io_ok(nvm::write(1, 0, 2, false).with_data(prp(buffer)));
    let into = host.allocate(512);
    let list = [
        SglDescriptor::bit_bucket(512),
        SglDescriptor::data_block(into, 512),
    ];
    let list = descriptors(&mut host, &list);
    let pointer = sgl(SglDescriptor::last_segment(list, bytes(2)).unwrap());
    host.io_ok(nvm::read(1, 0, 2, false).with_data(pointer));
    assert!(host.memory.get(into, 512) == pattern(1, 1024)[512..]);
    // For a write they have no length.
    host.io_ok(nvm::write(1, 5, 1, false).with_data(pointer));
}

#[test]
fn bad_sgls_are_refused() {
    let mut host = large_host();
    let buffer = host.allocate(4096);
    let block = |len| SglDescriptor::data_block(buffer, len);
    let command = nvm::read(1, 0, 1, false);
    let segment = |address, count| SglDescriptor::segment(address, bytes(count)).unwrap();
    let last = |address, count| SglDescriptor::last_segment(address, bytes(count)).unwrap();

    let two = descriptors(&mut host, &[block(256), block(256)]);
    let nested = descriptors(&mut host, &[block(256), last(two, 2)]);
    let early = descriptors(&mut host, &[last(two, 1), block(256)]);
    let endless = host.allocate(16);
    host.memory.set(endless, segment(endless, 1).as_bytes());
    // Type 4 (keyed), and subtype 1 (offset).
    let typed = |identifier: u8| {
        let [low, high] = block(512).qwords();
        SglDescriptor::from_qwords([low, high | u64::from(identifier) << 56])
    };
    let unaligned = {
        let [low, high] = last(two, 2).qwords();
        SglDescriptor::from_qwords([low, high + 8])
    };
    let cases = [
        (block(511), Status::DATA_SGL_LENGTH_INVALID),
        (block(513), Status::DATA_SGL_LENGTH_INVALID),
        (block(0), Status::DATA_SGL_LENGTH_INVALID),
        (last(two, 1), Status::DATA_SGL_LENGTH_INVALID),
        (last(nested, 2), Status::INVALID_SGL_SEGMENT),
        (segment(two, 2), Status::INVALID_SGL_SEGMENT),
        (unaligned, Status::INVALID_SGL_SEGMENT),
        (segment(early, 2), Status::INVALID_SGL_COUNT),
        (segment(endless, 1), Status::INVALID_SGL_COUNT),
        // Of more descriptors than are kept, whether or not they are there.
        (last(two, (1 << 16) + 1), Status::INVALID_SGL_COUNT),
        (segment(two, (1 << 28) - 1), Status::INVALID_SGL_COUNT),
        (typed(0x40), Status::SGL_TYPE_INVALID),
        (typed(0x01), Status::SGL_TYPE_INVALID),
        (last(0x1000, 1), Status::DATA_TRANSFER_ERROR),
        (
            SglDescriptor::data_block(u64::MAX - 8, 512),
            Status::DATA_TRANSFER_ERROR,
        ),
    ];
    for (descriptor, status) in cases {
        host.io_refused(command.with_data(sgl(descriptor)), status);
    }
    let mut reserved = command.with_data(sgl(block(512))).dwords();
    reserved[0] |= 3 << 14;
    host.io_refused(Sqe::from_dwords(reserved), Status::INVALID_FIELD);
}

#[test]
fn sgls_are_refused_where_they_are_not_supported() {
    let mut config = config(512);
    config.sgl = false;
    let mut host = Host::ready(config);
    let buffer = host.allocate(512);
    let pointer = sgl(SglDescriptor::data_block(buffer, 512));
    let command = nvm::read(1, 0, 1, false).with_data(pointer);
    host.io_refused(command, Status::INVALID_FIELD);
}

#[test]
fn larger_memory_pages_are_honoured() {
    let mut config = config(512);
    config.mpsmin = 1;
    let mut host = Host::new(config);
    host.alignment = 2 * PAGE;
    host.enable_with(usual_configuration().with_mps(1));
    wait_for(|| host.status().rdy().then_some(()));
    host.create_pair(1, 16, None);
    let data = pattern(1, 16384);
    let (second, first) = (host.allocate(8192), host.allocate(8192));
    host.memory.set(first, &data[..8192]);
    host.memory.set(second, &data[8192..]);
    let pages = |prp2| DataPointer::Prp { prp1: first, prp2 };
    host.io_ok(nvm::write(1, 0, 32, false).with_data(pages(second)));
    let misaligned = nvm::write(1, 0, 32, false).with_data(pages(second + PAGE));
    host.io_refused(misaligned, Status::PRP_OFFSET_INVALID);
    host.memory.set(first, &[0; 8192]);
    host.memory.set(second, &[0; 8192]);
    host.io_ok(nvm::read(1, 0, 32, false).with_data(pages(second)));
    assert!(host.memory.get(first, 8192) == data[..8192]);
    assert!(host.memory.get(second, 8192) == data[8192..]);
    let queue = admin::create_completion_queue(2, 16, second + PAGE, None);
    host.admin_refused(queue, Status::PRP_OFFSET_INVALID);
}
