//! How times, queues, opcodes and counts are written in a plan.

use std::fmt;
use std::time::Duration;

use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use serde::de::{Deserializer, Error, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::{FaultQueue, Opcode, Times};

/// Parses a time: a number and one of the units ns, us, µs, ms and s.
///
/// # Errors
///
/// A message that says what was expected.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let expected = || format!("{text:?} is not a time; expected one such as 80us");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits.parse().map_err(|_| expected())?;
    match &text[digits.len()..] {
        "ns" => Ok(Duration::from_nanos(number)),
        "us" | "µs" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        _ => Err(expected()),
    }
}

pub(super) mod duration {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let nanos = duration.as_nanos();
        let (divisor, unit) = [(1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us")]
            .into_iter()
            .find(|(divisor, _)| nanos.is_multiple_of(*divisor))
            .unwrap_or((1, "ns"));
        serializer.collect_str(&format_args!("{}{unit}", nanos / divisor))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_duration(&text).map_err(D::Error::custom)
    }
}

/// A number, or one of a few words.
struct NumberOr<T> {
    expected: &'static str,
    number: fn(u64) -> Option<T>,
    word: fn(&str) -> Option<T>,
}

impl<T> Visitor<'_> for NumberOr<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        (self.number)(number).ok_or_else(|| {
            E::invalid_value(serde::de::Unexpected::Unsigned(number), &self.expected)
        })
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        u64::try_from(number)
            .ok()
            .and_then(self.number)
            .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Signed(number), &self.expected))
    }

    fn visit_str<E: Error>(self, word: &str) -> Result<T, E> {
        (self.word)(word)
            .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(word), &self.expected))
    }
}

impl<'de> Deserialize<'de> for FaultQueue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOr {
            expected: "\"admin\", \"io\" or the identifier of a queue",
            number: |number| u16::try_from(number).ok().map(Self::Id),
            word: |word| match word {
                "admin" => Some(Self::Admin),
                "io" => Some(Self::Io),
                _ => None,
            },
        })
    }
}

impl Serialize for FaultQueue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Admin => serializer.serialize_str("admin"),
            Self::Io => serializer.serialize_str("io"),
            Self::Id(id) => serializer.serialize_u16(*id),
        }
    }
}

impl<'de> Deserialize<'de> for Times {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOr {
            expected: "a number or \"always\"",
            number: |number| Some(Self::from(number)),
            word: |word| (word == "always").then_some(Self::Always),
        })
    }
}

impl Serialize for Times {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Limited(times) => serializer.serialize_u64(*times),
            Self::Always => serializer.serialize_str("always"),
        }
    }
}

impl<'de> Deserialize<'de> for Opcode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOr {
            expected: "the name of a command, such as \"read\" or \"get-log-page\", or a number up \
                       to 0xff",
            number: |number| u8::try_from(number).ok().map(Self::Any),
            word: |word| {
                let named = |name: Option<&str>| name.is_some_and(|name| plan_name(name) == word);
                let admin = || {
                    (0..=u8::MAX)
                        .map(AdminOpcode)
                        .find(|opcode| named(opcode.name()))
                };
                let io = || {
                    (0..=u8::MAX)
                        .map(NvmOpcode)
                        .find(|opcode| named(opcode.name()))
                };
                io().map(Self::Io).or_else(|| admin().map(Self::Admin))
            },
        })
    }
}

impl Serialize for Opcode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Admin(AdminOpcode(opcode)) | Self::Io(NvmOpcode(opcode)) | Self::Any(opcode) => {
                let name = match self {
                    Self::Admin(opcode) => opcode.name(),
                    Self::Io(opcode) => opcode.name(),
                    Self::Any(_) => None,
                };
                match name {
                    Some(name) => serializer.serialize_str(&plan_name(name)),
                    // Without a name it is one of either kind of queue.
                    None => serializer.serialize_u8(*opcode),
                }
            }
        }
    }
}

/// "Delete I/O Submission Queue" is `delete-io-submission-queue`.
fn plan_name(name: &str) -> String {
    name.chars()
        .filter(|c| *c != '/')
        .map(|c| match c {
            ' ' => '-',
            c => c.to_ascii_lowercase(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(parse_duration("80us"), Ok(Duration::from_micros(80)));
        assert_eq!(parse_duration("3µs"), Ok(Duration::from_micros(3)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
        for bad in [
            "",
            "5",
            "us",
            "1.5ms",
            "5 ms",
            "-1s",
            "99999999999999999999s",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn no_name_stands_for_two_opcodes() {
        let mut names: Vec<_> = (0..=u8::MAX)
            .flat_map(|opcode| [AdminOpcode(opcode).name(), NvmOpcode(opcode).name()])
            .flatten()
            .map(plan_name)
            .collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.contains(&"delete-io-submission-queue".to_owned()));
    }
}
