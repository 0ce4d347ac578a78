//! The commands about plugins: what there is, how it is, and what it is to do.

use super::console::{Console, confirm, items, state, time, word};
use crate::client::segment;
use anyhow::{Result, bail};
use serde_json::{Value, json};

/// `plugrack list`.
pub(super) fn list(console: &Console) -> Result<()> {
    console.print(&console.api()?.call("GET", "/plugins", b"")?, table)
}

/// `plugrack show`.
pub(super) fn show(console: &Console, id: &str) -> Result<()> {
    console.print(&console.api()?.call("GET", &format!("/plugins/{}", segment(id)), b"")?, details)
}

/// `plugrack start`, `stop`, `restart`, `enable` and `disable`.
pub(super) fn command(console: &Console, ids: &[String], verb: &str) -> Result<()> {
    let api = console.api()?;
    for id in ids {
        let answer = api.call("POST", &format!("/plugins/{}/{verb}", segment(id)), b"")?;
        console.print(&answer, |plugin| format!("{id}: {}\n", state(plugin)))?;
        let running = matches!(verb, "start" | "restart" | "enable");
        if running && answer["state"] != "ready" {
            bail!("{id} is not ready: plugrack logs {id} may say more");
        }
    }
    Ok(())
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

fn table(answer: &Value) -> String {
    let heading = ["ID", "VERSION", "ROUTE", "LICENSE", "STATE"].map(str::to_owned);
    let row = |plugin: &Value| {
        let id = if plugin["id"].is_null() { "file" } else { "id" };
        let [id, version, route, license] = [id, "version", "route", "license"].map(|name| word(&plugin[name]).into_owned());
        [id, version, route, license, state(plugin)]
    };
    let rows: Vec<[String; 5]> = std::iter::once(heading).chain(items(&answer["plugins"]).map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (id, version, route, license) = (width(0), width(1), width(2), width(3));
    rows.iter().map(|[a, b, c, d, e]| format!("{a:id$}  {b:version$}  {c:route$}  {d:license$}  {e}\n")).collect()
}

fn details(plugin: &Value) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            out.push_str(&format!("{name:<13}{value}\n"));
        }
    };
    let (metadata, process) = (&plugin["metadata"], &plugin["process"]);
    line("id", &word(&plugin["id"]));
    for name in ["name", "version", "route"] {
        line(name, &word(&plugin[name]));
    }
    for name in ["description", "author", "homepage"] {
        line(name, &word(&metadata[name]));
    }
    line("state", &state(plugin));
    line("license", &word(&plugin["license"]));
    line("enabled", if plugin["enabled"] == true { "yes" } else { "no" });
    if let Some(since) = process["since"].as_i64() {
        line("since", &time(since));
    }
    if let Some(seconds) = process["retry_in"].as_f64().or(plugin["retry_in"].as_f64()) {
        line("next try", &format!("in {seconds:.1} s"));
    }
    line("what to do", &word(&plugin["advice"]));
    for (name, field) in [
        ("pid", "pid"),
        ("restarts", "restarts"),
        ("answered", "answered"),
        ("waiting", "waiting"),
        ("connections", "connections"),
    ] {
        line(name, &process[field].as_i64().map(|number| number.to_string()).unwrap_or_default());
    }
    line("file", &word(&plugin["file"]));
    line("program", &word(&process["program"]));
    line("log", &word(&process["log"]));
    let events = items(&plugin["events"]).map(|event| {
        let (kind, detail) = (word(&event["kind"]), word(&event["detail"]));
        let separator = if detail.is_empty() { "" } else { ": " };
        format!("  {}  {kind}{separator}{detail}\n", time(event["at"].as_i64().unwrap_or_default()))
    });
    let end = &plugin["last_end"];
    let lines = items(&end["lines"]).map(|line| format!("  {}\n", word(line)));
    let sections = [
        (
            format!("last end, {}: {}; what it had printed\n", time(end["at"].as_i64().unwrap_or_default()), word(&end["exit"])),
            lines.collect(),
        ),
        ("events, newest first\n".to_owned(), events.collect::<String>()),
    ];
    for (heading, lines) in sections {
        if !lines.is_empty() {
            out.push_str(&heading);
            out.push_str(&lines);
        }
    }
    out
}

fn changes(answer: &Value) -> String {
    let mut out = String::new();
    for kind in ["added", "changed", "removed", "refused"] {
        let names: Vec<_> = items(&answer[kind]).map(word).collect();
        if !names.is_empty() {
            out.push_str(&format!("{kind}: {}\n", names.join(", ")));
        }
    }
    let news = items(&answer["updates_refused"]).next().is_some();
    if out.is_empty() && !news { "nothing has changed\n".into() } else { out }
}

/// `plugrack rescan`. An update that is refused is a failure: the file that was put there does not run.
pub(super) fn rescan(console: &Console) -> Result<()> {
    let answer = console.api()?.call("POST", "/rescan", b"")?;
    console.print(&answer, changes)?;
    let refused: Vec<_> = items(&answer["updates_refused"])
        .map(|update| format!("{}: update refused, the process before goes on: {}", word(&update["id"]), word(&update["reason"])))
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
    if kept.is_empty() { "nothing is left of plugins that are gone\n".into() } else { kept }
}

/// `plugrack forget`.
pub(super) fn forget(console: &Console, id: &str, yes: bool) -> Result<()> {
    let api = console.api()?;
    if !yes {
        confirm(id, "delete its keys, settings, licence, log and files")?;
    }
    let answer = api.call("DELETE", &format!("/gone/{}", segment(id)), b"")?;
    console.print(&answer, |_| String::new())
}
