//! Broken licences: whatever comes, there is a verdict and no panic, and nothing passes that was not signed.

use crate::support::root;
use pasetors::keys::{AsymmetricKeyPair, Generate};
use pasetors::version4::{PublicToken, V4};
use plugrack_sdk::license::{Code, Keyring, Known, Place, Refusal, Time, inspect, unverified, verify};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

/// For so many seconds there is more; otherwise [`TRIES`] are all.
const SECONDS: &str = "PLUGRACK_FUZZ_SECONDS";

/// Enough to reach each verdict that can be reached, within a few seconds.
const TRIES: u32 = 1500;

/// Pieces of what tokens and claims are made of.
const PIECES: [&str; 24] = [
    "v4.public.",
    ".",
    "=",
    "e30",
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "null",
    "-1",
    "1e999",
    "18446744073709551616",
    "\\u0000",
    "\\ud800",
    "\u{feff}",
    "\u{202e}",
    "\0",
    "\"crit\":[\"x\"],",
    "\"v\":2,",
    "9999-12-31T23:59:59Z",
    "0000-00-00",
];

/// A small generator of numbers, so that what is found can be found again: xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(bound.max(1)).unwrap()).unwrap()
    }

    /// The text with a few things done to it, such as typing, cutting and pasting do.
    fn mutated(&mut self, text: &str, other: &str) -> Vec<u8> {
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..=self.below(3) {
            let at = self.below(bytes.len() + 1);
            let to = at + self.below((bytes.len() - at).min(40) + 1);
            match self.below(6) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 => drop(bytes.drain(at..to)),
                2 => drop(bytes.splice(at..at, bytes[at..to].to_vec())),
                3 => drop(bytes.splice(at..to, PIECES[self.below(PIECES.len())].bytes())),
                4 => {
                    let from = self.below(other.len() + 1);
                    drop(bytes.splice(at.., other.as_bytes()[from..].iter().copied()));
                }
                _ => bytes.insert(at, u8::try_from(self.below(256)).unwrap()),
            }
        }
        bytes
    }
}

#[test]
fn no_broken_licence_passes_or_ends_in_anything_but_a_verdict() {
    let file: Value = serde_json::from_slice(&fs::read(root().join("tests/protocol/licenses.json")).unwrap()).unwrap();
    let tokens: Vec<_> =
        file["cases"].as_array().unwrap().iter().filter_map(|case| case["token"].as_str().map(str::trim_ascii)).collect();
    let signed: BTreeSet<_> = tokens.iter().copied().collect();
    let payloads: Vec<_> = signed.iter().filter_map(|token| serde_json::to_string(&unverified(token)?).ok()).collect();
    let pair = AsymmetricKeyPair::<V4>::generate().unwrap();
    let mut own = String::new();
    pasetors::paserk::FormatAsPaserk::fmt(&pair.public, &mut own).unwrap();
    let keys = file["keys"].as_object().unwrap().iter().map(|(kid, key)| (kid.as_str(), key.as_str().unwrap()));
    let keyring = keys.chain([("own", own.as_str())]).fold(Keyring::new(), |keys, (kid, key)| keys.with(kid, key).unwrap());
    let now: Time = "2026-10-01T12:00:00Z".parse().unwrap();
    let place = Place {
        plugin_id: "report",
        instance_id: "5f0c3f0e-8a52-4c1e-9d55-0c6a4f0b7a11",
        release_date: None,
        now,
        not_before_time: None,
    };
    let known = Known { keyring: Some(&keyring), plugin_id: Some("report"), instance_id: Some("x"), release_date: None, now };

    let seconds = std::env::var(SECONDS).ok().and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    let (started, mut tries) = (Instant::now(), 0_u32);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut met = BTreeSet::new();
    let mut refused = |refusal: &Refusal| {
        let line = refusal.to_string();
        assert!(line.len() < 20_000 && !line.contains(char::is_control), "{line:?}");
        met.insert(refusal.code.as_str());
    };
    while seconds.map_or(tries < TRIES, |seconds| started.elapsed() < seconds) {
        tries += 1;
        // A token that was changed on its way.
        let (one, other) = (tokens[random.below(tokens.len())], tokens[random.below(tokens.len())]);
        let broken = String::from_utf8_lossy(&random.mutated(one, other)).into_owned();
        match verify(Some(&broken), &keyring, &place) {
            Ok(_) => assert!(signed.contains(broken.trim_ascii()), "this was not signed: {broken:?}"),
            Err(refusal) => refused(&refusal),
        }
        assert!(!inspect(&broken, &known).checks.is_empty());
        // Claims that a vendor has signed, whatever they are.
        let (one, other) = (&payloads[random.below(payloads.len())], &payloads[random.below(payloads.len())]);
        let payload = random.mutated(one, other);
        if let Ok(token) =
            PublicToken::sign(&pair.secret, &payload, Some(br#"{"kid":"own"}"#), Some(b"plugrack/plugin-licence/v1"))
        {
            let verdict = verify(Some(&token), &keyring, &place);
            let rightly = |code: Code| code != Code::BadSignature && code != Code::UnknownKey && code != Code::Missing;
            assert!(verdict.as_ref().err().is_none_or(|refusal| rightly(refusal.code)), "{verdict:?}");
            assert_eq!(
                unverified(&token).is_none(),
                verdict.as_ref().is_err_and(|refusal| matches!(refusal.code, Code::Malformed | Code::Unsupported))
            );
            verdict.err().iter().for_each(&mut refused);
        }
    }
    eprintln!("{tries} rounds in {} s: {met:?}", started.elapsed().as_secs());
    for code in [Code::Malformed, Code::UnknownKey, Code::BadSignature, Code::Unsupported, Code::WrongPlugin, Code::WrongInstance]
    {
        assert!(met.contains(code.as_str()), "{code} was never met: {met:?}");
    }
}
