//! Tests of the pool and of what comes out of it, over a mapper that keeps a list.

mod mapper;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, mpsc};
use std::thread;

use bytes::Bytes;
use iova::{AddressSpace, Direction};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use self::mapper::Mapper;
use super::{AllocError, DEVICE_PAGE, DmaBuf, DmaWords, Pool};

const CHUNK: usize = 2 << 20;

fn pool(limit: usize) -> (Pool, AddressSpace, Arc<Mapper>) {
    let mapper = Arc::new(Mapper::default());
    let space = AddressSpace::new(mapper.clone()).unwrap();
    (Pool::new(space.clone(), limit), space, mapper)
}

fn address(buf: &DmaBuf) -> usize {
    buf.as_ptr().addr()
}

fn assert_all_free(pool: &Pool) {
    let stats = pool.stats();
    assert_eq!((stats.allocated, stats.outstanding), (0, 0));
    assert_eq!(stats.mapped, stats.chunks * CHUNK);
    let whole: Vec<_> = (0..stats.chunks)
        .map(|_| pool.alloc(CHUNK).unwrap())
        .collect();
    assert_eq!(
        pool.stats().chunks,
        stats.chunks,
        "a chunk has not grown together again"
    );
    drop(whole);
}

#[test]
fn blocks_have_the_length_asked_for_and_whole_pages() {
    let (pool, ..) = pool(CHUNK);
    for (len, capacity) in [
        (1, DEVICE_PAGE),
        (DEVICE_PAGE - 1, DEVICE_PAGE),
        (DEVICE_PAGE, DEVICE_PAGE),
        (DEVICE_PAGE + 1, 2 * DEVICE_PAGE),
        (2 * DEVICE_PAGE + 1, 4 * DEVICE_PAGE),
        (CHUNK / 2 + 1, CHUNK),
        (CHUNK, CHUNK),
    ] {
        let buf = pool.alloc(len).unwrap();
        assert_eq!((buf.len(), buf.capacity()), (len, capacity));
        assert!(
            address(&buf).is_multiple_of(capacity),
            "the block is aligned to its size"
        );
        assert!(
            buf.iter().all(|&byte| byte == 0),
            "the pool starts out zeroed"
        );
        assert_eq!(
            (pool.stats().allocated, pool.stats().outstanding),
            (capacity, 1)
        );
    }
    assert_all_free(&pool);
}

#[test]
fn the_device_finds_the_same_bytes() {
    let (pool, space, mapper) = pool(4 * CHUNK);
    let mut bufs: Vec<_> = [1, 5000, 300_000, CHUNK, 3 * DEVICE_PAGE]
        .map(|len| pool.alloc(len).unwrap())
        .into();
    for (index, buf) in bufs.iter_mut().enumerate() {
        buf.fill(index as u8 + 1);
    }
    for buf in &bufs {
        let iova = buf.iova().unwrap();
        assert_eq!(mapper.read(iova, buf.len()), &buf[..]);
        assert_eq!(mapper.host_address(iova), address(buf));
        assert!(iova.is_multiple_of(DEVICE_PAGE as u64));
        let looked_up = space
            .look_up(buf.as_ptr(), buf.len(), Direction::FromDevice)
            .unwrap();
        assert_eq!(looked_up.iova(), iova);
    }
}

#[test]
fn grows_to_its_limit_and_no_further() {
    let limit = 3 * CHUNK + CHUNK / 2;
    let (pool, _, mapper) = pool(limit);
    assert_eq!(
        (pool.stats().limit, pool.stats().mapped, mapper.count()),
        (limit, 0, 0)
    );

    let mut bufs = Vec::new();
    for chunks in 1..=3 {
        for _ in 0..CHUNK / DEVICE_PAGE {
            bufs.push(pool.alloc(DEVICE_PAGE).unwrap());
            assert_eq!((pool.stats().chunks, mapper.count()), (chunks, chunks));
        }
    }
    let full = pool.stats();
    assert_eq!(
        (full.mapped, full.allocated, full.outstanding),
        (3 * CHUNK, 3 * CHUNK, bufs.len())
    );
    for len in [1, CHUNK, CHUNK + 1, usize::MAX] {
        match pool.alloc(len) {
            Err(AllocError::LimitReached { limit: reported }) => assert_eq!(reported, limit),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(pool.stats(), full);

    let freed = bufs.swap_remove(700).iova();
    assert_eq!(pool.alloc(1).unwrap().iova(), freed);
    bufs.clear();
    assert_eq!(mapper.count(), 3, "the pool keeps its chunks");
    assert_all_free(&pool);
}

#[test]
fn a_limit_below_a_chunk_holds_nothing() {
    let (pool, ..) = pool(CHUNK - 1);
    assert!(matches!(
        pool.alloc(1),
        Err(AllocError::LimitReached { .. })
    ));
}

#[test]
fn nothing_is_not_allocated() {
    let (pool, ..) = pool(CHUNK);
    assert!(matches!(pool.alloc(0), Err(AllocError::ZeroLength)));
    assert!(matches!(
        DmaWords::new(&pool, 0),
        Err(AllocError::ZeroLength)
    ));
    assert_eq!(pool.stats().mapped, 0);
}

#[test]
fn large_buffers_have_chunks_of_their_own() {
    let (pool, _, mapper) = pool(8 * CHUNK);
    let small = pool.alloc(1).unwrap();
    let len = 3 * CHUNK + 1;
    let mut large = pool.alloc(len).unwrap();
    assert_eq!(
        (large.len(), large.capacity()),
        (len, 3 * CHUNK + DEVICE_PAGE)
    );
    assert_eq!((pool.stats().chunks, mapper.count()), (2, 2));
    assert_eq!(pool.stats().mapped, 4 * CHUNK + DEVICE_PAGE);
    assert_eq!(pool.stats().outstanding, 2);

    large[len - 1] = 9;
    assert_eq!(mapper.read(large.iova().unwrap() + len as u64 - 1, 1), [9]);
    assert!(matches!(
        pool.alloc(4 * CHUNK),
        Err(AllocError::LimitReached { .. })
    ));

    drop(large);
    assert_eq!((pool.stats().chunks, mapper.count()), (1, 1));
    assert!(pool.alloc(7 * CHUNK).unwrap().iter().all(|&byte| byte == 0));
    drop(small);
    assert_all_free(&pool);
}

#[test]
fn a_refused_mapping_leaves_the_pool_as_it_was() {
    let (pool, _, mapper) = pool(2 * CHUNK);
    *mapper.refusals.lock().unwrap() = 2;
    for len in [1, CHUNK + 1] {
        let error = pool.alloc(len).unwrap_err();
        assert!(
            matches!(&error, AllocError::Mapping(source) if source.is_limit()),
            "{error:?}"
        );
        let stats = pool.stats();
        assert_eq!((stats.mapped, stats.chunks, stats.outstanding), (0, 0, 0));
    }
    let _first = pool.alloc(CHUNK).unwrap();
    let _second = pool.alloc(CHUNK).unwrap();
}

#[test]
fn buffers_outlive_the_pool() {
    let (pool, space, mapper) = pool(8 * CHUNK);
    let in_use = pool.alloc(CHUNK).unwrap();
    let mut first = pool.alloc(DEVICE_PAGE).unwrap();
    let mut second = pool.alloc(DEVICE_PAGE).unwrap();
    let mut large = pool.alloc(CHUNK + 1).unwrap();
    assert_eq!(mapper.count(), 3);
    drop(in_use);

    let clone = pool.clone();
    drop((pool, space));
    assert_eq!(mapper.count(), 3, "a handle is left");
    drop(clone);
    assert_eq!(
        mapper.count(),
        2,
        "the chunk without buffers is unmapped, others are not"
    );

    for (value, buf) in [&mut first, &mut second, &mut large]
        .into_iter()
        .enumerate()
    {
        buf.fill(value as u8);
        assert_eq!(mapper.read(buf.iova().unwrap(), buf.len()), &buf[..]);
    }
    drop(first);
    assert_eq!(mapper.count(), 2);
    drop(large);
    assert_eq!(mapper.count(), 1);
    let second = Bytes::from(second);
    assert_eq!(mapper.count(), 1);
    drop(second);
    assert_eq!(mapper.count(), 0);
}

#[test]
fn memory_is_freed_with_the_last_bytes() {
    let (pool, _, mapper) = pool(CHUNK);
    let mut buf = pool.alloc(6000).unwrap();
    buf.fill(0x11);
    buf[5000..].fill(0x22);
    buf.truncate(5500);
    let (address, iova) = (address(&buf), buf.iova().unwrap());

    let mut bytes = Bytes::from(buf);
    assert_eq!((bytes.len(), bytes.as_ptr().addr()), (5500, address));
    assert_eq!(mapper.read(iova, 5500), bytes);
    let tail = bytes.split_off(5000);
    let clone = tail.clone();
    drop((bytes, tail));
    assert_eq!(pool.stats().outstanding, 1);
    assert_eq!(clone, vec![0x22; 500]);
    drop(clone);
    assert_all_free(&pool);
}

#[test]
fn words_are_zeroed_even_in_a_used_block() {
    let (pool, ..) = pool(CHUNK);
    let mut dirty = pool.alloc(2 * DEVICE_PAGE).unwrap();
    dirty.fill(0xff);
    let used = dirty.iova();
    drop(dirty);

    let words = DmaWords::new(&pool, DEVICE_PAGE / 4 + 1).unwrap();
    assert_eq!(
        Some(words.iova()),
        used,
        "otherwise this test tests nothing"
    );
    assert_eq!(words.as_ref().len(), DEVICE_PAGE / 4 + 1);
    assert!(
        words
            .as_ref()
            .iter()
            .all(|word| word.load(Ordering::Relaxed) == 0)
    );
    assert!(matches!(
        DmaWords::new(&pool, usize::MAX),
        Err(AllocError::LimitReached { .. })
    ));
    drop(words);
    assert_all_free(&pool);
}

#[test]
fn words_are_little_endian_for_the_device() {
    let (pool, _, mapper) = pool(CHUNK);
    let words = DmaWords::new(&pool, 4).unwrap();
    words.store_u64(1, 0x1122_3344_5566_7788);
    words.as_ref()[1].store(0x99aa_bbcc_u32.to_le(), Ordering::Relaxed);
    assert_eq!(
        mapper.read(words.iova(), 16),
        [
            0, 0, 0, 0, 0xcc, 0xbb, 0xaa, 0x99, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11
        ],
    );
}

#[test]
#[should_panic = "out of range"]
fn an_entry_past_the_end_is_not_stored() {
    let (pool, ..) = pool(CHUNK);
    // The block has room behind the two words; the array has not.
    DmaWords::new(&pool, 2).unwrap().store_u64(1, 1);
}

#[test]
fn threads_that_run_out_together_share_the_new_chunk() {
    const THREADS: usize = 8;
    let (pool, _, mapper) = pool(CHUNK);
    let start = Barrier::new(THREADS);
    let bufs: Vec<_> = thread::scope(|scope| {
        let alloc = || {
            start.wait();
            pool.alloc(1).unwrap()
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(alloc)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!((bufs.len(), mapper.count()), (THREADS, 1));
}

#[test]
fn threads_never_share_a_block() {
    const THREADS: u8 = 4;
    const ROUNDS: usize = 1000;
    let (pool, _, mapper) = pool(3 * CHUNK);
    thread::scope(|scope| {
        // Each thread fills buffers and passes some to the next, which checks and frees them.
        let (senders, mut receivers): (Vec<_>, Vec<_>) = (0..THREADS)
            .map(|_| mpsc::channel::<(u8, DmaBuf)>())
            .unzip();
        receivers.rotate_left(1);
        for (thread, (sender, receiver)) in (0..THREADS).zip(senders.into_iter().zip(receivers)) {
            let pool = &pool;
            scope.spawn(move || {
                let check = |(fill, buf): (u8, DmaBuf)| {
                    assert!(
                        buf.iter().all(|&byte| byte == fill),
                        "somebody else wrote here"
                    );
                };
                let mut random = u32::from(thread) + 1;
                let mut held = Vec::new();
                for round in 0..ROUNDS {
                    random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let len = 1 + (random >> 8) as usize % (DEVICE_PAGE << (random >> 29));
                    let fill = thread << 6 | round as u8 & 0x3f;
                    match pool.alloc(len) {
                        Ok(mut buf) => {
                            buf.fill(fill);
                            held.push((fill, buf));
                        }
                        Err(AllocError::LimitReached { .. }) => held.clear(),
                        Err(error) => panic!("{error}"),
                    }
                    if random & 0x3000 == 0 && !held.is_empty() {
                        check(held.swap_remove(random as usize % held.len()));
                    }
                    if random & 0xc000 == 0 {
                        // The receiver may have ended; the buffer comes back in the error then.
                        held.pop()
                            .into_iter()
                            .for_each(|buf| drop(sender.send(buf)));
                    }
                    receiver.try_iter().for_each(check);
                }
                drop(sender);
                receiver.into_iter().for_each(check);
                held.into_iter().for_each(check);
            });
        }
    });
    assert_all_free(&pool);
    assert_eq!(mapper.count(), pool.stats().chunks);
    drop(pool);
    assert_eq!(mapper.count(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Alloc(usize),
    Free(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..40_000_usize).prop_map(Step::Alloc),
        1 => (40_000..CHUNK + CHUNK / 2).prop_map(Step::Alloc),
        4 => any::<prop::sample::Index>().prop_map(Step::Free),
    ]
}

fn config(cases: u32) -> ProptestConfig {
    // A fixed seed, and so no file of past failures in the tree.
    let rng_seed = RngSeed::Fixed(0x6e76_6d65);
    ProptestConfig {
        cases,
        rng_seed,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn accounts_for_every_block(steps in prop::collection::vec(step(), 1..120)) {
        const LIMIT: usize = 4 * CHUNK;
        let (pool, _, mapper) = pool(LIMIT);
        // By IOVA: capacity, the byte written, and the buffer.
        let mut bufs: BTreeMap<u64, (usize, u8, DmaBuf)> = BTreeMap::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Alloc(len) => {
                    let Ok(mut buf) = pool.alloc(len) else {
                        // A refusal is right only if there is no room for one more chunk.
                        prop_assert!(pool.stats().mapped + len.max(CHUNK) > LIMIT);
                        continue;
                    };
                    prop_assert_eq!(buf.len(), len);
                    let fill = number as u8;
                    buf.fill(fill);
                    let iova = buf.iova().unwrap();
                    prop_assert_eq!(mapper.host_address(iova), address(&buf));
                    let below = bufs.range(..=iova).next_back();
                    prop_assert!(below.is_none_or(|(start, (len, ..))| start + *len as u64 <= iova));
                    let above = bufs.range(iova..).next();
                    let end = iova + buf.capacity() as u64;
                    prop_assert!(above.is_none_or(|(start, _)| end <= *start));
                    bufs.insert(iova, (buf.capacity(), fill, buf));
                }
                Step::Free(_) if bufs.is_empty() => {}
                Step::Free(index) => {
                    let iova = *bufs.keys().nth(index.index(bufs.len())).unwrap();
                    let (_, fill, buf) = bufs.remove(&iova).unwrap();
                    prop_assert!(buf.iter().all(|&byte| byte == fill));
                }
            }
            let stats = pool.stats();
            prop_assert_eq!(stats.allocated, bufs.values().map(|(len, ..)| len).sum::<usize>());
            prop_assert_eq!(stats.outstanding, bufs.len());
            prop_assert_eq!(stats.chunks, mapper.count());
            prop_assert!(stats.mapped <= LIMIT);
        }
        bufs.clear();
        assert_all_free(&pool);
    }
}
