//! Times as people write them.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A length of time as people write and read it: `90s`, `10m`, `2h`, `1d`; whole numbers, milliseconds (`500ms`) at the
/// least.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Span(pub Duration);

/// Units, the longest first, and the milliseconds that each has.
const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1000),
    ("ms", 1),
];

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        let fits = |unit: &&(&str, u64)| ms > 0 && ms.is_multiple_of(u128::from(unit.1));
        let (unit, each) = UNITS.iter().find(fits).unwrap_or(&("s", 1000));
        write!(f, "{}{unit}", ms / u128::from(*each))
    }
}

/// The text is not a length of time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseSpanError(String);

impl fmt::Display for ParseSpanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is not a length of time: write a whole number and a unit, as 90s, 10m or 2h",
            self.0
        )
    }
}

impl std::error::Error for ParseSpanError {}

impl std::str::FromStr for Span {
    type Err = ParseSpanError;

    fn from_str(text: &str) -> Result<Span, ParseSpanError> {
        let error = || ParseSpanError(text.to_string());
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
        let number: u64 = text[..digits].parse().map_err(|_| error())?;
        let unit = text[digits..].trim();
        let (_, each) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(error)?;
        let ms = number.checked_mul(*each).ok_or_else(error)?;
        Ok(Span(Duration::from_millis(ms)))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them_and_written_back_the_same() {
        for (text, ms) in [
            ("500ms", 500),
            ("90s", 90_000),
            ("10m", 600_000),
            ("2h", 7_200_000),
            ("1d", 86_400_000),
            ("0s", 0),
        ] {
            let span = Span(Duration::from_millis(ms));
            assert_eq!(text.parse(), Ok(span), "{text}");
            assert_eq!(span.to_string(), text);
        }
        assert_eq!(" 5 s ".parse(), Ok(Span(Duration::from_secs(5))));
        for text in [
            "",
            "5",
            "s",
            "-1s",
            "1.5h",
            "3x",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }
}
