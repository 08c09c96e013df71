//! Blocks that can't be read or written, and those around them.

use nvme_async::nvme_spec::Status;
use nvme_async::{CommandError, Error, Namespace};

use super::drive::{Failing, Layer};
use super::load::{DEPTH, LEN, Load};
use crate::harness::{self, assert_says, run};

const BLOCK: usize = 512;

fn command_error(error: &Error) -> &CommandError {
    match error {
        Error::Command(error) => error,
        other => panic!("no status of the controller's: {other:?}"),
    }
}

async fn assert_reads(namespace: &Namespace, offset: u64, data: &[u8]) {
    let read = namespace.read(offset, data.len()).await.expect("reads");
    assert!(read == data, "other data at offset {offset}");
}

#[test]
fn a_block_that_cannot_be_read() {
    run(120, async || {
        let namespace = harness::open("plain").await;
        let data: Vec<u8> = (0..64 * BLOCK).map(|index| (index / BLOCK) as u8).collect();
        let data = namespace.write(0, data).await.expect("writes");
        let broken = 20;
        let layer = Layer::failing("plain", &[Failing::Read(broken)]);
        for (block, data) in (0..).zip(data.chunks(BLOCK)) {
            let offset = block * BLOCK as u64;
            if block != broken {
                assert_reads(&namespace, offset, data).await;
                continue;
            }
            let error = namespace.read(offset, BLOCK).await.expect_err("broken");
            let CommandError { command, status } = command_error(&error);
            assert!(status.is(Status::UNRECOVERED_READ_ERROR), "{error}");
            assert_eq!(command.nsid, Some(1));
            assert_eq!(command.blocks, Some(broken..broken + 1));
            let address = harness::address("plain");
            assert_says(
                &error,
                &[&address, "namespace 1", "Read of 1 blocks at LBA 20"],
            );
        }
        // In the middle of a longer one, and at its ends.
        for blocks in [8..32, broken..28, 13..broken + 1] {
            let len = (blocks.end - blocks.start) as usize * BLOCK;
            let read = namespace.read(blocks.start * BLOCK as u64, len).await;
            let error = read.expect_err("broken");
            let CommandError { command, status } = command_error(&error);
            assert!(status.is(Status::UNRECOVERED_READ_ERROR), "{error}");
            assert_eq!(command.blocks, Some(blocks));
        }
        // It can be written, and is read when the medium has healed.
        let offset = broken * BLOCK as u64;
        let new = vec![0xbb; BLOCK];
        let new = namespace.write(offset, new).await.expect("writes");
        let read = namespace.read(offset, BLOCK).await;
        read.expect_err("still broken");
        drop(layer);
        assert_reads(&namespace, offset, &new).await;
        harness::close(namespace).await;
    });
}

#[test]
fn what_cannot_be_written_comes_back() {
    run(120, async || {
        let namespace = harness::open("plain").await;
        let old = vec![0x0d; 16 * BLOCK];
        let old = namespace.write(0, old).await.expect("writes");
        let layer = Layer::failing("plain", &[Failing::Write(3), Failing::Flush]);
        let new = vec![0x0e; 8 * BLOCK];
        let failed = namespace.write(0, new.clone()).await.expect_err("broken");
        let CommandError { command, status } = command_error(&failed.error);
        assert!(status.is(Status::WRITE_FAULT), "{failed}");
        assert_eq!(command.blocks, Some(0..8));
        assert_eq!(failed.buffer.as_ref(), Some(&new));
        let error = namespace.flush().await.expect_err("broken");
        assert_eq!(command_error(&error).command.name, "Flush");

        // What is beside it is written, and it is not.
        let offset = 8 * BLOCK as u64;
        let new = namespace.write(offset, new).await.expect("writes");
        assert_reads(&namespace, 0, &old[..8 * BLOCK]).await;
        assert_reads(&namespace, offset, &new).await;

        drop(layer);
        let new = namespace.write(0, new).await.expect("writes");
        namespace.flush().await.expect("flushes");
        assert_reads(&namespace, 0, &new).await;
        harness::close(namespace).await;
    });
}

/// Of a request of many commands, the error says which part failed.
#[test]
fn a_part_of_a_large_request() {
    run(120, async || {
        let namespace = harness::open("plain").await;
        let len = 3 << 20;
        let data = vec![0x5a; len];
        let data = namespace.write(0, data).await.expect("writes");
        let broken = (len / BLOCK / 2) as u64;
        let layer = Layer::failing("plain", &[Failing::Read(broken)]);
        let error = namespace.read(0, len).await.expect_err("broken");
        let Error::Split(split) = &error else {
            panic!("no parts: {error:?}");
        };
        assert!(split.parts.len() > 2, "{error:?}");
        let mut end = 0;
        for (blocks, result) in &split.parts {
            assert_eq!(blocks.start, end, "{error:?}");
            end = blocks.end;
            match result {
                Ok(()) => assert!(!blocks.contains(&broken), "{error:?}"),
                Err(part) => {
                    assert!(blocks.contains(&broken), "{error:?}");
                    let status = command_error(part).status;
                    assert!(status.is(Status::UNRECOVERED_READ_ERROR), "{part}");
                }
            }
        }
        assert_eq!(end, (len / BLOCK) as u64);
        assert_eq!(split.failures().count(), 1);
        drop(layer);
        assert_reads(&namespace, 0, &data).await;
        harness::close(namespace).await;
    });
}

/// Tasks whose blocks are whole do not notice, and those of the others are as they were.
#[test]
fn broken_blocks_under_load() {
    run(300, async || {
        let namespace = harness::open("plain").await;
        let mut load = Load::start(&namespace, |_| false).await;
        let sector = |task: u64| task * (LEN / BLOCK) as u64;
        let broken = [Failing::Read(sector(3)), Failing::Write(sector(8) + 7)];
        let layer = Layer::failing("plain", &broken);
        load.reaches(20 * DEPTH).await;
        drop(layer);
        load.reaches(20 * DEPTH).await;
        let mut outcome = load.end().await;
        let failed: Vec<u64> = (0..DEPTH)
            .filter(|&task| outcome.errors_of(task).next().is_some())
            .collect();
        assert_eq!(failed, [3, 8]);
        for (task, expected) in [
            (3, Status::UNRECOVERED_READ_ERROR),
            (8, Status::WRITE_FAULT),
        ] {
            for error in outcome.errors_of(task) {
                let CommandError { command, status } = command_error(error);
                assert!(status.is(expected), "{error}");
                assert_eq!(command.blocks, Some(sector(task)..sector(task + 1)));
            }
        }
        outcome.verify(&namespace).await;
        harness::close(namespace).await;
    });
}
