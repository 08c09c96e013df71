//! Numbers for people.

use std::time::Duration;

/// Bytes in binary units with three digits or so: `1.50 GiB`; whole multiples without a fraction.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let exponent = bytes.checked_ilog2().unwrap_or(0) / 10;
    let unit = UNITS[exponent as usize];
    if bytes.is_multiple_of(1 << (10 * exponent)) {
        return format!("{} {unit}", bytes >> (10 * exponent));
    }
    let value = bytes as f64 / (1u64 << (10 * exponent)) as f64;
    format!("{value:.*} {unit}", decimals(value))
}

/// A time in the unit in which it has up to three digits before the point.
pub(crate) fn nanoseconds(nanoseconds: u64) -> String {
    let (value, unit) = match nanoseconds {
        0..1_000 => return format!("{nanoseconds} ns"),
        1_000..1_000_000 => (nanoseconds as f64 / 1e3, "µs"),
        1_000_000..1_000_000_000 => (nanoseconds as f64 / 1e6, "ms"),
        _ => (nanoseconds as f64 / 1e9, "s"),
    };
    format!("{value:.*} {unit}", decimals(value))
}

/// A rate such as IOPS, with thousands and millions abbreviated.
pub(crate) fn rate(per_second: f64) -> String {
    let (value, unit) = match per_second {
        ..1e3 => return format!("{per_second:.0}"),
        ..1e6 => (per_second / 1e3, "k"),
        _ => (per_second / 1e6, "M"),
    };
    format!("{value:.*}{unit}", decimals(value))
}

fn decimals(value: f64) -> usize {
    match value {
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    }
}

/// Parses a time: seconds with or without a fraction, or with one of the units `ms` and `s`.
pub(crate) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let (number, scale) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds: Option<f64> = number.parse().ok();
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds * scale).ok())
        // A year is more than enough, and no later sum of times overflows.
        .filter(|duration| *duration <= Duration::from_secs(365 * 24 * 3600))
        .ok_or_else(|| format!("{text:?} is not a time; expected seconds, such as 5 or 0.5"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_binary_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(4096), "4 KiB");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes((10 << 30) + (1 << 29)), "10.5 GiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn times_and_rates() {
        assert_eq!(nanoseconds(999), "999 ns");
        assert_eq!(nanoseconds(12_345), "12.3 µs");
        assert_eq!(nanoseconds(1_500_000), "1.50 ms");
        assert_eq!(nanoseconds(2_000_000_000), "2.00 s");
        assert_eq!(rate(12.0), "12");
        assert_eq!(rate(312_345.0), "312k");
        assert_eq!(rate(2_400_000.0), "2.40M");
    }

    #[test]
    fn parses_times() {
        assert_eq!(parse_seconds("5"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_seconds("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_seconds("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_seconds("150ms"), Ok(Duration::from_millis(150)));
        for bad in ["", "s", "-1", "nan", "inf", "1e300", "5m"] {
            assert!(parse_seconds(bad).is_err(), "{bad}");
        }
    }
}
