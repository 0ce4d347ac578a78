//! A plugin's log: what it prints, line by line, in files that rotate.
//!
//! Each line begins with the time. Control characters are escaped, so that no line can harm a terminal it is shown on.

use crate::data_dir::private_file;
use crate::repeat::Repeat;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Longest line in bytes; a longer one is cut into several.
const MAX_LINE: usize = 16 * 1024;

/// Size in bytes at which a log file is rotated.
const MAX_FILE: u64 = 1024 * 1024;

/// Files kept beside the current one: `<id>.log.1` is the newest of them.
const ROTATED: u32 = 4;

/// A plugin's log, shared by all that write to it.
#[derive(Clone)]
pub(crate) struct PluginLog {
    file: Arc<Mutex<LogFile>>,
}

struct LogFile {
    path: PathBuf,
    /// Open once something was written.
    file: Option<File>,
    size: u64,
    /// Lines that could not be written.
    lost: Repeat,
}

impl PluginLog {
    /// The log at `path`, which is made with its first line.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { file: Arc::new(Mutex::new(LogFile { path, file: None, size: 0, lost: Repeat::default() })) }
    }

    /// Adds a line the plugin printed. A log that cannot be written costs its lines, never the plugin.
    pub(crate) fn line(&self, line: &[u8]) {
        let mut text = format!("{:.3} ", jiff::Timestamp::now());
        escape(&mut text, line);
        text.push('\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        match file.append(text.as_bytes()) {
            Ok(()) => {
                if let Some(unsaid) = file.lost.over() {
                    log::info!(
                        "{}: lines are written again ({unsaid} more were lost since the last was said)",
                        file.path.display()
                    );
                }
            }
            Err(error) => {
                file.file = None;
                if let Some(unsaid) = file.lost.came(Instant::now()) {
                    let path = file.path.display();
                    log::error!("{path}: a line is lost ({unsaid} more since the last was said), it cannot be written: {error}");
                }
            }
        }
    }

    /// Adds a line of the host's about the plugin.
    pub(crate) fn note(&self, text: &str) {
        self.line(format!("plugrack: {text}").as_bytes());
    }

    /// Writes down all that comes from `source`, until its end.
    pub(crate) fn capture(&self, source: impl Read) {
        let mut source = BufReader::with_capacity(MAX_LINE, source);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut source).take(MAX_LINE as u64).read_until(b'\n', &mut line) {
                Ok(0) => return,
                Ok(_) => self.line(line.strip_suffix(b"\n").unwrap_or(&line)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

impl LogFile {
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.file.is_some() && self.size + line.len() as u64 > MAX_FILE {
            self.file = None;
            rotate(&self.path)?;
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let file = private_file().create(true).append(true).open(&self.path)?;
                self.size = file.metadata()?.len();
                self.file.insert(file)
            }
        };
        if let Err(error) = file.write_all(line) {
            // The beginning of the line may be there: the next one is not to continue it.
            file.set_len(self.size).unwrap_or_default();
            return Err(error);
        }
        self.size += line.len() as u64;
        Ok(())
    }
}

fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn rotate(path: &Path) -> io::Result<()> {
    for number in (1..ROTATED).rev() {
        match fs::rename(rotated(path, number), rotated(path, number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::rename(path, rotated(path, 1))
}

/// Appends bytes as text: UTF-8 as it is, control characters and what is not UTF-8 as `\xNN`. Tabs stay.
fn escape(out: &mut String, bytes: &[u8]) {
    let hex = |out: &mut String, bytes: &[u8]| bytes.iter().for_each(|byte| write!(out, "\\x{byte:02x}").unwrap_or_default());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\t' => out.push(c),
                c if c.is_control() => hex(out, c.encode_utf8(&mut [0; 4]).as_bytes()),
                c => out.push(c),
            }
        }
        hex(out, chunk.invalid());
    }
}

/// The last `lines` lines of a log, oldest first, read back through its rotated files.
pub(crate) fn tail(path: &Path, lines: usize) -> io::Result<Vec<String>> {
    let mut last = VecDeque::new();
    for number in 0..=ROTATED {
        let path = if number == 0 { path.to_owned() } else { rotated(path, number) };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let found = BufReader::new(file).split(b'\n').collect::<io::Result<Vec<_>>>()?;
        for line in found.iter().rev().take(lines - last.len()) {
            last.push_front(String::from_utf8_lossy(line).into_owned());
        }
        if last.len() == lines {
            break;
        }
    }
    Ok(last.into())
}

/// Follows a log from its present end, through rotation.
pub(crate) struct Follower {
    path: PathBuf,
    file: Option<BufReader<File>>,
    line: Vec<u8>,
}

impl Follower {
    /// Begins at the end of the log as it is now; a log that is not there yet is followed from its beginning.
    pub(crate) fn at_end(path: PathBuf) -> io::Result<Self> {
        let file = match File::open(&path) {
            Ok(mut file) => {
                file.seek(SeekFrom::End(0))?;
                Some(BufReader::new(file))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Self { path, file, line: Vec::new() })
    }

    /// The next line, or nothing for now.
    pub(crate) fn next_line(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(file) = &mut self.file {
                file.read_until(b'\n', &mut self.line)?;
                if self.line.pop_if(|byte| *byte == b'\n').is_some() {
                    let line = String::from_utf8_lossy(&self.line).into_owned();
                    self.line.clear();
                    return Ok(Some(line));
                }
                if !self.was_rotated()? {
                    return Ok(None);
                }
            }
            // The file at hand is read to its end, and another has its name.
            match File::open(&self.path) {
                Ok(file) => self.file = Some(BufReader::new(file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn was_rotated(&self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let Some(file) = &self.file else { return Ok(true) };
        let held = file.get_ref().metadata()?;
        match fs::metadata(&self.path) {
            Ok(named) => Ok((named.dev(), named.ino()) != (held.dev(), held.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &str) -> &str {
        line.split_once(' ').unwrap().1
    }

    #[test]
    fn lines_are_timed_escaped_and_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.log");
        let log = PluginLog::new(path.clone());
        log.capture(&b"plain \xe2\x98\x95\ttab\n\x1b[31mred\x07\n\xff\xfe\nno newline at the end"[..]);
        log.capture(&[vec![b'x'; MAX_LINE + 5], b"\n".to_vec()].concat()[..]);
        let lines = tail(&path, 100).unwrap();
        let texts: Vec<_> = lines.iter().map(|line| text(line)).collect();
        assert_eq!(texts[..4], ["plain ☕\ttab", "\\x1b[31mred\\x07", "\\xff\\xfe", "no newline at the end"]);
        assert_eq!((texts[4].len(), texts[5]), (MAX_LINE, "xxxxx"));
        assert!(lines[0].split_once(' ').unwrap().0.parse::<jiff::Timestamp>().is_ok(), "{}", lines[0]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_log_rotates_and_is_read_and_followed_through_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.log");
        let log = PluginLog::new(path.clone());
        log.line(b"before");
        let mut follower = Follower::at_end(path.clone()).unwrap();
        let filler = "x".repeat(10_000);
        let lines = 700;
        for i in 0..lines {
            log.line(format!("{i} {filler}").as_bytes());
            assert!(text(&follower.next_line().unwrap().unwrap()).starts_with(&format!("{i} ")));
        }
        assert_eq!(follower.next_line().unwrap(), None);
        let kept = tail(&path, 1000).unwrap();
        assert!(kept.len() < 700 && text(kept.last().unwrap()).starts_with("699 "));
        assert_eq!(tail(&path, 200).unwrap().len(), 200);
        let total: u64 = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(total <= MAX_FILE * u64::from(ROTATED + 1));
    }

    use std::os::unix::fs::PermissionsExt;
}
