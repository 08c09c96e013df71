//! The server of the disks, `nvme-async serve vhost-user-blk`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail, ensure};

const MIB: u64 = 1 << 20;
/// The disks, as bytes of the namespace. The guest's script knows their size and where they begin.
const DISKS: [Range<u64>; 2] = [16 * MIB..144 * MIB, 160 * MIB..288 * MIB];
/// Bytes of the namespace, which has room before, between and after the disks.
const NAMESPACE: u64 = 304 * MIB;

/// Whether the server takes memory that guests could take away again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    Untrusted,
    Trusted,
}

/// The server, its sockets and its file.
pub(super) struct Server {
    program: PathBuf,
    trust: Trust,
    /// Of each disk.
    sockets: [PathBuf; 2],
    image: PathBuf,
    running: Option<Running>,
}

struct Running {
    process: Child,
    /// Passes on what it complains about; returns the counters that it logs at its end, if it comes to that.
    messages: JoinHandle<Option<String>>,
}

impl Server {
    /// The program of the directory `programs`, with its files in `directory`. It does not run yet.
    pub(super) fn new(directory: &Path, programs: &Path, trust: Trust) -> Self {
        let name = |end: &str| directory.join(format!("disk-{}{end}", std::process::id()));
        let server = Self {
            program: programs.join("nvme-async"),
            trust,
            sockets: [name("a.sock"), name("b.sock")],
            image: name(".img"),
            running: None,
        };
        // Of a process that had the same number and was killed.
        let _ = fs::remove_file(&server.image);
        server
    }

    pub(super) fn sockets(&self) -> &[PathBuf; 2] {
        &self.sockets
    }

    /// Starts the server, and waits until it listens.
    pub(super) fn start(&mut self) -> Result<()> {
        let mut command = Command::new(&self.program);
        command.args(["serve", "vhost-user-blk", "--queues", "2"]);
        if self.trust == Trust::Trusted {
            command.arg("--trust-client");
        }
        for (socket, Range { start, end }) in self.sockets.iter().zip(&DISKS) {
            let socket = socket.display();
            command.arg("--disk");
            command.arg(format!("socket={socket},range={start}+{}", end - start));
        }
        let mut process = command
            .arg(format!("file:{}?size={NAMESPACE}", self.image.display()))
            // The counters are a message of the controller's.
            .env("RUST_LOG", "warn,nvme_async::controller=debug")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| self.program.display().to_string())?;
        let output = process.stdout.take().context("no pipe from the server")?;
        let messages = process.stderr.take().context("no pipe from the server")?;
        self.running = Some(Running {
            process,
            messages: thread::spawn(move || counters(messages)),
        });
        let mut announced = BufReader::new(output).lines();
        for _ in &self.sockets {
            let line = announced.next().context("the server does not start")??;
            ensure!(line.starts_with("serving "), "the server says: {line}");
        }
        Ok(())
    }

    /// Kills it, so that it can do nothing more (SIGKILL).
    pub(super) fn kill(&mut self) -> Result<()> {
        if let Some(mut running) = self.running.take() {
            running.process.kill()?;
            running.process.wait()?;
        }
        Ok(())
    }

    /// Ends the server in order. It fails if the last one copied data, or if something was written outside of the
    /// disks.
    pub(super) fn end(mut self) -> Result<()> {
        let Running {
            mut process,
            messages,
        } = self.running.take().context("it runs")?;
        let ended = Command::new("kill").arg(process.id().to_string()).status();
        ensure!(
            ended.context("kill")?.success(),
            "the server has ended before"
        );
        let status = process.wait()?;
        ensure!(status.success(), "the server ended with {status}");
        let left = self.sockets.iter().find(|socket| socket.exists());
        ensure!(left.is_none(), "the server has left its socket");

        let Ok(counters) = messages.join() else {
            bail!("the thread that reads the server's messages panicked");
        };
        let counters = counters.context("the server logs no counters")?;
        let counter = |name: &str| {
            counter(&counters, name).with_context(|| format!("no {name} in: {counters}"))
        };
        let (completions, bounced) = (counter("completions")?, counter("bounced_bytes")?);
        println!("vm-disk: the last server did {completions} commands and copied {bounced} bytes");
        ensure!(completions > 0, "the last server had nothing to do");
        ensure!(
            bounced == 0,
            "data went through the server's memory on their way"
        );
        self.rest_is_untouched()
    }

    fn rest_is_untouched(&self) -> Result<()> {
        let [first, second] = &DISKS;
        let gaps = [
            0..first.start,
            first.end..second.start,
            second.end..NAMESPACE,
        ];
        let mut file = File::open(&self.image)?;
        ensure!(file.metadata()?.len() == NAMESPACE, "the file's size");
        for gap in gaps {
            file.seek(SeekFrom::Start(gap.start))?;
            let mut bytes = Vec::new();
            (&file).take(gap.end - gap.start).read_to_end(&mut bytes)?;
            let written = bytes.iter().position(|byte| *byte != 0);
            if let Some(at) = written {
                bail!(
                    "byte {at} after {} was written, and is no disk's",
                    gap.start
                );
            }
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = self.kill();
        for path in self.sockets.iter().chain([&self.image]) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Passes on what the server complains about; returns the message that has its counters.
fn counters(messages: ChildStderr) -> Option<String> {
    let mut counters = None;
    for line in BufReader::new(messages).lines().map_while(Result::ok) {
        if line.contains("counters=") {
            counters = Some(line);
        } else if !line.contains(" DEBUG ") && !line.contains(" INFO ") {
            eprintln!("{line}");
        }
    }
    counters
}

/// The value of a counter in the message that has them all.
fn counter(message: &str, name: &str) -> Option<u64> {
    let (_, value) = message.split_once(&format!(" {name}: "))?;
    let end = value
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(value.len());
    value[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_their_whole_name() {
        let message =
            "shutdown counters=Counters { polled_completions: 3, completions: 17, last: 5 }";
        assert_eq!(counter(message, "completions"), Some(17));
        assert_eq!(counter(message, "last"), Some(5));
        assert_eq!(counter(message, "bounced_bytes"), None);
    }
}
