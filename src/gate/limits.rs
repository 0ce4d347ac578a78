//! What the gate takes from clients, and for how long: the settings of `plugrack serve` about it.

use crate::util::units::{parse_request_time, parse_size, parse_time};
use std::time::Duration;

/// Largest `--max-body`: beyond this a length is a mistake.
const MAX_MAX_BODY: u64 = 1 << 40;

/// Least and most `--max-head`: less than what browsers send, or more than the head of a frame of the plugin protocol.
const HEAD_BYTES: std::ops::RangeInclusive<u64> = 1024..=64 * 1024;

/// Most `--max-headers`, for which there is room on the stack.
const MAX_HEADERS: i64 = 256;

/// Most `--max-connections`: each takes an open file, and some KiB while it is used.
const MAX_CONNECTIONS: i64 = 65_536;

/// The part of all connections that one plugin may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Share {
    /// A number of connections.
    Number(u32),
    /// A percentage of all connections, from 1 to 100.
    Percent(u32),
}

impl Share {
    /// The number of connections this is of `connections` in all, at least one.
    pub(crate) fn of(self, connections: u32) -> u32 {
        match self {
            Self::Number(number) => number.min(connections),
            Self::Percent(percent) => (connections / 100 * percent + connections % 100 * percent / 100).max(1),
        }
    }
}

/// The limits of clients.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Limits of clients")]
pub(crate) struct ClientLimits {
    /// Simultaneous connections; fewer if the limit of open files leaves less room
    #[arg(long, value_name = "N", env = "PLUGRACK_MAX_CONNECTIONS", default_value_t = 512,
        value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    pub(crate) max_connections: u32,

    /// Simultaneous connections from one IPv4 address or IPv6 /64 network; for a client behind a trusted proxy, its simultaneous requests
    #[arg(long, value_name = "N", env = "PLUGRACK_MAX_CONNECTIONS_PER_ADDRESS", default_value_t = 128,
        value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    pub(crate) max_connections_per_address: u32,

    /// Simultaneous connections that one plugin occupies: a number, or a percentage of all connections
    #[arg(long, value_name = "N|PERCENT%", env = "PLUGRACK_MAX_CONNECTIONS_PER_PLUGIN", default_value = "50%", value_parser = parse_share)]
    pub(crate) max_connections_per_plugin: Share,

    /// Simultaneous tunnels, which are the connections of WebSocket: a number, or a percentage of all connections
    #[arg(long, value_name = "N|PERCENT%", env = "PLUGRACK_MAX_TUNNELS", default_value = "50%", value_parser = parse_share)]
    pub(crate) max_tunnels: Share,

    /// Time without a byte in either direction after which a tunnel is closed; without it, tunnels stay open
    #[arg(long, value_name = "TIME", env = "PLUGRACK_TUNNEL_IDLE", value_parser = parse_request_time)]
    pub(crate) tunnel_idle: Option<Duration>,

    /// Interval at which a client of a WebSocket is pinged; if nothing comes until the next ping, it has gone
    #[arg(long, value_name = "TIME", env = "PLUGRACK_WEBSOCKET_PING", default_value = "25s", value_parser = parse_time)]
    pub(crate) websocket_ping: Duration,

    /// Memory for messages of WebSocket that are not whole, or that their clients have not taken; then sockets are closed
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_WEBSOCKET_MEMORY", default_value = "64MiB", value_parser = parse_size)]
    pub(crate) websocket_memory: u64,

    /// Largest request head: request line and headers
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_MAX_HEAD", default_value = "16KiB", value_parser = parse_head_size)]
    pub(crate) max_head: u64,

    /// Most headers of a request
    #[arg(long, value_name = "N", env = "PLUGRACK_MAX_HEADERS", default_value_t = 64,
        value_parser = clap::value_parser!(u16).range(1..=MAX_HEADERS))]
    pub(crate) max_headers: u16,

    /// Time from the first to the last byte of a request's head; time for a TLS handshake
    #[arg(long, value_name = "TIME", env = "PLUGRACK_HEAD_TIMEOUT", default_value = "5s", value_parser = parse_time)]
    pub(crate) head_timeout: Duration,

    /// Time an idle keep-alive connection stays open; at most 15 s once half of the connections are taken
    #[arg(long, value_name = "TIME", env = "PLUGRACK_IDLE_TIMEOUT", default_value = "75s", value_parser = parse_time)]
    pub(crate) idle_timeout: Duration,

    /// Largest body of a request
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_MAX_BODY", default_value = "10MiB", value_parser = parse_body_size)]
    pub(crate) max_body: u64,

    /// Time without progress of a body, and time it may be slower than the minimum rate
    #[arg(long, value_name = "TIME", env = "PLUGRACK_BODY_TIMEOUT", default_value = "20s", value_parser = parse_time)]
    pub(crate) body_timeout: Duration,

    /// Minimum bytes a second that a client sends of a body or reads of a response
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_MIN_RATE", default_value = "500", value_parser = parse_size)]
    pub(crate) min_rate: u64,

    /// Bodies up to this size are collected before the plugin is called; larger ones are passed on as they arrive
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_BODY_BUFFER", default_value = "10MiB", value_parser = parse_size)]
    pub(crate) body_buffer: u64,

    /// Memory for received bodies; the rest goes to temporary files
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_BODY_MEMORY", default_value = "64MiB", value_parser = parse_size)]
    pub(crate) body_memory: u64,

    /// Total size of these files
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_BODY_DISK", default_value = "1GiB", value_parser = parse_size)]
    pub(crate) body_disk: u64,

    /// Time in which a client reads nothing of its response; then the connection is reset
    #[arg(long, value_name = "TIME", env = "PLUGRACK_WRITE_TIMEOUT", default_value = "5s", value_parser = parse_time)]
    pub(crate) write_timeout: Duration,
}

fn parse_share(text: &str) -> Result<Share, String> {
    let (digits, most, share): (_, _, fn(u32) -> Share) = match text.strip_suffix('%') {
        Some(percent) => (percent, 100, Share::Percent),
        None => (text, MAX_CONNECTIONS, Share::Number),
    };
    let number = digits.parse().ok().filter(|number| (1..=most).contains(&i64::from(*number)));
    number.map(share).ok_or_else(|| format!("a number from 1 to {MAX_CONNECTIONS}, or a percentage from 1% to 100%"))
}

fn parse_body_size(text: &str) -> Result<u64, String> {
    parse_size(text).and_then(|size| if size <= MAX_MAX_BODY { Ok(size) } else { Err("at most 1TiB".into()) })
}

fn parse_head_size(text: &str) -> Result<u64, String> {
    parse_size(text).and_then(|size| if HEAD_BYTES.contains(&size) { Ok(size) } else { Err("from 1KiB to 64KiB".into()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_number_or_a_percentage() {
        assert_eq!((parse_share("1"), parse_share("65536")), (Ok(Share::Number(1)), Ok(Share::Number(65_536))));
        assert_eq!((parse_share("1%"), parse_share("100%")), (Ok(Share::Percent(1)), Ok(Share::Percent(100))));
        for wrong in ["", "%", "0", "0%", "101%", "65537", "-1", "50 %", "half", "1.5%"] {
            assert!(parse_share(wrong).is_err(), "{wrong}");
        }
        let percent = |percent, of| Share::Percent(percent).of(of);
        assert_eq!([percent(50, 512), percent(50, 5), percent(50, 1), percent(1, 65_536)], [256, 2, 1, 655]);
        assert_eq!([percent(100, 65_536), Share::Number(300).of(512), Share::Number(300).of(32)], [65_536, 300, 32]);
    }

    #[test]
    fn sizes_have_their_ranges() {
        assert_eq!(parse_body_size("1TiB"), Ok(1 << 40));
        assert!(parse_body_size("2TiB").is_err());
        assert_eq!((parse_head_size("1KiB"), parse_head_size("64KiB")), (Ok(1024), Ok(65_536)));
        assert!(parse_head_size("1023").is_err() && parse_head_size("65537").is_err());
    }
}
