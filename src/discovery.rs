//! Finds what is in the plugins directory, and asks each who it is.

use crate::preflight;
use crate::process::{self, Bounds};
use crate::protocol::metadata::{MAX_METADATA, Metadata};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// Time a plugin has for `--metadata`.
const METADATA_TIME: Duration = Duration::from_secs(5);

/// Plugins asked at once: asking is starting a process, and the machine is small.
const ASKED_AT_ONCE: usize = 4;

/// The name of the executable in a plugin that is a directory.
const PROGRAM: &str = "plugin";

/// Something in the plugins directory.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// Its name there.
    pub(crate) file: String,
    /// What is executed.
    pub(crate) program: PathBuf,
    /// What of it changes when it is replaced; nothing when it cannot be looked at.
    pub(crate) fingerprint: Option<Fingerprint>,
}

/// Which file it is: another one under the same name differs in some of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    mode: u32,
    modified: (i64, i64),
}

/// Lists the plugins directory by name. Names that begin with a dot are passed over.
pub(crate) fn scan(dir: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        if file.starts_with('.') {
            continue;
        }
        let path = entry.path();
        let program = if path.is_dir() { path.join(PROGRAM) } else { path };
        let fingerprint = fs::metadata(&program).ok().map(|metadata| Fingerprint {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            mode: metadata.mode(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        });
        found.push(Found { file, program, fingerprint });
    }
    found.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(found)
}

/// Asks each who it is, several at once. The answers are in the order of the questions.
pub(crate) fn ask_all(found: Vec<Found>, bounds: Bounds) -> Vec<(Found, Result<Metadata, String>)> {
    let threads = found.len().min(ASKED_AT_ONCE);
    let questions = Mutex::new(found.into_iter().enumerate());
    let answers = Mutex::new(Vec::new());
    let next = || questions.lock().ok()?.next();
    let work = || {
        while let Some((place, found)) = next() {
            let answer = ask(&found, bounds);
            if let Ok(mut answers) = answers.lock() {
                answers.push((place, found, answer));
            }
        }
    };
    std::thread::scope(|scope| {
        for number in 1..threads {
            // With fewer threads it takes longer; this one is always there.
            drop(std::thread::Builder::new().name(format!("discovery-{number}")).spawn_scoped(scope, work));
        }
        work();
    });
    let mut answers = answers.into_inner().unwrap_or_default();
    answers.sort_by_key(|(place, ..)| *place);
    answers.into_iter().map(|(_, found, answer)| (found, answer)).collect()
}

fn ask(found: &Found, bounds: Bounds) -> Result<Metadata, String> {
    if found.program.ends_with(PROGRAM) && !found.program.exists() && !found.program.is_symlink() {
        return Err(format!("the directory has no executable file named {PROGRAM} inside"));
    }
    preflight::check(&found.program)?;
    let printed = process::output(&found.program, "--metadata", bounds, METADATA_TIME, MAX_METADATA)?;
    Metadata::parse(&printed).map_err(|error| error.to_string())
}
