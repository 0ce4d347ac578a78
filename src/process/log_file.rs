//! A plugin's log on disk: rotation, reading the last lines, and following.
//!
//! Operators may remove, rename or truncate a file while it is written; the next line starts a new one. A link or a non-regular file is
//! never written or read.

use crate::system::data_dir::{make_private_dir, private_file};
use crate::util::escape;
use crate::util::log_throttle::LogThrottle;
use jiff::Timestamp;
use rustix::fs::OFlags;
use std::collections::VecDeque;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Size in bytes at which a log file is rotated.
const MAX_FILE: u64 = 1024 * 1024;

/// Rotated files kept besides the current one; `<id>.log.1` is the newest.
const ROTATED: u32 = 4;

/// A follower prints this where it may have missed lines; how many is unknown.
const GAP: &str = "plugrack: lines may be missing here: the log was removed, truncated, or rotated away while it was followed";

/// The writer of a log.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    /// The current file, open once something was written.
    file: Option<File>,
    /// The group that may read the log.
    reader: Option<u32>,
    /// Lines lost since the last successful write.
    lost: u64,
    failures: LogThrottle,
}

impl LogFile {
    /// The log at `path`. The first line creates the file.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, file: None, reader: None, lost: 0, failures: LogThrottle::default() }
    }

    /// Lets a group read the log, including earlier lines; with none, nobody may.
    pub(crate) fn set_reader(&mut self, group: Option<u32>) {
        self.reader = group;
        for path in (0..=ROTATED).map(|number| rotated(&self.path, number)) {
            match open_regular(File::options().read(true), &path).and_then(|file| self.admit(&file)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    log::warn!("cannot set who may read {}: {error}", path.display());
                }
                _ => {}
            }
        }
    }

    /// Sets the group and mode of a log file.
    fn admit(&self, file: &File) -> io::Result<()> {
        let found = file.metadata()?;
        if let Some(group) = self.reader.filter(|group| *group != found.gid()) {
            fchown(file, None, Some(group))?;
        }
        let mode = if self.reader.is_some() { 0o640 } else { 0o600 };
        if found.mode() & 0o7777 != mode {
            file.set_permissions(Permissions::from_mode(mode))?;
        }
        Ok(())
    }

    /// Adds a line. If the log cannot be written, the line is lost, and the host's log says why. The next successful write is preceded by
    /// a line with the number of lost lines.
    pub(crate) fn add(&mut self, time: Timestamp, line: &[u8]) {
        let mut text = String::new();
        if self.lost > 0 {
            put(&mut text, time, format!("plugrack: {} lines were lost: the log could not be written", self.lost).as_bytes());
        }
        put(&mut text, time, line);
        match self.append(text.as_bytes()) {
            Ok(()) => {
                self.lost = 0;
                if self.failures.clear().is_some() {
                    log::info!("{} is written again", self.path.display());
                }
            }
            Err(error) => {
                self.lost += 1;
                self.complain(&format!("cannot write {}: {error}; its lines are lost until that is fixed", self.path.display()));
            }
        }
    }

    fn complain(&mut self, what: &str) {
        // Throttled, so that the host's log does not fill up instead.
        if self.failures.hit(Instant::now()).is_some() {
            log::error!("{what}");
        }
    }

    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        let mut size = self.open()?;
        if size > 0 && size + text.len() as u64 > MAX_FILE {
            match rotate(&self.path) {
                Ok(()) => self.file = None,
                Err(error) => {
                    // The newest lines matter most, and the log must not grow.
                    self.complain(&format!("cannot rotate {}: {error}; it is truncated instead", self.path.display()));
                    if let Some(file) = &self.file {
                        file.set_len(0)?;
                    }
                }
            }
            size = self.open()?;
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        file.write_all(text).inspect_err(|_| {
            // Removes a partial line. If even that fails, the next line follows the partial one.
            file.set_len(size).ok();
        })
    }

    /// Opens the file that currently has the log's name, and returns its size.
    fn open(&mut self) -> io::Result<u64> {
        if let (Some(file), Ok(named)) = (&self.file, fs::symlink_metadata(&self.path))
            && identity(&named) == identity(&file.metadata()?)
        {
            return Ok(named.len());
        }
        self.file = None;
        let open = || open_regular(private_file().create(true).append(true), &self.path);
        let file = match (open(), self.path.parent()) {
            (Err(error), Some(dir)) if error.kind() == io::ErrorKind::NotFound => {
                make_private_dir(dir)?;
                open()?
            }
            (file, _) => file?,
        };
        self.admit(&file)?;
        let size = file.metadata()?.len();
        self.file = Some(file);
        Ok(size)
    }
}

/// Identifies a file regardless of its name: device and inode.
fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Opens a regular file without following a link, and without blocking on a pipe.
fn open_regular(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let file = options.custom_flags(flags.cast_signed()).open(path).map_err(|error| match error.raw_os_error() {
        Some(code) if code == rustix::io::Errno::LOOP.raw_os_error() => io::Error::other("it is a symbolic link"),
        _ => error,
    })?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

fn put(out: &mut String, time: Timestamp, line: &[u8]) {
    out.push_str(&format!("{time:.3} "));
    escape::escape(out, line);
    out.push('\n');
}

fn rotated(path: &Path, number: u32) -> PathBuf {
    if number == 0 {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn rotate(path: &Path) -> io::Result<()> {
    for number in (0..ROTATED).rev() {
        match fs::rename(rotated(path, number), rotated(path, number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The last `lines` lines of a log, oldest first, including its rotated files; and a follower that continues after them.
pub(crate) fn tail(path: &Path, lines: usize) -> io::Result<(Vec<String>, Follower)> {
    let mut last = VecDeque::new();
    let mut follower = Follower { path: path.to_owned(), file: None, line: Vec::new() };
    let mut seen = Vec::new();
    for number in 0..=ROTATED {
        if number > 0 && last.len() == lines {
            break;
        }
        let mut file = match open_regular(File::options().read(true), &rotated(path, number)) {
            Ok(file) => file,
            Err(error) if number > 0 || error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // The log may be rotated while it is read.
        let metadata = file.metadata()?;
        if seen.contains(&identity(&metadata)) {
            continue;
        }
        seen.push(identity(&metadata));
        // The host's files are never larger; of any other file, show the end.
        let start = file.seek(SeekFrom::Start(metadata.len().saturating_sub(MAX_FILE)))?;
        let mut text = Vec::new();
        (&mut file).take(MAX_FILE).read_to_end(&mut text)?;
        // An unfinished line is left to the follower.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        if let Some(text) = text[..whole].strip_suffix(b"\n") {
            for line in text.rsplit(|byte| *byte == b'\n').take(lines - last.len()) {
                last.push_front(shown(line));
            }
        }
        if number == 0 {
            file.seek(SeekFrom::Start(start + whole as u64))?;
            follower.file = Some(BufReader::new(file));
        }
    }
    Ok((last.into(), follower))
}

/// A line for display. The host's lines are already escaped; another program's are not.
fn shown(line: &[u8]) -> String {
    let mut out = String::new();
    escape::escape(&mut out, line);
    out
}

/// Follows a log through rotation.
#[derive(Debug)]
pub(crate) struct Follower {
    path: PathBuf,
    /// None while there is no log.
    file: Option<BufReader<File>>,
    line: Vec<u8>,
}

/// What happened to the file that a follower reads.
enum Fate {
    /// It still has the log's name.
    Current,
    /// It is the rotated file with this number.
    Rotated(u32),
    /// It is no longer one of the log's files.
    Gone,
}

impl Follower {
    /// The next line, or none for now. Returns [`GAP`] where the follower may have missed lines.
    pub(crate) fn next_line(&mut self) -> io::Result<Option<String>> {
        loop {
            let Some(file) = &mut self.file else {
                self.file = self.open(0)?;
                if self.file.is_none() {
                    return Ok(None);
                }
                continue;
            };
            let held = file.get_ref().metadata()?;
            if let Some(line) = self.read_line()? {
                return Ok(Some(line));
            }
            let fate = self.fate(&held)?;
            // Reads once more: lines may have been written before the rotation was noticed.
            if let Some(line) = self.read_line()? {
                return Ok(Some(line));
            }
            let Some(file) = &mut self.file else { continue };
            match fate {
                Fate::Current if file.stream_position()? > file.get_ref().metadata()?.len() => {
                    file.rewind()?;
                    self.line.clear();
                    return Ok(Some(GAP.into()));
                }
                Fate::Current => return Ok(None),
                Fate::Rotated(number) => {
                    let next = self.open(number - 1)?;
                    // Valid only if this file kept its place meanwhile; otherwise that was not its successor.
                    if matches!(self.fate(&held)?, Fate::Rotated(now) if now == number) {
                        self.line.clear();
                        self.file = next;
                    }
                }
                Fate::Gone => {
                    let Some(next) = self.open(0)? else { return Ok(None) };
                    self.line.clear();
                    self.file = Some(next);
                    return Ok(Some(GAP.into()));
                }
            }
        }
    }

    fn read_line(&mut self) -> io::Result<Option<String>> {
        let Some(file) = &mut self.file else { return Ok(None) };
        file.read_until(b'\n', &mut self.line)?;
        Ok(self.line.pop_if(|byte| *byte == b'\n').map(|_| shown(&std::mem::take(&mut self.line))))
    }

    fn fate(&self, held: &Metadata) -> io::Result<Fate> {
        for number in 0..=ROTATED {
            match fs::symlink_metadata(rotated(&self.path, number)) {
                Ok(named) if identity(&named) == identity(held) => {
                    return Ok(if number == 0 { Fate::Current } else { Fate::Rotated(number) });
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(Fate::Gone)
    }

    fn open(&self, number: u32) -> io::Result<Option<BufReader<File>>> {
        match open_regular(File::options().read(true), &rotated(&self.path, number)) {
            Ok(file) => Ok(Some(BufReader::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use tempfile::TempDir;

    fn log() -> (TempDir, PathBuf, LogFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.log");
        let log = LogFile::new(path.clone());
        (dir, path, log)
    }

    fn add(log: &mut LogFile, line: &str) {
        log.add(Timestamp::now(), line.as_bytes());
    }

    /// Fills one file's worth of a log, with lines that begin with numbers from `from` on: the next such number.
    fn fill(log: &mut LogFile, from: u32) -> u32 {
        let until = from + u32::try_from(MAX_FILE).unwrap() / 10_000;
        (from..until).for_each(|number| add(log, &format!("{number} {}", "x".repeat(10_000))));
        until
    }

    /// The first word of each line behind its time.
    fn words(lines: &[String]) -> Vec<&str> {
        lines.iter().map(|line| line.split(' ').nth(1).unwrap()).collect()
    }

    fn last(path: &Path, lines: usize) -> Vec<String> {
        let lines = tail(path, lines).unwrap().0;
        lines.iter().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    /// The first words of what a follower has by now.
    fn followed(follower: &mut Follower) -> Vec<String> {
        let lines = std::iter::from_fn(|| follower.next_line().unwrap());
        lines.map(|line| if line == GAP { line } else { line.split(' ').nth(1).unwrap().to_owned() }).collect()
    }

    fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
        range.map(|number| number.to_string()).collect()
    }

    #[test]
    fn a_log_rotates_within_its_bound_and_is_read_back_through_its_files() {
        let (dir, path, mut log) = log();
        let end = (0..8).fold(0, |from, _| fill(&mut log, from));
        let kept = tail(&path, 10_000).unwrap().0;
        let first: u32 = words(&kept)[0].parse().unwrap();
        assert!(first > 0 && kept.len() > 400, "{first}: {}", kept.len());
        assert_eq!(words(&kept), numbers(first..end));
        assert_eq!(words(&tail(&path, 200).unwrap().0), numbers(end - 200..end));
        let files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap()).collect();
        assert!(files.iter().all(|file| file.len() <= MAX_FILE && file.permissions().mode() & 0o777 == 0o600), "{files:?}");
        assert_eq!(files.len(), ROTATED as usize + 1);
        // As if it were rotated between the looks at two of its files.
        fs::remove_file(rotated(&path, 1)).unwrap();
        fs::hard_link(&path, rotated(&path, 1)).unwrap();
        let shown = tail(&path, 150).unwrap().0;
        assert!(words(&shown).is_sorted_by_key(|word| word.parse::<u32>().unwrap()), "no line is shown twice");
    }

    #[test]
    fn a_follower_goes_on_where_the_tail_ends_and_through_several_rotations_without_loss_or_repetition() {
        let (_dir, path, mut log) = log();
        add(&mut log, "before");
        let (shown, mut follower) = tail(&path, 10).unwrap();
        assert_eq!(words(&shown), ["before"]);
        let mut from = 0;
        for files in [0, 1, 2, 3, 1] {
            let end = (0..files).fold(from, |from, _| fill(&mut log, from));
            add(&mut log, &end.to_string());
            assert_eq!(followed(&mut follower), numbers(from..end + 1), "after {files} rotations");
            from = end + 1;
        }
        // Further than the files reach: what is gone is told of, and the rest is neither mixed up nor shown twice.
        (0..7).fold(from, |from, _| fill(&mut log, from));
        add(&mut log, "end");
        let seen = followed(&mut follower);
        assert_eq!((seen[0].as_str(), seen.last().unwrap().as_str()), (GAP, "end"));
        assert_eq!(followed(&mut follower), [""; 0]);
    }

    #[test]
    fn a_log_that_is_not_there_yet_is_followed_from_its_beginning() {
        let (_dir, path, mut log) = log();
        let mut follower = tail(&path, 10).unwrap().1;
        assert_eq!(followed(&mut follower), [""; 0]);
        add(&mut log, "one");
        assert_eq!(followed(&mut follower), ["one"]);
    }

    #[test]
    fn an_operator_may_remove_rename_or_cut_the_file_while_it_is_written_and_followed() {
        let (dir, path, mut log) = log();
        let replace = || {
            fs::rename(&path, dir.path().join("elsewhere")).unwrap();
            fs::write(&path, "").unwrap();
        };
        let steps: [(&str, &dyn Fn()); 5] = [
            ("removed", &|| fs::remove_file(&path).unwrap()),
            ("replaced", &replace),
            ("renamed", &|| fs::rename(&path, dir.path().join("elsewhere")).unwrap()),
            ("cut", &|| File::options().write(true).open(&path).unwrap().set_len(0).unwrap()),
            ("removed with its directory", &|| fs::remove_dir_all(dir.path()).unwrap()),
        ];
        for (what, step) in steps {
            add(&mut log, "a first line that is longer than what follows");
            let mut follower = tail(&path, 0).unwrap().1;
            step();
            add(&mut log, "next");
            assert_eq!(last(&path, 10), ["next"], "{what}");
            assert_eq!(followed(&mut follower), [GAP, "next"], "{what}");
        }
    }

    #[test]
    fn what_is_no_regular_file_is_neither_written_nor_read_and_lines_lost_to_it_are_counted() {
        let (dir, path, mut log) = log();
        let other = dir.path().join("other");
        let fifo = || rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let faults: [(&str, &dyn Fn()); 4] = [
            ("a link", &|| symlink(&other, &path).unwrap()),
            ("a link that leads nowhere", &|| symlink(dir.path().join("none"), &path).unwrap()),
            ("a directory", &|| fs::create_dir(&path).unwrap()),
            ("a pipe", &fifo),
        ];
        for (what, fault) in faults {
            fs::write(&other, "another's\n").unwrap();
            fs::remove_file(&path).ok();
            fault();
            add(&mut log, "lost");
            add(&mut log, "lost too");
            assert!(tail(&path, 10).is_err(), "{what}");
            assert_eq!((fs::read_to_string(&other).unwrap().as_str(), dir.path().join("none").exists()), ("another's\n", false));
            fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
            add(&mut log, "again");
            assert_eq!(last(&path, 10), ["plugrack: 2 lines were lost: the log could not be written", "again"], "{what}");
        }
    }

    #[test]
    fn a_log_that_cannot_be_rotated_begins_anew() {
        let (dir, path, mut log) = log();
        fs::create_dir_all(dir.path().join("p.log.4/full")).unwrap();
        fs::write(dir.path().join("p.log.3"), "").unwrap();
        let end = (0..3).fold(0, |from, _| fill(&mut log, from));
        let kept = tail(&path, 1000).unwrap().0;
        assert_eq!(words(&kept), numbers(end - u32::try_from(kept.len()).unwrap()..end));
        assert!(fs::metadata(&path).unwrap().len() <= MAX_FILE && !kept.is_empty());
    }

    #[test]
    fn a_full_disk_costs_whole_lines_alone() {
        let (_dir, path, mut log) = log();
        add(&mut log, "before");
        // What a full disk leaves of a line: its beginning.
        let size = fs::metadata(&path).unwrap().len();
        log.file = Some(File::options().read(true).open(&path).unwrap());
        add(&mut log, "lost");
        assert_eq!((fs::metadata(&path).unwrap().len(), log.lost), (size, 1));
        log.file = None;
        add(&mut log, "after");
        assert_eq!(last(&path, 10), ["before", "plugrack: 1 lines were lost: the log could not be written", "after"]);
    }

    #[test]
    fn what_another_wrote_into_a_log_cannot_harm_whoever_reads_it() {
        let (_dir, path, _log) = log();
        fs::write(&path, "\x1b[2J\u{202e}\r\n").unwrap();
        let (lines, mut follower) = tail(&path, 10).unwrap();
        assert_eq!(lines, ["\\x1b[2J\\u{202e}\\x0d"]);
        File::options().append(true).open(&path).unwrap().write_all(b"\x07\xff\n").unwrap();
        assert_eq!(follower.next_line().unwrap().unwrap(), "\\x07\\xff");
    }
}
