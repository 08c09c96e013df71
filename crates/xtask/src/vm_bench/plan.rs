//! What runs in which order, and the script that makes the guest do it.

use std::fmt;
use std::time::Duration;

/// Who does the I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// fio's engine of that name, on the kernel's driver.
    Libaio,
    /// fio's engine of that name, on the kernel's driver.
    IoUring,
    /// `qemu-img bench` with QEMU's own driver for VFIO, `nvme://`.
    QemuImg,
    /// `nvme-async bench`.
    Ours,
}

impl Peer {
    pub(super) const ALL: [Self; 4] = [Self::Libaio, Self::IoUring, Self::QemuImg, Self::Ours];
    const ON_KERNEL_DRIVER: [Self; 2] = [Self::Libaio, Self::IoUring];
    const ON_VFIO: [Self; 2] = [Self::QemuImg, Self::Ours];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Libaio => "libaio",
            Self::IoUring => "io_uring",
            Self::QemuImg => "qemu-img",
            Self::Ours => "nvme-async",
        }
    }

    /// Whether it can do that; `qemu-img bench` either reads or writes.
    pub(super) fn does(self, workload: &Workload) -> bool {
        self != Self::QemuImg || workload.rw != "randrw"
    }
}

/// Requests of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Workload {
    /// fio's word for it.
    pub(crate) rw: &'static str,
    /// How many are in flight.
    pub(crate) iodepth: u32,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} QD{}", self.rw, self.iodepth)
    }
}

const fn workload(rw: &'static str, iodepth: u32) -> Workload {
    Workload { rw, iodepth }
}

/// All of them.
pub(crate) const WORKLOADS: [Workload; 6] = [
    workload("randread", 1),
    workload("randread", 4),
    workload("randwrite", 1),
    workload("randwrite", 4),
    workload("randrw", 1),
    workload("randrw", 4),
];

/// One workload by one of the peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first one is 1.
    pub(super) round: u32,
    pub(super) workload: Workload,
    pub(super) peer: Peer,
}

/// All runs, in order.
#[derive(Debug)]
pub(super) struct Plan {
    /// What a run measures, and does before that.
    pub(super) seconds: u32,
    pub(super) rounds: u32,
    pub(super) runs: Vec<Run>,
}

/// How long a run goes on before it measures; `qemu-img` does not.
const RAMP: Duration = Duration::from_millis(500);

/// What a program needs to start and to end in an emulated machine, amply.
const START: Duration = Duration::from_secs(10);

/// How long the rest of a round may take, and the boot, amply.
const ROUND: Duration = Duration::from_secs(120);

impl Plan {
    pub(super) fn new(seconds: u32, rounds: u32) -> Self {
        let mut runs = Vec::new();
        for round in 1..=rounds {
            for mut peers in [Peer::ON_KERNEL_DRIVER, Peer::ON_VFIO] {
                // None of two is always the first.
                if round % 2 == 0 {
                    peers.reverse();
                }
                for workload in WORKLOADS {
                    let able = peers.into_iter().filter(|peer| peer.does(&workload));
                    runs.extend(able.map(|peer| Run {
                        round,
                        workload,
                        peer,
                    }));
                }
            }
        }
        Self {
            seconds,
            rounds,
            runs,
        }
    }

    /// When a run is taken to hang.
    fn limit(&self) -> Duration {
        4 * (Duration::from_secs(self.seconds.into()) + RAMP) + START
    }

    /// When the machine is taken to hang.
    pub(super) fn time_limit(&self) -> Duration {
        let runs: Duration = self.runs.iter().map(|_| self.limit() + START).sum();
        runs + (self.rounds + 1) * ROUND
    }

    /// The script, which takes additional arguments of `nvme-async bench`, and the controller's
    /// address in the variable NVME0. Its runs are numbered as they are here.
    pub(super) fn script(&self) -> String {
        let mut script = format!(
            "seconds={} ramp_ms={} limit={}\n{}",
            self.seconds,
            RAMP.as_millis(),
            self.limit().as_secs(),
            include_str!("guest.sh")
        );
        let mut driver = "";
        for (number, run) in self.runs.iter().enumerate() {
            let wanted = if Peer::ON_VFIO.contains(&run.peer) {
                "use_vfio"
            } else {
                "use_kernel_driver"
            };
            if wanted != driver {
                script += &format!("{wanted}\n");
                driver = wanted;
            }
            let Workload { rw, iodepth } = run.workload;
            let peer = run.peer.name();
            script += &format!("run {number} {peer} {rw} {iodepth} \"$@\"\n");
        }
        script
    }
}

#[cfg(test)]
mod tests {
    use std::process::{self, Command};
    use std::{env, fs};

    use super::*;

    #[test]
    fn every_round_has_everything_twice_rebound() {
        let plan = Plan::new(3, 2);
        // Six workloads by three peers, four by qemu-img.
        assert_eq!(plan.runs.len(), 2 * (6 * 3 + 4));
        for workload in WORKLOADS {
            for peer in Peer::ALL.into_iter().filter(|peer| peer.does(&workload)) {
                let rounds = plan
                    .runs
                    .iter()
                    .filter(|run| run.workload == workload && run.peer == peer);
                let rounds: Vec<u32> = rounds.map(|run| run.round).collect();
                assert_eq!(rounds, [1, 2], "{workload} {}", peer.name());
            }
        }
        let script = plan.script();
        let lines = |wanted: &str| script.lines().filter(|line| *line == wanted).count();
        assert_eq!((lines("use_kernel_driver"), lines("use_vfio")), (2, 2));
    }

    /// Runs the script with programs that say what they are called with.
    #[test]
    fn the_guest_runs_what_is_planned() {
        let stand_ins = r#"
            export PATH="$directory:$PATH"
            echo 'echo version 9' >"$directory/fio"
            echo 'echo version 9' >"$directory/qemu-img"
            echo 'echo "nvme-async $*" >&2' >"$directory/nvme-async"
            echo 'echo /dev/null' >"$directory/ls"
            # Each run has a rate of 100 times its number of requests in flight; the last one hangs.
            cat >"$directory/timeout" <<'END'
shift 2
echo "$*"
echo "  \"iops\" : ${6#*=}00.5,"
printf '  "iops" : 0.000'
case "$*" in nvme-async*randrw*"--iodepth 4 "*) exit 124 ;; esac
END
            chmod +x "$directory"/*
        "#;
        let directory = env::temp_dir().join(format!("xtask-plan-{}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        let text = directory.display();
        let script = Plan::new(3, 1)
            .script()
            .replace("/run/", &format!("{text}/"))
            .replace("[ -b \"$disk\" ]", "[ -c \"$disk\" ]");
        let script = format!("directory={text}\n{stand_ins}\n{script}");
        let output = Command::new("sh")
            .args(["-c", &script, "vm-bench", "--poll", "busy"])
            .env("NVME0", "0000:00:10.0")
            .output()
            .unwrap();
        fs::remove_dir_all(&directory).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{text}{errors}");
        assert_eq!(
            errors,
            "nvme-async unbind 0000:00:10.0\nnvme-async bind 0000:00:10.0\n"
        );
        for expected in [
            ", version 9, version 9\nnote nvme-async bench --poll busy\nrun 0\nout fio \
             --name=vm-bench --filename=/dev/null --ioengine=libaio --rw=randread --iodepth=1 ",
            "--runtime=3s --ramp_time=500ms ",
            "\nout   \"iops\" : 0.000\nended 0 0\nrun 1\n",
            "\nout qemu-img bench -c 1200 -d 4 -s 4096 -f raw nvme://0000:00:10.0/1\n",
            "\nout qemu-img bench -c 300 -d 1 -s 4096 -f raw -w nvme://0000:00:10.0/1\n",
            "\nout nvme-async bench nvme://0000:00:10.0/1 --rw randrw --bs 4k --iodepth 4 \
             --runtime 3 --ramp 0.500 --json --poll busy\n",
            "\nended 21 124\n",
        ] {
            assert!(text.contains(expected), "{expected} in {text}");
        }
    }
}
