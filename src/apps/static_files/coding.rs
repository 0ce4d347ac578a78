//! The content codings that a request accepts (RFC 9110, section 12.5.3), and the files that have them. Pure.

use crate::http::errors::weight;

/// The weight of what is accepted without a weight, in thousandths.
const FULL_WEIGHT: u16 = 1000;

/// A content coding for which a file may lie beside the plain one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Coding {
    /// Its name in `content-encoding`.
    pub(super) name: &'static str,
    /// What is appended to the name of the plain file.
    pub(super) suffix: &'static [u8],
}

/// The codings, the one that makes files smallest first. Among those that a client accepts equally, the first is preferred.
const CODINGS: [Coding; 3] =
    [Coding { name: "br", suffix: b".br" }, Coding { name: "zstd", suffix: b".zst" }, Coding { name: "gzip", suffix: b".gz" }];

/// The weights that the `accept-encoding` lines of a request give. None of them accepts the plain file only.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Accepted {
    codings: [Option<u16>; CODINGS.len()],
    identity: Option<u16>,
    others: Option<u16>,
}

impl Accepted {
    /// Adds a line.
    pub(super) fn read(&mut self, value: &str) {
        for element in value.split(',') {
            let (name, parameters) = element.split_once(';').unwrap_or((element, ""));
            let name = name.trim();
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            let place = if is("*") {
                &mut self.others
            } else if is("identity") {
                &mut self.identity
            } else if let Some(at) = CODINGS.iter().position(|coding| is(coding.name) || coding.name == "gzip" && is("x-gzip")) {
                &mut self.codings[at]
            } else {
                continue;
            };
            *place = Some(if parameters.is_empty() { FULL_WEIGHT } else { weight(parameters) });
        }
    }

    /// The accepted codings, the most preferred first. The plain file comes after them all; a coding to which the client prefers it is
    /// left out.
    pub(super) fn preferred(&self) -> impl Iterator<Item = Coding> {
        let least = self.identity.unwrap_or(0).max(1);
        let mut weighed: [(u16, Option<Coding>); CODINGS.len()] = Default::default();
        for (place, (given, coding)) in weighed.iter_mut().zip(self.codings.iter().zip(CODINGS)) {
            let weight = given.or(self.others).unwrap_or(0);
            *place = (weight, Some(coding).filter(|_| weight >= least));
        }
        // The sort is stable.
        weighed.sort_by_key(|(weight, _)| std::cmp::Reverse(*weight));
        weighed.into_iter().filter_map(|(_, coding)| coding)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preferred(lines: &[&str]) -> Vec<&'static str> {
        let mut accepted = Accepted::default();
        lines.iter().for_each(|line| accepted.read(line));
        accepted.preferred().map(|coding| coding.name).collect()
    }

    #[test]
    fn weights_decide_and_then_the_smaller_file() {
        for (line, expected) in [
            ("gzip, deflate, br, zstd", &["br", "zstd", "gzip"][..]),
            ("gzip, deflate, br", &["br", "gzip"]),
            ("gzip", &["gzip"]),
            ("x-gzip", &["gzip"]),
            ("GZIP;Q=0.5 , Br ; q=0.4", &["gzip", "br"]),
            ("br;q=0, gzip", &["gzip"]),
            ("*", &["br", "zstd", "gzip"]),
            ("*;q=0.5, gzip", &["gzip", "br", "zstd"]),
            ("*, br;q=0", &["zstd", "gzip"]),
            ("identity, gzip;q=0.5", &[]),
            ("identity;q=0.5, gzip;q=0.5", &["gzip"]),
            ("identity;q=0, gzip;q=0.001", &["gzip"]),
            ("gzip;q=0", &[]),
            ("*;q=0", &[]),
            ("gzip;q=x", &[]),
            ("gzip;q=2", &[]),
            ("gzipped, brotli", &[]),
            ("", &[]),
            (",,;,", &[]),
        ] {
            assert_eq!(preferred(&[line]), expected, "{line}");
        }
        assert_eq!(preferred(&["gzip;q=0.5", "br;q=0.4"]), ["gzip", "br"]);
        assert!(preferred(&[]).is_empty());
    }
}
