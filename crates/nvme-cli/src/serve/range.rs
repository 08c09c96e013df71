//! `OFFSET+SIZE`: a part of a namespace, on the command line.

use std::ops::Range;
use std::str::FromStr;

use nvme_async::parse_size;

/// Bytes of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ByteRange(pub(super) Range<u64>);

impl FromStr for ByteRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (offset, size) = text
            .split_once('+')
            .ok_or_else(|| format!("{text:?} is not of the form OFFSET+SIZE, as in 1M+64M"))?;
        let bytes = |text| parse_size(text).map_err(|error| error.to_string());
        let (offset, size) = (bytes(offset)?, bytes(size)?);
        let end = offset
            .checked_add(size)
            .ok_or_else(|| format!("{text} ends past the largest possible offset"))?;
        Ok(Self(offset..end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let range = |text: &str| text.parse::<ByteRange>().map(|range| range.0);
        assert_eq!(range("1M+4K"), Ok(1 << 20..(1 << 20) + 4096));
        assert_eq!(range("0+512"), Ok(0..512));
        for wrong in [
            "1M",
            "",
            "+",
            "1M+",
            "+4K",
            "1M-2M",
            "16777215T+16777215T",
            "a+b",
        ] {
            assert!(range(wrong).is_err(), "{wrong}");
        }
    }
}
