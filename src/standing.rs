//! How a plugin stands with its licence, as the operator is told. Pure: time is passed in.
//!
//! The host has no vendor's key, so what it reads of a token is not verified: that is the plugin's part, and the host says that a
//! licence is valid only of a plugin that runs with it.

use crate::license::{Code, MAX_TOKEN, WARNING_DAYS};
use crate::protocol::message::Failure;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What every token begins with.
const PREFIX: &str = "v4.public.";

/// Bytes of the signature at the end of a token's payload.
const SIGNATURE: usize = 64;

/// Characters of a token's payload that are shown, so that an operator can tell two tokens apart: of the claims, which are no secret.
const SHOWN: usize = 8;

/// From how many milliseconds before its end on a licence is said to expire, as the plugins' own check does.
const NOTICE: i64 = WARNING_DAYS * DAY;

/// A day in milliseconds.
const DAY: i64 = 86_400_000;

/// The code and the sentence `licence: CODE: WHAT TO DO` of an answer by which a plugin refuses its licence.
pub(crate) fn refusal(told: &Failure) -> Option<(Code, String)> {
    let code = Code::ALL.into_iter().find(|code| code.as_str() == told.code)?;
    let prefix = format!("licence: {code}: ");
    let sentence = if told.message.starts_with(&prefix) { told.message.clone() } else { prefix + &told.message };
    Some((code, sentence))
}

/// A token without the white space around it, if it looks like one.
///
/// # Errors
/// One sentence: what it is not.
pub(crate) fn check_form(token: &[u8]) -> Result<&str, String> {
    let token = token.trim_ascii();
    if token.len() > MAX_TOKEN {
        return Err(format!("a licence is at most {MAX_TOKEN} bytes, this has {}: give the token alone", token.len()));
    }
    let segment = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    let token = std::str::from_utf8(token).ok().filter(|token| {
        let parts: Vec<&str> = token.strip_prefix(PREFIX).unwrap_or_default().split('.').collect();
        parts.len() == 2 && parts.iter().all(segment)
    });
    token.ok_or_else(|| "this is no licence: one is a line of the form v4.public.….…, give it as the vendor issued it".into())
}

/// As much of a token as is shown.
pub(crate) fn shown(token: &str) -> String {
    let end = token.floor_char_boundary(PREFIX.len() + SHOWN);
    format!("{}…", &token[..end])
}

/// What a token says of itself, not verified.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Claims {
    /// The licence's own id.
    jti: Option<String>,
    /// The customer.
    sub: Option<String>,
    /// The instances it is for.
    #[serde(default)]
    inst: Vec<String>,
    /// When it expires.
    exp: Option<String>,
    /// For how many days it then still holds.
    #[serde(default)]
    grace_days: u16,
}

impl Claims {
    /// Reads the claims of a token WITHOUT verifying it: to be shown, never to be relied on. Of what cannot be read there are none.
    pub(crate) fn unverified(token: &str) -> Self {
        let read = || {
            let payload = BASE64URL.decode(token.strip_prefix(PREFIX)?.split('.').next()?).ok()?;
            serde_json::from_slice(payload.get(..payload.len().checked_sub(SIGNATURE)?)?).ok()
        };
        read().unwrap_or_default()
    }

    /// Whether the licence is for this instance by name.
    pub(crate) fn names(&self, instance: &str) -> bool {
        self.inst.iter().any(|name| name == instance)
    }

    /// What is to be said in the log at `now_ms` of a licence that a plugin runs with.
    pub(crate) fn warning(&self, now_ms: i64) -> Option<String> {
        let exp = self.expiry()?;
        match self.left(now_ms)? {
            Left::Days(days) => Some(format!("its licence expires in {}, at {exp}: ask the vendor for the next", in_days(days))),
            Left::Grace(days) => {
                Some(format!("its licence has expired at {exp}, and the vendor lets it run for {} more: renew it", in_days(days)))
            }
        }
    }

    fn expiry(&self) -> Option<Timestamp> {
        self.exp.as_deref()?.parse().ok()
    }

    fn left(&self, now_ms: i64) -> Option<Left> {
        let left = self.expiry()?.as_millisecond().saturating_sub(now_ms);
        let days = |ms: i64| ms.saturating_add(DAY - 1).div_euclid(DAY).max(0);
        match left {
            ..=0 => Some(Left::Grace(days(left + i64::from(self.grace_days) * DAY))),
            1..=NOTICE => Some(Left::Days(days(left))),
            _ => None,
        }
    }
}

/// Whole days, rounded up.
enum Left {
    /// Until it expires.
    Days(i64),
    /// In which it still holds.
    Grace(i64),
}

fn in_days(days: i64) -> String {
    if days == 1 { "1 day".into() } else { format!("{days} days") }
}

/// How a plugin stands: `refused` is the code by which it has refused its licence, `runs` whether it answers. None while it does
/// not run for another reason, since then nobody has checked what it has.
pub(crate) fn standing(token: Option<&str>, refused: Option<Code>, runs: bool, now_ms: i64) -> Option<String> {
    match (refused, token) {
        (Some(code), _) => Some(format!("refused: {code}")),
        (None, None) => Some("none".into()),
        (None, Some(token)) => runs.then(|| match Claims::unverified(token).left(now_ms) {
            Some(Left::Days(days)) => format!("expires in {}", in_days(days)),
            Some(Left::Grace(_)) => "grace".into(),
            None => "valid".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(claims: &str) -> String {
        let payload = [claims.as_bytes(), &[7; SIGNATURE]].concat();
        format!("{PREFIX}{}.eyJraWQiOiJrIn0", BASE64URL.encode(payload))
    }

    #[test]
    fn a_plugin_stands_as_it_says_itself_and_as_its_licence_reads() {
        let end: Timestamp = "2027-03-01T00:00:00Z".parse().unwrap();
        let end = end.as_millisecond();
        let dated = token(r#"{"exp":"2027-03-01T00:00:00Z","grace_days":14}"#);
        let (dated, forever, garbled) = (Some(&*dated), Some(&*token("{}")), Some("v4.public.AAAA.BBBB"));
        for (token, refused, runs, now, expected) in [
            (None, None, true, end, Some("none")),
            (None, Some(Code::Missing), false, end, Some("refused: missing")),
            (dated, Some(Code::Expired), false, end, Some("refused: expired")),
            (dated, None, false, end, None),
            (dated, None, true, end - NOTICE - 1, Some("valid")),
            (dated, None, true, end - NOTICE, Some("expires in 30 days")),
            (dated, None, true, end - DAY - 1, Some("expires in 2 days")),
            (dated, None, true, end - DAY, Some("expires in 1 day")),
            (dated, None, true, end - 1, Some("expires in 1 day")),
            (dated, None, true, end, Some("grace")),
            (forever, None, true, end, Some("valid")),
            (garbled, None, true, end, Some("valid")),
        ] {
            assert_eq!(standing(token, refused, runs, now).as_deref(), expected, "{token:?} {refused:?} {runs} {}", now - end);
        }
        let claims = Claims::unverified(dated.unwrap());
        let warning = |now| claims.warning(now).unwrap_or_default();
        assert_eq!(warning(end - NOTICE - 1), "");
        assert!(warning(end - 2 * DAY).contains("expires in 2 days, at 2027-03-01T00:00:00Z"), "{}", warning(end - 2 * DAY));
        for (now, left) in [(end, "14 days"), (end + 1, "14 days"), (end + 13 * DAY, "1 day"), (end + 20 * DAY, "0 days")] {
            assert!(warning(now).contains(&format!("for {left} more")), "{}", warning(now));
        }
    }

    #[test]
    fn what_does_not_look_like_a_token_is_told_from_what_does() {
        let long = |length: usize| format!("{PREFIX}{}.e30", "A".repeat(length - PREFIX.len() - 4));
        for (given, taken) in [
            (" v4.public.AA-_.e30\n".to_owned(), true),
            (long(MAX_TOKEN), true),
            (long(MAX_TOKEN + 1), false),
            (String::new(), false),
            ("v4.public.AAAA".into(), false),
            ("v4.public..e30".into(), false),
            ("v4.public.AAAA.e30.e30".into(), false),
            ("v4.local.AAAA.e30".into(), false),
            ("v4.public.AA AA.e30".into(), false),
            ("v4.public.AAÄA.e30".into(), false),
        ] {
            assert_eq!(check_form(given.as_bytes()).is_ok(), taken, "{given}");
        }
        assert!(check_form(b"v4.public.\xff\xff.e30").is_err());
        assert_eq!(check_form(b"\tv4.public.AAAA.e30 "), Ok("v4.public.AAAA.e30"));
        assert_eq!(shown("v4.public.0123456789.e30"), "v4.public.01234567…");
    }

    #[test]
    fn what_cannot_be_read_of_a_token_has_no_claims() {
        for text in ["", "v4.public.", "v4.public.A.B", "v4.public.AAAA.BBBB", &token("[]"), &token(r#"{"exp":5}"#), &token("{")]
        {
            let claims = Claims::unverified(text);
            assert!(claims.exp.is_none() && claims.inst.is_empty(), "{text}");
        }
        assert!(Claims::unverified(&token(r#"{"inst":["a","b"]}"#)).names("b"));
        assert!(!Claims::unverified(&token(r#"{"inst":["*"]}"#)).names("b"));
    }

    #[test]
    fn a_refusal_is_told_by_its_code_and_says_it_once() {
        let told = |code: &str, message: &str| Failure { id: 1, code: code.into(), message: message.into(), index: None };
        assert_eq!(refusal(&told("config", "set it")), None);
        for message in ["renew it", "licence: expired: renew it"] {
            assert_eq!(refusal(&told("expired", message)), Some((Code::Expired, "licence: expired: renew it".into())));
        }
    }
}
