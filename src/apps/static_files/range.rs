//! The `range` of a request (RFC 9110, section 14). Pure.

/// What a request asks for of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All of it.
    Whole,
    /// The bytes from `first` to `last`, both included.
    Part { first: u64, last: u64 },
    /// A range that the file does not have.
    Unsatisfiable,
}

/// Reads the value of `range` for a file of `size` bytes. A malformed value, another unit and several ranges ask for the whole file, as
/// section 14.2 allows: several ranges in one answer cost more than they save, and some clients send hundreds.
pub(super) fn wanted(value: &str, size: u64) -> Wanted {
    parse(value, size).unwrap_or(Wanted::Whole)
}

fn parse(value: &str, size: u64) -> Option<Wanted> {
    let (unit, range) = value.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = range.trim().split_once('-')?;
    let end = size.checked_sub(1);
    let (first, last) = if first.is_empty() {
        match (number(last)?, end) {
            (0, _) => return Some(Wanted::Unsatisfiable),
            // A suffix of an empty file is all of it, which a 206 cannot express.
            (_, None) => return Some(Wanted::Whole),
            (length, Some(end)) => (size.saturating_sub(length), end),
        }
    } else {
        let first = number(first)?;
        let last = if last.is_empty() { u64::MAX } else { number(last)? };
        if last < first {
            return None;
        }
        match end.filter(|end| first <= *end) {
            Some(end) => (first, last.min(end)),
            None => return Some(Wanted::Unsatisfiable),
        }
    };
    Some(Wanted::Part { first, last })
}

/// A number in decimal. One over 64 bits counts as the largest: no file is as long.
fn number(digits: &str) -> Option<u64> {
    let is_number = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
    is_number.then(|| digits.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_range_is_a_part_of_the_file() {
        for (value, first, last) in [
            ("bytes=0-0", 0, 0),
            ("bytes=0-", 0, 9),
            ("bytes=3-5", 3, 5),
            ("bytes=3-99", 3, 9),
            ("bytes=9-", 9, 9),
            ("bytes=-1", 9, 9),
            ("bytes=-10", 0, 9),
            ("bytes=-99", 0, 9),
            ("BYTES = 1-2 ", 1, 2),
            ("bytes=0-99999999999999999999999999", 0, 9),
            ("bytes=-99999999999999999999999999", 0, 9),
            ("bytes=007-0008", 7, 8),
        ] {
            assert_eq!(wanted(value, 10), Wanted::Part { first, last }, "{value}");
        }
    }

    #[test]
    fn a_range_behind_the_end_is_unsatisfiable() {
        for (value, size) in
            [("bytes=10-", 10), ("bytes=10-20", 10), ("bytes=-0", 10), ("bytes=-0", 0), ("bytes=0-", 0), ("bytes=0-0", 0)]
        {
            assert_eq!(wanted(value, size), Wanted::Unsatisfiable, "{value} of {size}");
        }
        assert_eq!(wanted("bytes=99999999999999999999999999-", 10), Wanted::Unsatisfiable);
    }

    #[test]
    fn all_else_is_the_whole_file() {
        for value in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=a-b",
            "bytes=1-a",
            "bytes=5-3",
            "bytes=0-1,3-4",
            "bytes=0-1,",
            "bytes=,0-1",
            "lines=0-1",
            "bytes 0-1",
            "bytes=+1-2",
            "bytes=1--2",
            "bytes=--1",
            "bytes=1 -2",
            "bytes=0x1-2",
            "bytes=1",
        ] {
            assert_eq!(wanted(value, 10), Wanted::Whole, "{value}");
        }
        assert_eq!(wanted("bytes=-5", 0), Wanted::Whole);
    }

    proptest! {
        #[test]
        fn a_part_is_within_the_file(value in "bytes=[0-9]{0,21}-[0-9]{0,21}", size in any::<u64>()) {
            if let Wanted::Part { first, last } = wanted(&value, size) {
                prop_assert!(first <= last && last < size);
            }
        }
    }
}
