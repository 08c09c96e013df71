//! SET_MEM_TABLE of a front end that sends room for more regions than it has.
//!
//! Linux's virtio_uml is one (in Linux 6.1): one region, and room for two. Other servers take that, since the message says
//! how many regions there are; the crate `vhost` does not. So such a message is received here, and all others there.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg,
};
use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag, VhostUserMemoryRegion};

/// Bytes of a header: the request, flags, and the bytes that follow.
const HEADER: usize = 12;
/// Bytes up to the first region: the header, how many regions there are, and padding.
const TO_REGIONS: usize = HEADER + 8;
/// Bytes of a region.
const REGION: usize = 32;
/// The limits of the crate `vhost`: regions of a table, and bytes that follow a header.
const MAX_REGIONS: usize = 32;
const MAX_SIZE: usize = 0x1000;
/// The bits of the flags that have the version of the protocol, which is 1.
const VERSION: u32 = 3;

/// What the message says.
pub(super) struct PaddedTable {
    pub(super) regions: Vec<VhostUserMemoryRegion>,
    /// One for each region.
    pub(super) files: Vec<File>,
    pub(super) needs_reply: bool,
}

impl PaddedTable {
    /// Waits for a message, and takes it if it is such a one.
    ///
    /// # Errors
    ///
    /// It can't be taken, and there is no telling where the next one begins.
    pub(super) fn receive(stream: &UnixStream) -> io::Result<Option<Self>> {
        let mut start = [0; TO_REGIONS];
        // Of messages that are nothing but a header there is no more to wait for.
        if !peek(stream, &mut start[..HEADER])
            || word(&start, 0) != u32::from(FrontendReq::SET_MEM_TABLE)
            || !peek(stream, &mut start)
        {
            return Ok(None);
        }
        let [flags, size, count] = [4, 8, 12].map(|at| word(&start, at));
        let (size, count) = (size as usize, count as usize);
        let is_request = flags & (VERSION | VhostUserHeaderFlag::REPLY.bits()) == 1;
        let needed = count
            .saturating_mul(REGION)
            .saturating_add(TO_REGIONS - HEADER);
        let is_padded =
            (1..=MAX_REGIONS).contains(&count) && (needed + 1..=MAX_SIZE).contains(&size);
        if !is_request || !is_padded {
            return Ok(None);
        }
        let mut message = vec![0; HEADER + size];
        let files = read(stream, &mut message)?;
        if files.len() != count {
            let text = format!("{} files for {count} regions of memory", files.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let regions = message[TO_REGIONS..].chunks_exact(REGION).take(count);
        Ok(Some(Self {
            regions: regions.map(region).collect(),
            files,
            needs_reply: flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0,
        }))
    }
}

/// Tells the front end what became of the message.
pub(super) fn acknowledge(mut stream: &UnixStream, is_done: bool) -> io::Result<()> {
    let flags = 1 | VhostUserHeaderFlag::REPLY.bits();
    let header = [FrontendReq::SET_MEM_TABLE.into(), flags, 8];
    let mut reply: Vec<u8> = header.into_iter().flat_map(u32::to_ne_bytes).collect();
    reply.extend(u64::from(!is_done).to_ne_bytes());
    stream.write_all(&reply)
}

/// Waits for bytes that are left where they are. Where they do not come, they are for others to miss.
fn peek(stream: &UnixStream, into: &mut [u8]) -> bool {
    let len = into.len();
    recv(stream, into, RecvFlags::PEEK | RecvFlags::WAITALL).is_ok_and(|(read, _)| read == len)
}

/// Reads bytes, and the files that come with the first of them.
fn read(mut stream: &UnixStream, into: &mut [u8]) -> io::Result<Vec<File>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_REGIONS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream,
        &mut [IoSliceMut::new(into)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    let files = files.flatten().map(File::from).collect();
    if received.flags.contains(ReturnFlags::CTRUNC) {
        let text = "more files than regions of memory can have";
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    stream.read_exact(&mut into[received.bytes..])?;
    Ok(files)
}

fn region(bytes: &[u8]) -> VhostUserMemoryRegion {
    let [start, size, user_address, offset] =
        [0, 8, 16, 24].map(|at| u64::from_ne_bytes(array(bytes, at)));
    VhostUserMemoryRegion::new(start, size, user_address, offset)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(array(bytes, at))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[at + index])
}
