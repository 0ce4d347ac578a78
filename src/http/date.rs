//! The `date` of an answer (RFC 9110, section 6.6.1), formatted at most once a second in each thread.

use std::cell::Cell;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes of a date in the form IMF-fixdate, such as `Sun, 06 Nov 1994 08:49:37 GMT`.
const LENGTH: usize = 29;

/// The first second of the year 10000, which the form cannot express.
const END: u64 = 253_402_300_800;

thread_local! {
    /// A second since 1970, and its date.
    static LAST: Cell<(u64, [u8; LENGTH])> = const { Cell::new((u64::MAX, [b' '; LENGTH])) };
}

/// Appends a `date` line with the current time to a head.
pub(crate) fn put_line(head: &mut Vec<u8>) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    head.extend_from_slice(b"date: ");
    head.extend_from_slice(&format(since.as_secs()));
    head.extend_from_slice(b"\r\n");
}

/// Formats a second since 1970. Later years than the form has give its last second.
fn format(second: u64) -> [u8; LENGTH] {
    let second = second.min(END - 1);
    LAST.with(|last| {
        let (known, date) = last.get();
        if known == second {
            return date;
        }
        let mut date = [b' '; LENGTH];
        // The format has exactly this length.
        write!(&mut date[..], "{}", httpdate::HttpDate::from(UNIX_EPOCH + Duration::from_secs(second))).ok();
        last.set((second, date));
        date
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_have_the_fixed_form() {
        for (second, date) in [
            (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (784_111_777, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (784_111_777, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (784_111_778, "Sun, 06 Nov 1994 08:49:38 GMT"),
            (END - 1, "Fri, 31 Dec 9999 23:59:59 GMT"),
            (u64::MAX, "Fri, 31 Dec 9999 23:59:59 GMT"),
        ] {
            assert_eq!(std::str::from_utf8(&format(second)).unwrap(), date);
        }
        let mut head = Vec::new();
        put_line(&mut head);
        let text = String::from_utf8(head).unwrap();
        let date = text.strip_prefix("date: ").and_then(|text| text.strip_suffix("\r\n")).unwrap();
        let age = SystemTime::now().duration_since(httpdate::parse_http_date(date).unwrap()).unwrap();
        assert!(age < Duration::from_secs(30), "{date}");
    }
}
