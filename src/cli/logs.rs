//! `plugrack logs`: what a plugin has printed.

use super::console::{Console, print};
use crate::log_file;
use crate::pause::pause;
use anyhow::{Context, Result, bail};
use std::time::Duration;

/// How often `logs -f` looks for more.
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);

/// Reads the log itself, so that it can be read when the host does not run.
pub(super) fn logs(console: &Console, id: &str, follow: bool, lines: usize) -> Result<()> {
    // What a file printed that has not said who it is is under the name of the file.
    if id.is_empty() || id.starts_with('.') || id.contains('/') {
        bail!("{id:?} is not a plugin's id, nor the name of a file in the plugins directory");
    }
    let data = console.data()?;
    let path = data.log(id);
    if !path.exists() && !data.plugin_data(id).exists() {
        bail!("there is no plugin {id}, or it was never started");
    }
    let (last, mut follower) = log_file::tail(&path, lines).with_context(|| format!("cannot read {}", path.display()))?;
    for line in last {
        print(&format!("{line}\n"))?;
    }
    if !follow {
        return Ok(());
    }
    loop {
        match follower.next_line().with_context(|| format!("cannot read {}", path.display()))? {
            Some(line) => print(&format!("{line}\n"))?,
            None => pause(FOLLOW_PAUSE),
        }
    }
}
