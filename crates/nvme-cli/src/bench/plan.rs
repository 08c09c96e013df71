//! What is to be done, checked against the namespace.

use nvme_async::{OpenOptions, PollMode};

use super::ledger::MAX_BLOCKS;
use super::{Arguments, Flavor, Poll, Workload};
use crate::failure::Failure;
use crate::format;

/// The work, with all numbers checked.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) workload: Workload,
    /// Bytes of a request.
    pub(super) bs: usize,
    /// Bytes of a logical block.
    pub(super) block_size: usize,
    /// Where the region begins, in bytes.
    pub(super) offset: u64,
    /// How many requests the region holds.
    pub(super) blocks: u64,
    pub(super) jobs: u32,
    pub(super) iodepth: u32,
    /// Percent of the requests of a mixed workload that are reads.
    pub(super) read_percent: u8,
    /// Whether writes are durable when they complete.
    pub(super) fua: bool,
    pub(super) seed: u64,
}

/// Direction of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
}

/// Tasks that write or read the whole region for `--verify`, and the memory of each.
pub(super) const PASS_TASKS: u32 = 16;
pub(super) const PASS_BYTES: usize = 256 << 10;

impl Plan {
    /// Checks what can be checked without a device.
    pub(super) fn check_arguments(arguments: &Arguments) -> Result<(), Failure> {
        if !(1..=1 << 30).contains(&arguments.bs) {
            return Err(Failure::request("--bs must be 1 to 1G"));
        }
        if let Some(size) = arguments.size
            && (size == 0 || !size.is_multiple_of(arguments.bs))
        {
            return Err(Failure::request(format_args!(
                "--size {size} must be a multiple of --bs {} and not 0",
                arguments.bs
            )));
        }
        if arguments.fill && !arguments.verify {
            return Err(Failure::request("--fill is part of --verify; give both"));
        }
        if arguments.runtime.is_zero() {
            return Err(Failure::request("--runtime must be more than 0"));
        }
        Ok(())
    }

    /// Checks the rest, for a namespace of `capacity` bytes in blocks of `block_size`.
    pub(super) fn new(
        arguments: &Arguments,
        capacity: u64,
        block_size: u32,
    ) -> Result<Self, Failure> {
        let Arguments { bs, offset, .. } = *arguments;
        if !bs.is_multiple_of(block_size.into()) || !offset.is_multiple_of(block_size.into()) {
            return Err(Failure::request(format_args!(
                "--bs {bs} and --offset {offset} must be multiples of the logical block size, \
                 {block_size}"
            )));
        }
        let available = capacity.saturating_sub(offset);
        let size = arguments.size.unwrap_or(available - available % bs);
        if size == 0 || size > available {
            return Err(Failure::request(format_args!(
                "{} at offset {offset} reach past the end of the namespace, {capacity} bytes",
                format::bytes(size.max(bs)),
            )));
        }
        let blocks = size / bs;
        if arguments.verify && blocks > MAX_BLOCKS {
            return Err(Failure::request(format_args!(
                "--verify keeps track of at most {MAX_BLOCKS} blocks of --bs {bs}, which is {}; \
                 limit the region with --size",
                format::bytes(MAX_BLOCKS.saturating_mul(bs)),
            )));
        }
        Ok(Self {
            workload: arguments.rw,
            bs: bs as usize,
            block_size: block_size as usize,
            offset,
            blocks,
            jobs: arguments.jobs,
            iodepth: arguments.iodepth,
            read_percent: arguments.rwmixread,
            fua: arguments.fua,
            seed: arguments.seed,
        })
    }

    /// The offset of a request in bytes.
    pub(super) fn offset_of(&self, block: u64) -> u64 {
        self.offset + block * self.bs as u64
    }

    /// Bytes of the region.
    pub(super) fn size(&self) -> u64 {
        self.blocks * self.bs as u64
    }

    /// The block at which a job's sequential requests begin: jobs are spread over the region.
    pub(super) fn first_block(&self, job: u32) -> u64 {
        (u128::from(self.blocks) * u128::from(job) / u128::from(self.jobs)) as u64
    }
}

/// How to open the controller so that the workload finds enough memory and queue entries.
pub(super) fn open_options(arguments: &Arguments) -> OpenOptions {
    let tasks = arguments.jobs as usize * arguments.iodepth as usize;
    let request = (arguments.bs as usize).next_power_of_two();
    let pass = request.max(PASS_BYTES) * PASS_TASKS as usize;
    let options = OpenOptions::new()
        .pool_limit((256 << 20) + tasks * request + pass)
        // One entry of a queue stays empty. All tasks may meet in one queue.
        .queue_entries((tasks + 1).next_power_of_two().clamp(256, 4096) as u16)
        .poll_mode(match arguments.poll {
            Poll::Adaptive | Poll::Masked | Poll::Unmasked => PollMode::Adaptive,
            Poll::Interrupt => PollMode::Interrupt,
            Poll::Busy => PollMode::Busy,
            Poll::Paired => PollMode::Paired,
        });
    let options = match arguments.poll {
        Poll::Masked => options.mask_interrupts(true),
        Poll::Unmasked => options.mask_interrupts(false),
        Poll::Adaptive | Poll::Interrupt | Poll::Busy | Poll::Paired => options,
    };
    match arguments.flavor {
        // A single worker uses one queue, and what is no worker the other.
        Flavor::Current | Flavor::Park => options.queues(2).local_queues(0),
        Flavor::Multi => options.local_queues(0),
    }
}

impl Workload {
    pub(super) fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite | Self::Randrw)
    }

    pub(super) fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::Randread)
    }

    /// The direction of a request, where `roll` is 0 to 99, evenly.
    pub(super) fn operation(self, read_percent: u8, roll: u8) -> Operation {
        match self {
            Self::Read | Self::Randread => Operation::Read,
            Self::Write | Self::Randwrite => Operation::Write,
            Self::Randrw if roll < read_percent => Operation::Read,
            Self::Randrw => Operation::Write,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn arguments(line: &str) -> Arguments {
        Line::try_parse_from(
            ["bench", "mem:?size=1M"]
                .into_iter()
                .chain(line.split_whitespace()),
        )
        .expect("valid arguments")
        .arguments
    }

    fn plan(line: &str) -> Result<Plan, Failure> {
        let arguments = arguments(line);
        Plan::check_arguments(&arguments)?;
        Plan::new(&arguments, 1 << 20, 512)
    }

    #[test]
    fn the_region_is_the_rest_of_the_namespace() {
        let all = plan("--rw read --bs 4k").expect("valid");
        assert_eq!((all.offset, all.blocks, all.size()), (0, 256, 1 << 20));
        let rest = plan("--rw read --bs 4k --offset 512").expect("valid");
        assert_eq!((rest.offset, rest.blocks), (512, 255));
        assert_eq!(rest.offset_of(2), 512 + 8192);
        let part = plan("--rw read --bs 1536 --size 3k").expect("valid");
        assert_eq!(part.blocks, 2);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for bad in [
            "--rw read --bs 0",
            "--rw read --bs 1000",
            "--rw read --bs 2G",
            "--rw read --bs 4k --size 6k",
            "--rw read --bs 4k --size 0",
            "--rw read --bs 4k --size 2M",
            "--rw read --bs 4k --offset 100",
            "--rw read --bs 4k --offset 1M",
            "--rw read --bs 4k --offset 4k --size 1M",
            "--rw read --bs 2M",
            "--rw read --runtime 0",
            "--rw read --fill",
        ] {
            assert!(matches!(plan(bad), Err(Failure::Request(_))), "{bad}");
        }
    }

    #[test]
    fn the_ledger_is_limited() {
        let arguments = arguments("--rw write --verify --bs 512");
        let capacity = (MAX_BLOCKS + 1) * 512;
        assert!(matches!(
            Plan::new(&arguments, capacity, 512),
            Err(Failure::Request(_))
        ));
        assert!(Plan::new(&arguments, capacity - 512, 512).is_ok());
    }

    #[test]
    fn jobs_are_spread() {
        let plan = plan("--rw read --bs 4k --jobs 3").expect("valid");
        assert_eq!([0, 1, 2].map(|job| plan.first_block(job)), [0, 85, 170]);
    }

    #[test]
    fn mixed_workloads() {
        let reads = |percent| {
            let is_read = |&roll: &u8| Workload::Randrw.operation(percent, roll) == Operation::Read;
            (0..100).filter(is_read).count()
        };
        assert_eq!([0, 1, 50, 100].map(reads), [0, 1, 50, 100]);
        assert_eq!(Workload::Randread.operation(0, 99), Operation::Read);
        assert_eq!(Workload::Write.operation(100, 0), Operation::Write);
    }
}
