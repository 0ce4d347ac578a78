//! Sizes and times as people write them. Pure.

use bytesize::ByteSize;
use jiff::{SignedDuration, Span, SpanRelativeTo};
use std::time::Duration;

/// Shortest time that can be set.
const MIN_TIME: Duration = Duration::from_millis(1);

/// Longest time of most settings: five minutes, so that nothing hangs for longer than an operator would watch.
const MAX_TIME: Duration = Duration::from_mins(5);

/// Longest time for a plugin to become ready: an hour, for one that first migrates or indexes its data.
const MAX_START_TIME: Duration = Duration::from_hours(1);

/// Longest time for an answer to begin: a day, for reports, imports and model runs.
const MAX_REQUEST_TIME: Duration = Duration::from_hours(24);

/// Reads a size in bytes, such as `10MiB`.
///
/// # Errors
/// What a size is.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>()
        .map(|size| size.as_u64())
        .map_err(|_| "a size is a number of bytes, or one with KiB, MiB or GiB".into())
}

/// Reads a time of up to 5 minutes, such as `30s`.
///
/// # Errors
/// What a time is, and the range it must be in.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    time_up_to(text, MAX_TIME)
}

/// Reads the time for a plugin to become ready, of up to an hour.
///
/// # Errors
/// What a time is, and the range it must be in.
pub(crate) fn parse_start_time(text: &str) -> Result<Duration, String> {
    time_up_to(text, MAX_START_TIME)
}

/// Reads the time for an answer to begin, of up to a day.
///
/// # Errors
/// What a time is, and the range it must be in.
pub(crate) fn parse_request_time(text: &str) -> Result<Duration, String> {
    time_up_to(text, MAX_REQUEST_TIME)
}

fn time_up_to(text: &str, most: Duration) -> Result<Duration, String> {
    let span = text.parse::<Span>().ok();
    let time = span.and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()).ok());
    match time {
        Some(time) => Duration::try_from(time)
            .ok()
            .filter(|time| (MIN_TIME..=most).contains(time))
            .ok_or_else(|| format!("a time is from {} to {}", time_text(MIN_TIME), time_text(most))),
        None => Err("a time is a number with ms, s, m or h, such as 30s".into()),
    }
}

/// A time in the form in which it is read.
pub(crate) fn time_text(time: Duration) -> String {
    SignedDuration::try_from(time).map(|time| format!("{time:#}")).unwrap_or_default()
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

    #[test]
    fn each_time_has_its_own_range() {
        let hours = Duration::from_hours;
        assert_eq!((parse_time("5m"), parse_time("300001ms").is_err()), (Ok(Duration::from_mins(5)), true));
        assert_eq!((parse_start_time("1h"), parse_start_time("61m").is_err()), (Ok(hours(1)), true));
        assert_eq!((parse_request_time("24h"), parse_request_time("1d")), (Ok(hours(24)), Ok(hours(24))));
        assert_eq!(parse_request_time("1h 30m"), Ok(Duration::from_mins(90)));
        assert_eq!(parse_request_time("25h"), Err("a time is from 1ms to 24h".into()));
        assert!(parse_request_time("1mo").is_err() && parse_request_time("3000").is_err() && parse_request_time("").is_err());
    }

    #[test]
    fn a_time_is_shown_as_it_is_read() {
        for text in ["1ms", "250ms", "30s", "1m 30s", "24h"] {
            assert_eq!(time_text(parse_request_time(text).unwrap()), text);
        }
    }
}
