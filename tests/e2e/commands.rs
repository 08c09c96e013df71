//! Compare, Verify and Copy: what they send, what they report, and what they leave behind.

use std::ops::Range;
use std::slice;

use futures::FutureExt;
use nvme_async::nvme_spec::Status;
use nvme_async::{Error, IoError, Namespace};
use nvme_soft::store::MemoryStore;

use crate::support::bounded::{comes_true, on_both_flavours, on_current_thread};
use crate::support::faulty::{FaultyStore, Script};
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup};

const SIZE: u64 = 1 << 20;
const BLOCK: usize = 512;

/// I/O commands that the controller has fetched since the last call.
struct Commands(u64);

impl Commands {
    fn of(rig: &Rig) -> Self {
        Self(rig.device.counters().commands)
    }

    fn since(&mut self, rig: &Rig) -> u64 {
        let now = rig.device.counters().commands;
        now - std::mem::replace(&mut self.0, now)
    }
}

/// A namespace with bad places, transfers of at most 8 KiB, and numbered blocks.
async fn with_faults(change: impl FnOnce(Setup) -> Setup) -> (Rig, Namespace, Script) {
    let script = Script::default();
    let setup = Setup::empty()
        .store(FaultyStore::new(SIZE, &script), BLOCK as u32)
        .config(|config| config.mdts = 1);
    let rig = change(setup).open().await;
    let namespace = rig.namespace().await;
    for block in 0..100 {
        let data = vec![block as u8 + 1; BLOCK];
        namespace
            .write(bytes(block..block + 1).start, data)
            .await
            .expect("writes");
    }
    (rig, namespace, script)
}

fn bytes(blocks: Range<usize>) -> Range<u64> {
    (blocks.start * BLOCK) as u64..(blocks.end * BLOCK) as u64
}

/// What [`with_faults`] writes to these blocks.
fn numbered(blocks: Range<usize>) -> Vec<u8> {
    blocks.flat_map(|block| [block as u8 + 1; BLOCK]).collect()
}

#[test]
fn a_difference_is_told_from_a_fault_and_gives_the_buffer_back() {
    on_both_flavours(async || {
        let (rig, namespace, script) = with_faults(|setup| setup).await;
        let ledger = Ledger::default();
        let equal = namespace.compare(0, ledger.bytes(BLOCK, 1)).await;
        assert_eq!(equal.expect("equal").len(), BLOCK);

        let compared = namespace.compare(0, ledger.bytes(2 * BLOCK, 1)).await;
        let IoError { error, buffer, .. } = compared.expect_err("the second block differs");
        assert_eq!(buffer.map(|bytes| bytes.len()), Some(2 * BLOCK));
        assert!(error.is_compare_failure());
        let Error::Command(failed) = &error else {
            panic!("{error:?}");
        };
        assert_eq!(failed.command.blocks, Some(0..2));
        assert!(error.to_string().contains("Compare"), "{error}");

        script.fail_at(bytes(1..2));
        let compared = namespace.compare(0, ledger.bytes(2 * BLOCK, 1)).await;
        let IoError { error, buffer, .. } = compared.expect_err("a bad block");
        assert!(buffer.is_some());
        assert!(!error.is_compare_failure(), "{error}");
        drop(buffer);
        assert_eq!(ledger.alive(), 0);
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn a_long_compare_is_split_and_each_part_counts() {
    on_both_flavours(async || {
        let (rig, namespace, script) = with_faults(|setup| setup).await;
        let mut commands = Commands::of(&rig);
        let mut data = namespace.compare(0, numbered(0..40)).await.expect("equal");
        assert_eq!(commands.since(&rig), 3);
        assert_eq!(rig.device.counters().bytes_checked, 40 * BLOCK as u64);
        // Sixteen blocks a part. The last one differs.
        data[39 * BLOCK] = 0;
        let compared = namespace.compare(0, data).await;
        let IoError { error, buffer, .. } = compared.expect_err("differs");
        let data = buffer.expect("the device is done with it");
        assert!(error.is_compare_failure(), "{error}");
        let Error::Split(split) = &error else {
            panic!("{error:?}");
        };
        let failed: Vec<_> = split.failures().map(|(blocks, _)| blocks.clone()).collect();
        assert_eq!(failed, slice::from_ref(&(32..40)));
        // Whatever became of the others, they differ.
        script.fail_at(bytes(0..1));
        let error = namespace.compare(0, data).await.expect_err("differs").error;
        assert!(error.is_compare_failure(), "{error}");
        let error = namespace
            .compare(0, numbered(0..40))
            .await
            .expect_err("a bad block")
            .error;
        assert!(matches!(error, Error::Split(_)) && !error.is_compare_failure());
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn verify_is_split_by_its_own_limits() {
    on_current_thread(async || {
        let large = (96 << 20) + BLOCK as u64;
        for (vsl, len, expected) in [
            (0, 32 << 20, 1),
            (0, large, 4),
            // Of 8 KiB, and of 128 MiB, which is more than a command has blocks.
            (1, 8192, 1),
            (1, 8192 + 512, 2),
            (15, large, 4),
        ] {
            let store = MemoryStore::new(large).expect("not touched");
            let setup = Setup::empty().store(store, BLOCK as u32);
            let rig = setup
                .config(|config| (config.vsl, config.mdts) = (vsl, 1))
                .open()
                .await;
            let namespace = rig.namespace().await;
            let mut commands = Commands::of(&rig);
            namespace.verify(0, len).await.expect("it can be read");
            assert_eq!(commands.since(&rig), expected, "VSL {vsl}, {len} bytes");
            assert_eq!(rig.device.counters().bytes_checked, len);
            assert_eq!(rig.device.counters().bytes_read, 0);
            drop(namespace);
            rig.close().await;
        }
    });
}

#[test]
fn verify_says_which_blocks_are_bad() {
    on_both_flavours(async || {
        let (rig, namespace, script) =
            with_faults(|setup| setup.config(|config| config.vsl = 1)).await;
        script.fail_at(bytes(20..21));
        namespace
            .verify(0, 20 * BLOCK as u64)
            .await
            .expect("before it");
        namespace
            .verify(bytes(21..22).start, 100 * BLOCK as u64)
            .await
            .expect("after it");
        let error = namespace
            .verify(0, 60 * BLOCK as u64)
            .await
            .expect_err("a bad block");
        let Error::Command(failed) = &error else {
            panic!("{error:?}");
        };
        assert!(failed.status.is(Status::UNRECOVERED_READ_ERROR));
        assert_eq!(
            (failed.command.name, &failed.command.blocks),
            ("Verify", &Some(16..32))
        );
        drop(namespace);
        rig.close().await;
    });
}

/// Limits of 4 blocks a range, 10 in all, and 3 ranges.
fn few_blocks_a_copy(setup: Setup) -> Setup {
    setup.config(|config| {
        let namespace = &mut config.namespaces[0];
        (namespace.copy_range_blocks, namespace.copy_blocks) = (4, 10);
        namespace.copy_ranges = 3;
    })
}

#[test]
fn copies_are_split_by_all_three_limits() {
    on_both_flavours(async || {
        let (rig, namespace, _script) = with_faults(few_blocks_a_copy).await;
        let mut commands = Commands::of(&rig);
        let cases: [(&[Range<usize>], u64); 5] = [
            (slice::from_ref(&(0..4)), 1),
            (&[0..5, 90..93], 1),
            // Four ranges; more than 10 blocks; both.
            (&[3..4, 1..2, 2..3, 0..1], 2),
            (&[8..16, 0..3], 2),
            (&[10..35, 0..1, 40..42], 4),
        ];
        for (sources, expected) in cases {
            let to = bytes(200..201).start;
            let ranges: Vec<_> = sources.iter().cloned().map(bytes).collect();
            namespace.copy(&ranges, to).await.expect("copies");
            assert_eq!(commands.since(&rig), expected, "{sources:?}");
            let expected: Vec<u8> = sources.iter().cloned().flat_map(numbered).collect();
            let read = namespace.read(to, expected.len()).await.expect("reads");
            assert!(read == expected, "{sources:?}");
            commands.since(&rig);
        }
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn a_copy_that_fails_says_where_it_stopped() {
    on_both_flavours(async || {
        let (rig, namespace, script) = with_faults(few_blocks_a_copy).await;
        script.fail_at(bytes(15..16));
        let to = bytes(200..201).start;
        let error = namespace
            .copy(&[bytes(0..30)], to)
            .await
            .expect_err("a bad block");
        let Error::Command(failed) = &error else {
            panic!("{error:?}");
        };
        assert!(failed.status.is(Status::UNRECOVERED_READ_ERROR));
        assert_eq!(
            (failed.command.name, &failed.command.blocks),
            ("Copy", &Some(210..220))
        );
        script.heal();
        let read = namespace.read(to, 30 * BLOCK).await.expect("reads");
        assert!(read[..10 * BLOCK] == numbered(0..10));
        assert!(read[10 * BLOCK..].iter().all(|&byte| byte == 0));
        drop((read, namespace));
        rig.close().await;
    });
}

#[test]
fn a_copy_that_is_refused_changes_nothing() {
    on_current_thread(async || {
        let (rig, namespace, _script) = with_faults(few_blocks_a_copy).await;
        let mut commands = Commands::of(&rig);
        // All is checked before the first command.
        let error = namespace
            .copy(&[bytes(0..20), bytes(50..51)], bytes(40..41).start)
            .await;
        let Err(Error::Overlap { range, destination }) = error else {
            panic!("{error:?}");
        };
        assert_eq!((range, destination), (bytes(50..51), bytes(40..61)));
        let past = namespace.copy(&[bytes(0..20), 0..SIZE], 0).await;
        assert!(matches!(past, Err(Error::OutOfRange { .. })), "{past:?}");
        let endless = vec![0..SIZE; 3];
        let past = namespace.copy(&endless, 0).await;
        assert!(matches!(past, Err(Error::OutOfRange { .. })), "{past:?}");
        assert_eq!(commands.since(&rig), 0);
        // Side by side is no overlap.
        namespace
            .copy(&[bytes(0..20), bytes(60..70)], bytes(30..31).start)
            .await
            .expect("copies");
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn what_the_controller_does_not_have() {
    on_both_flavours(async || {
        let without = |setup: Setup| {
            setup.config(|config| {
                (config.compare, config.verify, config.copy) = (false, false, false);
            })
        };
        let (rig, namespace, _script) = with_faults(without).await;
        let mut commands = Commands::of(&rig);
        let ledger = Ledger::default();
        let compared = namespace.compare(0, ledger.bytes(BLOCK, 1)).await;
        let IoError { error, buffer, .. } = compared.expect_err("unsupported");
        assert!(buffer.is_some());
        assert!(!error.is_compare_failure());
        let errors = [
            error,
            namespace.verify(0, 512).await.expect_err("unsupported"),
            namespace
                .copy(&[bytes(0..1)], 512)
                .await
                .expect_err("unsupported"),
        ];
        for (error, name) in errors.into_iter().zip(["Compare", "Verify", "Copy"]) {
            assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
            assert!(error.to_string().contains(name), "{error}");
        }
        assert_eq!(commands.since(&rig), 0);
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn a_dropped_copy_is_over_after_a_quiesce() {
    on_both_flavours(async || {
        for polls in 0..6 {
            let (rig, namespace, _script) = with_faults(few_blocks_a_copy).await;
            let to = bytes(200..201).start;
            let sources = [bytes(0..60)];
            let mut copy = Box::pin(namespace.copy(&sources, to));
            for _ in 0..polls {
                if let Some(copied) = (&mut copy).now_or_never() {
                    copied.expect("copies");
                    break;
                }
                tokio::task::yield_now().await;
            }
            drop(copy);
            namespace.quiesce().await.expect("quiesces");
            let commands = rig.device.counters().commands;
            let copied = rig.device.counters().bytes_copied as usize;
            let read = namespace.read(to, 60 * BLOCK).await.expect("reads");
            assert!(
                read[..copied] == numbered(0..60)[..copied],
                "after {polls} polls"
            );
            assert!(
                read[copied..].iter().all(|&byte| byte == 0),
                "after {polls} polls"
            );
            // 30 KiB in reads of 8 KiB.
            assert_eq!(rig.device.counters().commands, commands + 4);
            drop((read, namespace));
            rig.close().await;
        }
    });
}

#[test]
fn a_dropped_compare_frees_its_buffer() {
    on_both_flavours(async || {
        let (rig, namespace, _script) = with_faults(|setup| setup).await;
        let ledger = Ledger::default();
        for blocks in [1, 40, 400] {
            let compare = namespace.compare(0, ledger.bytes(blocks * BLOCK, 1));
            drop(compare.now_or_never());
        }
        namespace.quiesce().await.expect("quiesces");
        comes_true("all memory is back", || ledger.alive() == 0).await;
        drop(namespace);
        rig.close().await;
    });
}
