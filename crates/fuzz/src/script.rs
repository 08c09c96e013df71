//! What an input says: the controller, its moves, and the program that uses it.

use arbitrary::Arbitrary;

/// One input.
#[derive(Arbitrary, Clone, Debug, Default)]
pub struct Script {
    /// What the controller claims to be.
    pub claims: Claims,
    /// What it does to commands: so many it serves as it should, then this once.
    pub moves: Vec<(u8, Move)>,
    /// What it does to accesses of its registers: so many it answers as it should, then this once.
    pub registers: Vec<(u8, RegisterMove)>,
    /// How it is opened.
    pub opening: Opening,
    /// What is done with it: groups of operations that run side by side.
    pub program: Vec<Vec<Step>>,
}

/// What differs from a sound controller in what it says of itself.
#[derive(Arbitrary, Clone, Debug, Default)]
pub struct Claims {
    /// CAP, exclusive or.
    pub capabilities: Option<u64>,
    /// VS.
    pub version: Option<u32>,
    /// CRTO.
    pub ready_timeouts: u32,
    /// How many interrupt vectors there are, less 1, modulo 3.
    pub vectors: u8,
    /// What Set Features answers to Number of Queues.
    pub queues: Option<u32>,
    /// Bytes of Identify Controller.
    pub controller: Vec<(u16, u8)>,
    /// Bytes of Identify Namespace.
    pub namespace: Vec<(u16, u8)>,
    /// Bytes of Identify Controller of the NVM command set.
    pub nvm_controller: Vec<(u16, u8)>,
    /// Entries of the list of active namespaces.
    pub namespaces: Vec<u32>,
    /// Mappings that the IOMMU takes, if it takes few.
    pub mappings: Option<u8>,
}

/// How the controller is opened.
#[derive(Arbitrary, Clone, Debug, Default)]
pub struct Opening {
    /// Whether data is copied out of the device's reach.
    pub shared_memory: bool,
    /// Interrupts, adaptive, or busy polling; modulo 3.
    pub poll_mode: u8,
    /// Shared queue pairs, less 1, modulo 3.
    pub queues: u8,
    /// Whether the queues of one thread are used.
    pub local: bool,
    /// Entries of a queue, less 2, modulo 15.
    pub entries: u8,
    /// The largest transfer is a page shifted left by this, modulo 6.
    pub pages: u8,
    /// How it ends.
    pub ending: Ending,
}

/// How a program ends.
#[derive(Arbitrary, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ending {
    /// With a shutdown.
    #[default]
    Shutdown,
    /// By dropping all handles.
    Drop,
    /// By dropping the runtime first.
    DropRuntime,
}

/// What the controller does to one command.
#[derive(Arbitrary, Clone, Debug)]
pub enum Move {
    /// Completes it with an entry in which something is wrong.
    Complete(Completion),
    /// Does not complete it now.
    Withhold,
    /// Completes it, and then one that was withheld.
    Late(u8),
    /// Completes it, after writing these bytes into its data.
    Data(u16, Vec<u8>),
    /// Writes bytes anywhere, then completes it.
    Scribble(Place, u16, Vec<u8>),
    /// Writes an entry of any completion queue, at its tail or further on, then completes it.
    Entry {
        /// Which queue, modulo their number.
        queue: u8,
        /// So many entries after the tail.
        after: u8,
        /// The entry.
        dwords: [u32; 4],
    },
    /// Completes it and signals a vector.
    Interrupt(u8),
    /// Completes it with the interrupt left out.
    Silent,
    /// Completes it and reports an event, if the driver asked for one.
    Event(u32),
    /// CSTS reads as this from now on.
    Status(u32),
    /// All registers read as ones from now on, and nothing is served.
    Vanish,
}

/// A completion queue entry, as it differs from the right one.
#[derive(Arbitrary, Clone, Debug)]
pub struct Completion {
    /// Exclusive or.
    pub cid: u16,
    /// Exclusive or.
    pub sq_id: u16,
    /// Exclusive or.
    pub sq_head: u16,
    /// As it is, without the phase.
    pub status: u16,
    /// Dword 0.
    pub result: u32,
    /// Whether the phase is that of the round before.
    pub stale: bool,
    /// How often it is posted, modulo 4.
    pub times: u8,
    /// Whether an interrupt follows.
    pub interrupt: bool,
}

/// Where the device writes.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    /// A submission queue.
    Submission(u8),
    /// A completion queue.
    Completion(u8),
    /// The memory that the command's data pointer names first.
    Prp1,
    /// The memory that it names second: a page, a list.
    Prp2,
    /// Any mapping.
    Mapping(u8),
}

/// What the device does to one access of a register.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum RegisterMove {
    /// A read returns this.
    Value(u32),
    /// A read returns another bit.
    Flip(u8),
    /// The transport fails.
    Fail,
}

/// An operation, and after how many polls its future is dropped.
#[derive(Arbitrary, Clone, Debug)]
pub struct Step {
    /// Nothing to wait for the end.
    pub polls: Option<u8>,
    /// The operation.
    pub operation: Operation,
}

/// An operation. Offsets and lengths are in blocks and kept small.
#[derive(Arbitrary, Clone, Debug)]
#[expect(
    missing_docs,
    reason = "they are the operations of a namespace, by name"
)]
pub enum Operation {
    Read(u8, u8),
    ReadInto(Memory, u8, u8),
    Write(Memory, bool, u8, u8),
    WriteBytes(u8, u8),
    Compare(Memory, u8, u8),
    Flush,
    WriteZeroes(u8, u8),
    Discard(Vec<(u8, u8)>),
    Verify(u8, u8),
    Copy(Vec<(u8, u8)>, u8),
    Quiesce,
    Active,
    Open(u32),
}

/// Memory of an operation.
#[derive(Arbitrary, Clone, Copy, Debug)]
#[expect(missing_docs, reason = "they are the kinds of memory, by name")]
pub enum Memory {
    Pool,
    Heap,
    Many,
}
