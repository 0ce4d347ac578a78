//! `plugrack detect`: proposes a manifest for an application. Works without a host.

use super::console::{Console, NOT_FOUND, failure, print};
use crate::apps::detect::{self, Detection, LOOKED_FOR, MANIFEST};
use crate::util::escape;
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::{Value, json};
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Mode of a manifest: it holds no secrets, and the host may run as another user.
const MODE: u32 = 0o644;

#[derive(Debug, Args)]
pub(super) struct Detect {
    /// The directory of the application
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Write the manifest to DIR/plugrack.toml, if there is none
    #[arg(long)]
    save: bool,
}

impl Detect {
    pub(super) fn run(self, console: &Console) -> Result<()> {
        let shown = self.directory.display().to_string();
        let cannot_read = || format!("cannot read the directory {shown}");
        let directory = fs::canonicalize(&self.directory).with_context(cannot_read)?;
        let name = directory.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let detection = detect::detect(&directory, &name).with_context(cannot_read)?;
        if let Some(already) = detection.already {
            let message = format!("{shown} is a plugin already: it has the file {already}, and needs no proposal");
            if self.save {
                bail!("{message}; nothing was written");
            }
            return if console.json { console.print(&json(&detection, None), |_| String::new()) } else { note(&message) };
        }
        let Some(first) = detection.found.first() else {
            let notes: String = detection.notes.iter().map(|note| format!("; {note}")).collect();
            let message = format!("{shown} has no application that is recognised: detect looked for {LOOKED_FOR}{notes}");
            return Err(failure(NOT_FOUND, message));
        };
        let saved = self.save.then(|| self.directory.join(MANIFEST));
        if let Some(path) = &saved {
            save(path, &first.toml()).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => anyhow!("{} already exists, and is not overwritten", path.display()),
                _ => anyhow!("cannot write {}: {error}", path.display()),
            })?;
        }
        if console.json {
            return console.print(&json(&detection, saved.as_deref()), |_| String::new());
        }
        print(&first.toml())?;
        for hint in first.hints.iter().chain(&detection.notes) {
            note(hint)?;
        }
        for other in &detection.found[1..] {
            note(&format!("also found: {} ({}); --json prints its manifest too", other.application, other.evidence))?;
        }
        match saved {
            Some(path) => note(&format!("wrote {}", path.display())),
            None => Ok(()),
        }
    }
}

/// Prints a line on standard error, so that standard output is the manifest alone.
fn note(text: &str) -> Result<()> {
    Ok(writeln!(io::stderr(), "plugrack: {}", escape::shown(text))?)
}

fn json(detection: &Detection, saved: Option<&Path>) -> Value {
    json!({
        "already": detection.already,
        "found": detection.found.iter().map(detect::Draft::json).collect::<Vec<_>>(),
        "notes": detection.notes,
        "saved": saved.map(|path| path.display().to_string()),
    })
}

/// Writes a manifest atomically where there is no file yet.
fn save(path: &Path, toml: &str) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(toml.as_bytes())?;
    // Set afterwards, so that the umask does not apply.
    file.as_file().set_permissions(Permissions::from_mode(MODE))?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path)?;
    Ok(())
}
