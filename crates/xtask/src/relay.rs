//! Takes what the guest writes to its virtio-serial ports and serial console.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

/// Something that happened in the guest.
#[derive(Debug)]
pub(crate) enum Event {
    /// All of the command's output, or all of its errors, has been passed on.
    StreamEnded,
    /// The init script has something to say.
    Control(String),
}

/// A socket that QEMU connects to. Its name is in no file system, so nothing is left behind.
#[derive(Debug)]
pub(crate) struct Port {
    listener: UnixListener,
    name: String,
}

impl Port {
    pub(crate) fn open() -> Result<Self> {
        let name = format!("nvme-async-xtask-{}", random());
        let address = SocketAddr::from_abstract_name(&name)?;
        let listener = UnixListener::bind_addr(&address).context("a socket for the guest")?;
        Ok(Self { listener, name })
    }

    /// The value of QEMU's option `-chardev` that connects here as `id`.
    pub(crate) fn chardev(&self, id: &str) -> String {
        format!("socket,id={id},path={},abstract=on", self.name)
    }

    /// Passes on what arrives before `marker`, as it arrives.
    pub(crate) fn copy(
        self,
        marker: String,
        mut sink: Box<dyn Write + Send>,
        events: Sender<Event>,
    ) {
        thread::spawn(move || {
            if copy(self.listener, marker, &mut *sink).unwrap_or(false) {
                // Nobody listens any more when the machine was given up.
                let _ = events.send(Event::StreamEnded);
            }
        });
    }

    /// Passes on lines.
    pub(crate) fn control(self, events: Sender<Event>) {
        thread::spawn(move || {
            let Ok((stream, _)) = self.listener.accept() else {
                return;
            };
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let _ = events.send(Event::Control(line));
            }
        });
    }

    /// Collects the kernel's messages, and shows them at once if `live`.
    pub(crate) fn log(self, live: bool) -> KernelLog {
        let log = KernelLog::default();
        let kept = log.clone();
        thread::spawn(move || {
            let Ok((stream, _)) = self.listener.accept() else {
                return;
            };
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if live {
                    eprintln!("{line}");
                }
                kept.push(line);
            }
        });
        log
    }
}

/// The last messages of the guest's kernel.
#[derive(Clone, Debug, Default)]
pub(crate) struct KernelLog(Arc<Mutex<VecDeque<String>>>);

impl KernelLog {
    const LINES: usize = 200;

    fn push(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == Self::LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    pub(crate) fn show(&self) {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        eprintln!(
            "xtask: the last {} lines of the guest's kernel log:",
            lines.len()
        );
        for line in &*lines {
            eprintln!("| {line}");
        }
    }
}

/// A number that nobody guesses, as text.
pub(crate) fn random() -> String {
    format!("{:016x}", RandomState::new().hash_one(()))
}

/// Copies until `marker`; returns whether it came.
fn copy(listener: UnixListener, marker: String, sink: &mut dyn Write) -> io::Result<bool> {
    let (mut stream, _) = listener.accept()?;
    let mut ending = Ending::new(marker.into_bytes());
    let mut buffer = vec![0; 64 << 10];
    let mut sink_open = true;
    loop {
        let length = stream.read(&mut buffer)?;
        let passed_on = ending.push(&buffer[..length], length == 0);
        // Without a reader (`| head`) the guest goes on, as it would without a machine around it.
        sink_open = sink_open
            && sink
                .write_all(&passed_on)
                .and_then(|()| sink.flush())
                .is_ok();
        if length == 0 || ending.reached {
            return Ok(ending.reached);
        }
    }
}

/// Finds a marker at the end of a stream, and holds back only what may be its beginning.
struct Ending {
    marker: Vec<u8>,
    held: Vec<u8>,
    reached: bool,
}

impl Ending {
    fn new(marker: Vec<u8>) -> Self {
        Self {
            marker,
            held: Vec::new(),
            reached: false,
        }
    }

    /// Takes what was read, and returns what certainly is not of the marker.
    fn push(&mut self, bytes: &[u8], last: bool) -> Vec<u8> {
        self.held.extend_from_slice(bytes);
        if self.held.ends_with(&self.marker) {
            self.reached = true;
            self.held.truncate(self.held.len() - self.marker.len());
            return std::mem::take(&mut self.held);
        }
        let longest = self.held.len().min(self.marker.len());
        let suspect = (1..=longest)
            .rev()
            .find(|&length| self.held.ends_with(&self.marker[..length]));
        let keep = if last { 0 } else { suspect.unwrap_or(0) };
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(chunks: &[&str]) -> (String, bool) {
        let mut ending = Ending::new(b"\x01end".to_vec());
        let mut output = Vec::new();
        for chunk in chunks {
            output.extend(ending.push(chunk.as_bytes(), chunk.is_empty()));
        }
        (String::from_utf8(output).unwrap(), ending.reached)
    }

    #[test]
    fn the_marker_is_found_wherever_it_is_cut() {
        assert_eq!(through(&["hello\x01end"]), ("hello".to_owned(), true));
        assert_eq!(through(&["hello", "\x01end"]), ("hello".to_owned(), true));
        assert_eq!(
            through(&["hello\x01", "e", "nd"]),
            ("hello".to_owned(), true)
        );
        assert_eq!(through(&["\x01\x01en", "d"]), ("\x01".to_owned(), true));
    }

    #[test]
    fn what_only_begins_like_the_marker_passes() {
        assert_eq!(
            through(&["a\x01e", "b\x01en", "x"]),
            ("a\x01eb\x01enx".to_owned(), false)
        );
        assert_eq!(through(&["a\x01en", ""]), ("a\x01en".to_owned(), false));
    }

    #[test]
    fn ordinary_output_is_not_held_back() {
        assert_eq!(through(&["progress"]), ("progress".to_owned(), false));
    }
}
