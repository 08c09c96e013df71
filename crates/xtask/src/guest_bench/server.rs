//! A process that serves a file over vhost-user.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::param::clock_ticks_per_second;

use super::image::Image;

/// A server that has not made its socket by then will not.
const START: Duration = Duration::from_secs(20);

/// How qemu-storage-daemon uses a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) is_direct: bool,
    pub(super) aio: &'static str,
}

/// A server, which ends with this value.
#[derive(Debug)]
pub(super) struct Server {
    process: Child,
    pub(super) socket: PathBuf,
}

impl Server {
    /// `nvme-async serve vhost-user-blk`, with the program in the directory `programs`.
    pub(super) fn ours(programs: &Path, image: &Image, socket: &Path, queues: u32) -> Result<Self> {
        let mut command = Command::new(programs.join("nvme-async"));
        command
            .args(["serve", "vhost-user-blk", "--queues", &queues.to_string()])
            .arg("--socket")
            .arg(socket)
            .arg(format!("file:{}", image.path.display()))
            .stdout(Stdio::piped());
        let mut server = Self::start(command, socket)?;
        // The socket is there before the controller is; and a driver that comes up beside something else that is busy
        // learns the wrong things about how long it takes to sleep.
        let stdout = server.process.stdout.take().context("its output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line.starts_with("serving"), "nvme-async does not serve");
        Ok(server)
    }

    pub(super) fn storage_daemon(
        access: Access,
        image: &Image,
        socket: &Path,
        queues: u32,
    ) -> Result<Self> {
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=file,{}",
                access.options(&image.path)
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=file,writable=on,num-queues={queues},\
                 addr.type=unix,addr.path={}",
                socket.display()
            ));
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: &Path) -> Result<Self> {
        // Of a process that was killed.
        let _ = fs::remove_file(socket);
        let process = command.stdin(Stdio::null()).spawn();
        let name = command.get_program().to_string_lossy().into_owned();
        let mut server = Self {
            process: process.with_context(|| name.clone())?,
            socket: socket.to_owned(),
        };
        let began = Instant::now();
        while !socket.exists() {
            if let Some(status) = server.process.try_wait()? {
                bail!("{name} has ended ({status})");
            }
            ensure!(began.elapsed() < START, "{name} makes no socket");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// What its threads have taken of processors so far.
    pub(super) fn cpu_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.process.id());
        let stat = fs::read_to_string(&path).with_context(|| path.clone())?;
        let ticks = ticks(&stat).with_context(|| format!("{path}: {stat}"))?;
        Ok(Duration::from_secs(ticks) / clock_ticks_per_second() as u32)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end and nothing to remove.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

impl Access {
    /// Options of QEMU's driver `file`.
    pub(super) fn options(self, path: &Path) -> String {
        let direct = if self.is_direct { "on" } else { "off" };
        format!(
            "filename={},cache.direct={direct},aio={}",
            path.display().to_string().replace(',', ",,"),
            self.aio
        )
    }
}

/// User and system time, the 14th and 15th field of proc_pid_stat(5), the second of which is a name in parentheses.
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11);
    let mut field = || fields.next()?.parse::<u64>().ok();
    Some(field()? + field()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "25033 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 300 42 0 0 20 0 1 0 7";
        assert_eq!(ticks(stat), Some(342));
        assert_eq!(ticks("25033 (a) S 1 2"), None);
        let own = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(ticks(&own).is_some());
    }

    #[test]
    fn paths_are_escaped() {
        let access = Access {
            is_direct: true,
            aio: "native",
        };
        let expected = "filename=/a,,b,cache.direct=on,aio=native";
        assert_eq!(access.options(Path::new("/a,b")), expected);
    }
}
