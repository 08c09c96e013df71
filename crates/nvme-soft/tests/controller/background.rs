//! Commands that wait for the medium, and what others do meanwhile.

use std::io::ErrorKind;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nvme_soft::fault::{Behaviour, Fault, FaultQueue, Loss};
use nvme_soft::{Config, NamespaceConfig};
use nvme_spec::copy::SourceRange;
use nvme_spec::dsm::Range;
use nvme_spec::registers::{ShutdownNotification, ShutdownStatus};
use nvme_spec::{Sqe, Status, admin, nvm};
use zerocopy::IntoBytes;

use crate::host::{Host, pattern, prp, usual_configuration, wait_for};
use crate::medium::{Call, End, Medium, MediumStore};

const LBA: u64 = 512;
/// A block that no test writes, of which something else can be read meanwhile.
const FAR: u64 = 4000;

/// A controller over a medium that takes its time, and one namespace in memory.
struct Slow {
    host: Host,
    medium: Arc<Medium>,
}

impl Drop for Slow {
    fn drop(&mut self) {
        // The controller's end waits for what is under way.
        self.medium.open();
        if !thread::panicking() {
            assert_eq!(self.medium.overlaps(), 0);
        }
    }
}

impl Slow {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Config)) -> Self {
        let medium = Medium::new(4 << 20);
        let mut config = Config::default();
        let store = MediumStore(medium.clone());
        config
            .namespaces
            .push(NamespaceConfig::new(store, LBA as u32));
        change(&mut config);
        Self {
            host: Host::ready(config),
            medium,
        }
    }

    /// Submits commands that are fetched together.
    fn submit(&mut self, commands: impl IntoIterator<Item = Sqe>) -> Vec<u16> {
        let cids = commands
            .into_iter()
            .map(|command| self.host.place(1, command))
            .collect();
        self.host.ring(1);
        cids
    }

    /// A write of so many blocks that are full of one byte.
    fn write(&mut self, slba: u64, blocks: u64, fill: u8, fua: bool) -> Sqe {
        let buffer = self.host.allocate(blocks * LBA);
        self.host
            .memory
            .set(buffer, &vec![fill; (blocks * LBA) as usize]);
        nvm::write(1, slba, blocks as u32, fua).with_data(prp(buffer))
    }

    /// A read, and the buffer that it fills.
    fn read(&mut self, slba: u64, blocks: u64) -> (Sqe, u64) {
        let buffer = self.host.allocate(blocks * LBA);
        let data = self.host.prps(buffer, blocks * LBA);
        let read = nvm::read(1, slba, blocks as u32, false).with_data(data);
        (read, buffer)
    }

    /// Reads a block that nothing conflicts with. By then all is looked at that was submitted before.
    fn read_far(&mut self) {
        let (read, _) = self.read(FAR, 1);
        self.host.io_ok(read);
    }

    /// Begins a durable write of blocks 0 to 8 in the background, as the first call.
    fn begin_write(&mut self, fill: u8) -> u16 {
        let write = self.write(0, 8, fill, true);
        let (read, _) = self.read(FAR, 1);
        let cids = self.submit([write, read]);
        self.ok(cids[1]);
        let begun = self.medium.wait_begun(1);
        let (offset, len) = (0, 8 * LBA);
        assert_eq!(begun, [Call::Write { offset, len }]);
        cids[0]
    }

    fn ok(&mut self, cid: u16) {
        let status = self.host.wait(1, cid).status();
        assert!(status.is_success(), "{status}");
    }

    fn contents(&mut self, slba: u64, blocks: u64) -> Vec<u8> {
        let (read, buffer) = self.read(slba, blocks);
        self.host.io_ok(read);
        self.host.memory.get(buffer, (blocks * LBA) as usize)
    }

    /// Does what waits for the medium, and lets its first call end meanwhile.
    fn waits_for_medium(&self, what: impl FnOnce(&Host) + Send) {
        let Self { host, medium } = self;
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                what(host);
                assert_eq!(medium.ended(), 1);
            });
            // Time for one that does not wait to be found out. One that does takes all of it.
            let until = Instant::now() + Duration::from_millis(50);
            while !thread.is_finished() && Instant::now() < until {
                thread::yield_now();
            }
            medium.end(0, End::Done);
            thread.join().unwrap();
        });
    }
}

#[test]
fn durable_writes_go_on_together_and_complete_as_they_end() {
    let mut slow = Slow::new();
    let writes = [0, 8, 16, 24].map(|slba| slow.write(slba, 8, slba as u8 + 1, true));
    let cids = slow.submit(writes);
    let begun = slow.medium.wait_begun(4);
    for slba in [24, 0, 16, 8] {
        assert!(slow.host.has_none(1));
        let offset = slba * LBA;
        let number = begun
            .iter()
            .position(|call| matches!(call, Call::Write { offset: at, .. } if *at == offset));
        slow.medium.end(number.unwrap(), End::Done);
        let entry = slow.host.reap(1);
        assert!(entry.status().is_success());
        assert_eq!(entry.cid(), cids[slba as usize / 8]);
        assert_eq!(slow.contents(slba, 8), [slba as u8 + 1; 4096]);
    }
    let counters = slow.host.controller.counters();
    assert_eq!((counters.syncs, counters.bytes_written), (4, 4 * 4096));
}

#[test]
fn what_overlaps_a_write_waits_for_it_in_order() {
    let mut slow = Slow::new();
    let first = slow.begin_write(1);
    let (before, before_buffer) = slow.read(0, 8);
    let change = slow.write(4, 8, 2, false);
    let (after, after_buffer) = slow.read(4, 8);
    let again = slow.write(7, 1, 3, true);
    let (last, last_buffer) = slow.read(0, 8);
    let cids = slow.submit([before, change, after, again, last]);
    slow.read_far();
    assert!(slow.host.has_none(1));
    assert_eq!(slow.medium.begun(), 1);
    slow.medium.end(0, End::Done);
    slow.ok(first);
    for cid in &cids[..3] {
        slow.ok(*cid);
    }
    let get = |slow: &Slow, buffer| slow.host.memory.get(buffer, 4096);
    assert_eq!(get(&slow, before_buffer), [1; 4096]);
    assert_eq!(get(&slow, after_buffer), [2; 4096]);
    // The second durable write is under way by now, and only who comes after it waits.
    slow.medium.wait_begun(2);
    assert!(slow.host.has_none(1));
    slow.medium.end(1, End::Done);
    slow.ok(cids[3]);
    slow.ok(cids[4]);
    let expected = [[1; 2048].as_slice(), &[2; 1536], &[3; 512]].concat();
    assert_eq!(get(&slow, last_buffer), expected);
}

#[test]
fn all_kinds_of_commands_wait_for_what_they_overlap() {
    let mut slow = Slow::new();
    let list = slow.host.allocate(4096);
    slow.host.memory.set(list, Range::new(2, 1).as_bytes());
    let sources = slow.host.allocate(4096);
    let source = SourceRange::new(0, 2);
    slow.host.memory.set(sources, source.as_bytes());
    let expected = slow.host.allocate(8 * LBA);
    slow.host.memory.set(expected, &[1; 4096]);
    let first = slow.begin_write(1);
    let cids = slow.submit([
        nvm::compare(1, 0, 8, false).with_data(prp(expected)),
        nvm::verify(1, 7, 2, false),
        nvm::copy(1, 100, 1, false).with_data(prp(sources)),
        nvm::write_zeroes(1, 1, 1, false, false),
        nvm::dataset_management(1, 1, true).with_data(prp(list)),
    ]);
    // After a command for the whole namespace others wait, except those that touch no block.
    let (read, _) = slow.read(FAR, 1);
    let far = slow.submit([read, nvm::flush(1)]);
    slow.medium.wait_begun(2);
    slow.medium.end(1, End::Done);
    slow.ok(far[1]);
    assert!(slow.host.has_none(1));
    slow.medium.end(0, End::Done);
    slow.ok(first);
    for cid in cids {
        slow.ok(cid);
    }
    slow.ok(far[0]);
    assert_eq!(slow.contents(100, 2), [1; 1024]);
    assert_eq!(slow.contents(1, 2), [0; 1024]);
    assert_eq!(slow.contents(3, 5), [1; 2560]);
}

#[test]
fn a_flush_waits_for_no_write_and_nobody_for_a_flush() {
    let mut slow = Slow::new();
    let write = slow.begin_write(1);
    let flushes = slow.submit([nvm::flush(1), nvm::flush(admin::ALL_NAMESPACES)]);
    slow.medium.wait_begun(3);
    slow.read_far();
    let plain = slow.write(20, 8, 5, false);
    slow.host.io_ok(plain);
    for number in [1, 2] {
        slow.medium.end(number, End::Done);
    }
    for cid in flushes {
        slow.ok(cid);
    }
    assert!(slow.host.has_none(1));
    slow.medium.end(0, End::Done);
    slow.ok(write);
    assert_eq!(slow.host.controller.counters().syncs, 3);
}

#[test]
fn a_read_from_the_medium_waits_for_its_flush() {
    let mut slow = Slow::new();
    let plain = slow.write(0, 8, 7, false);
    slow.host.io_ok(plain);
    let (_, buffer) = slow.read(0, 8);
    let (far, _) = slow.read(FAR, 1);
    let read = nvm::read(1, 0, 8, true).with_data(prp(buffer));
    let cids = slow.submit([read, far]);
    slow.ok(cids[1]);
    slow.medium.wait_begun(1);
    // What it reads does not change any more.
    let overlapping = slow.write(0, 8, 8, false);
    let later = slow.submit([overlapping]);
    slow.read_far();
    assert!(slow.host.has_none(1));
    slow.medium.end(0, End::Done);
    slow.ok(cids[0]);
    slow.ok(later[0]);
    assert_eq!(slow.host.memory.get(buffer, 4096), [7; 4096]);
    assert_eq!(slow.host.controller.counters().syncs, 1);
}

#[test]
fn large_zeroes_are_done_in_the_background() {
    let mut slow = Slow::new();
    let data = slow.write(0, 8, 1, false);
    slow.host.io_ok(data);
    let (read, _) = slow.read(FAR, 1);
    let cids = slow.submit([nvm::write_zeroes(1, 0, 2048, true, false), read]);
    let (offset, len) = (0, 1 << 20);
    assert_eq!(slow.medium.wait_begun(1), [Call::Zero { offset, len }]);
    slow.ok(cids[1]);
    slow.medium.end(0, End::Done);
    slow.ok(cids[0]);
    assert_eq!(slow.contents(0, 8), [0; 4096]);
    assert_eq!(slow.host.controller.counters().syncs, 0);
}

#[test]
fn a_durable_copy_is_written_in_the_background() {
    let mut slow = Slow::new();
    let data = slow.write(0, 2, 1, false);
    slow.host.io_ok(data);
    let sources = slow.host.allocate(4096);
    let source = SourceRange::new(0, 2);
    slow.host.memory.set(sources, source.as_bytes());
    let copy = nvm::copy(1, 100, 1, true).with_data(prp(sources));
    // The source is read by now, so that it may change.
    let change = slow.write(0, 2, 2, false);
    let cids = slow.submit([copy, change]);
    let (offset, len) = (100 * LBA, 2 * LBA);
    assert_eq!(slow.medium.wait_begun(1), [Call::Write { offset, len }]);
    slow.ok(cids[1]);
    slow.medium.end(0, End::Done);
    slow.ok(cids[0]);
    assert_eq!(slow.contents(100, 2), [1; 1024]);
    let counters = slow.host.controller.counters();
    assert_eq!((counters.bytes_copied, counters.syncs), (1024, 1));
}

#[test]
fn errors_in_the_background_are_statuses() {
    let mut slow = Slow::new();
    let ends = [
        (
            End::Fails(ErrorKind::StorageFull),
            Status::CAPACITY_EXCEEDED,
        ),
        (End::Fails(ErrorKind::Other), Status::WRITE_FAULT),
        (End::Panics, Status::WRITE_FAULT),
    ];
    let commands = [
        slow.write(0, 8, 1, true),
        nvm::flush(1),
        nvm::write_zeroes(1, 8, 8, false, true),
    ];
    let mut begun = 0;
    for (end, failed) in ends {
        for command in commands {
            let (read, _) = slow.read(FAR, 1);
            let cids = slow.submit([command, read]);
            slow.medium.wait_begun(begun + 1);
            slow.medium.end(begun, end);
            begun += 1;
            let status = slow.host.wait(1, cids[0]).status();
            assert!(status.is(failed) && !status.dnr(), "{status}");
            slow.ok(cids[1]);
        }
    }
    let counters = slow.host.controller.counters();
    assert_eq!((counters.failed_commands, counters.bytes_written), (9, 0));
}

#[test]
fn more_than_the_medium_takes_stays_in_the_queue() {
    let mut slow = Slow::new();
    let writes: Vec<_> = (0..60)
        .map(|block| slow.write(block, 1, block as u8 + 1, true))
        .collect();
    let cids = slow.submit(writes);
    slow.medium.wait_begun(16);
    // Sixteen are under way, and fetching ends with the batch that makes it sixteen that wait.
    wait_for(|| (slow.host.controller.counters().commands >= 32).then_some(()));
    slow.host
        .admin_ok(admin::get_features(1, admin::FeatureSelect::Current));
    assert_eq!(slow.host.controller.counters().commands, 32);
    assert_eq!(slow.medium.begun(), 16);
    slow.medium.open();
    for cid in cids {
        slow.ok(cid);
    }
    let expected: Vec<u8> = (1..=60).flat_map(|fill| [fill; LBA as usize]).collect();
    let contents = [slow.contents(0, 30), slow.contents(30, 30)].concat();
    assert!(contents == expected);
}

#[test]
fn the_controllers_thread_waits_itself_for_who_is_alone() {
    let mut slow = Slow::new();
    let write = slow.write(0, 8, 1, true);
    let alone = slow.submit([write]);
    slow.medium.wait_begun(1);
    // It serves nothing else, and finds that afterwards.
    let (read, _) = slow.read(FAR, 1);
    let late = slow.submit([read]);
    slow.medium.end(0, End::Done);
    slow.ok(alone[0]);
    slow.ok(late[0]);
    let background = slow.submit([write]);
    slow.medium.wait_begun(2);
    slow.read_far();
    slow.medium.end(1, End::Done);
    slow.ok(background[0]);
    assert_eq!(slow.host.controller.counters().syncs, 2);
}

#[test]
fn a_reset_waits_for_the_medium_and_completes_nothing() {
    for disable in [false, true] {
        let mut slow = Slow::new();
        slow.begin_write(1);
        let (read, buffer) = slow.read(0, 8);
        slow.submit([read]);
        slow.read_far();
        // So that the write can't complete before the reset.
        slow.host.controller.set_bus_master(false);
        let accesses = slow.host.memory.accesses();
        slow.waits_for_medium(|host| match disable {
            true => host.disable(),
            false => host.controller.reset().unwrap(),
        });
        slow.host.controller.set_bus_master(true);
        assert!(slow.host.has_none(1));
        assert_eq!(slow.host.memory.accesses(), accesses);
        slow.host.enable();
        slow.host.create_pair(1, 64, None);
        assert!(slow.host.has_none(1));
        assert_eq!(slow.contents(0, 8), [1; 4096]);
        // What waited for the write is not done any more.
        assert_eq!(slow.host.memory.get(buffer, 4096), [0; 4096]);
    }
}

#[test]
fn a_deleted_queue_has_no_work_in_the_background() {
    let mut slow = Slow::new();
    slow.host.create_pair(2, 16, None);
    let write = slow.begin_write(1);
    let (read, _) = slow.read(0, 1);
    let waiting = slow.submit([read])[0];
    slow.read_far();
    let other = slow.host.submit(2, read);
    let deletion = slow.host.submit(0, admin::delete_submission_queue(1));
    let status = slow.host.wait(1, waiting).status();
    assert!(status.is(Status::ABORTED_SQ_DELETION), "{status}");
    assert!(slow.host.has_none(1) && slow.host.has_none(0));
    slow.medium.end(0, End::Done);
    assert!(slow.host.wait(0, deletion).status().is_success());
    let entry = slow
        .host
        .look(1)
        .expect("it completed before its queue was deleted");
    assert_eq!(entry.cid(), write);
    assert!(slow.host.wait(2, other).status().is_success());
}

#[test]
fn only_what_waits_can_be_aborted() {
    let mut slow = Slow::new();
    let write = slow.begin_write(1);
    let (read, _) = slow.read(0, 1);
    let waiting = slow.submit([read, read]);
    slow.read_far();
    assert_eq!(slow.host.admin_ok(admin::abort(1, waiting[0])), 0);
    let status = slow.host.wait(1, waiting[0]).status();
    assert!(status.is(Status::ABORT_REQUESTED), "{status}");
    assert_eq!(slow.host.admin_ok(admin::abort(1, write)), 1);
    slow.medium.end(0, End::Done);
    slow.ok(write);
    slow.ok(waiting[1]);
}

#[test]
fn a_shutdown_completes_what_is_under_way() {
    let mut slow = Slow::new();
    let write = slow.begin_write(1);
    let (read, buffer) = slow.read(0, 8);
    let waiting = slow.submit([read])[0];
    slow.read_far();
    let shutdown = usual_configuration().with_shn(ShutdownNotification::Normal);
    slow.host.write_configuration(shutdown);
    wait_for(|| (slow.host.status().shst() == ShutdownStatus::Occurring).then_some(()));
    slow.medium.end(0, End::Done);
    // And then what it has cached.
    slow.medium.wait_begun(2);
    assert_eq!(slow.host.status().shst(), ShutdownStatus::Occurring);
    slow.medium.end(1, End::Done);
    wait_for(|| (slow.host.status().shst() == ShutdownStatus::Complete).then_some(()));
    slow.ok(write);
    slow.ok(waiting);
    assert_eq!(slow.host.memory.get(buffer, 4096), [1; 4096]);
}

#[test]
fn changes_wait_for_the_medium() {
    let changes: [fn(&Host); 5] = [
        |host| host.controller.resize_namespace(1, 1 << 20).unwrap(),
        |host| host.controller.detach_namespace(1).unwrap(),
        |host| host.controller.power_loss(Loss::All),
        |host| host.controller.vanish(Loss::All),
        |host| {
            let fault = Fault::new(Behaviour::SpuriousInterrupt).queue(FaultQueue::Io);
            host.controller.inject(fault).unwrap();
        },
    ];
    for change in changes {
        let mut slow = Slow::new();
        slow.begin_write(1);
        slow.waits_for_medium(change);
    }
}

#[test]
fn the_cache_is_turned_off_after_what_it_was_on_for() {
    let mut slow = Slow::new();
    let (read, _) = slow.read(FAR, 1);
    let cids = slow.submit([nvm::write_zeroes(1, 0, 2048, true, false), read]);
    slow.medium.wait_begun(1);
    let feature = nvme_spec::feature::id::VOLATILE_WRITE_CACHE;
    let off = slow.host.submit(0, admin::set_features(feature, 0, false));
    slow.ok(cids[1]);
    slow.medium.end(0, End::Done);
    assert_eq!(slow.medium.wait_begun(2)[1], Call::Flush);
    slow.ok(cids[0]);
    slow.medium.end(1, End::Done);
    assert!(slow.host.wait(0, off).status().is_success());
}

#[test]
fn with_faults_commands_come_one_after_the_other() {
    let mut slow = Slow::new();
    let fault = Fault::new(Behaviour::SpuriousInterrupt).queue(FaultQueue::Io);
    slow.host.controller.inject(fault).unwrap();
    let writes = [0, 8].map(|slba| slow.write(slba, 8, 1, true));
    let cids = slow.submit(writes);
    for (number, cid) in cids.into_iter().enumerate() {
        assert_eq!(slow.medium.wait_begun(number + 1).len(), number + 1);
        slow.medium.end(number, End::Done);
        slow.ok(cid);
    }
}

#[test]
fn without_bus_mastering_the_medium_goes_on_and_the_host_hears_later() {
    let mut slow = Slow::new();
    let write = slow.begin_write(1);
    slow.host.controller.set_bus_master(false);
    let accesses = slow.host.memory.accesses();
    slow.medium.end(0, End::Done);
    wait_for(|| (slow.medium.ended() == 1).then_some(()));
    // In effect only after the completion had its chance.
    slow.host.controller.set_bus_master(false);
    assert_eq!(slow.host.memory.accesses(), accesses);
    slow.host.controller.set_bus_master(true);
    slow.ok(write);
}

#[test]
fn the_end_of_a_controller_waits_for_what_is_under_way() {
    let mut slow = Slow::new();
    let _ = slow.begin_write(1);
    let medium = slow.medium.clone();
    drop(slow);
    assert_eq!(medium.ended(), 1);
    // No thread has it any more.
    assert_eq!(Arc::strong_count(&medium), 1);
}

#[test]
fn commands_at_the_same_place_see_no_mixture() {
    let mut slow = Slow::new();
    slow.medium.open();
    let data: Vec<u64> = (0..4).map(|_| slow.host.allocate(8 * LBA)).collect();
    let choices = pattern(1, 4000);
    for (round, choices) in choices.chunks(16).enumerate() {
        for (index, buffer) in data.iter().enumerate() {
            let fill = (round * data.len() + index) as u8;
            slow.host.memory.set(*buffer, &[fill; 4096]);
        }
        let mark = slow.host.mark();
        let mut reads = Vec::new();
        let commands: Vec<_> = choices
            .iter()
            .map(|choice| {
                let written = data[usize::from(choice >> 3 & 3)];
                match choice & 7 {
                    0..3 => nvm::write(1, 0, 8, true).with_data(prp(written)),
                    3 => nvm::write(1, 0, 8, false).with_data(prp(written)),
                    4 => nvm::write_zeroes(1, 0, 8, false, true),
                    _ => {
                        let (read, buffer) = slow.read(0, 8);
                        reads.push(buffer);
                        read
                    }
                }
            })
            .collect();
        for cid in slow.submit(commands) {
            slow.ok(cid);
        }
        for buffer in reads {
            let bytes = slow.host.memory.get(buffer, 4096);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{round}");
        }
        slow.host.free_to(mark);
    }
}
