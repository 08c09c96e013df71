//! The client's memory as the server reaches it: by file, or by asking the client.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};

use nvme_soft::{AccessFault, HostMemory};
use vfio_user::socket::send;
use vfio_user::{DmaAccess, DmaMap, Limits, Message, Reply, Request};

use super::lock;

pub(crate) struct Dma {
    asks: bool,
    regions: Mutex<BTreeMap<u64, Region>>,
    asked: Mutex<Asked>,
    /// Held while a message is sent.
    sending: Mutex<()>,
}

struct Region {
    map: DmaMap,
    file: File,
}

#[derive(Default)]
struct Asked {
    client: Option<UnixStream>,
    last: u16,
    waiting: HashMap<u16, Sender<Message>>,
}

impl Dma {
    pub(super) fn new(asks: bool) -> Self {
        Self {
            asks,
            regions: Mutex::default(),
            asked: Mutex::default(),
            sending: Mutex::default(),
        }
    }

    pub(super) fn map(&self, map: DmaMap, file: Option<OwnedFd>) -> Result<(), u32> {
        // Memory without a file is accepted, and then of no use.
        let Some(file) = file else { return Ok(()) };
        let file = File::from(file);
        lock(&self.regions).insert(map.address, Region { map, file });
        Ok(())
    }

    pub(super) fn unmap(&self, address: u64, size: u64) -> Result<(), u32> {
        let mut regions = lock(&self.regions);
        match regions.get(&address) {
            Some(region) if region.map.size == size => {
                regions.remove(&address);
                Ok(())
            }
            _ => Err(libc::ENOENT as u32),
        }
    }

    pub(super) fn clear(&self) {
        lock(&self.regions).clear();
    }

    /// Regions that there are.
    pub(crate) fn regions(&self) -> usize {
        lock(&self.regions).len()
    }

    /// The first address of each region, and its size.
    pub(crate) fn ranges(&self) -> Vec<(u64, u64)> {
        let regions = lock(&self.regions);
        regions
            .values()
            .map(|region| (region.map.address, region.map.size))
            .collect()
    }

    pub(super) fn connect(&self, client: UnixStream) {
        lock(&self.asked).client = Some(client);
    }

    pub(super) fn disconnect(&self) {
        *lock(&self.asked) = Asked::default();
    }

    pub(super) fn answered(&self, message: Message) {
        let waiting = lock(&self.asked).waiting.remove(&message.header.id());
        // What was sent as an answer may have become a question on the way.
        if let Some(waiting) = waiting {
            let _ = waiting.send(message);
        }
    }

    /// Sends a message whole.
    pub(super) fn send(
        &self,
        client: &UnixStream,
        bytes: &[u8],
        fds: &[OwnedFd],
    ) -> io::Result<()> {
        let _sending = lock(&self.sending);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send(client, bytes, &fds)
    }

    /// Asks the client; nothing if it has left.
    pub(crate) fn ask(&self, request: &Request<'_>) -> Option<Message> {
        let (sender, receiver) = channel();
        let (id, client) = {
            let mut asked = lock(&self.asked);
            asked.last = asked.last.wrapping_add(1);
            let id = asked.last;
            let client = asked.client.as_ref()?.try_clone().ok()?;
            asked.waiting.insert(id, sender);
            (id, client)
        };
        self.send(&client, &request.encode(id, false), &[]).ok()?;
        receiver.recv().ok()
    }

    /// Asks the client all of this before it takes an answer; returns how many answers there were.
    pub(crate) fn ask_many(&self, requests: Vec<Request<'_>>) -> usize {
        let _not_sent_meanwhile = lock(&self.sending);
        let (sender, receiver) = channel();
        let mut asked = lock(&self.asked);
        let client = asked
            .client
            .as_ref()
            .and_then(|client| client.try_clone().ok());
        let client = client.expect("a client");
        for request in &requests {
            asked.last = asked.last.wrapping_add(1);
            let id = asked.last;
            asked.waiting.insert(id, sender.clone());
            send(&client, &request.encode(id, false), &[]).expect("sends");
        }
        drop((asked, sender));
        receiver.iter().count()
    }

    /// Sends the client something that nobody waits for.
    pub(crate) fn ask_nothing(&self, bytes: &[u8]) {
        let client = lock(&self.asked).client.as_ref().map(UnixStream::try_clone);
        let client = client.expect("a client").expect("a descriptor");
        self.send(&client, bytes, &[]).expect("sends");
    }

    /// Does something with each piece of a range: the file, the offset in it, and which bytes it is.
    fn each(
        &self,
        fault: AccessFault,
        mut piece: impl FnMut(&File, u64, std::ops::Range<usize>) -> io::Result<()>,
    ) -> Result<(), AccessFault> {
        let regions = lock(&self.regions);
        let mut done = 0;
        while done < fault.len {
            let at = fault.address + done as u64;
            let found = regions.range(..=at).next_back();
            let region = found.map(|(_, region)| region).filter(|region| {
                at - region.map.address < region.map.size
                    && (if fault.is_write {
                        region.map.writable
                    } else {
                        region.map.readable
                    })
            });
            let region = region.ok_or(fault)?;
            let offset = at - region.map.address;
            let part = (region.map.size - offset).min((fault.len - done) as u64) as usize;
            let range = done..done + part;
            piece(&region.file, region.map.offset + offset, range).map_err(|_| fault)?;
            done += part;
        }
        Ok(())
    }
}

impl HostMemory for Dma {
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), AccessFault> {
        let fault = AccessFault::read(address, out.len());
        if !self.asks {
            return self.each(fault, |file, at, range| {
                file.read_exact_at(&mut out[range], at)
            });
        }
        let count = out.len() as u64;
        let request = Request::DmaRead(DmaAccess { address, count });
        let answer = self.ask(&request).ok_or(fault)?;
        match answer.reply(&Limits::default()) {
            Ok(Reply::DmaRead { data, .. }) => out.copy_from_slice(data),
            _ => return Err(fault),
        }
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), AccessFault> {
        let fault = AccessFault::write(address, data.len());
        if !self.asks {
            return self.each(fault, |file, at, range| file.write_all_at(&data[range], at));
        }
        let answer = self
            .ask(&Request::DmaWrite { address, data })
            .ok_or(fault)?;
        match answer.reply(&Limits::default()) {
            Ok(Reply::DmaWrite(_)) => Ok(()),
            _ => Err(fault),
        }
    }

    fn store_release(&self, address: u64, value: u32) -> Result<(), AccessFault> {
        self.write(address, &value.to_le_bytes())
    }

    fn load_acquire(&self, address: u64) -> Result<u32, AccessFault> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }
}
