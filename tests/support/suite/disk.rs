//! A namespace beside a model of it in memory, and the forms in which it is written and read.

use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use fastrand::Rng;
use nvme_async::memory::SharedMemory;
use nvme_async::{DmaBuf, Error, Registered, RegisteredSlice, Registration};

use super::target::{How, Target};

/// The longest write or read.
pub(super) const LARGEST: usize = 2 << 20;
/// Where registered memory is used: at a page, at a word, anywhere.
const PLACES: [usize; 3] = [4096, 1232, 1233];

/// The kinds of memory that a write takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteForm {
    Dma,
    Heap,
    Bytes,
    /// At an odd address.
    OddBytes,
    /// What a read made.
    PoolBytes,
    Vec,
    Registered,
    ManyDma,
    ManyBytes,
    ManyRegistered,
}

pub(crate) const WRITE_FORMS: [WriteForm; 10] = [
    WriteForm::Dma,
    WriteForm::Heap,
    WriteForm::Bytes,
    WriteForm::OddBytes,
    WriteForm::PoolBytes,
    WriteForm::Vec,
    WriteForm::Registered,
    WriteForm::ManyDma,
    WriteForm::ManyBytes,
    WriteForm::ManyRegistered,
];

/// The ways to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadForm {
    /// Into memory of the driver's choice.
    Bytes,
    Dma,
    Heap,
    Registered,
    ManyDma,
    ManyRegistered,
}

pub(crate) const READ_FORMS: [ReadForm; 6] = [
    ReadForm::Bytes,
    ReadForm::Dma,
    ReadForm::Heap,
    ReadForm::Registered,
    ReadForm::ManyDma,
    ReadForm::ManyRegistered,
];

/// A namespace and what it should contain.
pub(crate) struct Disk<'a, N> {
    pub(super) namespace: &'a N,
    pub(super) block_size: usize,
    pub(super) model: Vec<u8>,
    pub(super) random: Rng,
    guest: Arc<Guest>,
    registration: Registration,
}

impl<'a, N: Target> Disk<'a, N> {
    /// Takes the first `area` bytes as they are.
    pub(crate) async fn new(namespace: &'a N, seed: u64, area: u64) -> Self {
        let memory = SharedMemory::new(LARGEST + (256 << 10)).expect("a little memory");
        let guest = Arc::new(Guest(memory));
        let registration = namespace
            .controller()
            .register(guest.clone())
            .await
            .expect("registers");
        let model = namespace.read(0, area as usize).await.expect("reads");
        Self {
            namespace,
            block_size: namespace.block_size(),
            model: model.into(),
            random: Rng::with_seed(seed),
            guest,
            registration,
        }
    }

    /// Writes random data in `form` and checks that the memory comes back as it was.
    pub(crate) async fn write(&mut self, form: WriteForm, how: How, offset: u64, len: usize) {
        let mut data = vec![0; len];
        self.random.fill(&mut data);
        let context = format!("{how:?} write of {len} bytes at {offset} from {form:?}");
        let returned = self.send(form, how, offset, &data).await;
        let returned = returned.unwrap_or_else(|error| panic!("{context}: {error}"));
        assert_same(
            &returned,
            &data,
            &format!("what came back from a {context}"),
        );
        self.model[offset as usize..][..len].copy_from_slice(&data);
    }

    /// Sends data in `form`; returns what the memory holds afterwards.
    pub(super) async fn send(
        &mut self,
        form: WriteForm,
        how: How,
        offset: u64,
        data: &[u8],
    ) -> Result<Bytes, Error> {
        let namespace = self.namespace;
        let len = data.len();
        match form {
            WriteForm::Dma | WriteForm::Heap => {
                let mut buffer = match form {
                    WriteForm::Dma => namespace.allocate(len),
                    _ => DmaBuf::heap(len),
                };
                buffer.copy_from_slice(data);
                let back = namespace.send(offset, buffer, how).await;
                back.map(Bytes::from).map_err(Error::from)
            }
            WriteForm::Bytes => {
                let bytes = Bytes::copy_from_slice(data);
                namespace
                    .send(offset, bytes, how)
                    .await
                    .map_err(Error::from)
            }
            WriteForm::OddBytes => {
                let mut padded = vec![0xee; len + 2];
                let start = 1 + padded.as_ptr().addr() % 2;
                padded[start..start + len].copy_from_slice(data);
                let bytes = Bytes::from(padded).slice(start..start + len);
                namespace
                    .send(offset, bytes, how)
                    .await
                    .map_err(Error::from)
            }
            WriteForm::PoolBytes => {
                let mut buffer = namespace.allocate(len);
                buffer.copy_from_slice(data);
                let bytes = Bytes::from(buffer);
                namespace
                    .send(offset, bytes, how)
                    .await
                    .map_err(Error::from)
            }
            WriteForm::Vec => namespace
                .send(offset, data.to_vec(), how)
                .await
                .map(Bytes::from)
                .map_err(Error::from),
            WriteForm::Registered => {
                let place = self.any(&PLACES);
                self.guest.store(place, data);
                let slice = self.registration.slice(place, len).expect("fits");
                let back = namespace.send(offset, slice, how).await;
                back.map(|slice| self.guest.load(slice.offset(), slice.len()).into())
                    .map_err(Error::from)
            }
            WriteForm::ManyDma => {
                let pieces = self.cut(data);
                let buffers: Vec<DmaBuf> = pieces
                    .iter()
                    .map(|piece| {
                        let mut buffer = namespace.allocate(piece.len());
                        buffer.copy_from_slice(piece);
                        buffer
                    })
                    .collect();
                let back = namespace.send(offset, buffers, how).await;
                back.map(|buffers| join(&buffers)).map_err(Error::from)
            }
            WriteForm::ManyBytes => {
                let pieces = self.cut(data);
                let back = namespace.send(offset, pieces, how).await;
                back.map(|pieces| join(&pieces)).map_err(Error::from)
            }
            WriteForm::ManyRegistered => {
                let slices = self.scatter(len);
                let mut rest = data;
                for slice in &slices {
                    let (now, later) = rest.split_at(slice.len());
                    self.guest.store(slice.offset(), now);
                    rest = later;
                }
                let back = namespace.send(offset, slices, how).await;
                back.map(|slices| self.gather(&slices)).map_err(Error::from)
            }
        }
    }

    /// Reads in `form` and compares with the model.
    pub(crate) async fn check(&mut self, form: ReadForm, offset: u64, len: usize) {
        let namespace = self.namespace;
        let context = format!("read of {len} bytes at {offset} into {form:?}");
        let read: Result<Bytes, Error> = match form {
            ReadForm::Bytes => namespace.read(offset, len).await,
            ReadForm::Dma | ReadForm::Heap => {
                let mut buffer = match form {
                    ReadForm::Dma => namespace.allocate(len),
                    _ => DmaBuf::heap(len),
                };
                buffer.fill(0xee);
                let read = namespace.read_into(offset, buffer).await;
                read.map(Bytes::from).map_err(Error::from)
            }
            ReadForm::Registered => {
                let place = self.any(&PLACES);
                self.guest.store(0, &vec![0xee; place + len + 1]);
                let slice = self.registration.slice(place, len).expect("fits");
                let read = namespace.read_into(offset, slice).await;
                let around = (self.guest.load(0, place), self.guest.load(place + len, 1));
                assert!(
                    around.0.iter().chain(&around.1).all(|&byte| byte == 0xee),
                    "{context}: memory around it changed"
                );
                read.map(|slice| self.guest.load(slice.offset(), slice.len()).into())
                    .map_err(Error::from)
            }
            ReadForm::ManyDma => {
                let sizes: Vec<usize> = self.cut(&vec![0; len]).iter().map(Bytes::len).collect();
                let buffers: Vec<DmaBuf> =
                    sizes.iter().map(|&size| namespace.allocate(size)).collect();
                let read = namespace.read_into(offset, buffers).await;
                read.map(|buffers| join(&buffers)).map_err(Error::from)
            }
            ReadForm::ManyRegistered => {
                let slices = self.scatter(len);
                let end = slices.iter().map(|slice| slice.offset() + slice.len());
                let end = end.max().unwrap_or_default();
                self.guest.store(0, &vec![0xee; end + 1]);
                let mut inside = vec![false; end + 1];
                for slice in &slices {
                    inside[slice.offset()..][..slice.len()].fill(true);
                }
                let read = namespace.read_into(offset, slices).await;
                let around = self.guest.load(0, end + 1);
                assert!(
                    inside
                        .iter()
                        .zip(around)
                        .all(|(inside, byte)| *inside || byte == 0xee),
                    "{context}: memory around it changed"
                );
                read.map(|slices| self.gather(&slices)).map_err(Error::from)
            }
        };
        let read = read.unwrap_or_else(|error| panic!("{context}: {error}"));
        let expected = &self.model[offset as usize..][..len];
        assert_same(&read, expected, &context);
    }

    /// Compares the whole area with the model.
    pub(crate) async fn check_all(&mut self) {
        let step = 1 << 20;
        for start in (0..self.model.len()).step_by(step) {
            let len = step.min(self.model.len() - start);
            self.check(ReadForm::Bytes, start as u64, len).await;
        }
    }

    /// A place for `len` bytes.
    pub(crate) fn place(&mut self, len: usize) -> u64 {
        let blocks = (self.model.len() - len) / self.block_size;
        (self.random.usize(0..=blocks) * self.block_size) as u64
    }

    /// Any of `forms`.
    pub(crate) fn any<T: Copy>(&mut self, forms: &[T]) -> T {
        forms[self.random.usize(0..forms.len())]
    }

    /// Cuts `data` where it pleases: at pages, at words and anywhere.
    fn cut(&mut self, data: &[u8]) -> Vec<Bytes> {
        let unit = self.any(&[1, 4, 4096]);
        let mut pieces = Vec::new();
        let mut rest = Bytes::copy_from_slice(data);
        for _ in 0..self.random.usize(0..5) {
            let at = self.random.usize(0..=rest.len()) / unit * unit;
            if at > 0 {
                pieces.push(rest.split_to(at));
            }
        }
        if !rest.is_empty() {
            pieces.push(rest);
        }
        pieces
    }

    /// Registered memory for `len` bytes, in pieces that lie apart and in no order: a list of pages such as
    /// guests make, of words, or of anything.
    fn scatter(&mut self, len: usize) -> Vec<RegisteredSlice> {
        let sizes: Vec<usize> = self.cut(&vec![0; len]).iter().map(Bytes::len).collect();
        let place = self.any(&PLACES);
        let mut starts = vec![0; sizes.len()];
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        self.random.shuffle(&mut order);
        let mut next = place;
        for index in order {
            starts[index] = next;
            next = (next + sizes[index]).next_multiple_of(4096) + place % 4096;
        }
        let pieces = starts.into_iter().zip(sizes);
        pieces
            .map(|(start, size)| self.registration.slice(start, size).expect("fits"))
            .collect()
    }

    fn gather(&self, slices: &[RegisteredSlice]) -> Bytes {
        let load = |slice: &RegisteredSlice| self.guest.load(slice.offset(), slice.len());
        slices.iter().flat_map(load).collect()
    }
}

/// Foreign memory.
struct Guest(SharedMemory);

impl Guest {
    fn store(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.0.len());
        // SAFETY: inside of the mapping, as checked above.
        let to = unsafe { self.0.addr().add(offset) };
        // SAFETY: writable bytes of a live mapping that no command uses at the moment and that
        // `data` is no part of, since nobody is given a reference to it.
        unsafe { to.copy_from_nonoverlapping(NonNull::from(data).cast(), data.len()) };
    }

    fn load(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.0.len());
        // SAFETY: inside of the mapping, as checked above.
        let from = unsafe { self.0.addr().add(offset) };
        // SAFETY: initialized bytes of a live mapping, which no command writes at the moment.
        unsafe { std::slice::from_raw_parts(from.as_ptr(), len) }.to_vec()
    }
}

// SAFETY: the mapping stays where it is while the value lives, is the whole file, and is accessed
// by `store` and `load` only between commands, with no reference left behind.
unsafe impl Registered for Guest {
    fn addr(&self) -> NonNull<u8> {
        self.0.addr()
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn file(&self) -> Option<(std::os::fd::BorrowedFd<'_>, u64)> {
        Some((self.0.fd(), 0))
    }
}

fn join(pieces: &[impl AsRef<[u8]>]) -> Bytes {
    let pieces: Vec<&[u8]> = pieces.iter().map(AsRef::as_ref).collect();
    pieces.concat().into()
}

/// Compares, and says where the difference begins.
pub(crate) fn assert_same(found: &[u8], expected: &[u8], context: &str) {
    assert_eq!(found.len(), expected.len(), "{context}");
    if found == expected {
        return;
    }
    let differs = |at: &usize| found[*at] != expected[*at];
    let first = (0..found.len()).find(differs).unwrap_or_default();
    let last = (0..found.len()).rfind(differs).unwrap_or_default();
    panic!(
        "{context}: bytes {first} to {last} differ; first {:#04x} instead of {:#04x}",
        found[first], expected[first]
    );
}
