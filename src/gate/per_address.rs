//! How many connections and requests each address has, for `--max-connections-per-address`.

use crate::util::key_counts::{Counted, KeyCounts};
use std::net::{IpAddr, Ipv6Addr};

/// Counts by origin.
#[derive(Debug, Default, Clone)]
pub(super) struct PerAddress(KeyCounts<IpAddr>);

impl PerAddress {
    /// The count of an address's origin.
    pub(super) fn of(&self, address: IpAddr) -> u32 {
        self.0.of(&origin(address))
    }

    /// Adds one to the count of an address's origin, unless that has reached `limit`.
    pub(super) fn count(&self, address: IpAddr, limit: u32) -> Option<Counted<IpAddr>> {
        self.0.count(origin(address), limit)
    }
}

/// Addresses that are counted together: one IPv4 address, or the /64 network that one client has in IPv6 (RFC 6177).
fn origin(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_network_is_one_origin() {
        let of = |text: &str| origin(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:3::4"), of("2001:db8:1:2:ffff::1"));
        assert_ne!(of("2001:db8:1:2::4"), of("2001:db8:1:3::4"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
