//! The operations of the store as HTTP requests and responses: `docs/protocol.md`, "The store over HTTP". Pure.

use crate::http::HttpError;
use crate::http::errors;
use crate::protocol::message::{DeleteOp, IncrOp, KvOp, ListOp, MAX_LIST_LIMIT, MAX_TTL_MS, SetOp};
use crate::store::kv::{Answer, KvError};
use percent_encoding::percent_decode_str;
use serde_json::json;
use std::borrow::Cow;

/// The path of the namespace; a key follows after a `/`.
const ROOT: &str = "/kv";

/// Seconds after which a request that was `busy` may be sent again. The store is rarely busy for longer.
const BUSY_RETRY_AFTER: &str = "1";

/// The parameters of a POST on a key, of which `op` is read first.
const INCR_PARAMETERS: [&str; 3] = ["op", "delta", "ttl_ms"];

/// An operation that a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) op: KvOp,
    pub(super) form: Form,
}

/// What the response to an operation depends on, beside the answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// The name of the operation.
    op: &'static str,
    /// The `if-none-match` of a `get`: the revisions that the caller has.
    known: Option<String>,
}

/// A response without its framing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, Cow<'static, str>)>,
    pub(super) body: Vec<u8>,
}

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    status: u16,
    code: &'static str,
    /// One sentence without a capital and a full stop.
    pub(super) message: String,
    /// Index of the write of a `txn` that failed.
    index: Option<usize>,
    header: Option<(&'static str, &'static str)>,
}

impl Refused {
    pub(super) fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), index: None, header: None }
    }

    fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "bad_request", message)
    }

    fn bad_method(message: impl Into<String>, allow: &'static str) -> Self {
        Self { header: Some(("allow", allow)), ..Self::new(405, "method_not_allowed", message) }
    }
}

impl From<HttpError> for Refused {
    fn from(error: HttpError) -> Self {
        match error.status {
            405 => Self::bad_method(error.message, Target::KEY_METHODS),
            status => Self::new(status, error.code, error.message),
        }
    }
}

impl From<KvError> for Refused {
    fn from(error: KvError) -> Self {
        let code = error.code();
        let status = match code {
            "bad_request" | "bad_key" => 400,
            "conflict" => 412,
            "busy" => 503,
            "quota" | "no_space" => 507,
            _ => 500,
        };
        let header = (code == "busy").then_some(("retry-after", BUSY_RETRY_AFTER));
        Self { index: error.index(), header, ..Self::new(status, code, error.message()) }
    }
}

impl From<Refused> for Response {
    fn from(refused: Refused) -> Self {
        let Refused { status, code, message, index, header } = refused;
        let body = match index {
            None => errors::json(code, &message),
            Some(index) => json!({"error": {"code": code, "message": message, "index": index}}).to_string() + "\n",
        };
        let headers = [("content-type", "application/json")].into_iter().chain(header);
        Self { status, headers: headers.map(|(name, value)| (name, value.into())).collect(), body: body.into_bytes() }
    }
}

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Namespace,
    Key(String),
}

impl Target {
    const NAMESPACE_METHODS: &str = "GET, HEAD, POST";
    const KEY_METHODS: &str = "GET, HEAD, PUT, POST, DELETE";

    fn of(path: &str) -> Result<Self, Refused> {
        match path.strip_prefix(ROOT) {
            Some("") => Ok(Self::Namespace),
            Some(rest) if rest.starts_with('/') => {
                decode(&rest[1..]).map(Self::Key).map_err(|fault| Refused::new(400, "bad_key", format!("the key {fault}")))
            }
            _ => Err(Refused::new(
                404,
                "not_found",
                format!("there is nothing at this path: the store is at {ROOT} and {ROOT}/KEY"),
            )),
        }
    }
}

/// The headers of a request that say on which condition it is carried out.
#[derive(Debug, Default)]
struct Conditions<'a> {
    if_match: Option<&'a str>,
    if_none_match: Option<&'a str>,
}

impl<'a> Conditions<'a> {
    /// Gathers them from the lines of a canonical head.
    fn gather(lines: impl Iterator<Item = &'a [u8]>) -> Result<Self, Refused> {
        let mut conditions = Self::default();
        for line in lines {
            let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            let (name, place) = match name {
                b"if-match" => ("if-match", &mut conditions.if_match),
                b"if-none-match" => ("if-none-match", &mut conditions.if_none_match),
                b"content-range" => {
                    return Err(Refused::bad_request("content-range is not for the store: a value is set as a whole"));
                }
                _ => continue,
            };
            let Ok(value) = std::str::from_utf8(value) else {
                return Err(Refused::bad_request(format!("{name} holds characters that no entity-tag of the store has")));
            };
            if place.replace(value).is_some() {
                return Err(Refused::bad_request(format!("the request has more than one {name}")));
            }
        }
        Ok(conditions)
    }

    /// The revision of an `if-match`, which is the same as `if_rev`.
    fn if_rev(&self, parameter: Option<u64>) -> Result<Option<u64>, Refused> {
        let Some(tag) = self.if_match else { return Ok(parameter) };
        if parameter.is_some() {
            return Err(Refused::bad_request("if-match and if_rev are the same condition: send one of them"));
        }
        let rev = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).and_then(digits);
        rev.map(Some).ok_or_else(|| Refused::bad_request(format!("if-match must be one revision in quotes, got {tag}")))
    }

    /// Whether there is an `if-none-match: *`, which is the same as `if_absent=true`.
    fn if_absent(&self, parameter: Option<bool>) -> Result<bool, Refused> {
        match (self.if_none_match, parameter) {
            (None, parameter) => Ok(parameter.unwrap_or(false)),
            (Some("*"), None) => Ok(true),
            (Some("*"), Some(_)) => {
                Err(Refused::bad_request("if-none-match and if_absent are the same condition: send one of them"))
            }
            (Some(tag), _) => Err(Refused::bad_request(format!("if-none-match must be * in a set, got {tag}"))),
        }
    }

    fn no_if_match(&self, op: &str) -> Result<(), Refused> {
        if self.if_match.is_some() {
            return Err(Refused::bad_request(format!("if-match is for set and delete, not for {op}")));
        }
        Ok(())
    }

    fn no_if_none_match(&self, op: &str) -> Result<(), Refused> {
        if self.if_none_match.is_some() {
            return Err(Refused::bad_request(format!("if-none-match is for get and set, not for {op}")));
        }
        Ok(())
    }
}

/// The parameters of a request.
struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Reads a query, without the checks of [`Self::only`].
    fn read(query: &str) -> Result<Self, Refused> {
        let mut parameters: Vec<(String, String)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            // As forms and `http_build_query` encode a space.
            let part = |part: &str| decode(&part.replace('+', " "));
            let name = part(name).map_err(|fault| Refused::bad_request(format!("the name of a parameter {fault}")))?;
            let value = part(value).map_err(|fault| Refused::bad_request(format!("the parameter {name} {fault}")))?;
            if parameters.iter().any(|(other, _)| *other == name) {
                return Err(Refused::bad_request(format!("the parameter {name} is there twice")));
            }
            parameters.push((name, value));
        }
        Ok(Self(parameters))
    }

    /// Checks that there are no parameters but these.
    fn only(&self, op: &str, known: &[&str]) -> Result<(), Refused> {
        match self.0.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some((name, _)) if known.is_empty() => Err(Refused::bad_request(format!("{op} takes no parameters, not {name:?}"))),
            Some((name, _)) => Err(Refused::bad_request(format!("{op} takes {}, not {name:?}", known.join(", ")))),
        }
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The value of a parameter as `read` understands it, which must be as `form` says.
    fn read_as<T>(&self, name: &str, form: &str, read: impl FnOnce(&str) -> Option<T>) -> Result<Option<T>, Refused> {
        let Some(value) = self.text(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| Refused::bad_request(format!("{name} must be {form}, got {value:?}")))
    }

    fn number(&self, name: &str, least: u64, most: u64) -> Result<Option<u64>, Refused> {
        let read = |value: &str| digits(value).filter(|number| (least..=most).contains(number));
        self.read_as(name, &format!("an integer within {least}-{most}"), read)
    }

    fn ttl_ms(&self) -> Result<Option<u64>, Refused> {
        self.number("ttl_ms", 1, MAX_TTL_MS)
    }

    fn if_rev(&self) -> Result<Option<u64>, Refused> {
        self.number("if_rev", 0, u64::MAX)
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, Refused> {
        self.read_as(name, "true or false", |value| value.parse().ok())
    }
}

/// An unsigned number of digits alone.
fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Decodes a part of a target, or says what is wrong with it.
fn decode(part: &str) -> Result<String, &'static str> {
    let is_escape =
        |rest: &str| rest.as_bytes().first_chunk::<2>().is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit));
    if !part.split('%').skip(1).all(is_escape) {
        return Err("holds a % without two hexadecimal digits");
    }
    percent_decode_str(part).decode_utf8().map(Into::into).map_err(|_| "is not UTF-8")
}

/// Reads the operation from a canonical head of the parser's.
pub(super) fn read(head: &[u8]) -> Result<Operation, Refused> {
    let mut lines = head.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let line = lines.next().and_then(|line| std::str::from_utf8(line).ok()).unwrap_or_default();
    let mut parts = line.split(' ');
    let (method, target) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let target = Target::of(path)?;
    let (parameters, conditions) = (Parameters::read(query)?, Conditions::gather(lines)?);
    let (op, known) = match (method, target) {
        ("GET" | "HEAD", Target::Key(key)) => {
            parameters.only("get", &[])?;
            conditions.no_if_match("get")?;
            (KvOp::Get { key }, conditions.if_none_match.map(str::to_owned))
        }
        ("PUT", Target::Key(key)) => {
            parameters.only("set", &["ttl_ms", "if_rev", "if_absent"])?;
            let if_rev = conditions.if_rev(parameters.if_rev()?)?;
            let if_absent = conditions.if_absent(parameters.flag("if_absent")?)?;
            (KvOp::Set(SetOp { key, ttl_ms: parameters.ttl_ms()?, if_rev, if_absent }), None)
        }
        ("DELETE", Target::Key(key)) => {
            parameters.only("delete", &["if_rev"])?;
            conditions.no_if_none_match("delete")?;
            (KvOp::Delete(DeleteOp { key, if_rev: conditions.if_rev(parameters.if_rev()?)? }), None)
        }
        ("POST", Target::Key(key)) => {
            require_op(&parameters, "a POST to a key", "incr")?;
            parameters.only("incr", &INCR_PARAMETERS)?;
            conditions.no_if_match("incr")?;
            conditions.no_if_none_match("incr")?;
            let delta = parameters.read_as("delta", "a signed 64-bit integer", |value| value.parse().ok())?.unwrap_or(1);
            (KvOp::Incr(IncrOp { key, delta, ttl_ms: parameters.ttl_ms()? }), None)
        }
        ("GET" | "HEAD", Target::Namespace) => {
            parameters.only("list", &["prefix", "after", "limit", "values"])?;
            conditions.no_if_match("list")?;
            conditions.no_if_none_match("list")?;
            let limit = parameters.number("limit", 1, MAX_LIST_LIMIT.into())?;
            let list = ListOp {
                prefix: parameters.text("prefix").unwrap_or_default().to_owned(),
                after: parameters.text("after").map(str::to_owned),
                limit: limit.and_then(|limit| limit.try_into().ok()),
                values: parameters.flag("values")?.unwrap_or(false),
            };
            (KvOp::List(list), None)
        }
        ("POST", Target::Namespace) => {
            require_op(&parameters, "a POST to the store", "txn")?;
            parameters.only("txn", &["op"])?;
            conditions.no_if_match("txn")?;
            conditions.no_if_none_match("txn")?;
            (KvOp::Txn, None)
        }
        (method, Target::Key(_)) => {
            let allow = Target::KEY_METHODS;
            return Err(Refused::bad_method(format!("a key takes {allow}, not {method}"), allow));
        }
        (method, Target::Namespace) => {
            let allow = Target::NAMESPACE_METHODS;
            return Err(Refused::bad_method(
                format!("the store takes {allow}, not {method}: a key follows after {ROOT}/"),
                allow,
            ));
        }
    };
    let form = Form { op: op.name(), known };
    Ok(Operation { op, form })
}

fn require_op(parameters: &Parameters, request: &str, op: &str) -> Result<(), Refused> {
    match parameters.text("op") {
        Some(said) if said == op => Ok(()),
        Some(said) => Err(Refused::bad_request(format!("{request} takes op={op}, not op={said}"))),
        None => Err(Refused::bad_request(format!("{request} needs the parameter op={op}"))),
    }
}

/// Checks that a body belongs to the operation.
pub(super) fn check_body(op: &KvOp, body: &[u8]) -> Result<(), Refused> {
    match op {
        KvOp::Set(_) | KvOp::Txn => Ok(()),
        _ if body.is_empty() => Ok(()),
        _ => Err(Refused::bad_request(format!("{} must have no body, got {} bytes", op.name(), body.len()))),
    }
}

impl Form {
    /// The response of an operation's answer.
    pub(super) fn response(&self, answer: Result<Answer, KvError>) -> Response {
        match answer {
            Ok(answer) => self.of_answer(answer),
            Err(error) => Refused::from(error).into(),
        }
    }

    fn of_answer(&self, Answer { result, body }: Answer) -> Response {
        let mut response = Response { status: 200, body, ..Response::default() };
        let mut put = |name, value: Cow<'static, str>| response.headers.push((name, value));
        if result.found == Some(false) {
            return Refused::new(404, "not_found", "there is no such key").into();
        }
        let tag = result.rev.map(|rev| format!("\"{rev}\""));
        if let Some(tag) = &tag {
            put("etag", tag.clone().into());
        }
        if let Some(left) = result.expires_in_ms {
            put("x-kv-expires-in-ms", left.to_string().into());
        }
        match self.op {
            "get" => put("content-type", "application/octet-stream".into()),
            "incr" => {
                put("content-type", "text/plain".into());
                response.body = result.value.unwrap_or_default().to_string().into_bytes();
            }
            "list" => {
                put("content-type", "application/json".into());
                let next = result.next.map(|next| format!(r#","next":{}"#, json!(next))).unwrap_or_default();
                response.body = [br#"{"keys":"#, response.body.as_slice(), next.as_bytes(), b"}\n"].concat();
            }
            "txn" => {
                put("content-type", "application/json".into());
                response.body.push(b'\n');
            }
            _ => response.status = 204,
        }
        if self.knows(tag.as_deref()) {
            response.status = 304;
        }
        response
    }

    /// Whether the caller has the value of this tag. Revisions are compared weakly, as RFC 9110, section 13.1.2, has it.
    fn knows(&self, tag: Option<&str>) -> bool {
        let Some(known) = &self.known else { return false };
        known.split(',').map(str::trim).any(|known| known == "*" || Some(known.strip_prefix("W/").unwrap_or(known)) == tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str, headers: &str) -> Result<KvOp, (u16, String)> {
        let operation = read(format!("{line} HTTP/1.1\r\nhost: plugrack\r\n{headers}").as_bytes());
        operation.map(|operation| operation.op).map_err(|refused| (refused.status, refused.message))
    }

    #[test]
    fn requests_are_operations() {
        let key = || "a".to_owned();
        let set = |ttl_ms, if_rev, if_absent| KvOp::Set(SetOp { key: key(), ttl_ms, if_rev, if_absent });
        let incr = |delta, ttl_ms| KvOp::Incr(IncrOp { key: key(), delta, ttl_ms });
        for (line, headers, op) in [
            ("GET /kv/a", "", KvOp::Get { key: key() }),
            ("HEAD /kv/a?&", "if-none-match: \"1\"\r\n", KvOp::Get { key: key() }),
            ("GET /kv/", "", KvOp::Get { key: String::new() }),
            ("GET /kv/a/b%2F%25+%3f%C3%A9/", "", KvOp::Get { key: "a/b/%+?é/".into() }),
            ("PUT /kv/a", "", set(None, None, false)),
            ("PUT /kv/%61?ttl_ms=5&if_rev=0", "", set(Some(5), Some(0), false)),
            ("PUT /kv/a?if_absent=true", "", set(None, None, true)),
            ("PUT /kv/a?if_absent=false", "if-match: \"18446744073709551615\"\r\n", set(None, Some(u64::MAX), false)),
            ("PUT /kv/a", "if-none-match: *\r\n", set(None, None, true)),
            ("DELETE /kv/a?if_rev=7", "", KvOp::Delete(DeleteOp { key: key(), if_rev: Some(7) })),
            ("POST /kv/a?op=incr", "", incr(1, None)),
            ("POST /kv/a?delta=-9223372036854775808&ttl_ms=1&op=incr", "", incr(i64::MIN, Some(1))),
            ("GET /kv", "", KvOp::List(ListOp::default())),
            (
                "GET /kv?prefix=a+b%2B&after=&limit=1000&values=true",
                "",
                KvOp::List(ListOp { prefix: "a b+".into(), after: Some(String::new()), limit: Some(1000), values: true }),
            ),
            ("POST /kv?op=txn", "", KvOp::Txn),
        ] {
            assert_eq!(of(line, headers), Ok(op), "{line} {headers}");
        }
    }

    #[test]
    fn what_is_no_operation_is_refused_by_one_sentence() {
        for (line, headers, status, message) in [
            ("GET /", "", 404, "there is nothing at this path: the store is at /kv and /kv/KEY"),
            ("GET /kvx", "", 404, "there is nothing at this path"),
            ("OPTIONS *", "", 404, "there is nothing at this path"),
            ("PATCH /kv/a", "", 405, "a key takes GET, HEAD, PUT, POST, DELETE, not PATCH"),
            ("get /kv/a", "", 405, "not get"),
            ("PUT /kv", "", 405, "the store takes GET, HEAD, POST, not PUT: a key follows after /kv/"),
            ("GET /kv/%", "", 400, "the key holds a % without two hexadecimal digits"),
            ("GET /kv/%4", "", 400, "the key holds a % without"),
            ("GET /kv/%zz", "", 400, "the key holds a % without"),
            ("GET /kv/%é", "", 400, "the key holds a % without"),
            ("GET /kv/%ff", "", 400, "the key is not UTF-8"),
            ("GET /kv?prefix=%ff", "", 400, "the parameter prefix is not UTF-8"),
            ("GET /kv?%ff=1", "", 400, "the name of a parameter is not UTF-8"),
            ("GET /kv?after=%", "", 400, "the parameter after holds a %"),
            ("GET /kv?limit=1&limit=1", "", 400, "the parameter limit is there twice"),
            ("GET /kv?limit=0", "", 400, "limit must be an integer within 1-1000, got \"0\""),
            ("GET /kv?limit=1001", "", 400, "limit must be"),
            ("GET /kv?limit=", "", 400, "limit must be"),
            ("GET /kv?limit=%2B1", "", 400, "limit must be"),
            ("GET /kv?values=yes", "", 400, "values must be true or false, got \"yes\""),
            ("GET /kv?values", "", 400, "values must be true or false, got \"\""),
            ("GET /kv?key=a", "", 400, "list takes prefix, after, limit, values, not \"key\""),
            ("GET /kv/a?op=get", "", 400, "get takes no parameters, not \"op\""),
            ("PUT /kv/a?ttl=5", "", 400, "set takes ttl_ms, if_rev, if_absent, not \"ttl\""),
            ("PUT /kv/a?ttl_ms=0", "", 400, "ttl_ms must be an integer within 1-315360000000, got \"0\""),
            ("PUT /kv/a?if_rev=-1", "", 400, "if_rev must be an integer within 0-18446744073709551615, got \"-1\""),
            ("PUT /kv/a?if_absent=1", "", 400, "if_absent must be true or false"),
            ("PUT /kv/a?if_rev=1", "if-match: \"1\"\r\n", 400, "if-match and if_rev are the same condition: send one of them"),
            ("PUT /kv/a?if_absent=true", "if-none-match: *\r\n", 400, "if-none-match and if_absent are the same condition"),
            ("PUT /kv/a", "if-match: *\r\n", 400, "if-match must be one revision in quotes, got *"),
            ("PUT /kv/a", "if-match: \"1\", \"2\"\r\n", 400, "if-match must be one revision"),
            ("PUT /kv/a", "if-match: W/\"1\"\r\n", 400, "if-match must be one revision"),
            ("PUT /kv/a", "if-match: 1\r\n", 400, "if-match must be one revision"),
            ("PUT /kv/a", "if-match: \"1\"\r\nif-match: \"1\"\r\n", 400, "the request has more than one if-match"),
            ("PUT /kv/a", "if-none-match: \"1\"\r\n", 400, "if-none-match must be * in a set, got \"1\""),
            ("PUT /kv/a", "content-range: bytes 0-1/2\r\n", 400, "content-range is not for the store"),
            ("GET /kv/a", "if-match: \"1\"\r\n", 400, "if-match is for set and delete, not for get"),
            ("DELETE /kv/a", "if-none-match: *\r\n", 400, "if-none-match is for get and set, not for delete"),
            ("POST /kv/a", "", 400, "a POST to a key needs the parameter op=incr"),
            ("POST /kv/a?op=set", "", 400, "a POST to a key takes op=incr, not op=set"),
            ("POST /kv/a?op=incr&by=1", "", 400, "incr takes op, delta, ttl_ms, not \"by\""),
            ("POST /kv/a?op=incr&delta=1.5", "", 400, "delta must be a signed 64-bit integer, got \"1.5\""),
            ("POST /kv/a?op=incr&delta=9223372036854775808", "", 400, "delta must be"),
            ("POST /kv/a?op=incr", "if-match: \"1\"\r\n", 400, "if-match is for set and delete, not for incr"),
            ("POST /kv", "", 400, "a POST to the store needs the parameter op=txn"),
            ("POST /kv?op=incr", "", 400, "a POST to the store takes op=txn, not op=incr"),
            ("POST /kv?op=txn&a=b", "", 400, "txn takes op, not \"a\""),
        ] {
            let (refused, said) = of(line, headers).expect_err(line);
            assert_eq!(
                (refused, said.starts_with(message) || said.ends_with(message)),
                (status, true),
                "{line} {headers}: {said}"
            );
        }
    }
}
