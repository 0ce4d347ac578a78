//! How many connections and requests each address has, for `--max-connections-per-address`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::rc::Rc;

/// Counts by origin. An origin with no connections has no entry.
type Counts = Rc<RefCell<HashMap<IpAddr, u32>>>;

/// Counts of all origins, for the gate's thread only.
#[derive(Debug, Default, Clone)]
pub(super) struct PerAddress(Counts);

/// A connection or request that counts for its origin until this is dropped.
#[derive(Debug)]
pub(super) struct Counted {
    counts: Counts,
    origin: IpAddr,
}

impl PerAddress {
    /// The count of an address's origin.
    pub(super) fn of(&self, address: IpAddr) -> u32 {
        self.0.borrow().get(&origin(address)).copied().unwrap_or(0)
    }

    /// Adds one to the count of an address's origin.
    pub(super) fn count(&self, address: IpAddr) -> Counted {
        let origin = origin(address);
        *self.0.borrow_mut().entry(origin).or_default() += 1;
        Counted { counts: Rc::clone(&self.0), origin }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.counts.borrow_mut();
        if let Some(count) = counts.get_mut(&self.origin) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.origin);
            }
        }
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

    #[test]
    fn what_is_counted_counts_until_it_is_dropped() {
        let (counts, one, other) = (PerAddress::default(), [192, 0, 2, 1].into(), [192, 0, 2, 2].into());
        let (first, second) = (counts.count(one), counts.count(one));
        assert_eq!((counts.of(one), counts.of(other)), (2, 0));
        drop(first);
        assert_eq!(counts.of(one), 1);
        drop(second);
        assert!(counts.0.borrow().is_empty());
    }
}
