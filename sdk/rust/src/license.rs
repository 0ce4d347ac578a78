//! Licences of proprietary plugins: tokens, and their checks for a plugin, an instance and a time. No I/O and no clock.
//!
//! A token is a PASETO `v4.public` (Ed25519) whose payload is the claims and whose footer names the key; `docs/licensing.md` has
//! the format. Plugins use [`verify`], vendors use [`issue`], and [`inspect`] explains a token to people.

use jiff::SignedDuration;
use jiff::civil;
use pasetors::keys::{AsymmetricKeyPair, AsymmetricPublicKey, AsymmetricSecretKey, Generate};
use pasetors::paserk::FormatAsPaserk;
use pasetors::token::{Public, UntrustedToken};
use pasetors::version4::{PublicToken, V4};
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest token in bytes: enough for some 25 instances and 100 features, and an eighth of the largest frame head.
pub const MAX_TOKEN: usize = 8192;

/// Longest footer in bytes. It is parsed before the signature is checked, and only names a key.
pub const MAX_FOOTER: usize = 256;

/// Longest key name, in characters.
pub const MAX_KID: usize = 64;

/// Longest grace period in days: ten years. Anything longer calls for a perpetual licence.
pub const MAX_GRACE_DAYS: u16 = 3650;

/// Largest limit: 2^53 − 1, the largest integer every JSON implementation holds exactly.
pub const MAX_LIMIT: u64 = (1 << 53) - 1;

/// Days before expiry from which a licence carries a warning: time enough to buy another.
pub const WARNING_DAYS: i64 = 30;

/// How many seconds the clock may be behind a licence's issue time: a day, so that local time mistaken for UTC does no harm.
pub const CLOCK_SLACK: i64 = DAY;

/// The version of the claims that this code knows.
const VERSION: u64 = 1;

/// Implicit assertion, signed with each token but not part of it, so that nothing else signed with the key passes for a licence.
const ASSERTION: &[u8] = b"plugrack/plugin-licence/v1";

/// In `inst`: every instance.
pub const ANY_INSTANCE: &str = "*";

/// The claims that this code knows, and that `crit` may name.
const KNOWN: [&str; 14] =
    ["v", "jti", "iss", "aud", "inst", "sub", "iat", "nbf", "exp", "grace_days", "upd", "feat", "lim", "crit"];

/// Seconds of a day.
const DAY: i64 = 86_400;

/// A second of time in UTC, written `2026-09-26T12:00:00Z`, from the year 1 to 9999.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Time(civil::DateTime);

/// A day, written `2026-09-26`, from the year 1 to 9999.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Date(civil::Date);

/// Text that is not a valid time or date.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not of the form {form}")]
pub struct NoTime {
    text: String,
    form: &'static str,
}

impl Time {
    /// Seconds from this time to another; negative if that is earlier.
    #[must_use]
    pub fn seconds_until(self, later: Self) -> i64 {
        later.0.duration_since(self.0).as_secs()
    }

    /// The end of a day: the first second of the next one.
    #[must_use]
    pub fn end_of(day: Date) -> Self {
        Self::from(day).plus_seconds(DAY)
    }

    /// The time this many seconds later, clamped to the range of [`Time`].
    #[must_use]
    pub fn plus_seconds(self, seconds: i64) -> Self {
        let last = Self(civil::datetime(9999, 12, 31, 23, 59, 59, 0));
        let first = Self(civil::datetime(1, 1, 1, 0, 0, 0, 0));
        let end = if seconds < 0 { first } else { last };
        self.0.checked_add(SignedDuration::from_secs(seconds)).map_or(end, |time| Self(time).clamp(first, last))
    }
}

/// Truncates to whole seconds, and clamps to the range of [`Time`].
impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        let epoch = Self(civil::datetime(1970, 1, 1, 0, 0, 0, 0));
        let seconds = |time: std::time::Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => epoch.plus_seconds(seconds(after)),
            Err(before) => epoch.plus_seconds(-seconds(before.duration())),
        }
    }
}

impl From<Date> for Time {
    /// The first second of the day.
    fn from(date: Date) -> Self {
        Self(date.0.at(0, 0, 0, 0))
    }
}

/// Whether text matches a pattern, in which `0` stands for any digit and other characters for themselves.
fn has_form(text: &str, pattern: &str) -> bool {
    let fits = |(have, want): (u8, u8)| if want == b'0' { have.is_ascii_digit() } else { have == want };
    text.len() == pattern.len() && text.bytes().zip(pattern.bytes()).all(fits) && !text.starts_with("0000")
}

impl FromStr for Time {
    type Err = NoTime;

    fn from_str(text: &str) -> Result<Self, NoTime> {
        let read = || has_form(text, "0000-00-00T00:00:00Z").then(|| text.trim_end_matches('Z').parse().ok().map(Self))?;
        // The parser reads second 60 as 59, so compare the text: each time has exactly one spelling.
        let time = read().filter(|time| time.to_string() == text);
        time.ok_or_else(|| NoTime { text: text.to_owned(), form: "YYYY-MM-DDTHH:MM:SSZ" })
    }
}

impl FromStr for Date {
    type Err = NoTime;

    fn from_str(text: &str) -> Result<Self, NoTime> {
        let read = || has_form(text, "0000-00-00").then(|| text.parse().ok().map(Self))?;
        read().ok_or_else(|| NoTime { text: text.to_owned(), form: "YYYY-MM-DD" })
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}Z", self.0)
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl TryFrom<String> for Time {
    type Error = NoTime;

    fn try_from(text: String) -> Result<Self, NoTime> {
        text.parse()
    }
}

impl TryFrom<String> for Date {
    type Error = NoTime;

    fn try_from(text: String) -> Result<Self, NoTime> {
        text.parse()
    }
}

impl From<Time> for String {
    fn from(time: Time) -> Self {
        time.to_string()
    }
}

impl From<Date> for String {
    fn from(date: Date) -> Self {
        date.to_string()
    }
}

/// The claims of a licence.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Claims {
    /// The version of the claims: 1.
    pub v: u64,
    /// The licence's own id.
    pub jti: String,
    /// Who issued it.
    pub iss: String,
    /// The plugin's id.
    pub aud: String,
    /// The ids of the instances it is for; `*` is every one.
    pub inst: Vec<String>,
    /// The customer.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub sub: Option<String>,
    /// When it was issued.
    pub iat: Time,
    /// Start of validity; at once, when absent.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub nbf: Option<Time>,
    /// Expiry; never, when absent.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub exp: Option<Time>,
    /// Days after expiry during which the plugin still runs, at most [`MAX_GRACE_DAYS`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub grace_days: u16,
    /// Last release date of the plugin that it covers; all releases, when absent.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub upd: Option<Date>,
    /// Features that it grants.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub feat: Vec<String>,
    /// Limits by name, each at most [`MAX_LIMIT`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub lim: BTreeMap<String, u64>,
}

/// JSON without duplicate member names, since parsers disagree on which one counts.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        value.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((name, Strict(value))) = members.next_entry::<String, Strict>()? {
            if object.insert(name, value).is_some() {
                return Err(A::Error::custom("a name occurs twice"));
            }
        }
        Ok(object.into())
    }
}

/// Parses a JSON object.
///
/// # Errors
/// Why the bytes are not a valid object.
fn object(json: &[u8]) -> Result<Map<String, Value>, String> {
    match serde_json::from_slice(json) {
        Ok(Strict(Value::Object(object))) => Ok(object),
        Ok(_) => Err("it is not an object".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Deserializes a claim that is present, so that `null` is a type error.
fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(value: D) -> Result<Option<T>, D::Error> {
    T::deserialize(value).map(Some)
}

fn is_zero(days: &u16) -> bool {
    *days == 0
}

impl Claims {
    /// Parses a payload: first the version, then the critical claims, then the rest, whose form may differ in a later version.
    fn parse(payload: &[u8]) -> Result<Self, Refusal> {
        let object = object(payload).map_err(|error| malformed(&format!("its claims: {error}")))?;
        let version = object.get("v").ok_or_else(|| malformed("it has no version"))?;
        if !version.is_u64() && !version.is_i64() {
            return Err(malformed("its version is not an integer"));
        }
        if version != VERSION {
            let what = format!(
                "it has version {version}, and this plugin supports version {VERSION}: install a newer plugin, or ask the vendor for a licence of version {VERSION}"
            );
            return Err(Refusal::new(Code::Unsupported, what));
        }
        let critical = object.get("crit").map_or(Ok(Vec::new()), |names| serde_json::from_value::<Vec<String>>(names.clone()));
        let critical = critical.map_err(|_| malformed("crit is not a list of names"))?;
        if let Some(name) = critical.iter().find(|name| !KNOWN.contains(&name.as_str())) {
            let what = format!("its critical claim {name:?} is unknown to this plugin: install a newer plugin");
            return Err(Refusal::new(Code::Unsupported, what));
        }
        let claims: Self = serde_json::from_value(object.into()).map_err(|error| malformed(&format!("its claims: {error}")))?;
        claims.check_bounds().map_err(|reason| malformed(&reason))?;
        Ok(claims)
    }

    fn check_bounds(&self) -> Result<(), String> {
        if self.grace_days > MAX_GRACE_DAYS {
            return Err(format!("a grace of {} days is over the limit of {MAX_GRACE_DAYS}", self.grace_days));
        }
        match self.lim.iter().find(|&(_, &limit)| limit > MAX_LIMIT) {
            Some((name, limit)) => Err(format!("the limit {name:?} of {limit} is over {MAX_LIMIT}")),
            None => Ok(()),
        }
    }

    /// End of the grace period; `None` for a perpetual licence.
    #[must_use]
    pub fn ends(&self) -> Option<Time> {
        self.exp.map(|exp| exp.plus_seconds(i64::from(self.grace_days) * DAY))
    }

    fn for_plugin(&self, id: &str) -> Result<(), Refusal> {
        if self.aud == id {
            return Ok(());
        }
        Err(Refusal::new(
            Code::WrongPlugin,
            format!("it is for the plugin {:?}, and this is {id:?}: set the licence of this plugin", self.aud),
        ))
    }

    fn for_instance(&self, id: &str) -> Result<(), Refusal> {
        if self.inst.iter().any(|inst| inst == id || inst == ANY_INSTANCE) {
            return Ok(());
        }
        let what = format!(
            "it is for the instance {}, and this is {id}: ask the vendor for a licence for this instance",
            self.instances()
        );
        Err(Refusal::new(Code::WrongInstance, what))
    }

    /// The instances, the first few by name.
    fn instances(&self) -> String {
        const FEW: usize = 3;
        let named: Vec<_> = self.inst.iter().take(FEW).map(|id| id.escape_debug().to_string()).collect();
        match self.inst.len() {
            0 => "of nobody".to_owned(),
            all if all > FEW => format!("{} and {} more", named.join(", "), all - FEW),
            _ => named.join(", "),
        }
    }

    fn for_release(&self, released: Date) -> Result<(), Refusal> {
        match self.upd {
            Some(upd) if released > upd => {
                let what = format!(
                    "it covers releases up to {upd}, and this one was released on {released}: install an older release, or ask the vendor for a licence that covers this one"
                );
                Err(Refusal::new(Code::UpdateNotCovered, what))
            }
            _ => Ok(()),
        }
    }

    fn clock(&self, now: Time) -> Result<(), Refusal> {
        if self.iat.seconds_until(now) >= -CLOCK_SLACK {
            return Ok(());
        }
        let what = format!("the clock shows {now}, and the licence was issued at {}: set the clock of this machine", self.iat);
        Err(Refusal::new(Code::ClockNotSet, what))
    }

    fn begun(&self, time: Time) -> Result<(), Refusal> {
        match self.nbf {
            Some(nbf) if time < nbf => Err(Refusal::new(
                Code::NotYetValid,
                format!("it is valid from {nbf} on, and it is {time}: wait, or ask the vendor for another"),
            )),
            _ => Ok(()),
        }
    }

    /// The standing at a time, judged by the dates alone.
    ///
    /// # Errors
    /// It has expired, and its grace period is over.
    pub fn standing(&self, time: Time) -> Result<Standing, Refusal> {
        let (Some(exp), Some(ends)) = (self.exp, self.ends()) else { return Ok(Standing::Valid) };
        let days = |seconds: i64| u32::try_from((seconds + DAY - 1) / DAY).unwrap_or(u32::MAX);
        let (left, grace) = (time.seconds_until(exp), time.seconds_until(ends));
        if left > WARNING_DAYS * DAY {
            Ok(Standing::Valid)
        } else if left > 0 {
            Ok(Standing::Warning { days_left: days(left) })
        } else if grace > 0 {
            Ok(Standing::Grace { days_left: days(grace) })
        } else {
            let grace = if self.grace_days > 0 { format!(", and its grace period ended at {ends}") } else { String::new() };
            Err(Refusal::new(
                Code::Expired,
                format!("it expired at {exp}{grace}, and it is {time}: ask the vendor for a new one"),
            ))
        }
    }
}

/// Why a licence is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// No licence is set.
    Missing,
    /// It is malformed.
    Malformed,
    /// Signed with a key that the plugin does not have.
    UnknownKey,
    /// Not signed with the key that it names, or modified since.
    BadSignature,
    /// Of an unknown version, or with an unknown critical claim.
    Unsupported,
    /// For another plugin.
    WrongPlugin,
    /// For other instances.
    WrongInstance,
    /// The licence does not cover this release of the plugin.
    UpdateNotCovered,
    /// The machine's clock is before the issue time. Temporary.
    ClockNotSet,
    /// It is not valid yet.
    NotYetValid,
    /// It has expired, and its grace period is over.
    Expired,
}

impl Code {
    /// All codes, in the order of the checks.
    pub const ALL: [Self; 11] = [
        Self::Missing,
        Self::Malformed,
        Self::UnknownKey,
        Self::BadSignature,
        Self::Unsupported,
        Self::WrongPlugin,
        Self::WrongInstance,
        Self::UpdateNotCovered,
        Self::ClockNotSet,
        Self::NotYetValid,
        Self::Expired,
    ];

    /// The code in the protocol.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::UnknownKey => "unknown_key",
            Self::BadSignature => "bad_signature",
            Self::Unsupported => "unsupported",
            Self::WrongPlugin => "wrong_plugin",
            Self::WrongInstance => "wrong_instance",
            Self::UpdateNotCovered => "update_not_covered",
            Self::ClockNotSet => "clock_not_set",
            Self::NotYetValid => "not_yet_valid",
            Self::Expired => "expired",
        }
    }

    /// Whether the refusal may end without another licence.
    #[must_use]
    pub fn is_temporary(self) -> bool {
        self == Self::ClockNotSet
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a licence is refused, and what to do about it. Displayed as the one line that a plugin logs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("licence: {code}: {what}")]
pub struct Refusal {
    /// Which check failed.
    pub code: Code,
    /// What to do, in one sentence that never contains the token.
    pub what: String,
}

impl Refusal {
    fn new(code: Code, what: String) -> Self {
        Self { code, what }
    }
}

fn missing() -> Refusal {
    Refusal::new(Code::Missing, "there is no licence, and this plugin needs one: ask its vendor for a licence for the id that plugrack instance prints, and set it with plugrack license set".to_owned())
}

/// A malformed token. The reason may quote the token, so it is truncated.
fn malformed(reason: &str) -> Refusal {
    const SHOWN: usize = 160;
    let reason: String = reason.chars().take(SHOWN).collect();
    let what =
        format!("this is not a licence ({}): copy the whole token again, or ask the vendor for another", reason.escape_debug());
    Refusal::new(Code::Malformed, what)
}

/// The validity of an accepted licence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Valid for more than [`WARNING_DAYS`], or for ever.
    Valid,
    /// It expires within [`WARNING_DAYS`].
    Warning {
        /// Days until it expires, rounded up.
        days_left: u32,
    },
    /// It has expired, and the plugin still runs.
    Grace {
        /// Days until the grace period ends, rounded up.
        days_left: u32,
    },
}

/// An accepted licence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct License {
    /// The claims.
    pub claims: Claims,
    /// How long it remains valid.
    pub standing: Standing,
}

impl License {
    /// Whether the licence grants a feature.
    #[must_use]
    pub fn has(&self, feature: &str) -> bool {
        self.claims.feat.iter().any(|have| have == feature)
    }

    /// A limit, if the licence has it.
    #[must_use]
    pub fn limit(&self, name: &str) -> Option<u64> {
        self.claims.lim.get(name).copied()
    }
}

/// An invalid key or key name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoKey {
    /// An invalid key name.
    #[error("{0:?} is not a valid key name: use 1–{MAX_KID} characters of A–Z a–z 0–9 . _ -")]
    Kid(String),
    /// Not a public key.
    #[error("the key {0} is not a public key of the form k4.public.…")]
    Public(String),
    /// Not a private key. The message does not repeat the text.
    #[error("the key {0} is not a private key of the form k4.secret.…")]
    Secret(String),
}

/// Whether this is a valid key name.
#[must_use]
pub fn is_kid(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MAX_KID).contains(&text.len()) && text.bytes().all(allowed)
}

/// The vendor's public keys by name: those in use, and older ones whose licences are still valid.
#[derive(Debug, Clone, Default)]
pub struct Keyring(BTreeMap<String, AsymmetricPublicKey<V4>>);

impl Keyring {
    /// A keyring without keys.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key: its name and its text `k4.public.…`, as printed by `plugrack license keygen`.
    ///
    /// # Errors
    /// The name or the text is malformed.
    pub fn with(mut self, kid: &str, public: &str) -> Result<Self, NoKey> {
        if !is_kid(kid) {
            return Err(NoKey::Kid(kid.to_owned()));
        }
        let key = AsymmetricPublicKey::try_from(public).map_err(|_| NoKey::Public(kid.to_owned()))?;
        self.0.insert(kid.to_owned(), key);
        Ok(self)
    }
}

/// A vendor's private key and its name.
#[derive(Clone)]
pub struct SigningKey {
    kid: String,
    secret: AsymmetricSecretKey<V4>,
}

impl SigningKey {
    /// Generates a key; `None` if the system has no random bytes.
    ///
    /// # Errors
    /// The name is invalid.
    pub fn generate(kid: &str) -> Result<Option<Self>, NoKey> {
        if !is_kid(kid) {
            return Err(NoKey::Kid(kid.to_owned()));
        }
        let pair = AsymmetricKeyPair::<V4>::generate().ok();
        Ok(pair.map(|pair| Self { kid: kid.to_owned(), secret: pair.secret }))
    }

    /// Parses a key from its name and its text `k4.secret.…`.
    ///
    /// # Errors
    /// The name or the text is malformed.
    pub fn parse(kid: &str, secret: &str) -> Result<Self, NoKey> {
        if !is_kid(kid) {
            return Err(NoKey::Kid(kid.to_owned()));
        }
        let secret = AsymmetricSecretKey::try_from(secret).map_err(|_| NoKey::Secret(kid.to_owned()))?;
        Ok(Self { kid: kid.to_owned(), secret })
    }

    /// The name of the key.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The private key as text, `k4.secret.…`. Only the vendor may see it.
    #[must_use]
    pub fn secret(&self) -> String {
        paserk(&self.secret)
    }

    /// The public key as text, `k4.public.…`.
    #[must_use]
    pub fn public(&self) -> String {
        AsymmetricPublicKey::try_from(&self.secret).map_or_else(|_| String::new(), |key| paserk(&key))
    }
}

/// Omits the private key.
impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("kid", &self.kid).finish_non_exhaustive()
    }
}

fn paserk(key: &impl FormatAsPaserk) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    key.fmt(&mut text).ok();
    text
}

/// Why a licence cannot be issued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotIssued {
    /// A claim is out of range.
    #[error("{0}")]
    Bounds(String),
    /// The token is too long.
    #[error("the licence has {0} bytes, over the limit of {MAX_TOKEN}: name fewer instances, features or limits")]
    TooLong(usize),
    /// The library refused to sign.
    #[error("the licence cannot be signed")]
    Signing,
}

/// Signs claims and returns the token.
///
/// # Errors
/// A claim is out of range, or the token would be too long.
pub fn issue(claims: &Claims, key: &SigningKey) -> Result<String, NotIssued> {
    claims.check_bounds().map_err(NotIssued::Bounds)?;
    let payload = serde_json::to_vec(claims).map_err(|_| NotIssued::Signing)?;
    let footer = serde_json::json!({ "kid": key.kid }).to_string();
    let token =
        PublicToken::sign(&key.secret, &payload, Some(footer.as_bytes()), Some(ASSERTION)).map_err(|_| NotIssued::Signing)?;
    if token.len() > MAX_TOKEN { Err(NotIssued::TooLong(token.len())) } else { Ok(token) }
}

/// The parts of a token. None of it is verified.
struct Parts {
    kid: String,
    token: UntrustedToken<Public, V4>,
}

impl Parts {
    fn parse(text: Option<&str>) -> Result<Self, Refusal> {
        let text = text.unwrap_or_default().trim_ascii();
        if text.is_empty() {
            return Err(missing());
        }
        if text.len() > MAX_TOKEN {
            return Err(malformed(&format!("it has {} bytes, over the limit of {MAX_TOKEN}", text.len())));
        }
        if !text.starts_with(PublicToken::HEADER) {
            return Err(malformed("it does not start with v4.public."));
        }
        let token = UntrustedToken::try_from(text).map_err(|_| malformed("a part is missing or not base64"))?;
        let footer = token.untrusted_footer();
        if footer.len() > MAX_FOOTER {
            return Err(malformed(&format!("its footer has {} bytes, over the limit of {MAX_FOOTER}", footer.len())));
        }
        let footer = object(footer).map_err(|error| malformed(&format!("its footer: {error}")))?;
        if footer.values().any(|value| value.is_object() || value.is_array()) {
            return Err(malformed("its footer is not flat"));
        }
        match footer.get("kid").and_then(Value::as_str).filter(|kid| is_kid(kid)) {
            Some(kid) => Ok(Self { kid: kid.to_owned(), token }),
            None => Err(malformed("its footer names no key")),
        }
    }

    fn key<'a>(&self, keyring: &'a Keyring) -> Result<&'a AsymmetricPublicKey<V4>, Refusal> {
        keyring.0.get(&self.kid).ok_or_else(|| {
            let what = format!("it is signed with the key {}, which this plugin does not have: install the plugin's newest release, or ask the vendor for another licence", self.kid);
            Refusal::new(Code::UnknownKey, what)
        })
    }

    fn signature(&self, key: &AsymmetricPublicKey<V4>) -> Result<(), Refusal> {
        match PublicToken::verify(key, &self.token, None, Some(ASSERTION)) {
            // Only the signature matters here; a payload that is not text is reported when it is parsed.
            Ok(_) | Err(pasetors::errors::Error::PayloadInvalidUtf8) => Ok(()),
            Err(_) => {
                let what = format!(
                    "it was not signed with the key {}, or it was changed: copy the whole token again, or ask the vendor for another",
                    self.kid
                );
                Err(Refusal::new(Code::BadSignature, what))
            }
        }
    }

    fn claims(&self) -> Result<Claims, Refusal> {
        Claims::parse(self.token.untrusted_payload())
    }
}

/// The claims of a token, **unverified**: to show a licence without a key.
#[must_use]
pub fn unverified(token: &str) -> Option<Claims> {
    Parts::parse(Some(token)).ok()?.claims().ok()
}

/// Runs the checks of [`verify`] that need neither a key nor a release date. The signature is **not verified**: a token that passes
/// may be a forgery.
///
/// A token of an unknown version, or with an unknown critical claim, passes: the plugin may be newer than this code.
///
/// # Errors
/// The token is bad whatever the key.
pub fn check_unsigned(token: Option<&str>, place: &Place<'_>) -> Result<(), Refusal> {
    match Parts::parse(token)?.claims() {
        Ok(claims) => place.check(&claims).map(drop),
        Err(refusal) if refusal.code == Code::Unsupported => Ok(()),
        Err(refusal) => Err(refusal),
    }
}

/// Where and when a licence must be valid.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The plugin's id.
    pub plugin_id: &'a str,
    /// The instance's id.
    pub instance_id: &'a str,
    /// Release date of the plugin. Without it `upd` is not checked.
    pub release_date: Option<Date>,
    /// The machine's clock.
    pub now: Time,
    /// The host's high-water mark of time, a lower bound whatever the clock shows.
    pub not_before_time: Option<Time>,
}

impl Place<'_> {
    /// Checks claims here and now, and returns their standing. The first failed check decides.
    fn check(&self, claims: &Claims) -> Result<Standing, Refusal> {
        claims.for_plugin(self.plugin_id)?;
        claims.for_instance(self.instance_id)?;
        self.release_date.map_or(Ok(()), |released| claims.for_release(released))?;
        claims.clock(self.now)?;
        let time = self.not_before_time.map_or(self.now, |mark| mark.max(self.now));
        claims.begun(time)?;
        claims.standing(time)
    }
}

/// Checks a token for a plugin, an instance and a time. The first failed check decides.
///
/// # Errors
/// The token is refused.
pub fn verify(token: Option<&str>, keyring: &Keyring, place: &Place<'_>) -> Result<License, Refusal> {
    let parts = Parts::parse(token)?;
    parts.signature(parts.key(keyring)?)?;
    let claims = parts.claims()?;
    let standing = place.check(&claims)?;
    Ok(License { claims, standing })
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It passed, with a description.
    Passed(String),
    /// It failed.
    Refused(Refusal),
    /// It was skipped because an argument is missing.
    Unchecked(&'static str),
}

/// Everything that can be said about a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// The key that the token names.
    pub kid: Option<String>,
    /// The claims, which are unverified unless the signature check passed.
    pub claims: Option<Claims>,
    /// The checks by name, in the order of [`verify`].
    pub checks: Vec<(&'static str, Verdict)>,
}

/// The arguments of [`inspect`]; a missing one skips its check.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The vendor's keys.
    pub keyring: Option<&'a Keyring>,
    /// The plugin's id.
    pub plugin_id: Option<&'a str>,
    /// The instance's id.
    pub instance_id: Option<&'a str>,
    /// The plugin's release date.
    pub release_date: Option<Date>,
    /// The time of the check.
    pub now: Time,
}

/// Runs every possible check, also after a failed one.
#[must_use]
pub fn inspect(token: &str, known: &Known<'_>) -> Inspection {
    fn verdict(checked: Result<String, Refusal>) -> Verdict {
        checked.map_or_else(Verdict::Refused, Verdict::Passed)
    }
    let parts = match Parts::parse(Some(token)) {
        Ok(parts) => parts,
        Err(refusal) => return Inspection { kid: None, claims: None, checks: vec![("form", Verdict::Refused(refusal))] },
    };
    let mut checks = vec![("form", Verdict::Passed(format!("a signed token of {} bytes", token.trim_ascii().len())))];
    let signature = match known.keyring {
        None => Verdict::Unchecked("give the vendor's key with --public-key"),
        Some(keyring) => {
            let signed = parts.key(keyring).and_then(|key| parts.signature(key));
            verdict(signed.map(|()| format!("it is signed with the key {}", parts.kid)))
        }
    };
    checks.push(("signature", signature));
    let claims = match parts.claims() {
        Ok(claims) => claims,
        Err(refusal) => {
            checks.push(("claims", Verdict::Refused(refusal)));
            return Inspection { kid: Some(parts.kid), claims: None, checks };
        }
    };
    let plugin = |id: &str| verdict(claims.for_plugin(id).map(|()| format!("it is for {id}")));
    let instance = |id: &str| verdict(claims.for_instance(id).map(|()| format!("it is for {id}")));
    let release = |date: Date| verdict(claims.for_release(date).map(|()| format!("it covers the release of {date}")));
    let now = known.now;
    let standing = claims.standing(now).map(|standing| match (standing, claims.exp) {
        (Standing::Warning { days_left }, _) => format!("it expires in {}", days(days_left)),
        (Standing::Grace { days_left }, _) => format!("it has expired, and its grace period ends in {}", days(days_left)),
        (Standing::Valid, Some(exp)) => format!("it is valid until {exp}"),
        (Standing::Valid, None) => "it never expires".to_owned(),
    });
    checks.extend([
        ("claims", Verdict::Passed(format!("of version {}", claims.v))),
        ("plugin", known.plugin_id.map_or(Verdict::Unchecked("name the plugin with --plugin"), plugin)),
        ("instance", known.instance_id.map_or(Verdict::Unchecked("name the instance with --instance"), instance)),
        ("release", known.release_date.map_or(Verdict::Unchecked("give the plugin's date with --release-date"), release)),
        ("clock", verdict(claims.clock(now).map(|()| format!("it is {now}, and was issued at {}", claims.iat)))),
        ("begin", verdict(claims.begun(now).map(|()| "it has become valid".to_owned()))),
        ("end", verdict(standing)),
    ]);
    Inspection { kid: Some(parts.kid), claims: Some(claims), checks }
}

/// A number of days in words.
#[must_use]
pub fn days(number: u32) -> String {
    if number == 1 { "1 day".to_owned() } else { format!("{number} days") }
}
