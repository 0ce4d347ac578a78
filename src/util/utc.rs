//! Times as the operator reads them: RFC 3339 in UTC with milliseconds, and ages. All are milliseconds since 1970-01-01 UTC.

use jiff::Timestamp;
use serde::{Serialize, Serializer};

/// Seconds of a minute, an hour and a day.
const MINUTE: i64 = 60;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// A time in RFC 3339; empty for one beyond the years that it can write.
pub(crate) fn rfc3339(ms: i64) -> String {
    Timestamp::from_millisecond(ms).map(|time| format!("{time:.3}")).unwrap_or_default()
}

/// The time that a text in RFC 3339 names.
pub(crate) fn parse(text: &str) -> Option<i64> {
    text.parse().ok().map(Timestamp::as_millisecond)
}

/// How long something took, in one unit, rounded down: `12s`, `3m`, `2h`, `5d`. Less than nothing is `0s`.
pub(crate) fn age(ms: i64) -> String {
    let seconds = ms.max(0) / 1000;
    let (unit, name) =
        [(DAY, 'd'), (HOUR, 'h'), (MINUTE, 'm')].into_iter().find(|(unit, _)| seconds >= *unit).unwrap_or((1, 's'));
    format!("{}{name}", seconds / unit)
}

/// Serializes a time as text, for serde.
pub(crate) fn serialize<S: Serializer>(ms: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    rfc3339(*ms).serialize(serializer)
}

/// Serializes a time as text, or `null` where there is none, for serde.
pub(crate) fn serialize_some<S: Serializer>(ms: &Option<i64>, serializer: S) -> Result<S::Ok, S::Error> {
    ms.map(rfc3339).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_and_read_and_ages_have_one_unit() {
        for (ms, text) in [(0, "1970-01-01T00:00:00.000Z"), (1_764_307_911_007, "2025-11-28T05:31:51.007Z")] {
            assert_eq!((rfc3339(ms), parse(text)), (text.to_owned(), Some(ms)));
        }
        assert_eq!((rfc3339(i64::MAX), parse("soon"), parse("")), (String::new(), None, None));
        for (seconds, expected) in [
            (-5, "0s"),
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (3599, "59m"),
            (3600, "1h"),
            (86_399, "23h"),
            (86_400, "1d"),
            (400 * 86_400, "400d"),
        ] {
            assert_eq!(age(seconds * 1000 + 999 * i64::from(seconds >= 0)), expected);
        }
    }
}
