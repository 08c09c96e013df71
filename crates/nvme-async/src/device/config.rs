//! PCI configuration space: the command register and where MSI-X lies.

use std::io;
use std::ops::Range;

/// Command register (PCI local bus specification 3.0, section 6.2.2).
const COMMAND: u64 = 0x04;
/// The function answers accesses to its memory BARs.
pub(super) const MEMORY_SPACE: u16 = 1 << 1;
/// The function may access host memory.
pub(super) const BUS_MASTER: u16 = 1 << 2;
/// The function does not assert INTx.
pub(super) const INTX_DISABLE: u16 = 1 << 10;

const STATUS: u64 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITIES_POINTER: u64 = 0x34;
const MSIX: u8 = 0x11;
/// Message Control, in that capability (section 6.8.2.3).
const MSIX_CONTROL: u64 = 2;
#[cfg(feature = "vfio-user")]
const MSIX_FUNCTION_MASK: u16 = 1 << 14;
#[cfg(feature = "vfio-user")]
const MSIX_ENABLE: u16 = 1 << 15;

/// Reads `N` bytes at an offset of configuration space.
pub(super) trait ReadConfig {
    fn read<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]>;
}

/// Writes bytes at an offset of configuration space, as one access.
pub(super) trait WriteConfig: ReadConfig {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Sets and clears bits of the command register, and checks that it took them. Only one thread may do
/// so at a time.
pub(super) fn change_command(config: &impl WriteConfig, set: u16, clear: u16) -> io::Result<()> {
    let wanted = u16::from_le_bytes(config.read(COMMAND)?) & !clear | set;
    config.write(COMMAND, &wanted.to_le_bytes())?;
    let command = u16::from_le_bytes(config.read(COMMAND)?);
    // A function that is gone reads as all ones; one without INTx need not have its bit.
    let set = set & !INTX_DISABLE;
    if command == 0xffff || command & set != set || command & clear != 0 {
        return Err(io::Error::other(format!(
            "PCI command register is {command:#06x}"
        )));
    }
    Ok(())
}

/// Turns MSI-X on, with no vector masked by the function, or off; not at all where there is no such
/// capability.
#[cfg(feature = "vfio-user")]
pub(super) fn enable_msix(config: &impl WriteConfig, enable: bool) -> io::Result<()> {
    let Some(at) = find_capability(config, MSIX)? else {
        return Ok(());
    };
    let control = at + MSIX_CONTROL;
    let read = || config.read(control).map(u16::from_le_bytes);
    let bit = if enable { MSIX_ENABLE } else { 0 };
    let wanted = read()? & !(MSIX_ENABLE | MSIX_FUNCTION_MASK) | bit;
    config.write(control, &wanted.to_le_bytes())?;
    let control = read()?;
    if control & (MSIX_ENABLE | MSIX_FUNCTION_MASK) != bit {
        return Err(io::Error::other(format!(
            "MSI-X message control is {control:#06x}"
        )));
    }
    Ok(())
}

/// The parts of BAR 0 that belong to MSI-X (section 6.8.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Msix {
    pub(super) table: Option<Range<u64>>,
    pub(super) pending_bits: Option<Range<u64>>,
}

/// Looks for MSI-X in BAR 0.
pub(super) fn msix_in_bar0(config: &impl ReadConfig) -> io::Result<Msix> {
    let Some(at) = find_capability(config, MSIX)? else {
        return Ok(Msix::default());
    };
    let vectors = u64::from(u16::from_le_bytes(config.read(at + MSIX_CONTROL)?) & 0x7ff) + 1;
    let table = u32::from_le_bytes(config.read(at + 4)?);
    let pending = u32::from_le_bytes(config.read(at + 8)?);
    let in_bar0 = |place: u32, len| {
        let start = u64::from(place & !0x7);
        (place & 0x7 == 0).then(|| start..start + len)
    };
    Ok(Msix {
        table: in_bar0(table, vectors * 16),
        pending_bits: in_bar0(pending, vectors.div_ceil(64) * 8),
    })
}

fn find_capability(config: &impl ReadConfig, wanted: u8) -> io::Result<Option<u64>> {
    if u16::from_le_bytes(config.read(STATUS)?) & STATUS_CAPABILITIES == 0 {
        return Ok(None);
    }
    let [mut next] = config.read(CAPABILITIES_POINTER)?;
    // There is room for 48 of them; a longer chain leads in a circle.
    for _ in 0..48 {
        let at = u64::from(next & !0x3);
        if at < 0x40 {
            break;
        }
        let [id, following] = config.read(at)?;
        if id == wanted {
            return Ok(Some(at));
        }
        next = following;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    impl ReadConfig for [u8; 256] {
        fn read<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
            let bytes = self.get(offset as usize..).and_then(<[u8]>::first_chunk);
            bytes
                .copied()
                .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        }
    }

    fn config_with_msix(table: u32, pending: u32) -> [u8; 256] {
        let mut config = [0; 256];
        config[0x06] = 0x10;
        config[0x34] = 0x80;
        config[0x80..0x82].copy_from_slice(&[0x10, 0x40]);
        config[0x40..0x44].copy_from_slice(&[0x11, 0x00, 64, 0x80]);
        config[0x44..0x48].copy_from_slice(&table.to_le_bytes());
        config[0x48..0x4c].copy_from_slice(&pending.to_le_bytes());
        config
    }

    #[test]
    fn msix_table_and_pending_bits() {
        let parts = msix_in_bar0(&config_with_msix(0x2000, 0x3000)).unwrap();
        assert_eq!(parts.table, Some(0x2000..0x2410));
        assert_eq!(parts.pending_bits, Some(0x3000..0x3010));
    }

    #[test]
    fn msix_in_another_bar_does_not_matter() {
        let parts = msix_in_bar0(&config_with_msix(0x2004, 0x3004)).unwrap();
        assert_eq!(parts, Msix::default());
        let parts = msix_in_bar0(&config_with_msix(0x2004, 0x3000)).unwrap();
        assert_eq!(
            (parts.table, parts.pending_bits),
            (None, Some(0x3000..0x3010))
        );
    }

    #[test]
    fn no_capabilities_no_msix() {
        assert_eq!(msix_in_bar0(&[0; 256]).unwrap(), Msix::default());
    }

    #[test]
    fn a_circle_of_capabilities_ends() {
        let mut config = config_with_msix(0x2000, 0x3000);
        config[0x40] = 0x09;
        config[0x41] = 0x80;
        assert_eq!(msix_in_bar0(&config).unwrap(), Msix::default());
    }
}
