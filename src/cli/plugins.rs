//! The commands that list, show and control plugins.

use super::console::{
    self, Console, age, coloured, failure, fields, items, reason, state, terminal_width, time_and_age, wait, word,
};
use super::table;
use crate::cli::api_client::segment;
use crate::licensing::status::for_people;
use crate::store::now_ms;
use crate::util::utc;
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::collections::HashSet;

/// The columns of `list` on a terminal, and the first columns of the long form.
const SHORT: [&str; 7] = ["ID", "STATE", "SINCE", "RESTARTS", "MEM", "VERSION", "ROUTE"];

/// The additional columns of the long form. Names and reasons contain spaces, so they come last.
const LONG: [&str; 4] = ["LICENSE", "PID", "NAME", "REASON"];

/// Columns of the short form that are truncated to fit a terminal, in this order, with the minimum width of each. The route is first
/// because it mostly repeats the id; the id is last because commands need it.
const SHRINK: [(usize, usize); 3] = [(6, 12), (5, 8), (0, 8)];

/// Indentation of the line below a plugin's row.
const INDENT: usize = 2;

/// Placeholder for a missing value.
const NONE: &str = "-";

/// Code for a plugin that should run and does not.
const NOT_READY: &str = "not_ready";

/// `plugrack list`: truncated to fit a terminal, otherwise in full with one line for each plugin.
pub(super) fn list(console: &Console, long: bool) -> Result<()> {
    let api = console.api()?;
    let answer = api.call("GET", "/plugins", b"")?;
    if items(&answer["plugins"]).next().is_none() && !console.json {
        let dir = api.call("GET", "/instance", b"")?;
        return console::print(&format!(
            "no plugins: put an executable file, or a directory with an executable file named plugin, in {}, then: plugrack rescan\n",
            word(&dir["plugins_dir"])
        ));
    }
    console.print(&answer, |answer| match terminal_width().filter(|_| !long) {
        Some(width) => short_list(answer, width, now_ms()),
        None => long_list(answer, now_ms()),
    })
}

/// `plugrack show`.
pub(super) fn show(console: &Console, ids: &[String]) -> Result<()> {
    let api = console.api()?;
    let first = ids.first();
    console.each(
        ids,
        |id| Ok(api.call("GET", &format!("/plugins/{}?first_page=true", segment(id)), b"")?),
        |_, _| Ok(()),
        |id, plugin| {
            let before = if ids.len() == 1 {
                String::new()
            } else {
                format!("{}{id}\n", if Some(id) == first.map(String::as_str) { "" } else { "\n" })
            };
            before + &details(plugin, now_ms())
        },
    )
}

/// `plugrack start`, `stop`, `restart`, `enable` and `disable`.
pub(super) fn command(console: &Console, ids: &[String], verb: &str) -> Result<()> {
    let api = console.api()?;
    let runs = matches!(verb, "start" | "restart" | "enable");
    console.each(
        ids,
        |id| Ok(api.call("POST", &format!("/plugins/{}/{verb}", segment(id)), b"")?),
        |id, plugin| match &*word(&plugin["state"]) {
            _ if !runs => Ok(()),
            "ready" => Ok(()),
            "starting" => Err(failure(NOT_READY, format!("{id} is still starting; follow its log: plugrack logs -f {id}"))),
            _ => Err(failure(NOT_READY, format!("{id} is not ready; see: plugrack logs {id}"))),
        },
        |id, plugin| format!("{id}: {}\n", state(plugin)),
    )
}

/// `plugrack adopt`.
pub(super) fn adopt(console: &Console, id: &str, file: &str) -> Result<()> {
    let body = json!({"file": file}).to_string();
    let answer = console.api()?.call("POST", &format!("/plugins/{}/adopt", segment(id)), body.as_bytes())?;
    console.print(&answer, |plugin| format!("{id}: {}\n", state(plugin)))
}

/// `plugrack gone`.
pub(super) fn gone(console: &Console) -> Result<()> {
    console.print(&console.api()?.call("GET", "/gone", b"")?, leftovers)
}

/// A value as one table cell; a dash if it is missing.
fn cell(value: &Value) -> String {
    match word(value) {
        text if text.is_empty() => NONE.to_owned(),
        text => text.replace('\t', " "),
    }
}

fn number(value: &Value) -> String {
    value.as_i64().map_or(NONE.to_owned(), |number| number.to_string())
}

/// Bytes in decimal units, such as `41 MB`. `space` separates number and unit.
fn memory(bytes: &Value, space: &str) -> String {
    let Some(bytes) = bytes.as_u64() else { return NONE.to_owned() };
    let (unit, name) = if bytes < 1_000_000 {
        (1000, "kB")
    } else if bytes < 10_000_000_000 {
        (1_000_000, "MB")
    } else {
        (1_000_000_000, "GB")
    };
    format!("{}{space}{name}", bytes / unit)
}

/// The cells that the short and the long form share. `space` separates numbers and units.
fn cells(plugin: &Value, space: &str, now: i64) -> [String; 7] {
    let name = if plugin["id"].is_null() { "file" } else { "id" };
    let process = &plugin["process"];
    [
        cell(&plugin[name]),
        cell(&plugin["state"]),
        age(&plugin["since"], now),
        number(&process["restarts"]),
        memory(&process["memory"], space),
        cell(&plugin["version"]),
        cell(if plugin["route"].is_null() { &plugin["host"][0] } else { &plugin["route"] }),
    ]
}

/// The explanation of a plugin's state, and the next try.
fn explanation(plugin: &Value, now: i64) -> (String, String) {
    let license = match &*word(&plugin["license"]["state"]) {
        "expiring" | "grace" => format!("the licence {}", word(&plugin["license"]["message"])),
        _ => String::new(),
    };
    let parts: Vec<_> = [reason(plugin), license].into_iter().filter(|part| !part.is_empty()).collect();
    let retry = match wait(&plugin["retry_at"], now) {
        wait if wait.is_empty() => wait,
        wait if parts.is_empty() => format!("next try {wait}"),
        wait => format!("; next try {wait}"),
    };
    (parts.join("; ").replace('\t', " "), retry)
}

fn short_list(answer: &Value, width: usize, now: i64) -> String {
    let heading = SHORT.map(str::to_owned);
    let rows: Vec<_> = std::iter::once(heading).chain(items(&answer["plugins"]).map(|plugin| cells(plugin, " ", now))).collect();
    let widths = table::fit(&rows, &SHRINK, width);
    let explanations = std::iter::once((String::new(), String::new()));
    let explanations = explanations.chain(items(&answer["plugins"]).map(|plugin| match &plugin["license"]["code"] {
        // The plugin's message is long, and truncation would remove its end, which says what to do.
        code if code == "missing" => (format!("no licence: plugrack license set {} TOKEN", word(&plugin["id"])), String::new()),
        _ => explanation(plugin, now),
    }));
    let mut out = String::new();
    for (row, (why, retry)) in rows.iter().zip(explanations) {
        let plain = table::row(row, &widths, |_, cell| cell);
        if table::width(&plain) > width {
            // Truncation could split a colour code.
            out += &table::cut(&plain, width);
        } else {
            let is_heading = row[1] == SHORT[1];
            out += &table::row(
                row,
                &widths,
                |column, cell| {
                    if column == 1 && !is_heading { coloured(&row[1], &cell) } else { cell }
                },
            );
        }
        out.push('\n');
        let space = width.saturating_sub(INDENT);
        let why = table::cut(&why, space.saturating_sub(table::width(&retry)));
        let line = table::cut(&(why + &retry), space);
        if !line.is_empty() {
            out += &format!("{:INDENT$}{line}\n", "");
        }
    }
    out
}

fn long_list(answer: &Value, now: i64) -> String {
    let rows = items(&answer["plugins"]).map(|plugin| {
        let license = &plugin["license"];
        let code = match &*word(&license["state"]) {
            "refused" => format!(":{}", word(&license["code"])),
            _ => String::new(),
        };
        let (why, retry) = explanation(plugin, now);
        let why = if why.is_empty() && retry.is_empty() { NONE.to_owned() } else { why + &retry };
        let [id, state, since, restarts, mem, version, route] = cells(plugin, "", now);
        let (license, pid, name) = (cell(&license["state"]) + &code, number(&plugin["process"]["pid"]), cell(&plugin["name"]));
        [id, state, since, restarts, mem, version, route, license, pid, name, why]
    });
    let [a, b, c, d, e, f, g] = SHORT.map(str::to_owned);
    let [h, i, j, k] = LONG.map(str::to_owned);
    let rows: Vec<_> = std::iter::once([a, b, c, d, e, f, g, h, i, j, k]).chain(rows).collect();
    let widths = table::fit(&rows, &[], usize::MAX);
    rows.iter()
        .map(|row| table::row(row, &widths, |column, cell| if column == 1 { coloured(&row[1], &cell) } else { cell }) + "\n")
        .collect()
}

/// Everything about a plugin, for people. State and advice come first, and each reason appears once.
fn details(plugin: &Value, now: i64) -> String {
    let text = |value: &Value| word(value).into_owned();
    let count = |value: &Value| value.as_i64().map(|number| number.to_string()).unwrap_or_default();
    let (metadata, process, license) = (&plugin["metadata"], &plugin["process"], &plugin["license"]);
    let state = word(&plugin["state"]);
    let why = reason(plugin);
    let mut said = HashSet::from([text(&plugin["reason"]), text(&plugin["update_refused"])]);
    let enabled = if plugin["enabled"] == true { "yes" } else { "no" };
    let mut out = fields(
        "",
        &[
            ("state", coloured(&state, &state)),
            ("since", time_and_age(&plugin["since"], now)),
            ("next try", wait(&plugin["retry_at"], now)),
            ("what to do", text(&plugin["advice"])),
            ("reason", why),
            ("first page", text(&plugin["first_page"]["advice"])),
        ],
    );
    let memory = if process["memory"].is_null() { String::new() } else { memory(&process["memory"], " ") };
    let mut section = |heading: &str, lines: String| {
        if !lines.is_empty() {
            out.push_str(&format!("\n{heading}\n{lines}"));
        }
    };
    section(
        "identity",
        fields(
            "  ",
            &[
                ("id", text(&plugin["id"])),
                ("name", text(&plugin["name"])),
                ("version", text(&plugin["version"])),
                ("route", text(&plugin["route"])),
                ("host", items(&plugin["host"]).map(word).collect::<Vec<_>>().join(", ")),
                ("url", text(&plugin["url"])),
                ("description", text(&metadata["description"])),
                ("author", text(&metadata["author"])),
                ("homepage", text(&metadata["homepage"])),
                ("enabled", enabled.to_owned()),
                ("file", text(&plugin["file"])),
                ("program", text(&process["program"])),
                ("log", text(&process["log"])),
            ],
        ),
    );
    // The reason of the state includes the message of a refused licence.
    let message =
        if license["code"].is_null() && license["state"] == "grace" { text(&license["message"]) } else { String::new() };
    section(
        "licence",
        fields("  ", &[("license", console::license(license)), ("expires", text(&license["expires_at"])), ("message", message)]),
    );
    section(
        "process",
        fields(
            "  ",
            &[
                ("pid", count(&process["pid"])),
                ("memory", memory),
                ("restarts", count(&process["restarts"])),
                ("answered", count(&process["answered"])),
                ("failed", count(&process["failed"])),
                ("waiting", count(&process["waiting"])),
                ("connections", count(&process["connections"])),
                ("congestion", text(&process["congestion"])),
                ("requests", requests(&process["requests"])),
            ],
        ),
    );
    let end = &plugin["last_end"];
    if !end.is_null() {
        let how =
            if said.insert(text(&end["reason"])) { for_people(&word(&end["reason"])) } else { "see the reason above".to_owned() };
        // Skips the output if all of it is already in the reason.
        let is_said = |line: &Value| {
            let line = line.as_str().unwrap_or_default();
            let printed = line.split_once(' ').filter(|(time, _)| utc::parse(time).is_some()).map_or(line, |(_, rest)| rest);
            end["reason"].as_str().is_some_and(|reason| reason.contains(printed))
        };
        let lines = items(&end["lines"]).filter(|_| !items(&end["lines"]).all(is_said));
        let lines: String = lines.map(|line| format!("    {}\n", word(line))).collect();
        let printed = if lines.is_empty() { "" } else { "  last output\n" };
        section("last end", format!("  {}: {how}\n{printed}{lines}", time_and_age(&end["at"], now)));
    }
    let events = items(&plugin["events"]).map(|event| {
        let detail = text(&event["detail"]);
        let detail = match detail.as_str() {
            "" => String::new(),
            // Not abbreviated: the text is short, and each such event is a separate action.
            "by the operator" => ": by the operator".to_owned(),
            _ if !said.insert(detail.clone()) => ": as above".to_owned(),
            _ => format!(": {}", for_people(&detail)),
        };
        format!("  {}  {}{detail}\n", time_and_age(&event["at"], now), word(&event["kind"]))
    });
    section("events, newest first", events.collect());
    out
}

fn changes(answer: &Value) -> String {
    let mut out = String::new();
    for kind in ["added", "changed", "removed", "refused"] {
        let names: Vec<_> = items(&answer[kind]).map(word).collect();
        if !names.is_empty() {
            let why = if kind == "refused" { " (plugrack list says why)" } else { "" };
            out.push_str(&format!("{kind}: {}{why}\n", names.join(", ")));
        }
    }
    let news = items(&answer["updates_refused"]).next().is_some();
    if out.is_empty() && !news { "no changes\n".into() } else { out }
}

/// `plugrack rescan`. A refused update is a failure, because the new file does not run.
pub(super) fn rescan(console: &Console) -> Result<()> {
    let answer = console.api()?.call("POST", "/rescan", b"")?;
    console.print(&answer, changes)?;
    let refused: Vec<_> = items(&answer["updates_refused"])
        .map(|update| {
            format!("{}: update refused, the old process keeps running: {}", word(&update["id"]), word(&update["reason"]))
        })
        .collect();
    if refused.is_empty() { Ok(()) } else { bail!("{}", refused.join("; ")) }
}

fn leftovers(answer: &Value) -> String {
    let row = |left: &Value| {
        let mut has = vec![format!("{} keys, {} bytes", left["keys"], left["bytes"]), format!("{} settings", left["settings"])];
        for (field, what) in [("env", "environment variable"), ("limits", "limit")] {
            match left[field].as_u64() {
                None | Some(0) => {}
                Some(1) => has.push(format!("1 {what}")),
                Some(count) => has.push(format!("{count} {what}s")),
            }
        }
        has.extend((left["license"] == true).then(|| "a licence".into()));
        has.extend((left["files"] == true).then(|| "files".into()));
        let file = word(&left["file"]);
        let file = if file.is_empty() { String::new() } else { format!("  (was the file {file})") };
        format!("{}: {}{file}\n", word(&left["id"]), has.join(", "))
    };
    let kept: String = items(&answer["gone"]).filter(|left| left["kept"] == true).map(row).collect();
    if kept.is_empty() { "removed plugins have left no data\n".into() } else { kept }
}

/// `plugrack forget`.
pub(super) fn forget(console: &Console, ids: &[String], yes: bool) -> Result<()> {
    let api = console.api()?;
    console.each(
        ids,
        |id| {
            if !yes {
                console.confirm(id, "delete its keys, settings, licence, log and files")?;
            }
            Ok(api.call("DELETE", &format!("/gone/{}", segment(id)), b"")?)
        },
        |_, _| Ok(()),
        |_, _| String::new(),
    )
}

/// The counters of a plugin's requests in one line; empty where there were none.
fn requests(counts: &Value) -> String {
    let kinds = [
        ("success", "2xx"),
        ("redirect", "3xx"),
        ("client_error", "4xx"),
        ("server_error", "5xx"),
        ("cut", "cut short"),
        ("cancelled", "cancelled"),
    ];
    let shown = kinds.into_iter().filter_map(|(field, name)| match counts[field].as_u64() {
        Some(count @ 1..) => Some(format!("{count} {name}")),
        _ => None,
    });
    shown.collect::<Vec<_>>().join(", ")
}
