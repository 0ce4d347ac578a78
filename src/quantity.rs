//! Sizes and times as people write them. Pure.

use bytesize::ByteSize;
use jiff::SignedDuration;
use std::time::Duration;

/// Longest time that can be set: five minutes, so that nothing hangs for longer than an operator would watch.
const MAX_TIME: Duration = Duration::from_secs(300);

/// Reads a size in bytes, such as `10MiB`.
///
/// # Errors
/// What a size is.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>()
        .map(|size| size.as_u64())
        .map_err(|_| "a size is a number of bytes, or one with KiB, MiB or GiB".into())
}

/// Reads a time, such as `30s`.
///
/// # Errors
/// What a time is, and the range it must be in.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    let time = text.parse::<SignedDuration>().ok().and_then(|time| Duration::try_from(time).ok());
    match time {
        Some(time) if time >= Duration::from_millis(1) && time <= MAX_TIME => Ok(time),
        Some(_) => Err("a time is from 1ms to 5m".into()),
        None => Err("a time is a number with ms, s or m, such as 30s".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_as_people_write_them() {
        assert_eq!(parse_size("10MiB"), Ok(10 << 20));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert!(parse_size("lots").is_err() && parse_size("-1").is_err());
        assert_eq!(parse_time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_time("250ms"), Ok(Duration::from_millis(250)));
        assert!(
            parse_time("0s").is_err() && parse_time("1h").is_err() && parse_time("-1s").is_err() && parse_time("soon").is_err()
        );
    }
}
