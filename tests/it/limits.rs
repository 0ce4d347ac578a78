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
    /// A word.
    Word,
    /// As KiB, of bytes.
    KiB,
    /// As MiB, of bytes.
    MiB,
    /// As seconds, of a duration.
    Seconds,
}

/// A file, by its path from `src`.
fn source(file: &str) -> String {
    fs::read_to_string(root().join("src").join(file)).unwrap()
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
        let seconds = factor.strip_prefix("Duration::from_secs(").map(|rest| (1000, rest));
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
    let config = source("config.rs");
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
            Self::Word => ["none", "one", "two", "three", "four", "five"][usize::try_from(number).unwrap()].to_owned(),
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

/// In each sentence `@` stands for the number.
#[test]
fn the_limits_on_the_protocol_s_page_are_those_of_the_source() {
    let page = page();
    let mut wrong = Vec::new();
    let mut check = |sentence: &str, number: &str, from: &str| {
        let sentence = sentence.replacen('@', number, 1);
        if !page.contains(&sentence) {
            wrong.push(format!("by {from}: {sentence}"));
        }
    };
    for (sentence, file, name, form) in [
        ("u32 big-endian head length 1 … @ ", "protocol/message.rs", "MAX_HEAD", As::Number),
        ("u32 big-endian body length 0 … @ ", "protocol/message.rs", "MAX_BODY", As::Number),
        ("the version the host speaks: @ |", "protocol/message.rs", "PROTOCOL_VERSION", As::Number),
        ("`--metadata-timeout`, at most @ KiB. It opens no socket", "protocol/metadata.rs", "MAX_METADATA", As::KiB),
        ("| `name` | yes | 1–@ characters", "protocol/metadata.rs", "MAX_NAME", As::Number),
        ("may use up to @ code points", "protocol/metadata.rs", "MAX_ICON_CHARS", As::Number),
        ("`data:image/…` URI of at most @ KiB", "protocol/metadata.rs", "MAX_ICON_URI", As::KiB),
        ("[a-z0-9][a-z0-9._-]*`, at most @ bytes", "protocol/metadata.rs", "MAX_ROUTE", As::Number),
        ("| `concurrency` | no | 1–@, default 1", "protocol/metadata.rs", "MAX_CONCURRENCY", As::Number),
        ("text of at most @ characters, shown", "protocol/metadata.rs", "MAX_TEXT", As::Number),
        ("a line is at most @ KiB", "output.rs", "MAX_LINE", As::KiB),
        ("More than @ lines or", "output.rs", "MAX_RATE", As::Number),
        ("lines or @ KiB in a second", "output.rs", "MAX_BYTE_RATE", As::KiB),
        ("A request's body of at most @ KiB comes whole", "protocol/message.rs", "MAX_INLINE_BODY", As::KiB),
        ("must send something at least every @ s", "worker.rs", "STREAM_IDLE", As::Seconds),
        ("It has @ s from the message; then SIGTERM", "supervisor.rs", "SHUTDOWN_TIME", As::Seconds),
        ("to its process group, and @ s later SIGKILL", "supervisor.rs", "TERMINATE_TIME", As::Seconds),
        ("At most @ connections a plugin", "callback.rs", "MAX_CONNECTIONS", As::Number),
        ("`limit` (1–@, default", "protocol/message.rs", "MAX_LIST_LIMIT", As::Number),
        (", default @), `values`", "protocol/message.rs", "DEFAULT_LIST_LIMIT", As::Number),
        ("body: JSON array of 1–@ writes", "protocol/message.rs", "MAX_TXN_OPS", As::Number),
        ("**Keys** are 1–@ bytes", "protocol/message.rs", "MAX_KEY", As::Number),
        ("**Values** are 0 … @ bytes", "protocol/message.rs", "MAX_VALUE", As::Groups),
        ("**ttl_ms** is 1 … @ (ten years)", "protocol/message.rs", "MAX_TTL_MS", As::Groups),
        ("| `too_large` | the value is over @ MiB", "protocol/message.rs", "MAX_VALUE", As::MiB),
        ("the database locked this comes after @ s,", "store/schema.rs", "BUSY_TIMEOUT", As::Seconds),
        ("the host sends `ping` every @ s;", "worker.rs", "PING_AFTER", As::Seconds),
        ("; @ unanswered in a row", "worker.rs", "MAX_MISSES", As::Word),
        ("unanswered in a row (@ s each)", "worker.rs", "PING_TIME", As::Seconds),
        ("retried with backoff, @ s doubling", "restart.rs", "FIRST_BACKOFF", As::Seconds),
        ("s doubling to @ s", "restart.rs", "MAX_START_BACKOFF", As::Seconds),
    ] {
        let source = source(file);
        let written = form.write(number(&source, &constant(&source, name)));
        check(sentence, &written, &format!("{name} of {file}"));
    }
    for (sentence, variable, form) in [
        ("its start time (@ s) is over", "PLUGRACK_START_TIMEOUT", As::Number),
        ("answer has not begun within @ s is answered with 504", "PLUGRACK_REQUEST_TIMEOUT", As::Number),
        ("A plugin may hold @ MiB (keys and values)", "PLUGRACK_KV_MAX_BYTES", As::Number),
        ("(keys and values) and @ keys", "PLUGRACK_KV_MAX_KEYS", As::Groups),
    ] {
        check(sentence, &form.write(default(variable)), variable);
    }
    assert!(wrong.is_empty(), "docs/protocol.md does not say: {wrong:#?}");
}

#[test]
fn the_lists_on_the_protocol_s_page_are_those_of_the_source() {
    let page = page();
    for (before, after, file, name) in [
        ("one the host keeps: ", " |", "protocol/metadata.rs", "RESERVED_ROUTES"),
        ("Hop-by-hop headers (", ")", "protocol/message.rs", "HOP_BY_HOP"),
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
        ("sdk/plugrack.py", ["_MAX_HEAD = @", "_MAX_BODY = @"]),
        ("sdk/plugrack.mjs", ["const MAX_HEAD = @;", "const MAX_BODY = @;"]),
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
        let (name, rest) = setting.split_once(" <").unwrap();
        let (value, _) = rest.split_once('>').unwrap();
        let default = within(setting, "[default: ", "]").unwrap_or("none".into());
        [format!("--{name} {value}"), within(setting, "[env: ", "=]").unwrap(), default]
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
