//! The status of a plugin's licence, as shown to the operator. Pure: time is passed in.
//!
//! The host has no vendor key, so it cannot verify a token; the plugin does that. The host calls a licence valid only if the plugin
//! runs with it.

use crate::license::{Claims, Code, MAX_TOKEN, Standing, Time, unverified};
use crate::process::exit::Exit;
use crate::protocol::message::Failure;
use serde::Serialize;

/// Prefix of the sentence of a plugin that refuses its licence.
const SENTENCE: &str = "licence: ";

/// Prefix of every token.
const PREFIX: &str = "v4.public.";

/// Characters of a token's payload to show, so that an operator can tell tokens apart. They encode claims, which are not secret.
const SHOWN: usize = 8;

/// The code and the sentence `licence: CODE: WHAT TO DO` of a reply by which a plugin refuses its licence.
pub(crate) fn refusal(told: &Failure) -> Option<(Code, String)> {
    let code = Code::ALL.into_iter().find(|code| code.as_str() == told.code)?;
    let prefix = format!("licence: {code}: ");
    let sentence = if told.message.starts_with(&prefix) { told.message.clone() } else { prefix + &told.message };
    Some((code, sentence))
}

/// The code by which an application refuses its licence: it exits with 78, and its last line is `licence: CODE: WHAT TO DO`, or speaks of
/// a licence in its own words.
pub(crate) fn refusal_by_exit(exit: Exit, last_line: &str, has_license: bool) -> Option<Code> {
    if exit != Exit::Code(78) {
        return None;
    }
    let code = last_line.strip_prefix(SENTENCE).and_then(|rest| rest.split(':').next());
    let code = code.and_then(|code| Code::ALL.into_iter().find(|known| known.as_str() == code));
    let words = last_line.to_ascii_lowercase();
    let speaks_of_it = words.contains("licence") || words.contains("license");
    code.or_else(|| speaks_of_it.then_some(if has_license { Code::Malformed } else { Code::Missing }))
}

/// Trims a token and checks its form.
///
/// # Errors
/// One sentence that says what is wrong with it.
pub(crate) fn check_form(token: &[u8]) -> Result<&str, String> {
    let token = token.trim_ascii();
    if token.len() > MAX_TOKEN {
        return Err(format!("a licence has at most {MAX_TOKEN} bytes, and this has {}: give the token alone", token.len()));
    }
    let segment = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    let token = std::str::from_utf8(token).ok().filter(|token| {
        let parts: Vec<&str> = token.strip_prefix(PREFIX).unwrap_or_default().split('.').collect();
        parts.len() == 2 && parts.iter().all(segment)
    });
    token
        .ok_or_else(|| "this is not a licence: give the token as the vendor issued it, one line of the form v4.public.….…".into())
}

/// Trims text and checks that the host can hand it to a plugin as a licence.
///
/// # Errors
/// One sentence that says what is wrong with it.
pub(crate) fn check_text(token: &[u8]) -> Result<&str, String> {
    let token = token.trim_ascii();
    let is_text = |token: &&str| !token.is_empty() && token.len() <= MAX_TOKEN && !token.chars().any(char::is_control);
    let text = std::str::from_utf8(token).ok().filter(is_text);
    text.ok_or_else(|| format!("a licence is one line of 1 to {MAX_TOKEN} bytes of text, and this has {} bytes", token.len()))
}

/// Whether an exit before `ready` counts as a refusal of the licence on trial. A plugin that `ran` with what it had before must run
/// again, so for it any exit of its own counts.
///
/// A licence that `begins_later` stays on trial, unless the plugin ran before.
pub(crate) fn rejects_trial(exit: Exit, ran: bool, begins_later: bool) -> bool {
    match exit {
        Exit::Unlicensed(Code::NotYetValid) if begins_later => ran,
        Exit::Unlicensed(code) if !code.is_temporary() => true,
        Exit::Unlicensed(_) | Exit::Code(_) | Exit::Signal(_) | Exit::Fault => ran,
        _ => false,
    }
}

/// What a plugin did with a licence on trial that it did not become ready with, judged by the reason of its exit.
pub(crate) fn verdict(why: &str) -> &'static str {
    if why.starts_with(SENTENCE) { "rejected" } else { "did not start with" }
}

/// Turns the sentence `licence: CODE: WHAT TO DO` into `WHAT TO DO (CODE)` for people. Returns any other reason unchanged.
pub(crate) fn for_people(why: &str) -> String {
    match why.strip_prefix(SENTENCE).and_then(|rest| rest.split_once(": ")) {
        Some((code, what)) => format!("{what} ({code})"),
        None => why.to_owned(),
    }
}

/// The status of a plugin's licence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct LicenseStatus {
    /// The state, for programs.
    pub(crate) state: LicenseState,
    /// The code with which the plugin refused it.
    code: Option<&'static str>,
    /// For people: why it was refused, or when it expires.
    message: Option<String>,
    /// Expiry in RFC 3339, from the token and unverified.
    expires_at: Option<String>,
}

/// The state of a plugin's licence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LicenseState {
    /// No licence is set, and the plugin has not asked for one.
    None,
    /// The plugin runs with it.
    Valid,
    /// The plugin runs with it, and it expires within 30 days.
    Expiring,
    /// It has expired, and the plugin still runs.
    Grace,
    /// It has expired, and the plugin has refused it.
    Expired,
    /// It is not valid yet; the plugin starts when it is.
    Pending,
    /// The plugin has refused it for another reason, or needs one and has none.
    Refused,
    /// A licence is set, and the plugin does not run for another reason.
    Unchecked,
}

/// The part of a token that is shown.
pub(crate) fn shown(token: &str) -> String {
    let end = token.floor_char_boundary(PREFIX.len() + SHOWN);
    format!("{}…", &token[..end])
}

/// The standing of a running plugin's licence. It may have expired since the plugin checked it.
fn of_running(claims: &Claims, now: Time) -> Standing {
    claims.standing(now).unwrap_or(Standing::Grace { days_left: 0 })
}

/// The daily log warning about the licence of a running plugin, if one is due.
pub(crate) fn warning(token: &str, now: Time) -> Option<String> {
    let claims = unverified(token)?;
    let exp = claims.exp?;
    match of_running(&claims, now) {
        Standing::Valid => None,
        Standing::Warning { days_left } => {
            Some(format!("its licence expires in {}, at {exp}: ask the vendor to renew it", in_days(days_left)))
        }
        Standing::Grace { days_left } => {
            Some(format!("its licence expired at {exp}, and its grace period ends in {}: renew it", in_days(days_left)))
        }
    }
}

/// Whether a licence names this instance.
pub(crate) fn names(token: &str, instance: &str) -> bool {
    unverified(token).is_some_and(|claims| claims.inst.iter().any(|name| name == instance))
}

fn in_days(days: u32) -> String {
    if days == 1 { "1 day".into() } else { format!("{days} days") }
}

/// The status of a plugin's licence. `refused` is the code and reason of the plugin's refusal; `runs` is whether the plugin answers
/// requests.
pub(crate) fn license_status(token: Option<&str>, refused: Option<(Code, &str)>, runs: bool, now: Time) -> LicenseStatus {
    let claims = token.and_then(unverified);
    let begins = claims.as_ref().and_then(|claims| claims.nbf);
    let (state, code, message) = match (refused, token) {
        (Some((code, why)), _) => {
            let state = match code {
                Code::Expired => LicenseState::Expired,
                Code::NotYetValid if begins.is_some_and(|begins| now < begins) => LicenseState::Pending,
                _ => LicenseState::Refused,
            };
            let what = why.strip_prefix(&format!("{SENTENCE}{code}: ")).unwrap_or(why);
            (state, Some(code.as_str()), Some(what.to_owned()))
        }
        (None, None) => (LicenseState::None, None, None),
        (None, Some(_)) if !runs => (LicenseState::Unchecked, None, None),
        (None, Some(_)) => match claims.as_ref().map(|claims| of_running(claims, now)) {
            Some(Standing::Warning { days_left }) => {
                (LicenseState::Expiring, None, Some(format!("expires in {}", in_days(days_left))))
            }
            Some(Standing::Grace { days_left }) => {
                (LicenseState::Grace, None, Some(format!("expired, and its grace period ends in {}", in_days(days_left))))
            }
            Some(Standing::Valid) | None => (LicenseState::Valid, None, None),
        },
    };
    // Tokens have whole seconds; times in JSON have milliseconds.
    let expires_at = claims.and_then(|claims| claims.exp).map(|exp| exp.to_string().replace('Z', ".000Z"));
    LicenseStatus { state, code, message, expires_at }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;

    const DAY: i64 = 86_400;

    /// A token of these claims beside those that must be there. Nobody here verifies its signature.
    fn token(claims: &str) -> String {
        let required = r#""v":1,"jti":"1","iss":"i","aud":"p","iat":"2026-01-01T00:00:00Z""#;
        let payload = [format!("{{{required},{claims}}}").as_bytes(), &[7; 64]].concat();
        format!("{PREFIX}{}.eyJraWQiOiJrIn0", BASE64URL.encode(payload))
    }

    #[test]
    fn the_status_follows_from_the_refusal_and_the_claims() {
        let end: Time = "2027-03-01T00:00:00Z".parse().unwrap();
        let dated = token(r#""inst":[],"exp":"2027-03-01T00:00:00Z","grace_days":14"#);
        let (dated, forever, garbled) = (Some(&*dated), Some(&*token(r#""inst":[]"#)), Some("v4.public.AAAA.BBBB"));
        let later = token(r#""inst":[],"nbf":"2027-03-02T00:00:00Z""#);
        let (later, early) = (Some(&*later), Some((Code::NotYetValid, "licence: not_yet_valid: wait")));
        let missing = Some((Code::Missing, "licence: missing: set one"));
        let expired = Some((Code::Expired, "licence: expired: renew it"));
        for (token, refused, runs, seconds, expected) in [
            (None, None, true, 0, (LicenseState::None, None, None)),
            (None, missing, false, 0, (LicenseState::Refused, Some("missing"), Some("set one"))),
            (dated, expired, false, 0, (LicenseState::Expired, Some("expired"), Some("renew it"))),
            (later, early, false, 0, (LicenseState::Pending, Some("not_yet_valid"), Some("wait"))),
            (later, early, false, DAY, (LicenseState::Refused, Some("not_yet_valid"), Some("wait"))),
            (dated, early, false, 0, (LicenseState::Refused, Some("not_yet_valid"), Some("wait"))),
            (dated, None, false, 0, (LicenseState::Unchecked, None, None)),
            (dated, None, true, -30 * DAY - 1, (LicenseState::Valid, None, None)),
            (dated, None, true, -30 * DAY, (LicenseState::Expiring, None, Some("expires in 30 days"))),
            (dated, None, true, -DAY - 1, (LicenseState::Expiring, None, Some("expires in 2 days"))),
            (dated, None, true, -DAY, (LicenseState::Expiring, None, Some("expires in 1 day"))),
            (dated, None, true, -1, (LicenseState::Expiring, None, Some("expires in 1 day"))),
            (dated, None, true, 0, (LicenseState::Grace, None, Some("expired, and its grace period ends in 14 days"))),
            (dated, None, true, 20 * DAY, (LicenseState::Grace, None, Some("expired, and its grace period ends in 0 days"))),
            (forever, None, true, 0, (LicenseState::Valid, None, None)),
            (garbled, None, true, 0, (LicenseState::Valid, None, None)),
        ] {
            let status = license_status(token, refused, runs, end.plus_seconds(seconds));
            let told = (status.state, status.code, status.message.as_deref());
            assert_eq!(told, expected, "{token:?} {refused:?} {runs} {seconds}");
            let expires_at = (token == dated && dated.is_some()).then_some("2027-03-01T00:00:00.000Z");
            assert_eq!(status.expires_at.as_deref(), expires_at, "{token:?}");
        }
        for (why, shown) in
            [("licence: expired: renew it: now", "renew it: now (expired)"), ("exit code 1: no", "exit code 1: no")]
        {
            assert_eq!(for_people(why), shown);
        }
        let warning = |seconds| warning(dated.unwrap(), end.plus_seconds(seconds)).unwrap_or_default();
        assert_eq!(warning(-30 * DAY - 1), "");
        assert!(warning(-2 * DAY).contains("expires in 2 days, at 2027-03-01T00:00:00Z"), "{}", warning(-2 * DAY));
        for (seconds, left) in [(0, "14 days"), (1, "14 days"), (13 * DAY, "1 day"), (20 * DAY, "0 days")] {
            assert!(warning(seconds).contains(&format!("ends in {left}:")), "{}", warning(seconds));
        }
        assert!(names(&token(r#""inst":["a","b"]"#), "b"));
        assert!(!names(&token(r#""inst":["*"]"#), "b") && !names("v4.public.AAAA.BBBB", "b"));
    }

    #[test]
    fn only_text_in_the_form_of_a_token_is_accepted() {
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
    fn a_plugin_that_ran_rejects_a_licence_by_any_end_of_its_own_and_another_by_a_code() {
        for (exit, ran, rejects) in [
            (Exit::Unlicensed(Code::UnknownKey), false, true),
            (Exit::Unlicensed(Code::NotYetValid), false, true),
            (Exit::Unlicensed(Code::UnknownKey), true, true),
            (Exit::Unlicensed(Code::ClockNotSet), false, false),
            (Exit::Unlicensed(Code::ClockNotSet), true, true),
            (Exit::Code(78), false, false),
            (Exit::Code(78), true, true),
            (Exit::Code(1), true, true),
            (Exit::Signal(11), true, true),
            (Exit::Fault, true, true),
            (Exit::Fault, false, false),
            (Exit::NoCapacity, true, false),
            (Exit::NotStarted, true, false),
            (Exit::Unfit, true, false),
        ] {
            assert_eq!(rejects_trial(exit, ran, false), rejects, "{exit:?} {ran}");
        }
        let later = |code, ran| rejects_trial(Exit::Unlicensed(code), ran, true);
        assert_eq!(
            [later(Code::NotYetValid, false), later(Code::NotYetValid, true), later(Code::UnknownKey, false)],
            [false, true, true]
        );
    }

    #[test]
    fn with_force_any_line_of_text_is_a_licence() {
        for (given, taken) in [("hello\n", true), ("", false), (" \n", false), ("a\nb", false)] {
            assert_eq!(check_text(given.as_bytes()).is_ok(), taken, "{given:?}");
        }
        assert!(check_text(&[b'x'; MAX_TOKEN]).is_ok() && check_text(&[b'x'; MAX_TOKEN + 1]).is_err());
        assert!(check_text(b"\xff").is_err());
    }

    #[test]
    fn a_refusal_is_recognised_by_its_code_and_names_it_once() {
        let told = |code: &str, message: &str| Failure { id: 1, code: code.into(), message: message.into(), index: None };
        assert_eq!(refusal(&told("config", "set it")), None);
        for message in ["renew it", "licence: expired: renew it"] {
            assert_eq!(refusal(&told("expired", message)), Some((Code::Expired, "licence: expired: renew it".into())));
        }
    }

    #[test]
    fn an_application_refuses_its_licence_by_its_exit_and_last_line() {
        let refusal = |line| refusal_by_exit(Exit::Code(78), line, true);
        assert_eq!(refusal("licence: expired: renew it"), Some(Code::Expired));
        assert_eq!(refusal("Error: the License Key is not for this machine"), Some(Code::Malformed));
        assert_eq!(refusal_by_exit(Exit::Code(78), "no licence", false), Some(Code::Missing));
        assert_eq!(refusal("the setting DATABASE_URL is missing"), None);
        assert_eq!(refusal_by_exit(Exit::Code(1), "licence: expired: renew it", true), None);
    }
}
