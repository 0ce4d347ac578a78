//! `plugrack license clock`: shows or resets the time by which licences are judged.

use super::console::{Console, fields, word};
use super::instance;
use crate::cli::api_client::ClientError;
use crate::licensing::clock::{CLOCK_NOT_SET, ClockReadings, LicenseClock};
use crate::store::now_ms;
use anyhow::{Context, Result};
use clap::Subcommand;
use serde_json::Value;
use std::time::Instant;

/// The clock's path in the API.
const PATH: &str = "/license-clock";

/// The word that confirms a reset.
const RESET: &str = "reset";

#[derive(Debug, Subcommand)]
pub(super) enum Clock {
    /// Set the high-water mark of time to the system clock, after the clock was ahead
    Reset {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// Shows or resets the licence clock: through the running host, or in the database if none runs.
pub(super) fn run(console: &Console, action: Option<&Clock>) -> Result<()> {
    if let Some(Clock::Reset { yes: false }) = action {
        console.confirm(RESET, "set the high-water mark of time to the system clock")?;
    }
    let answer = match console.api() {
        Ok(api) => api.call(if action.is_some() { "DELETE" } else { "GET" }, PATH, b"")?,
        Err(error) if matches!(error.downcast_ref(), Some(ClientError::NoHost)) => in_database(console, action.is_some())?,
        Err(error) => return Err(error),
    };
    console.print(&answer, report)
}

/// The same without a running host.
fn in_database(console: &Console, reset: bool) -> Result<Value> {
    let (_lock, store) = instance::locked_store(console)?;
    let mut mark = store.license_clock_mark()?;
    if reset {
        mark = LicenseClock::new(mark, Instant::now()).reset(Instant::now(), now_ms());
        store.set_license_clock_mark(mark.context(CLOCK_NOT_SET)?)?;
    }
    Ok(serde_json::to_value(ClockReadings::new(now_ms(), mark))?)
}

fn report(clock: &Value) -> String {
    let ahead = clock["now"] != clock["system"];
    let judged = match ahead {
        true => format!("{}, the high-water mark: it is ahead of the system clock", word(&clock["now"])),
        false => format!("{}, the system clock", word(&clock["now"])),
    };
    let mark = if clock["mark"].is_string() { word(&clock["mark"]).into_owned() } else { "none yet".to_owned() };
    let advice = if ahead { "if the system clock is right and was ahead before: plugrack license clock reset" } else { "" };
    fields(
        "",
        &[
            ("system clock", word(&clock["system"]).into_owned()),
            ("mark", mark),
            ("licences at", judged),
            ("what to do", advice.to_owned()),
        ],
    )
}
