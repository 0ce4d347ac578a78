//! What a plugin says of itself with `--metadata`: read and checked. No I/O.

use super::fields::{self, Field, Form};
use super::message::PROTOCOL_VERSION;
use super::values::integer;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Largest output of `--metadata` in bytes: room for an icon of 32 KiB and the rest.
pub const MAX_METADATA: usize = 64 * 1024;

/// Longest id in bytes, so that it fits a file name and a DNS label.
pub const MAX_ID_LENGTH: usize = 63;

/// Longest route in bytes.
pub const MAX_ROUTE: usize = 128;

/// Most host names of one plugin: enough for a site with all its spellings, and few enough to list.
pub const MAX_HOSTS: usize = 32;

/// Longest host name in bytes, without a dot at its end (RFC 1035, section 2.3.4).
pub const MAX_HOST_NAME: usize = 253;

/// Longest label of a host name in bytes (RFC 1035, section 2.3.4).
const MAX_LABEL: usize = 63;

/// What a host name that stands for many begins with.
pub const WILDCARD: &str = "*.";

/// The name of the local machine (RFC 6761, section 6.3). It is the host's, and each name below it that of the plugin with that id.
pub const LOCALHOST: &str = "localhost";

/// Longest name in characters, and version in bytes.
pub const MAX_NAME: usize = 64;

/// Longest icon that is text, in Unicode code points: four emoji with their modifiers and joiners.
pub const MAX_ICON_CHARS: usize = 16;

/// Longest icon that is a `data:` URI, in bytes.
pub const MAX_ICON_URI: usize = 32 * 1024;

/// Longest description, author or homepage in characters.
pub const MAX_TEXT: usize = 512;

/// Most connections the host opens to one plugin.
pub const MAX_CONCURRENCY: u32 = 256;

/// Most message types that [`Metadata::speaks`] names.
pub const MAX_SPEAKS: usize = 16;

/// What [`Metadata::speaks`] names if the plugin understands the messages of WebSocket.
pub const WEBSOCKET: &str = "websocket";

/// Most origins that [`Metadata::origins`] lists.
pub const MAX_ORIGINS: usize = 32;

/// Every origin, in [`Metadata::origins`].
pub const ANY_ORIGIN: &str = "*";

/// Longest name of a message type in bytes.
pub const MAX_MESSAGE_TYPE: usize = 32;

/// Routes the host keeps for itself, with all below them.
pub const RESERVED_ROUTES: [&str; 4] = ["/api", "/admin", "/healthz", "/metrics"];

/// What some editors and shells put before UTF-8 (RFC 8259, section 8.1, forbids it in JSON).
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The fields, each of its type. What else they must be is for [`Metadata::check`].
const FIELDS: [Field; 15] = [
    Field::required("id", Form::Text),
    Field::required("name", Form::Text),
    Field::required("version", Form::Text),
    Field::required("icon", Form::Text),
    Field::optional("route", Form::Text),
    Field::optional("host", Form::Texts),
    Field::optional("below_route", Form::Word(&["rewrite"])),
    Field::optional("trailing_slash", Form::Word(&["redirect"])),
    Field::optional("protocol", Form::Integer(0, u32::MAX as u64)),
    Field::optional("concurrency", Form::Integer(0, u32::MAX as u64)),
    Field::optional("description", Form::Text),
    Field::optional("author", Form::Text),
    Field::optional("homepage", Form::Text),
    Field::optional("speaks", Form::Texts),
    Field::optional("origins", Form::Texts),
];

/// Who a plugin is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Names the plugin everywhere: `[a-z0-9][a-z0-9-]{0,62}`.
    pub id: String,
    /// For people.
    pub name: String,
    /// The plugin's own version.
    pub version: String,
    /// An emoji, a few characters, or a `data:image/…` URI.
    pub icon: String,
    /// The path at which it is put on the web: `/segment(/segment)*`. None if it has host names alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// Host names that are the plugin's as a whole, such as `wiki.example.org` or `*.example.org`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host: Vec<String>,
    /// What the host does to paths in its responses below the route.
    #[serde(default, skip_serializing_if = "BelowRoute::is_as_is")]
    pub below_route: BelowRoute,
    /// What the host answers at the route itself.
    #[serde(default, skip_serializing_if = "TrailingSlash::is_as_is")]
    pub trailing_slash: TrailingSlash,
    /// The protocol version it speaks.
    #[serde(default = "default_protocol", deserialize_with = "integer")]
    pub protocol: u32,
    /// How many connections the host may hold open to it at once.
    #[serde(default = "default_concurrency", deserialize_with = "integer")]
    pub concurrency: u32,
    /// What it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Who wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// Where to read more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub homepage: Option<String>,
    /// Names of what it understands beyond the messages that every plugin does, such as [`WEBSOCKET`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub speaks: Vec<String>,
    /// Origins of other sites whose pages may open a WebSocket: `https://app.example.org`, or [`ANY_ORIGIN`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub origins: Vec<String>,
}

/// What the host does to paths in the headers of a plugin's responses, if the request came by its route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BelowRoute {
    /// Nothing: the plugin writes them with its route.
    #[default]
    #[serde(skip)]
    AsIs,
    /// It puts the route before the paths in `location`, `content-location`, `refresh`, and before the path of each cookie.
    Rewrite,
}

impl BelowRoute {
    fn is_as_is(&self) -> bool {
        *self == Self::AsIs
    }
}

/// What the host does with a request for a plugin's route without a slash behind it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrailingSlash {
    /// It passes the request on.
    #[default]
    #[serde(skip)]
    AsIs,
    /// It redirects the client to the route with a slash, so that relative links lead below the route.
    Redirect,
}

impl TrailingSlash {
    fn is_as_is(&self) -> bool {
        *self == Self::AsIs
    }
}

fn default_protocol() -> u32 {
    PROTOCOL_VERSION
}

fn default_concurrency() -> u32 {
    1
}

/// Why metadata is refused: one sentence that names the field and the rule.
#[derive(Debug, thiserror::Error)]
pub enum BadMetadata {
    /// Not one JSON object.
    #[error("the metadata is not a JSON object: {0}")]
    NotAnObject(String),
    /// A field that is missing or of another type, in a sentence.
    #[error("{0}")]
    Form(String),
    /// A field breaks its form.
    #[error("the metadata's {field} {value:?} is not valid: {rule}")]
    Field {
        /// Which.
        field: &'static str,
        /// What it holds, cut to a length that fits a line.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// It has no place on the web.
    #[error("metadata.route is missing, and so is metadata.host: a plugin needs a route, host names, or both")]
    Nowhere,
    /// A route of the host's own.
    #[error("the route {0} belongs to the host")]
    Reserved(String),
    /// Another protocol version.
    #[error("the plugin speaks protocol {0}, this host speaks {PROTOCOL_VERSION}")]
    Protocol(u32),
}

impl Metadata {
    /// Reads and checks what `--metadata` printed.
    ///
    /// # Errors
    /// When it is not JSON, lacks a field, or a field breaks its form.
    pub fn parse(json: &[u8]) -> Result<Self, BadMetadata> {
        let mut object = object(json)?;
        if let Some(fault) = fields::fault("metadata", &FIELDS, &object) {
            return Err(BadMetadata::Form(fault));
        }
        object.retain(|_, value| !value.is_null());
        let metadata: Self = serde_json::from_value(Value::Object(object))
            .map_err(|error| BadMetadata::Form(fields::other_fault("metadata", &error)))?;
        metadata.check()?;
        Ok(metadata)
    }

    /// The first host name that is no wildcard.
    #[must_use]
    pub fn exact_host(&self) -> Option<&str> {
        self.host.iter().map(String::as_str).find(|name| !name.starts_with(WILDCARD))
    }

    /// Checks every field against the protocol's table.
    ///
    /// # Errors
    /// The first field that breaks its form.
    pub fn check(&self) -> Result<(), BadMetadata> {
        let text = |value: &str, most: usize| value.chars().count() <= most && !value.chars().any(char::is_control);
        let require = |holds: bool, field: &'static str, value: &str, rule: &'static str| match holds {
            true => Ok(()),
            false => Err(BadMetadata::Field { field, value: value.chars().take(80).collect(), rule }),
        };
        require(is_plugin_id(&self.id), "id", &self.id, "1-63 of a-z, 0-9 and -, not beginning with -")?;
        let name = !self.name.trim().is_empty() && text(&self.name, MAX_NAME);
        require(name, "name", &self.name, "1-64 characters, no control characters")?;
        let version = (1..=MAX_NAME).contains(&self.version.len()) && self.version.bytes().all(|b| (0x20..0x7f).contains(&b));
        require(version, "version", &self.version, "1-64 printable ASCII characters")?;
        require(is_icon(&self.icon), "icon", &self.icon, "an emoji, 1-4 characters, or a data:image/ URI of at most 32 KiB")?;
        if self.route.is_none() && self.host.is_empty() {
            return Err(BadMetadata::Nowhere);
        }
        if let Some(route) = &self.route {
            require(is_route(route), "route", route, "/segment(/segment)*, segments of a-z, 0-9 and . _ -, at most 128 bytes")?;
            if is_reserved(route) {
                return Err(BadMetadata::Reserved(route.clone()));
            }
        }
        require(self.host.len() <= MAX_HOSTS, "host", &self.host.join(", "), "at most 32 host names")?;
        for (at, name) in self.host.iter().enumerate() {
            if let Some(rule) = host_name_fault(name) {
                require(false, "host", name, rule)?;
            }
            let own = name.strip_prefix(WILDCARD).unwrap_or(name) == LOCALHOST;
            require(!own, "host", name, "localhost and *.localhost belong to the host")?;
            require(!self.host[..at].contains(name), "host", name, "each host name is given once")?;
        }
        if self.protocol != PROTOCOL_VERSION {
            return Err(BadMetadata::Protocol(self.protocol));
        }
        let concurrency = (1..=MAX_CONCURRENCY).contains(&self.concurrency);
        require(concurrency, "concurrency", &self.concurrency.to_string(), "a whole number from 1 to 256")?;
        for (field, value) in [("description", &self.description), ("author", &self.author), ("homepage", &self.homepage)] {
            let value = value.as_deref().unwrap_or_default();
            require(text(value, MAX_TEXT), field, value, "at most 512 characters, no control characters")?;
        }
        let speaks = self.speaks.join(", ");
        require(self.speaks.len() <= MAX_SPEAKS, "speaks", &speaks, "at most 16 message types")?;
        for (at, kind) in self.speaks.iter().enumerate() {
            let rule = "a message type is 1-32 of a-z, 0-9 and -, beginning with a letter";
            require(is_message_type(kind), "speaks", kind, rule)?;
            require(!self.speaks[..at].contains(kind), "speaks", kind, "each message type is named once")?;
        }
        require(self.origins.len() <= MAX_ORIGINS, "origins", &self.origins.join(", "), "at most 32 origins")?;
        for origin in &self.origins {
            let rule = "an origin is scheme://host or scheme://host:port in lower case without a path, or *";
            require(is_origin(origin), "origins", origin, rule)?;
        }
        Ok(())
    }
}

/// Reads the one JSON object that `--metadata` has to print.
fn object(printed: &[u8]) -> Result<Map<String, Value>, BadMetadata> {
    let not_an_object = |why: String| Err(BadMetadata::NotAnObject(why));
    if printed.starts_with(BYTE_ORDER_MARK) {
        return not_an_object("it begins with a byte order mark, and must be plain UTF-8 without one".into());
    }
    let Ok(printed) = std::str::from_utf8(printed) else {
        return not_an_object(format!("it is not UTF-8, and begins with {}", fields::excerpt_of_bytes(printed)));
    };
    let printed = printed.trim();
    if printed.is_empty() {
        return not_an_object("--metadata printed nothing on standard output".into());
    }
    let mut values = serde_json::Deserializer::from_str(printed).into_iter::<Value>();
    let first = values.next();
    let rest = printed.get(values.byte_offset()..).unwrap_or_default().trim();
    match first {
        Some(Ok(Value::Object(fields))) if rest.is_empty() => Ok(fields),
        Some(Ok(Value::Object(_))) => {
            not_an_object(format!("behind it stands {}, and nothing else may be printed", fields::excerpt(rest)))
        }
        Some(Ok(other)) if rest.is_empty() => not_an_object(format!("it is {}", fields::shown(&other))),
        Some(Err(error)) if printed.starts_with('{') => not_an_object(fields::not_json("the text", printed, &error)),
        _ => not_an_object(format!("it begins with {}", fields::excerpt(printed))),
    }
}

/// Whether a string has the form of a plugin id, which makes it safe as a file name and in a path.
#[must_use]
pub fn is_plugin_id(id: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=MAX_ID_LENGTH).contains(&id.len()) && id.bytes().all(allowed) && !id.starts_with('-')
}

/// Whether a string may name a message type: `[a-z][a-z0-9-]{0,31}`.
fn is_message_type(kind: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    kind.len() <= MAX_MESSAGE_TYPE && kind.starts_with(|first: char| first.is_ascii_lowercase()) && kind.bytes().all(allowed)
}

/// Whether a string is an origin (RFC 6454, section 6.2), or stands for all.
fn is_origin(origin: &str) -> bool {
    let is_scheme = |scheme: &str| !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    let is_place = |place: &str| {
        !place.is_empty()
            && place.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-:[]".contains(&byte))
    };
    let parts = origin.split_once("://");
    origin == ANY_ORIGIN
        || (origin.len() <= MAX_TEXT && parts.is_some_and(|(scheme, place)| is_scheme(scheme) && is_place(place)))
}

fn is_icon(icon: &str) -> bool {
    match icon.strip_prefix("data:") {
        Some(uri) => uri.starts_with("image/") && icon.len() <= MAX_ICON_URI && icon.bytes().all(|b| (0x21..0x7f).contains(&b)),
        None => !icon.trim().is_empty() && icon.chars().count() <= MAX_ICON_CHARS && !icon.chars().any(char::is_control),
    }
}

fn is_route(route: &str) -> bool {
    let segment = |s: &str| {
        s.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
    };
    route.len() <= MAX_ROUTE && route.strip_prefix('/').is_some_and(|rest| rest.split('/').all(segment))
}

/// Why a string is no host name, be it exact or with `*.` before it, as the rule that it breaks; none if it is one.
#[must_use]
pub fn host_name_fault(name: &str) -> Option<&'static str> {
    let exact = name.strip_prefix(WILDCARD).unwrap_or(name);
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    if !name.is_ascii() {
        Some("an international name is written in ASCII, such as xn--bcher-kva.example")
    } else if name.contains('/') {
        Some("a host name has no scheme and no path")
    } else if name.contains(':') {
        Some("a host name has no port and is no address")
    } else if exact.contains('*') {
        Some("a wildcard is *. before a name, such as *.example.org")
    } else if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Some("a host name is in lower case")
    } else if name.len() > MAX_HOST_NAME {
        Some("a host name has at most 253 bytes")
    } else if exact.ends_with('.') {
        Some("a host name has no dot at its end")
    } else if !exact.split('.').all(is_label) {
        Some("the labels between the dots are 1-63 of a-z, 0-9 and -, neither beginning nor ending with -")
    } else if exact.rsplit('.').next().is_some_and(is_number) {
        Some("a host name does not end with a number, as an address does")
    } else {
        None
    }
}

fn is_reserved(route: &str) -> bool {
    RESERVED_ROUTES.iter().any(|kept| route.strip_prefix(kept).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn notes() -> Value {
        json!({"id": "notes", "name": "Notes", "version": "1.0.0", "icon": "📝", "route": "/notes"})
    }

    fn with(field: &str, value: Value) -> Vec<u8> {
        let mut metadata = notes();
        metadata[field] = value;
        serde_json::to_vec(&metadata).unwrap()
    }

    #[test]
    fn the_required_fields_are_enough() {
        let metadata = Metadata::parse(notes().to_string().as_bytes()).unwrap();
        assert_eq!((metadata.protocol, metadata.concurrency), (1, 1));
        assert_eq!((metadata.below_route, metadata.trailing_slash), (BelowRoute::AsIs, TrailingSlash::AsIs));
        for field in ["id", "name", "version", "icon", "route"] {
            let mut lacking = notes();
            lacking.as_object_mut().unwrap().remove(field);
            let error = Metadata::parse(lacking.to_string().as_bytes()).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn what_is_printed_instead_is_named() {
        for (printed, error) in [
            ("", "the metadata is not a JSON object: --metadata printed nothing on standard output"),
            ("Loading model...\n{}", "the metadata is not a JSON object: it begins with \"Loading model...\\n{}\""),
            (
                "\u{feff}{}",
                "the metadata is not a JSON object: it begins with a byte order mark, and must be plain UTF-8 without one",
            ),
            ("{}\nBye now\n", "the metadata is not a JSON object: behind it stands \"Bye now\", and nothing else may be printed"),
            ("[]", "the metadata is not a JSON object: it is an array of 0"),
            ("7", "the metadata is not a JSON object: it is 7"),
            (
                "{\"id\": }",
                "the metadata is not a JSON object: the text is not JSON at byte 8 of 8: it begins with \"{\\\"id\\\": }\"",
            ),
            ("{}", "metadata.id is missing: it must be a string"),
        ] {
            assert_eq!(Metadata::parse(printed.as_bytes()).unwrap_err().to_string(), error);
        }
        for (field, value, error) in [
            ("id", json!(7), "metadata.id must be a string, got 7"),
            (
                "route",
                json!(null),
                "metadata.route is missing, and so is metadata.host: a plugin needs a route, host names, or both",
            ),
            ("host", json!("a.example"), "metadata.host must be an array of strings, got the string \"a.example\""),
            ("host", json!(["A.example"]), "the metadata's host \"A.example\" is not valid: a host name is in lower case"),
            ("below_route", json!("strip"), "metadata.below_route must be one of rewrite, got the string \"strip\""),
            ("trailing_slash", json!(true), "metadata.trailing_slash must be one of redirect, got true"),
            ("speaks", json!("a"), "metadata.speaks must be an array of strings, got the string \"a\""),
            ("speaks", json!([1]), "metadata.speaks[0] must be a string, got 1"),
            (
                "speaks",
                json!(["tunnel", "Tunnel"]),
                "the metadata's speaks \"Tunnel\" is not valid: a message type is 1-32 of a-z, 0-9 and -, beginning with a letter",
            ),
            ("speaks", json!(["a", "b", "a"]), "the metadata's speaks \"a\" is not valid: each message type is named once"),
            ("concurrency", json!("4"), "metadata.concurrency must be an integer from 0 to 4294967295, got the string \"4\""),
            ("author", json!(["me"]), "metadata.author must be a string, got an array of 1"),
        ] {
            assert_eq!(Metadata::parse(&with(field, value)).unwrap_err().to_string(), error);
        }
    }

    #[test]
    fn a_plugin_has_a_route_or_host_names_or_both() {
        let mut metadata = notes();
        metadata.as_object_mut().unwrap().remove("route");
        metadata["host"] = json!([]);
        assert!(matches!(Metadata::parse(metadata.to_string().as_bytes()), Err(BadMetadata::Nowhere)));
        metadata["host"] = json!(["notes.example", "*.notes.example"]);
        metadata["below_route"] = json!("rewrite");
        metadata["trailing_slash"] = json!("redirect");
        let read = Metadata::parse(metadata.to_string().as_bytes()).unwrap();
        assert_eq!((read.route.as_deref(), read.host.len()), (None, 2));
        assert_eq!((read.below_route, read.trailing_slash), (BelowRoute::Rewrite, TrailingSlash::Redirect));
        // As the host keeps it.
        assert_eq!(Metadata::parse(&serde_json::to_vec(&read).unwrap()).unwrap(), read);
        let plain = Metadata::parse(notes().to_string().as_bytes()).unwrap();
        let kept = serde_json::to_value(&plain).unwrap();
        assert!(["host", "below_route", "trailing_slash"].iter().all(|field| kept.get(field).is_none()), "{kept}");
    }

    #[test]
    fn a_host_name_says_which_rule_it_breaks() {
        for (name, rule) in [
            ("", "labels"),
            (".", "dot at its end"),
            ("a..example", "labels"),
            ("a.example.", "dot at its end"),
            ("-a.example", "labels"),
            ("a-.example", "labels"),
            ("a_b.example", "labels"),
            ("a b", "labels"),
            ("x\n", "labels"),
            ("A.example", "lower case"),
            ("bücher.example", "ASCII"),
            ("https://a.example", "no scheme"),
            ("a.example/b", "no path"),
            ("a.example:80", "no port"),
            ("[::1]", "no address"),
            ("192.0.2.1", "number"),
            ("7", "number"),
            ("*", "wildcard"),
            ("*example.org", "wildcard"),
            ("a.*.org", "wildcard"),
            ("*.*.org", "wildcard"),
            ("*.", "labels"),
            ("*.192.0.2.1", "number"),
        ] {
            assert!(host_name_fault(name).is_some_and(|fault| fault.contains(rule)), "{name:?}: {:?}", host_name_fault(name));
        }
        assert!(host_name_fault(&format!("{}.example", "x".repeat(64))).is_some_and(|fault| fault.contains("1-63")));
        let long = "a.".repeat(126);
        assert_eq!(host_name_fault(&(long.clone() + "b")), None);
        assert!(host_name_fault(&(long + "bc")).is_some_and(|fault| fault.contains("253")));
    }

    #[test]
    fn each_field_is_held_to_its_form() {
        let good: &[(&str, Value)] = &[
            ("id", json!("a")),
            ("id", json!("0-9")),
            ("id", json!("x".repeat(63))),
            ("name", json!("é".repeat(64))),
            ("icon", json!("👩‍👩‍👧‍👦")),
            ("icon", json!("data:image/png;base64,AAAA")),
            ("route", json!("/a/b.c/d_e-f")),
            ("route", json!("/apis")),
            ("host", json!(["wiki.example.org", "*.example.org", "intranet", "a-1.b2.s3x", "other.localhost"])),
            ("host", json!(["xn--bcher-kva.example", "*.org"])),
            ("host", json!((0..32).map(|n| format!("n{n}.example")).collect::<Vec<_>>())),
            ("host", json!([format!("{}.{}", "x".repeat(63), "y.".repeat(94) + "z")])),
            ("host", json!(null)),
            ("below_route", json!("rewrite")),
            ("below_route", json!(null)),
            ("trailing_slash", json!("redirect")),
            ("trailing_slash", json!(null)),
            ("concurrency", json!(256)),
            ("concurrency", json!(8.0)),
            ("concurrency", json!(null)),
            ("protocol", json!(1e0)),
            ("protocol", json!(null)),
            ("author", json!(null)),
            ("speaks", json!(null)),
            ("speaks", json!([])),
            ("speaks", json!((0..16).map(|n| format!("x{n:0>31}")).collect::<Vec<_>>())),
            ("unknown", json!({"later": true})),
        ];
        for (field, value) in good {
            assert!(Metadata::parse(&with(field, value.clone())).is_ok(), "{field} {value}");
        }
        let bad: &[(&str, Value)] = &[
            ("id", json!("")),
            ("id", json!("-a")),
            ("id", json!("A")),
            ("id", json!("a/b")),
            ("id", json!("..")),
            ("id", json!("x".repeat(64))),
            ("id", json!(7)),
            ("name", json!("")),
            ("name", json!(" ")),
            ("name", json!("a\nb")),
            ("name", json!("x".repeat(65))),
            ("version", json!("")),
            ("version", json!("1.0\t")),
            ("icon", json!("")),
            ("icon", json!("x".repeat(17))),
            ("icon", json!("data:text/html,<script>")),
            ("icon", json!(format!("data:image/png;base64,{}", "A".repeat(32 * 1024)))),
            ("route", json!("/")),
            ("route", json!("notes")),
            ("route", json!("/notes/")),
            ("route", json!("/Notes")),
            ("route", json!("/a//b")),
            ("route", json!("/../etc")),
            ("route", json!("/a b")),
            ("route", json!(format!("/{}", "x".repeat(128)))),
            ("route", json!("/api")),
            ("route", json!("/api/x")),
            ("route", json!("/healthz")),
            ("host", json!((0..33).map(|n| format!("n{n}.example")).collect::<Vec<_>>())),
            ("host", json!(["a.example", "a.example"])),
            ("host", json!(["localhost"])),
            ("host", json!(["*.localhost"])),
            ("host", json!(7)),
            ("below_route", json!("as_is")),
            ("below_route", json!(["rewrite"])),
            ("trailing_slash", json!("")),
            ("concurrency", json!(0)),
            ("concurrency", json!(257)),
            ("concurrency", json!("4")),
            ("protocol", json!(2)),
            ("author", json!("x".repeat(513))),
            ("concurrency", json!(1.5)),
            ("speaks", json!((0..17).map(|n| format!("x{n}")).collect::<Vec<_>>())),
            ("speaks", json!(["x".repeat(33)])),
            ("speaks", json!([""])),
            ("speaks", json!(["-a"])),
            ("speaks", json!(["a_b"])),
        ];
        for (field, value) in bad {
            assert!(Metadata::parse(&with(field, value.clone())).is_err(), "{field} {value}");
        }
    }
}
