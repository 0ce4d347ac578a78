//! Trusted reverse proxies, and their headers about the client. Pure.

use ipnet::{IpNet, Ipv4Net};
use std::net::{IpAddr, SocketAddr};

/// Limit of elements read from `x-forwarded-for`: one for each proxy on the way, of which there are rarely more than three.
const MAX_HOPS: usize = 32;

/// Longest request id accepted from a proxy, in bytes. Common ones have 16 to 64.
const MAX_REQUEST_ID: usize = 128;

/// Leading bits of the IPv6 addresses that stand for IPv4 addresses (`::ffff:0:0/96`, RFC 4291, section 2.5.5.2).
const MAPPED_BITS: u8 = 96;

/// Networks whose hosts are trusted proxies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Networks(Vec<IpNet>);

impl Networks {
    /// Reads networks separated by commas; a plain address is a network of its own. An empty text is no network, so that the setting's
    /// variable may be empty.
    ///
    /// # Errors
    /// Which element is not a network, with an example of one.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let elements = text.split(',').map(str::trim).filter(|element| !element.is_empty());
        elements.map(network).collect::<Result<_, _>>().map(Self)
    }

    /// All networks of several settings.
    pub(crate) fn all<'a>(settings: impl IntoIterator<Item = &'a Self>) -> Self {
        Self(settings.into_iter().flat_map(|networks| &networks.0).copied().collect())
    }

    /// Whether an address, in its canonical form, is that of a trusted proxy.
    pub(crate) fn contain(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }

    /// The client that the `x-forwarded-for` headers of a trusted proxy name: the rightmost address that is not itself that of a trusted
    /// proxy, or the leftmost if all are. Each proxy appends the address of its own client, so the client itself may have written
    /// everything to the left of that. None if an element on the way is no address, or there are too many.
    pub(super) fn client<'a>(&self, headers: impl DoubleEndedIterator<Item = &'a [u8]>) -> Option<IpAddr> {
        let mut furthest = None;
        let elements = headers.rev().flat_map(|value| value.rsplit(|&byte| byte == b','));
        for (hop, element) in elements.enumerate() {
            let address = address(element.trim_ascii()).filter(|_| hop < MAX_HOPS)?;
            furthest = Some(address);
            if !self.contain(address) {
                break;
            }
        }
        furthest
    }
}

fn network(text: &str) -> Result<IpNet, String> {
    let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    let network = network.map_err(|_| {
        format!("{text:?} is no network: write an address with or without a prefix length, such as 10.0.0.0/8 or fd00::/8")
    })?;
    Ok(match network {
        IpNet::V6(six) if six.prefix_len() >= MAPPED_BITS => match six.addr().to_ipv4_mapped() {
            Some(four) => Ipv4Net::new(four, six.prefix_len() - MAPPED_BITS).map_or(network, IpNet::V4),
            None => network,
        },
        _ => network,
    })
}

/// The address in an element of an `x-forwarded-for`, with or without a port and brackets.
fn address(element: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(element).ok()?;
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().ok().or_else(|| Some(text.parse::<SocketAddr>().ok()?.ip()))?;
    Some(address.to_canonical())
}

/// Whether a proxy's request id is acceptable. It appears in logs and headers, so it must be one word everywhere.
pub(super) fn is_request_id(value: &[u8]) -> bool {
    let is_plain = |byte: &u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\'' | b'`' | b'\\' | b',' | b';');
    (1..=MAX_REQUEST_ID).contains(&value.len()) && value.iter().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_of_both_versions_and_an_address_is_one() {
        let networks = Networks::parse(" 10.0.0.0/8, 192.0.2.1,,fd00::/8 ,2001:db8::1,::ffff:198.51.100.0/120").unwrap();
        let contain = |text: &str| networks.contain(text.parse().unwrap());
        for trusted in ["10.0.0.0", "10.255.255.255", "192.0.2.1", "fd12::1", "2001:db8::1", "198.51.100.7"] {
            assert!(contain(trusted), "{trusted}");
        }
        for other in ["11.0.0.0", "192.0.2.2", "fc00::1", "2001:db8::2", "::1", "198.51.101.7", "127.0.0.1"] {
            assert!(!contain(other), "{other}");
        }
        assert_eq!(Networks::parse(""), Ok(Networks::default()));
        assert!(Networks::parse("0.0.0.0/0").unwrap().contain([9, 9, 9, 9].into()));
        for wrong in [
            "10.0.0.0/33",
            "10.0.0",
            "fd00::/129",
            "localhost",
            "10.0.0.0/-1",
            "10.0.0.0/",
            "[::1]",
            "10.0.0.1:80",
            "10.0.0.0/8 10.1.0.0/16",
        ] {
            assert!(Networks::parse(wrong).unwrap_err().starts_with(&format!("{wrong:?} is no network")), "{wrong}");
        }
    }

    #[test]
    fn the_client_is_the_rightmost_address_that_is_no_proxys() {
        let networks = Networks::parse("10.0.0.0/8,fd00::/8").unwrap();
        for (headers, expected) in [
            (&["192.0.2.7"][..], Some("192.0.2.7")),
            (&["6.6.6.6, 192.0.2.7"], Some("192.0.2.7")),
            (&["6.6.6.6, 192.0.2.7, 10.0.0.1"], Some("192.0.2.7")),
            (&["6.6.6.6, 192.0.2.7:99, [fd00::1]:80,10.0.0.1"], Some("192.0.2.7")),
            (&["6.6.6.6", "192.0.2.7", "10.0.0.1, 10.0.0.2"], Some("192.0.2.7")),
            (&["6.6.6.6, 192.0.2.7", "10.0.0.1"], Some("192.0.2.7")),
            (&["nonsense, 192.0.2.7, 10.0.0.1"], Some("192.0.2.7")),
            (&["::ffff:192.0.2.7, ::ffff:10.0.0.1"], Some("192.0.2.7")),
            (&["2001:db8::7, fd00::1"], Some("2001:db8::7")),
            // All of the way is inside.
            (&["10.0.0.9, 10.0.0.1"], Some("10.0.0.9")),
            (&[], None),
            (&[""], None),
            (&["192.0.2.7,"], None),
            (&["192.0.2.7", ""], None),
            (&["192.0.2.7, unknown, 10.0.0.1"], None),
            (&["192.0.2.7, 10.0.0.1, unknown"], None),
        ] {
            let expected = expected.map(|text| text.parse::<IpAddr>().unwrap());
            assert_eq!(networks.client(headers.iter().map(|value| value.as_bytes())), expected, "{headers:?}");
        }
        let hops = |count: usize| format!("192.0.2.7{}", ",10.0.0.1".repeat(count));
        let client = |text: &str| networks.client([text.as_bytes()].into_iter());
        assert_eq!(client(&hops(MAX_HOPS - 1)), Some([192, 0, 2, 7].into()));
        assert_eq!(client(&hops(MAX_HOPS)), None);
    }

    #[test]
    fn a_request_id_is_one_plain_word() {
        for good in ["a", "0b9f7e52-6d3b-4c1e-9a57-1f2e3d4c5b6a", "Root=1-67891233-abcdef012345678912345678", "a/b:c.d_e+f=="] {
            assert!(is_request_id(good.as_bytes()), "{good}");
        }
        assert!(is_request_id(&[b'a'; MAX_REQUEST_ID]) && !is_request_id(&[b'a'; MAX_REQUEST_ID + 1]));
        for bad in ["", "a b", "a\tb", "a\"", "'a'", "a\\b", "a,b", "a;b", "`a`", "\u{e9}", "a\u{7f}"] {
            assert!(!is_request_id(bad.as_bytes()), "{bad:?}");
        }
    }
}
