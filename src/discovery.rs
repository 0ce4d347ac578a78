//! Finds what is in the plugins directory, and asks each who it is.

use crate::preflight;
use crate::process::{self, Bounds};
use crate::protocol::metadata::{MAX_METADATA, Metadata};
use crate::room;
use crossbeam_channel::{Sender, unbounded};
use std::collections::BTreeMap;
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

/// Most names in the plugins directory. More are no plugins but a mistake, such as a home directory; and each costs a look, a line in
/// the list and a few hundred bytes of memory.
const MAX_NAMES: usize = 10_000;

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

/// Why something is no plugin.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// In a sentence.
    pub(crate) reason: String,
    /// Whether it is for want of files, threads or memory, so that it may be one later.
    pub(crate) for_want: bool,
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self { reason, for_want: false }
    }
}

/// Lists the plugins directory by name. Names that begin with a dot are passed over.
///
/// # Errors
/// It cannot be read, or has more names than [`MAX_NAMES`]: to take some of them would be to stop the plugins among the others.
pub(crate) fn scan(dir: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        if file.starts_with('.') {
            continue;
        }
        if found.len() == MAX_NAMES {
            let many =
                format!("it has more than {MAX_NAMES} names: move what is no plugin elsewhere, or choose another with --plugins");
            return Err(io::Error::other(many));
        }
        let path = entry.path();
        let program = if path.is_dir() { path.join(PROGRAM) } else { path };
        let fingerprint = fingerprint(&program);
        found.push(Found { file, program, fingerprint });
    }
    found.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(found)
}

/// Which file is there now; nothing when it cannot be looked at.
pub(crate) fn fingerprint(program: &Path) -> Option<Fingerprint> {
    let metadata = fs::metadata(program).ok()?;
    Some(Fingerprint {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        mode: metadata.mode(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    })
}

/// Asks each who it is, several at once, and tells the answers in the order of the questions, each as soon as those before it are told.
pub(crate) fn ask_all(found: Vec<Found>, bounds: Bounds, mut tell: impl FnMut(Found, Result<Metadata, Refusal>)) {
    let threads = found.len().min(ASKED_AT_ONCE);
    let questions = Mutex::new(found.into_iter().enumerate());
    // Holds as many as there are questions at most.
    let (answering, answers) = unbounded();
    let work = |answering: Sender<_>| {
        let next = || questions.lock().ok()?.next();
        while let Some((place, found)) = next() {
            let answer = ask(&found, bounds);
            // Whoever asks is there until all are answered.
            answering.send((place, (found, answer))).unwrap_or_default();
        }
    };
    std::thread::scope(|scope| {
        let spawn = |number| {
            let answering = answering.clone();
            std::thread::Builder::new().name(format!("discovery-{number}")).spawn_scoped(scope, move || work(answering))
        };
        // With fewer threads it takes longer; with none this one does it.
        if (0..threads).filter(|&number| spawn(number).is_ok()).count() == 0 {
            work(answering.clone());
        }
        drop(answering);
        let mut early = BTreeMap::new();
        let mut due = 0;
        for (place, answer) in answers {
            early.insert(place, answer);
            while let Some((found, answer)) = early.remove(&due) {
                tell(found, answer);
                due += 1;
            }
        }
    });
}

fn ask(found: &Found, bounds: Bounds) -> Result<Metadata, Refusal> {
    if found.program.ends_with(PROGRAM) && !found.program.exists() && !found.program.is_symlink() {
        return Err(format!("the directory has no executable file named {PROGRAM} inside").into());
    }
    preflight::check(&found.program)?;
    let printed = process::output(&found.program, "--metadata", bounds, METADATA_TIME, MAX_METADATA).map_err(|error| {
        let (reason, for_want) = room::explain("cannot start it", &error);
        Refusal { reason, for_want }
    })??;
    Metadata::parse(&printed).map_err(|error| error.to_string().into())
}
