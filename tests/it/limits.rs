//! The limits and settings that the docs name are those of the source.

use crate::support::{binary, command, root};
use std::collections::BTreeSet;
use std::fs;

/// How the page writes a number.
enum As {
    /// In the constant's own unit; digits alone.
    Number,
    /// In groups of three digits.
    Groups,
    /// As KiB, of bytes.
    KiB,
    /// As MiB, of bytes.
    MiB,
    /// As seconds, of a duration.
    Seconds,
}

/// A file of the Rust SDK's crate, by its path from `sdk/rust/src`, or of the host, by its path from `src`.
fn source(file: &str) -> String {
    let folder = if file.starts_with("protocol/") { "sdk/rust/src" } else { "src" };
    fs::read_to_string(root().join(folder).join(file)).unwrap()
}

/// The text of the protocol's page, all white space alike.
fn page() -> String {
    let text = fs::read_to_string(root().join("docs/protocol.md")).unwrap();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What follows `const NAME: TYPE =` up to the `;`.
fn constant(source: &str, name: &str) -> String {
    let named = format!("const {name}: ");
    let (_, rest) = source.split_once(&named).unwrap_or_else(|| panic!("there is no {named}"));
    // An array's type has a `;` too, and stands before the `=`.
    let (_, value) = rest.split_once(" = ").unwrap();
    value.split_once(';').unwrap().0.to_owned()
}

/// The number a constant stands for; milliseconds, of a duration.
fn number(source: &str, expression: &str) -> u64 {
    let factor = |factor: &str| {
        let factor = factor.trim();
        let minutes = factor.strip_prefix("Duration::from_mins(").map(|rest| (60_000, rest));
        let seconds = minutes.or(factor.strip_prefix("Duration::from_secs(").map(|rest| (1000, rest)));
        let (unit, digits) =
            seconds.or(factor.strip_prefix("Duration::from_millis(").map(|rest| (1, rest))).unwrap_or((1, factor));
        match digits.trim_end_matches(')').replace('_', "").parse::<u64>() {
            Ok(number) => number * unit,
            Err(_) => number(source, &constant(source, digits)),
        }
    };
    expression.split('*').map(factor).product()
}

/// The default of what the operator may set through a variable: a number, its unit left out.
fn default(variable: &str) -> u64 {
    let config = source("server/options.rs") + &source("gate/limits.rs");
    let line =
        config.lines().find(|line| line.contains(&format!("\"{variable}\""))).unwrap_or_else(|| panic!("there is no {variable}"));
    let (_, value) = line.split_once("default_value").unwrap();
    let digits: String =
        value.chars().skip_while(|c| !c.is_ascii_digit()).take_while(|c| c.is_ascii_digit() || *c == '_').collect();
    digits.replace('_', "").parse().unwrap()
}

impl As {
    fn write(&self, number: u64) -> String {
        match self {
            Self::Number => number.to_string(),
            Self::KiB => fraction(number, 1024),
            Self::MiB => fraction(number, 1024 * 1024),
            Self::Seconds => fraction(number, 1000),
            Self::Groups if number < 1000 => number.to_string(),
            Self::Groups => format!("{} {:03}", self.write(number / 1000), number % 1000),
        }
    }
}

/// A number in a larger unit, with a decimal where it is not whole.
fn fraction(number: u64, unit: u64) -> String {
    match number % unit {
        0 => (number / unit).to_string(),
        rest => format!("{}.{}", number / unit, rest * 10 / unit),
    }
}

/// Where a number on the page comes from.
enum From {
    /// A constant of a file, by its path from `src`.
    Constant(&'static str, &'static str),
    /// The default of a setting, by its environment variable.
    Setting(&'static str),
}

impl From {
    fn number(&self) -> u64 {
        match self {
            Self::Constant(file, name) => {
                let source = source(file);
                number(&source, &constant(&source, name))
            }
            Self::Setting(variable) => default(variable),
        }
    }
}

/// The rows of the table below a heading of the protocol's page, without its two first.
fn table(heading: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join("docs/protocol.md")).unwrap();
    let (_, section) = text.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("the page has no {heading}"));
    let rows = section.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    rows.skip(2).map(str::to_owned).collect()
}

/// Each row of the table, where `@` stands for numbers, and what the numbers are.
#[test]
fn the_table_of_limits_is_that_of_the_source() {
    use As::{Groups, KiB, MiB, Number, Seconds};
    use From::{Constant, Setting};
    const MESSAGE: &str = "protocol/message.rs";
    const STORE_HTTP: &str = "plugins/host_socket/http.rs";
    let rows: [(&str, &[(As, From)]); 44] = [
        ("head of a frame | 1–@ bytes | fixed", &[(Number, Constant(MESSAGE, "MAX_HEAD"))]),
        ("body of a frame | 0–@ bytes | fixed", &[(Number, Constant(MESSAGE, "MAX_BODY"))]),
        ("`id` of a message | 0 … 2^53−1 | fixed", &[]),
        ("output of `--metadata` | @ KiB | fixed", &[(KiB, Constant("protocol/metadata.rs", "MAX_METADATA"))]),
        ("time for `--metadata` | @ s | `--metadata-timeout`", &[(Number, Setting("PLUGRACK_METADATA_TIMEOUT"))]),
        ("time from start to `ready` | @ s | `--start-timeout`", &[(Number, Setting("PLUGRACK_START_TIMEOUT"))]),
        (
            "time to exit after `error` in reply to `init` | @ s | fixed",
            &[(Seconds, Constant("plugins/supervisor/mod.rs", "LEAVE_TIME"))],
        ),
        (
            "time to exit after the first connection ended before `ready` | @ s | fixed",
            &[(Seconds, Constant("plugins/supervisor/mod.rs", "START_SETTLE_TIME"))],
        ),
        (
            "time from a request to the beginning of its answer | @ s | `--request-timeout`",
            &[(Number, Setting("PLUGRACK_REQUEST_TIMEOUT"))],
        ),
        (
            "time for the answer to `kv` | that of a request, at most @ s | fixed",
            &[(Seconds, Constant("plugins/job.rs", "MAX_KV_TIME"))],
        ),
        ("silence in a streaming body, up or down | @ s | fixed", &[(Seconds, Constant("plugins/worker/mod.rs", "STREAM_IDLE"))]),
        ("body of a request in its `http` frame | @ KiB | fixed", &[(KiB, Constant(MESSAGE, "MAX_INLINE_BODY"))]),
        (
            "body of a request that is collected before the plugin is asked | @ MiB | `--body-buffer`",
            &[(Number, Setting("PLUGRACK_BODY_BUFFER"))],
        ),
        ("body of a request | @ MiB | `--max-body`", &[(Number, Setting("PLUGRACK_MAX_BODY"))]),
        (
            "head of a request | @ KiB, @ headers | `--max-head`, `--max-headers`",
            &[(Number, Setting("PLUGRACK_MAX_HEAD")), (Number, Setting("PLUGRACK_MAX_HEADERS"))],
        ),
        (
            "connections of the host to the plugin | 1 | `concurrency`, 1–@",
            &[(Number, Constant("protocol/metadata.rs", "MAX_CONCURRENCY"))],
        ),
        ("requests sent ahead on a connection | @ | fixed", &[(Number, Constant("plugins/worker/exchange.rs", "MAX_DEPTH"))]),
        (
            "requests that wait for a plugin | @ for each connection, at most @ | fixed",
            &[
                (Number, Constant("plugins/queue.rs", "CAPACITY_PER_CONNECTION")),
                (Number, Constant("plugins/queue.rs", "MAX_CAPACITY")),
            ],
        ),
        ("idle time before a `ping` | @ s | fixed", &[(Seconds, Constant("plugins/worker/intake.rs", "PING_AFTER"))]),
        ("time for a `pong` | @ s | fixed", &[(Seconds, Constant("plugins/worker/native.rs", "PING_TIME"))]),
        (
            "pings without an answer before a restart | @ | fixed",
            &[(Number, Constant("plugins/worker/native.rs", "MAX_MISSED_PINGS"))],
        ),
        ("time from `shutdown` to SIGTERM | @ s | fixed", &[(Seconds, Constant("plugins/supervisor/mod.rs", "SHUTDOWN_TIME"))]),
        ("time from SIGTERM to SIGKILL | @ s | fixed", &[(Seconds, Constant("plugins/supervisor/mod.rs", "TERMINATE_TIME"))]),
        ("message of a WebSocket | 0–@ bytes | fixed", &[(Number, Constant(MESSAGE, "MAX_BODY"))]),
        (
            "credit of a WebSocket at the beginning | @ bytes | `credit` in `ws_open` and `ws_accept`",
            &[(Number, Constant(MESSAGE, "SOCKET_CREDIT"))],
        ),
        ("body of a response that refuses a WebSocket | @ bytes | fixed", &[(Number, Constant(MESSAGE, "MAX_REFUSAL"))]),
        ("time for a client to answer a close frame | @ s | fixed", &[(Seconds, Constant("gate/websocket.rs", "CLOSE_TIME"))]),
        (
            "time between two pings to the client of a WebSocket | @ s | `--websocket-ping`",
            &[(Number, Setting("PLUGRACK_WEBSOCKET_PING"))],
        ),
        (
            "connections of a plugin to the host socket | @ | fixed",
            &[(Number, Constant("plugins/host_socket/mod.rs", "MAX_CONNECTIONS"))],
        ),
        (
            "time to read replies on the host socket | @ s | fixed",
            &[(Seconds, Constant("plugins/host_socket/mod.rs", "WRITE_TIME"))],
        ),
        (
            "head of an HTTP request on the host socket | @ KiB and @ headers, within @ s | fixed",
            &[
                (KiB, Constant(STORE_HTTP, "MAX_HEAD")),
                (Number, Constant(STORE_HTTP, "MAX_HEADERS")),
                (Seconds, Constant(STORE_HTTP, "HEAD_TIME")),
            ],
        ),
        (
            "body of an HTTP request on the host socket | @ MiB, within @ s | fixed",
            &[(MiB, Constant(MESSAGE, "MAX_BODY")), (Seconds, Constant(STORE_HTTP, "BODY_TIME"))],
        ),
        ("key | 1–@ bytes | fixed", &[(Number, Constant(MESSAGE, "MAX_KEY"))]),
        ("value | 0–@ bytes | fixed", &[(Number, Constant(MESSAGE, "MAX_VALUE"))]),
        ("writes in a `txn` | @ | fixed", &[(Number, Constant(MESSAGE, "MAX_TXN_OPS"))]),
        ("entries in a page of `list` | @ | fixed", &[(Number, Constant(MESSAGE, "MAX_LIST_LIMIT"))]),
        ("bytes of keys and values | @ MiB | `--kv-max-bytes`", &[(Number, Setting("PLUGRACK_KV_MAX_BYTES"))]),
        ("keys | @ | `--kv-max-keys`", &[(Groups, Setting("PLUGRACK_KV_MAX_KEYS"))]),
        ("settings in `init` | @ KiB together | fixed", &[(KiB, Constant("api/mod.rs", "MAX_CONFIG"))]),
        ("code of an `error` | @ bytes | fixed", &[(Number, Constant(MESSAGE, "MAX_ERROR_CODE"))]),
        ("message of an `error` | @ bytes | fixed", &[(Number, Constant(MESSAGE, "MAX_ERROR_MESSAGE"))]),
        ("line in the log | @ KiB | fixed", &[(KiB, Constant("process/output.rs", "MAX_LINE"))]),
        (
            "output in a second | @ lines or @ KiB | fixed",
            &[(Number, Constant("process/output.rs", "MAX_RATE")), (KiB, Constant("process/output.rs", "MAX_BYTE_RATE"))],
        ),
        (
            "log file | @ MiB, and @ older ones | fixed",
            &[(MiB, Constant("process/log_file.rs", "MAX_FILE")), (Number, Constant("process/log_file.rs", "ROTATED"))],
        ),
    ];
    let expected = rows.map(|(row, numbers)| {
        let row = numbers.iter().fold(row.to_owned(), |row, (form, from)| row.replacen('@', &form.write(from.number()), 1));
        format!("| {row} |")
    });
    assert_eq!(table("## Limits and times"), expected);
}

/// In each sentence `@` stands for the number.
#[test]
fn the_numbers_in_the_protocol_s_prose_are_those_of_the_source() {
    let page = page();
    let mut wrong = Vec::new();
    for (sentence, file, name, form) in [
        ("u32 big-endian head length 1 … @ ", "protocol/message.rs", "MAX_HEAD", As::Number),
        ("u32 big-endian body length 0 … @ ", "protocol/message.rs", "MAX_BODY", As::Number),
        ("the version the host speaks: @ |", "protocol/message.rs", "PROTOCOL_VERSION", As::Number),
        ("| `name` | string | yes | | 1–@ characters", "protocol/metadata.rs", "MAX_NAME", As::Number),
        ("(at most @ code points)", "protocol/metadata.rs", "MAX_ICON_CHARS", As::Number),
        ("`data:image/…` URI of at most @ KiB", "protocol/metadata.rs", "MAX_ICON_URI", As::KiB),
        ("[a-z0-9][a-z0-9._-]*`, at most @ bytes", "protocol/metadata.rs", "MAX_ROUTE", As::Number),
        ("| `concurrency` | integer | no | 1 | 1–@:", "protocol/metadata.rs", "MAX_CONCURRENCY", As::Number),
        ("| `speaks` | array of strings | no | `[]` | At most @ distinct", "protocol/metadata.rs", "MAX_SPEAKS", As::Number),
        ("| `homepage` | string | no | | At most @ characters", "protocol/metadata.rs", "MAX_TEXT", As::Number),
        ("A line is at most @ KiB", "process/output.rs", "MAX_LINE", As::KiB),
        ("Beyond @ lines or", "process/output.rs", "MAX_RATE", As::Number),
        ("lines or @ KiB in one second", "process/output.rs", "MAX_BYTE_RATE", As::KiB),
        ("a body of more than @ KiB comes in several frames", "protocol/message.rs", "MAX_INLINE_BODY", As::KiB),
        ("must send something at least every @ s", "plugins/worker/mod.rs", "STREAM_IDLE", As::Seconds),
        ("The plugin has @ s from the first `shutdown`", "plugins/supervisor/mod.rs", "SHUTDOWN_TIME", As::Seconds),
        ("to its process group, and @ s later SIGKILL", "plugins/supervisor/mod.rs", "TERMINATE_TIME", As::Seconds),
        ("The process then has @ s to exit", "plugins/supervisor/mod.rs", "START_SETTLE_TIME", As::Seconds),
        ("exits non-zero within @ s of the `error`", "plugins/supervisor/mod.rs", "LEAVE_TIME", As::Seconds),
        ("and waits at most @ s for that", "plugins/worker/native.rs", "ACCEPT_TIME", As::Seconds),
        ("at most @ such connections", "plugins/host_socket/mod.rs", "MAX_CONNECTIONS", As::Number),
        ("replies are not read for @ s", "plugins/host_socket/mod.rs", "WRITE_TIME", As::Seconds),
        ("The host waits @ s for the rest of a head", "plugins/host_socket/http.rs", "HEAD_TIME", As::Seconds),
        ("and @ s for the rest of a body", "plugins/host_socket/http.rs", "BODY_TIME", As::Seconds),
        ("The head is over @ KiB", "plugins/host_socket/http.rs", "MAX_HEAD", As::KiB),
        ("or @ headers", "plugins/host_socket/http.rs", "MAX_HEADERS", As::Number),
        ("The body is over @ bytes", "protocol/message.rs", "MAX_BODY", As::Groups),
        ("The plugin has @ connections already", "plugins/host_socket/mod.rs", "MAX_CONNECTIONS", As::Number),
        ("| `limit` | integer | no | @ |", "protocol/message.rs", "DEFAULT_LIST_LIMIT", As::Number),
        ("| `limit` | integer | no | 100 | 1–@ |", "protocol/message.rs", "MAX_LIST_LIMIT", As::Number),
        ("The body is a JSON array of 1–@ writes", "protocol/message.rs", "MAX_TXN_OPS", As::Number),
        ("| `key` | string | yes | | 1–@ bytes", "protocol/message.rs", "MAX_KEY", As::Number),
        ("**Values** are 0 … @ bytes", "protocol/message.rs", "MAX_VALUE", As::Groups),
        ("1 … @ (ten years)", "protocol/message.rs", "MAX_TTL_MS", As::Groups),
        ("the database locked this comes after @ s,", "store/schema.rs", "BUSY_TIMEOUT", As::Seconds),
        ("that has been idle for @ s", "plugins/worker/intake.rs", "PING_AFTER", As::Seconds),
        ("gives the plugin @ s to answer", "plugins/worker/native.rs", "PING_TIME", As::Seconds),
        ("After @ pings the host closes an idle connection", "plugins/worker/mod.rs", "IDLE_PINGS", As::Number),
        ("retried with backoff, @ s doubling", "plugins/restart_policy.rs", "FIRST_BACKOFF", As::Seconds),
        ("s doubling to @ s", "plugins/restart_policy.rs", "MAX_START_BACKOFF", As::Seconds),
        ("the pause doubles, up to @ s", "plugins/restart_policy.rs", "MAX_SERVED_BACKOFF", As::Seconds),
        ("or has been ready for @ s", "plugins/restart_policy.rs", "STEADY", As::Seconds),
    ] {
        let sentence = sentence.replacen('@', &form.write(From::Constant(file, name).number()), 1);
        if !page.contains(&sentence) {
            wrong.push(format!("by {name} of {file}: {sentence}"));
        }
    }
    assert!(wrong.is_empty(), "docs/protocol.md does not say: {wrong:#?}");
}

/// The fields that the source gives a list of that name: name, type as the page writes it, and whether it is required.
fn fields(list: &str) -> BTreeSet<[String; 3]> {
    let source = source("protocol/message.rs") + &source("protocol/metadata.rs");
    let value = constant_list(&source, list);
    let of = |entry: &str| {
        let (required, rest) = match entry.split_once("Field::required(") {
            Some((_, rest)) => ("yes", rest),
            None => ("no", entry.split_once("Field::optional(").unwrap_or_else(|| panic!("{list}: {entry}")).1),
        };
        let (name, form) = rest.split_once(", ").unwrap();
        let form = form.trim_start_matches("Form::");
        let kind = ["Texts", "Text", "Bool", "Integer", "Pairs"].iter().position(|kind| form.starts_with(kind));
        let kind = match (kind, form) {
            (Some(kind), _) => ["array of strings", "string", "boolean", "integer", "array of pairs"][kind],
            (None, form) if form.starts_with("COUNT") || form.starts_with("SIGNED") => "integer",
            (None, form) if ["Word", "CODE", "MESSAGE", "CLOSE_REASON"].iter().any(|kind| form.starts_with(kind)) => "string",
            (None, form) => panic!("{list} has a field of the form {form}"),
        };
        [name.trim_matches('"').to_owned(), kind.to_owned(), required.to_owned()]
    };
    let id = ["id".to_owned(), "integer".to_owned(), "yes".to_owned()];
    let entries = value.split("),").map(str::trim).filter(|entry| !entry.is_empty());
    let mut fields = BTreeSet::new();
    for entry in entries {
        if entry.trim_start_matches("ID,").trim() != entry || entry == "ID" {
            fields.insert(id.clone());
        }
        if entry.contains("Field::") {
            fields.insert(of(entry));
        }
    }
    fields
}

/// What stands between the brackets of `const NAME: [Field; N] = [ … ]`.
fn constant_list(source: &str, name: &str) -> String {
    let (_, rest) = source.split_once(&format!("const {name}: [Field; ")).unwrap_or_else(|| panic!("there is no list {name}"));
    let (_, list) = rest.split_once(" =").unwrap();
    let list = list.trim_start().strip_prefix('[').unwrap();
    list.split_once("];").unwrap().0.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The first columns of a table.
fn columns<const N: usize>(heading: &str) -> BTreeSet<[String; N]> {
    let cells = |row: &String| row.split('|').skip(1).map(|cell| cell.trim().trim_matches('`').to_owned()).collect::<Vec<_>>();
    table(heading).iter().map(|row| cells(row)[..N].to_vec().try_into().unwrap()).collect()
}

#[test]
fn the_tables_of_messages_are_those_of_the_source() {
    for (heading, list) in [
        ("### Metadata", "FIELDS"),
        ("### http", "HTTP"),
        ("### response", "RESPONSE"),
        ("### data", "DATA"),
        ("### error", "ERROR"),
        ("### ws_open", "SOCKET_OPEN"),
        ("### ws_accept", "SOCKET_ACCEPT"),
        ("### ws_message", "SOCKET_MESSAGE"),
        ("### Credit", "SOCKET_CREDIT"),
        ("### ws_close", "SOCKET_CLOSE"),
    ] {
        assert_eq!(columns(heading), fields(list), "{heading}");
    }
    // What the host sends is in the struct.
    let source = source("protocol/message.rs");
    let (_, rest) = source.split_once("pub struct Init {").unwrap();
    let of_struct = |line: &str| line.trim().strip_prefix("pub ")?.split_once(':').map(|(name, _)| name.to_owned());
    let init: BTreeSet<_> = rest.split_once("\n}").unwrap().0.lines().filter_map(of_struct).collect();
    assert_eq!(columns::<1>("### init").into_iter().map(|[name]| name).collect::<BTreeSet<_>>(), init);
}

#[test]
fn the_errors_that_clients_get_are_those_of_the_source() {
    let source = source("http/errors.rs") + &source("http/parse/request_head.rs");
    let source = source.split_whitespace().collect::<Vec<_>>().join(" ");
    let pair = |rest: &str| {
        let (status, rest) = rest.trim_start().split_once(", \"")?;
        Some([status.parse::<u16>().ok()?.to_string(), rest.split_once('"')?.0.to_owned()])
    };
    let meant: BTreeSet<_> = source.split("HttpError::new(").skip(1).filter_map(pair).collect();
    assert!(meant.len() > 10);
    assert_eq!(columns("## Errors that clients get"), meant);
}

#[test]
fn the_lists_on_the_protocol_s_page_are_those_of_the_source() {
    let page = page();
    for (before, after, file, name) in [
        ("at or below a route of the host: ", " |", "protocol/metadata.rs", "RESERVED_ROUTES"),
        ("removes hop-by-hop headers (", ")", "protocol/message.rs", "HOP_BY_HOP"),
    ] {
        let (_, rest) = page.split_once(before).unwrap_or_else(|| panic!("docs/protocol.md does not say: {before}"));
        let (listed, _) = rest.split_once(after).unwrap();
        let said: BTreeSet<_> = listed.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        let list = constant(&source(file), name);
        let meant: BTreeSet<_> = list.split('"').skip(1).step_by(2).map(str::to_owned).collect();
        assert!(!meant.is_empty());
        assert_eq!(said, meant, "the page, and {name} of {file}");
    }
}

#[test]
fn the_sdks_of_other_languages_have_the_protocol_s_limits() {
    let message = source("protocol/message.rs");
    for (file, lines) in [
        ("../sdk/python/plugrack.py", ["_MAX_HEAD = @", "_MAX_BODY = @"]),
        ("../sdk/node/plugrack.mjs", ["const MAX_HEAD = @;", "const MAX_BODY = @;"]),
        ("../plugins-examples/counter/plugin", ["head_size <= @ ", "body_size > @:"]),
    ] {
        let code = source(file).replace('_', "");
        for (line, name) in lines.iter().zip(["MAX_HEAD", "MAX_BODY"]) {
            let line = line.replace('@', &number(&message, &constant(&message, name)).to_string()).replace('_', "");
            assert!(code.contains(&line), "{file} has no {line:?}");
        }
    }
}

/// The settings of `plugrack serve` as its help lists them: argument, variable and default.
fn settings() -> BTreeSet<[String; 3]> {
    let help = command(binary()).args(["serve", "--help"]).output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    let within = |text: &str, before: &str, after: &str| {
        text.split_once(before).and_then(|(_, rest)| rest.split_once(after)).map(|(found, _)| found.to_owned())
    };
    // `[` ends a setting's words, and ` --` begins the next.
    let each = help.split(" --").filter(|setting| setting.contains("[env: "));
    each.map(|setting| {
        let (name, rest) = setting.split_once(' ').unwrap();
        // A switch has no value.
        let value = rest.strip_prefix('<').and_then(|rest| rest.split_once('>')).map(|(value, _)| format!(" {value}"));
        let default = within(setting, "[default: ", "]").unwrap_or("none".into());
        [format!("--{name}{}", value.unwrap_or_default()), within(setting, "[env: ", "=]").unwrap(), default]
    })
    .collect()
}

#[test]
fn the_settings_on_the_operator_s_page_are_those_of_the_program() {
    let page = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| `--"));
    let listed: BTreeSet<[String; 3]> = rows
        .map(|row| {
            // A `|` within a cell is written `\|`.
            let row = row.replace("\\|", "\0");
            let cells: Vec<String> = row.split('|').map(|cell| cell.trim().trim_matches('`').replace('\0', "|")).collect();
            [1, 2, 3].map(|index| cells[index].clone())
        })
        .collect();
    assert!(listed.len() > 20);
    assert_eq!(listed, settings());
}
