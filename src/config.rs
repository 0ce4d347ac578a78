//! What the operator asked for, checked and complete.

use bytesize::ByteSize;
use jiff::SignedDuration;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// Where the host keeps everything unless told otherwise.
pub(crate) const DEFAULT_DATA: &str = "/var/lib/plugrack";

/// Largest `--max-body`: beyond this a length is a mistake.
const MAX_MAX_BODY: u64 = 1 << 40;

/// Least `--plugin-memory`: with less not even an interpreter starts.
const MIN_MEMORY: u64 = 16 << 20;

/// The uids there are, but root's. The largest number means no uid to the kernel.
const UIDS: RangeInclusive<u32> = 1..=u32::MAX - 1;

/// Longest time that can be set: five minutes, so that nothing hangs for longer than an operator would watch.
const MAX_TIME: Duration = Duration::from_secs(300);

/// How `plugrack serve` is to run, as typed: arguments before environment before defaults.
#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    /// Directory the plugins are in [default: DATA/plugins]
    #[arg(long, value_name = "DIR", env = "PLUGRACK_PLUGINS")]
    pub(crate) plugins: Option<PathBuf>,

    /// Address and port to listen on; port 0 takes a free one, which is then in DATA/run/listen
    #[arg(long, value_name = "ADDR:PORT", env = "PLUGRACK_LISTEN", default_value = "127.0.0.1:8080")]
    pub(crate) listen: SocketAddr,

    /// Largest body of a request, such as 10MiB
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_MAX_BODY", default_value = "10MiB", value_parser = parse_body_size)]
    pub(crate) max_body: u64,

    /// Time a plugin has to begin an answer
    #[arg(long, value_name = "TIME", env = "PLUGRACK_REQUEST_TIMEOUT", default_value = "30s", value_parser = parse_time)]
    pub(crate) request_timeout: Duration,

    /// Time a plugin has to become ready
    #[arg(long, value_name = "TIME", env = "PLUGRACK_START_TIMEOUT", default_value = "10s", value_parser = parse_time)]
    pub(crate) start_timeout: Duration,

    /// Bytes of keys and values each plugin may hold in the key-value store
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_KV_MAX_BYTES", default_value = "64MiB", value_parser = parse_size)]
    pub(crate) kv_max_bytes: u64,

    /// Uids for plugins, each to run as one of its own, such as 200000-265535; for a host that runs as root [default: none]
    #[arg(long, value_name = "FIRST-LAST", env = "PLUGRACK_PLUGIN_UIDS", value_parser = parse_uids)]
    pub(crate) plugin_uids: Option<RangeInclusive<u32>>,

    /// Most memory of each process of a plugin: heap and private writable memory, such as 256MiB [default: none]
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_PLUGIN_MEMORY", value_parser = parse_memory)]
    pub(crate) plugin_memory: Option<u64>,

    /// Keys each plugin may hold in the key-value store
    #[arg(long, value_name = "N", env = "PLUGRACK_KV_MAX_KEYS", default_value_t = 100_000)]
    pub(crate) kv_max_keys: u64,
}

fn parse_size(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>()
        .map(|size| size.as_u64())
        .map_err(|_| "a size is a number of bytes, or one with KiB, MiB or GiB".into())
}

fn parse_body_size(text: &str) -> Result<u64, String> {
    parse_size(text).and_then(|size| if size <= MAX_MAX_BODY { Ok(size) } else { Err("at most 1TiB".into()) })
}

fn parse_memory(text: &str) -> Result<u64, String> {
    parse_size(text).and_then(|size| if size >= MIN_MEMORY { Ok(size) } else { Err("at least 16MiB".into()) })
}

fn parse_uids(text: &str) -> Result<RangeInclusive<u32>, String> {
    let number = |text: &str| text.parse::<u32>().ok().filter(|uid| UIDS.contains(uid));
    match text.split_once('-').and_then(|(first, last)| Some((number(first)?, number(last)?))) {
        Some((first, last)) if first < last => Ok(first..=last),
        Some(_) => Err("the last is above the first: one is for asking plugins who they are, the others are theirs".into()),
        None => Err("uids are two numbers from 1 to 4294967294 with a - between them, such as 200000-265535".into()),
    }
}

fn parse_time(text: &str) -> Result<Duration, String> {
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
        assert_eq!(parse_body_size("10MiB"), Ok(10 << 20));
        assert_eq!(parse_body_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_body_size("4096"), Ok(4096));
        assert!(parse_body_size("2TiB").is_err() && parse_body_size("lots").is_err() && parse_body_size("-1").is_err());
        assert_eq!(parse_memory("16MiB"), Ok(16 << 20));
        assert!(parse_memory("16777215").is_err());
        assert_eq!(parse_time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_time("250ms"), Ok(Duration::from_millis(250)));
        assert!(
            parse_time("0s").is_err() && parse_time("1h").is_err() && parse_time("-1s").is_err() && parse_time("soon").is_err()
        );
    }

    #[test]
    fn uids_are_a_range_of_two_at_least_and_never_root() {
        assert_eq!(parse_uids("200000-265535"), Ok(200_000..=265_535));
        assert_eq!(parse_uids("1-4294967294"), Ok(1..=u32::MAX - 1));
        for wrong in ["", "5", "0-9", "9-9", "9-5", "-5-9", "5-", "a-b", "1-4294967295", "1 - 5"] {
            assert!(parse_uids(wrong).is_err(), "{wrong}");
        }
    }
}
