//! What the device offers: features and configuration space (virtio 1.2, sections 5.2.3 and 5.2.4).

use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use crate::Export;

/// The unit of a request's offset, whatever the size of a block, in bytes.
pub(super) const SECTOR: u64 = 512;
/// Segments of a request's data, by which a request with header and status fits a queue of 128.
pub(super) const SEG_MAX: u16 = 126;
/// Bytes of a segment.
pub(super) const SIZE_MAX: u32 = 1 << 20;
/// Sectors that one segment of Write Zeroes has: 32 MiB.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;
/// Sectors that one segment of Discard has: 1 TiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 31;
/// Segments of a Discard and of a Write Zeroes.
pub(super) const MAX_SEGMENTS: u32 = 64;

/// Bytes of configuration space. Past the fields that there are, it is zero.
const CONFIG_LEN: usize = 256;
/// Where `writeback` is, which the driver may write.
const WRITEBACK_AT: usize = 32;

/// The features that a driver and a front end may have.
pub(super) fn features(export: &Export) -> u64 {
    let mut features: u64 = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_MQ,
    ]
    .into_iter()
    .fold(0, |all, bit| all | 1 << bit);
    if export.is_read_only() {
        features |= 1 << VIRTIO_BLK_F_RO;
    } else {
        features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        if can_discard(export) {
            features |= 1 << VIRTIO_BLK_F_DISCARD;
        }
    }
    features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

/// Whether a feature is among `features`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features >> bit & 1 != 0
}

/// The features of the protocol; the crate `vhost` adds REPLY_ACK. Nothing is asked of front ends by BACKEND_REQ, but
/// Linux's virtio_uml takes no interrupts where that is not offered.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

fn can_discard(export: &Export) -> bool {
    let commands = export.namespace().controller().identify();
    commands.optional_nvm_commands().dataset_management()
}

/// `len` bytes of configuration space at `offset`.
pub(super) fn read(
    export: &Export,
    queues: u16,
    is_writeback: bool,
    offset: u32,
    len: u32,
) -> Option<Vec<u8>> {
    let mut config = [0; CONFIG_LEN];
    let block = export.block_size();
    let sectors_of_block = block / SECTOR as u32;
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(export.size() / SECTOR).to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &u32::from(SEG_MAX).to_le_bytes());
    put(20, &block.to_le_bytes());
    // Topology: a physical block is a logical one; least and best size of I/O, in logical blocks.
    put(26, &1_u16.to_le_bytes());
    put(WRITEBACK_AT, &[is_writeback.into()]);
    put(34, &queues.to_le_bytes());
    if !export.is_read_only() {
        if can_discard(export) {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_SEGMENTS.to_le_bytes());
            put(44, &sectors_of_block.to_le_bytes());
        }
        put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_SEGMENTS.to_le_bytes());
        put(56, &[1]);
    }
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    Some(config.get(start..end)?.to_vec())
}

/// What a driver's write of configuration space sets `writeback` to, which is all that it may write.
pub(super) fn written_writeback(offset: u32, bytes: &[u8]) -> Option<bool> {
    match (offset as usize, bytes) {
        (WRITEBACK_AT, [0]) => Some(false),
        (WRITEBACK_AT, [1]) => Some(true),
        _ => None,
    }
}
