//! What a controller says of a namespace.

use std::sync::Arc;

use nvme_spec::identify::{IdentifyNamespace, NamespaceDescriptor, NamespaceDescriptors};

/// What was said of an active namespace, which can be.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    identify: Arc<IdentifyNamespace>,
    uuid: Option<[u8; 16]>,
    geometry: Geometry,
}

impl Seen {
    /// Nothing for a namespace that is not active. What can't be is refused with the reason.
    pub(crate) fn new(
        identify: Box<IdentifyNamespace>,
        descriptors: Option<&NamespaceDescriptors>,
    ) -> Result<Option<Self>, &'static str> {
        if !identify.is_active() {
            return Ok(None);
        }
        let mut uuid = None;
        for descriptor in descriptors.into_iter().flat_map(NamespaceDescriptors::iter) {
            // What follows a broken one is not seen.
            if let Ok(NamespaceDescriptor::Uuid(id)) = descriptor {
                uuid = Some(id);
            }
        }
        Ok(Some(Self {
            geometry: Geometry::new(&identify)?,
            uuid,
            identify: Arc::from(identify),
        }))
    }

    pub(crate) fn identify(&self) -> &Arc<IdentifyNamespace> {
        &self.identify
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether both can be of one namespace: identifiers that both have are the same. Those are
    /// never used twice.
    pub(crate) fn is_same_namespace(&self, other: &Self) -> bool {
        fn agree<const N: usize>(one: [u8; N], other: [u8; N]) -> bool {
            one == other || one == [0; N] || other == [0; N]
        }
        let uuid = |seen: &Self| seen.uuid.unwrap_or_default();
        agree(self.identify.nguid, other.identify.nguid)
            && agree(self.identify.eui64, other.identify.eui64)
            && agree(uuid(self), uuid(other))
    }

    /// Whether nothing differs but the blocks that are allocated.
    pub(crate) fn is_equal_but_for_use(&self, other: &Self) -> bool {
        let mut mine = Box::new(*self.identify);
        mine.nuse = other.identify.nuse;
        *mine == *other.identify
    }

    /// The same namespace later: `next`, with the identifier that this one has if it could not be
    /// read any more.
    pub(crate) fn followed_by(&self, next: Self) -> Self {
        Self {
            uuid: next.uuid.or(self.uuid),
            ..next
        }
    }
}

/// What bytes and blocks there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) blocks: u64,
    /// In bytes, a power of two of at least 512.
    pub(crate) block_size: u32,
    /// Bytes of metadata with each block.
    pub(crate) metadata: u16,
}

impl Geometry {
    fn new(identify: &IdentifyNamespace) -> Result<Self, &'static str> {
        let format = identify.format().ok_or("a format that does not exist")?;
        let block_size = format.lba_size().ok_or("an absurd logical block size")?;
        let blocks = identify.nsze.get();
        if blocks.leading_zeros() < block_size.trailing_zeros() {
            return Err("an absurd size");
        }
        Ok(Self {
            blocks,
            block_size,
            metadata: format.ms.get(),
        })
    }

    /// In bytes.
    pub(crate) fn capacity(&self) -> u64 {
        // The check above was that these bits are free.
        self.blocks << self.block_size.trailing_zeros()
    }

    pub(crate) fn has_format_of(&self, other: &Self) -> bool {
        (self.block_size, self.metadata) == (other.block_size, other.metadata)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use nvme_spec::identify::LbaFormat;

    use super::*;

    pub(crate) fn identify(blocks: u64, lbads: u8) -> IdentifyNamespace {
        let mut identify = IdentifyNamespace {
            nsze: blocks.into(),
            ncap: blocks.into(),
            ..IdentifyNamespace::default()
        };
        identify.lbaf[0] = LbaFormat {
            lbads,
            ..LbaFormat::default()
        };
        identify
    }

    pub(crate) fn seen(identify: IdentifyNamespace) -> Seen {
        Seen::new(Box::new(identify), None).unwrap().unwrap()
    }

    fn with_uuid(id: u8) -> Seen {
        let uuid = NamespaceDescriptor::Uuid([id; 16]);
        let list = NamespaceDescriptors::from_descriptors(&[uuid]);
        let identify = Box::new(identify(10, 9));
        Seen::new(identify, Some(&list)).unwrap().unwrap()
    }

    #[test]
    fn identifiers_tell_namespaces_apart() {
        let plain = seen(identify(10, 9));
        let [one, other] = [1, 2].map(with_uuid);
        assert!(one.is_same_namespace(&one) && !one.is_same_namespace(&other));
        assert!(one.is_same_namespace(&plain));
        let later = one.followed_by(plain);
        assert!(later.is_same_namespace(&one) && !later.is_same_namespace(&other));
        let mut named = identify(10, 9);
        named.eui64 = [1; 8];
        let one = seen(named);
        named.eui64 = [2; 8];
        assert!(!one.is_same_namespace(&seen(named)));
    }

    #[test]
    fn a_geometry_that_cannot_be_is_refused() {
        let inactive = Seen::new(Box::default(), None);
        assert!(matches!(inactive, Ok(None)));
        let geometry = Geometry::new(&identify(10, 12)).unwrap();
        assert_eq!((geometry.capacity(), geometry.block_size), (40960, 4096));
        let largest = Geometry::new(&identify((1 << 55) - 1, 9)).unwrap();
        assert_eq!(largest.capacity(), u64::MAX - 511);
        for (blocks, lbads) in [
            (1 << 55, 9),
            (u64::MAX, 9),
            (u64::MAX - 1, 9),
            (10, 8),
            (10, 32),
        ] {
            assert!(
                Geometry::new(&identify(blocks, lbads)).is_err(),
                "{blocks} {lbads}"
            );
        }
        let mut missing = identify(10, 9);
        missing.flbas = 1;
        assert!(Geometry::new(&missing).is_err());
    }
}
