//! A plugin's log: its output, line by line, and the host's notes about it.
//!
//! Each line starts with the time. Excess output costs the plugin log lines and nothing else: the host reads it, so the plugin never
//! blocks, but only counts it. The last lines stay in memory, whether written or not.

use crate::lock::LockExt;
use crate::process::log_file::LogFile;
use crate::util::escape;
use crossbeam_channel::Sender;
use jiff::Timestamp;
use memchr::{memchr, memchr_iter, memrchr, memrchr_iter};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io::{self, PipeReader, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::time::{Duration, Instant};

/// Longest line in bytes; a longer one is split.
const MAX_LINE: usize = 16 * 1024;

/// Lines written for one plugin in a second: more than people can read, and little for any disk.
const MAX_RATE: u32 = 200;

/// Bytes written for one plugin in a second, before escaping, because long lines load a disk as much as many lines.
const MAX_BYTE_RATE: usize = 256 * 1024;

/// The window of [`MAX_RATE`] and [`MAX_BYTE_RATE`].
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// Time after which an unfinished line is written, so that a progress bar or a prompt is visible.
const PARTIAL_TIME: Duration = Duration::from_secs(2);

/// Interval at which an idle capture checks whether its plugin's next process has started.
const SUCCESSOR_CHECK: Duration = Duration::from_secs(60);

/// Number of a process's last lines kept in memory.
const RECENT_LINES: usize = 50;

/// Most bytes kept of each of these lines.
const MAX_RECENT: usize = 400;

/// Notes of the host that may wait while another thread waits for the disk.
const MAX_NOTES: usize = 64;

/// Longest note of the host in bytes; it may quote a request.
const MAX_NOTE: usize = 4096;

/// Time for the receiver of copies to take a line. Until then it holds up the plugin, as a terminal does; later it loses lines.
const COPY_TIME: Duration = Duration::from_secs(5);

/// Read size in bytes: the capacity of a pipe, see pipe(7).
const READ_SIZE: usize = 64 * 1024;

/// A plugin's log, shared by all its writers.
#[derive(Clone)]
pub(crate) struct PluginLog {
    shared: Arc<Shared>,
}

struct Shared {
    writer: Arc<LogWriter>,
    printed: Mutex<Printed>,
    /// Gets a copy of each line.
    copies: OnceLock<Sender<Line>>,
}

/// A line of a log.
#[derive(Debug)]
pub(crate) enum Line {
    /// The plugin has printed it.
    Printed(Vec<u8>),
    /// A note of the host.
    Note(String),
}

/// The state that the logs of two processes of one plugin share, while an update runs beside the old process.
struct LogWriter {
    /// Held during disk writes; the other locks are not.
    file: Mutex<LogFile>,
    notes: Mutex<Notes>,
}

/// Notes to be written by the thread that holds the file.
#[derive(Default)]
struct Notes {
    waiting: VecDeque<(Timestamp, String)>,
    /// The group that may read the log, if that is to change.
    reader: Option<Option<u32>>,
    /// Number of notes dropped because the queue was full.
    lost: u64,
}

/// The plugin's output.
struct Printed {
    /// Number of the current process. Output of an earlier one may still arrive, from its orphans.
    generation: u64,
    recent: VecDeque<(Timestamp, Vec<u8>)>,
    /// End of the current second.
    window_end: Instant,
    /// Lines written in the current second.
    lines: u32,
    bytes: usize,
    /// Lines dropped and not reported yet.
    left_out: u64,
}

impl Printed {
    fn has_room(&self) -> bool {
        self.lines < MAX_RATE && self.bytes < MAX_BYTE_RATE
    }

    fn remember(&mut self, time: Timestamp, line: &[u8]) {
        let mut kept = match self.recent.len() {
            RECENT_LINES => self.recent.pop_front().map(|(_, line)| line).unwrap_or_default(),
            _ => Vec::new(),
        };
        kept.clear();
        let cut = &line[..line.len().min(MAX_RECENT)];
        kept.extend_from_slice(if cut.len() < line.len() { &cut[..whole_chars(cut)] } else { cut });
        self.recent.push_back((time, kept));
    }
}

impl PluginLog {
    /// The log at `path`. The first line creates the file.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self::to(Arc::new(LogWriter { file: Mutex::new(LogFile::new(path)), notes: Mutex::default() }))
    }

    /// Another log in the same file, for a process beside this one. Each has its own rate limit and last lines.
    pub(crate) fn beside(&self) -> Self {
        Self::to(Arc::clone(&self.shared.writer))
    }

    fn to(writer: Arc<LogWriter>) -> Self {
        let printed =
            Printed { generation: 0, recent: VecDeque::new(), window_end: Instant::now(), lines: 0, bytes: 0, left_out: 0 };
        Self { shared: Arc::new(Shared { writer, printed: Mutex::new(printed), copies: OnceLock::new() }) }
    }

    /// Sends a copy of each line from now on, also of those beyond the rate limit.
    pub(crate) fn copy_to(&self, copies: Sender<Line>) {
        self.shared.copies.set(copies).ok();
    }

    fn copy_printed(&self, line: &[u8]) {
        if let Some(copies) = self.shared.copies.get() {
            copies.send_timeout(Line::Printed(line.to_vec()), COPY_TIME).ok();
        }
    }

    /// Starts the log of a new process, and drops the last lines of the previous one. The group `reader` may read the log, including
    /// earlier lines; with none, nobody may.
    pub(crate) fn begin(&self, reader: Option<u32>) {
        {
            let mut printed = self.shared.printed.locked();
            printed.generation += 1;
            printed.recent.clear();
        }
        self.shared.writer.notes.locked().reader = Some(reader);
        self.note("starting");
    }

    /// The last lines of the current process, written or not, oldest first. Each is as in the file, truncated to [`MAX_RECENT`] bytes of
    /// text.
    pub(crate) fn recent(&self) -> Vec<String> {
        let printed = self.shared.printed.locked();
        let shown = |(time, line): &(Timestamp, Vec<u8>)| {
            let mut out = format!("{time:.3} ");
            let most = out.len() + MAX_RECENT;
            escape::escape(&mut out, line);
            out.truncate(out.floor_char_boundary(most));
            out
        };
        printed.recent.iter().map(shown).collect()
    }

    /// Adds a note of the host about the plugin. Does not wait while another thread waits for the disk: that one writes the note later.
    pub(crate) fn note(&self, text: &str) {
        if let Some(copies) = self.shared.copies.get() {
            // A note must not wait.
            copies.try_send(Line::Note(text.to_owned())).ok();
        }
        let mut note = format!("plugrack: {text}");
        note.truncate(note.floor_char_boundary(MAX_NOTE));
        let mut notes = self.shared.writer.notes.locked();
        if notes.waiting.len() < MAX_NOTES {
            notes.waiting.push_back((Timestamp::now(), note));
        } else {
            notes.lost += 1;
        }
        drop(notes);
        self.write_notes();
    }

    /// Writes the waiting notes, unless another thread holds the file. That thread checks for notes after it releases the file, so none is
    /// left behind.
    fn write_notes(&self) {
        while !self.shared.writer.notes.locked().waiting.is_empty() {
            let mut file = match self.shared.writer.file.try_lock() {
                Ok(file) => file,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            self.write_notes_to(&mut file);
        }
    }

    fn write_notes_to(&self, file: &mut LogFile) {
        let Notes { waiting, reader, lost } = std::mem::take(&mut *self.shared.writer.notes.locked());
        if let Some(group) = reader {
            file.set_reader(group);
        }
        for (time, note) in waiting {
            file.add(time, note.as_bytes());
        }
        if lost > 0 {
            file.add(Timestamp::now(), format!("plugrack: {lost} notes were left out, because the disk was too slow").as_bytes());
        }
    }

    /// Adds a line after the waiting notes, however long the disk takes.
    fn write(&self, time: Timestamp, line: &[u8]) {
        let mut file = self.shared.writer.file.locked();
        self.write_notes_to(&mut file);
        file.add(time, line);
        drop(file);
        self.write_notes();
    }

    /// Adds output that came another way than through a pipe, line by line. Its end is the end of a line.
    pub(crate) fn print(&self, output: &[u8]) {
        let generation = self.shared.printed.locked().generation;
        let mut capture = Capture { log: self, generation, line: Vec::new(), since: None, continued: false };
        let now = Instant::now();
        capture.turn_window(now, false);
        capture.take(output, now);
        if !capture.line.is_empty() {
            capture.end_line(true);
        }
    }

    /// Captures `source` until its end.
    pub(crate) fn capture(&self, source: &PipeReader) {
        let generation = self.shared.printed.locked().generation;
        Capture { log: self, generation, line: Vec::new(), since: None, continued: false }.run(source);
    }
}

/// The output of one process.
struct Capture<'a> {
    log: &'a PluginLog,
    generation: u64,
    /// The start of an unfinished line.
    line: Vec<u8>,
    /// Since when there is an unfinished line.
    since: Option<Instant>,
    /// Whether the start of the line was already written.
    continued: bool,
}

impl Capture<'_> {
    fn run(mut self, mut source: &PipeReader) {
        let mut buffer = Vec::new();
        loop {
            let read = is_readable(source, self.next_wake()).then(|| {
                buffer.resize(READ_SIZE, 0);
                source.read(&mut buffer)
            });
            let now = Instant::now();
            self.turn_window(now, false);
            match read {
                // An orphan that escaped holds the output open.
                None if self.log.shared.printed.locked().generation != self.generation => break,
                None => {}
                Some(Ok(0)) => break,
                Some(Ok(size)) => {
                    self.take(&buffer[..size], now);
                    if size < READ_SIZE {
                        // Free the buffer: most plugins are silent for a long time.
                        buffer = Vec::new();
                    }
                }
                Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Some(Err(_)) => break,
            }
            if self.since.is_some_and(|since| now >= since + PARTIAL_TIME) {
                self.end_line(false);
            }
        }
        if !self.line.is_empty() {
            self.end_line(true);
        }
        self.turn_window(Instant::now(), true);
    }

    /// The next deadline without further input.
    fn next_wake(&self) -> Instant {
        let printed = self.log.shared.printed.locked();
        let tell = (printed.left_out > 0).then_some(printed.window_end);
        let check = Instant::now() + SUCCESSOR_CHECK;
        [tell, self.since.map(|since| since + PARTIAL_TIME)].into_iter().flatten().fold(check, Instant::min)
    }

    /// Starts a new second when the current one is over, and reports the lines dropped in it; at the `end` in any case.
    fn turn_window(&self, now: Instant, end: bool) {
        let left_out = {
            let mut printed = self.log.shared.printed.locked();
            if now >= printed.window_end {
                (printed.window_end, printed.lines, printed.bytes) = (now + RATE_WINDOW, 0, 0);
            } else if !end {
                return;
            }
            std::mem::take(&mut printed.left_out)
        };
        if left_out > 0 {
            let kib = MAX_BYTE_RATE / 1024;
            let note = format!("plugrack: {left_out} lines were left out (more than {MAX_RATE} a second, or {kib} KiB)");
            self.log.write(Timestamp::now(), note.as_bytes());
        }
    }

    /// Splits input into lines.
    fn take(&mut self, mut rest: &[u8], now: Instant) {
        while !rest.is_empty() {
            if self.line.is_empty()
                && !self.continued
                && let Some(end) = memrchr(b'\n', rest)
                && self.leave_out(&rest[..end])
            {
                rest = &rest[end + 1..];
                continue;
            }
            let part = &rest[..rest.len().min(MAX_LINE - self.line.len())];
            let end = memchr(b'\n', part);
            self.line.extend_from_slice(&part[..end.unwrap_or(part.len())]);
            self.since.get_or_insert(now);
            rest = &rest[end.map_or(part.len(), |end| end + 1)..];
            if end.is_some() {
                self.end_line(true);
            } else if self.line.len() == MAX_LINE {
                // Carry the first bytes of a split character over to the next line.
                let cut = self.line.split_off(whole_chars(&self.line));
                self.end_line(false);
                self.since = (!cut.is_empty()).then_some(now);
                self.line = cut;
            }
        }
    }

    /// Counts whole lines without writing them, if the rate limit of this second is used up. The last line is without its line end.
    fn leave_out(&mut self, lines: &[u8]) -> bool {
        let mut printed = self.log.shared.printed.locked();
        if printed.has_room() || self.log.shared.copies.get().is_some() {
            return false;
        }
        printed.left_out += 1 + memchr_iter(b'\n', lines).count() as u64;
        if printed.generation == self.generation {
            let time = Timestamp::now();
            let start = memrchr_iter(b'\n', lines).nth(RECENT_LINES - 1).map_or(0, |before| before + 1);
            lines[start..].split(|byte| *byte == b'\n').for_each(|line| printed.remember(time, line));
        }
        true
    }

    /// Writes the current line, or counts it. `whole` means that the next byte starts another line.
    fn end_line(&mut self, whole: bool) {
        // The start of the line may already be written, and only its end left.
        if !(whole && self.continued && self.line.is_empty()) {
            self.log.copy_printed(&self.line);
            let time = Timestamp::now();
            let mut printed = self.log.shared.printed.locked();
            if printed.generation == self.generation {
                printed.remember(time, &self.line);
            }
            if printed.has_room() {
                printed.lines += 1;
                printed.bytes += self.line.len();
                drop(printed);
                self.log.write(time, &self.line);
            } else {
                printed.left_out += 1;
            }
        }
        self.continued = !whole;
        self.line.clear();
        self.since = None;
    }
}

/// Length of these bytes without an incomplete character at their end.
fn whole_chars(bytes: &[u8]) -> usize {
    bytes.len() - bytes.utf8_chunks().last().map_or(0, |chunk| chunk.invalid().len())
}

/// Waits for input or its end.
fn is_readable(source: &PipeReader, until: Instant) -> bool {
    // A few seconds always fit.
    let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
    let mut fds = [PollFd::new(source, PollFlags::IN)];
    // If polling fails, the read reports why.
    !matches!(poll(&mut fds, left.as_ref()), Ok(0) | Err(Errno::INTR))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::log_file::tail;
    use crate::util::pause::pause;
    use std::io::Write;
    use std::path::Path;

    /// The texts of all lines in a log.
    fn texts(path: &Path) -> Vec<String> {
        let lines = tail(path, 10_000).unwrap().0;
        lines.iter().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    /// Has a process of its own print some bytes to a log, in one go.
    fn print(log: &PluginLog, bytes: &[u8]) {
        let (reader, mut writer) = io::pipe().unwrap();
        std::thread::scope(|scope| {
            std::thread::Builder::new().spawn_scoped(scope, || log.capture(&reader)).unwrap();
            writer.write_all(bytes).unwrap();
            drop(writer);
        });
    }

    /// How many lines the notes in some texts say were left out.
    fn left_out(texts: &[String]) -> u64 {
        let count = |text: &String| text.strip_prefix("plugrack: ")?.split_once(" lines were left out")?.0.parse::<u64>().ok();
        texts.iter().filter_map(count).sum()
    }

    #[test]
    fn lines_are_timed_escaped_and_cut_between_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.log");
        let log = PluginLog::new(path.clone());
        print(&log, b"plain \xe2\x98\x95\ttab\n\n\x1b[31mred\x07\r\n\xff\xfe\nno newline at the end");
        assert_eq!(texts(&path), ["plain ☕\ttab", "", "\\x1b[31mred\\x07\\x0d", "\\xff\\xfe", "no newline at the end"]);
        let x = |count| "x".repeat(count);
        for (line, expected) in [
            (x(MAX_LINE), vec![x(MAX_LINE)]),
            (x(MAX_LINE + 5), vec![x(MAX_LINE), x(5)]),
            (x(MAX_LINE - 1) + "☕x", vec![x(MAX_LINE - 1), "☕x".into()]),
            (x(MAX_LINE - 3) + "☕x", vec![x(MAX_LINE - 3) + "☕", "x".into()]),
        ] {
            let before = texts(&path).len();
            print(&log, format!("{line}\n").as_bytes());
            assert!(texts(&path)[before..] == expected, "a line of {} bytes", line.len());
        }
        let lines = tail(&path, 10_000).unwrap().0;
        assert!(lines.iter().all(|line| line.split_once(' ').unwrap().0.parse::<Timestamp>().is_ok()), "{lines:?}");
    }

    #[test]
    fn what_a_plugin_prints_too_fast_is_counted_to_the_line() {
        let dir = tempfile::tempdir().unwrap();
        for (name, line, count) in [("short", "y\n".to_owned(), 200_000), ("long", "z".repeat(5000) + "\n", 100)] {
            let path = dir.path().join(name);
            let log = PluginLog::new(path.clone());
            print(&log, line.repeat(count).as_bytes());
            let texts = texts(&path);
            let written = texts.iter().filter(|text| !text.starts_with("plugrack: ")).count();
            assert!(written > 0 && written < count, "{written} of {count}");
            assert_eq!(written as u64 + left_out(&texts), count as u64, "{name}");
        }
    }

    #[test]
    fn a_flood_that_stops_is_told_of_while_the_plugin_is_silent_and_so_is_a_line_without_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.log");
        let log = PluginLog::new(path.clone());
        let (reader, mut writer) = io::pipe().unwrap();
        std::thread::scope(|scope| {
            std::thread::Builder::new().spawn_scoped(scope, || log.capture(&reader)).unwrap();
            let mut wait_for = |bytes: &[u8], what: &dyn Fn(&[String]) -> bool| {
                writer.write_all(bytes).unwrap();
                let deadline = Instant::now() + Duration::from_secs(30);
                while !what(&texts(&path)) {
                    assert!(Instant::now() < deadline, "{:?}", texts(&path));
                    pause(Duration::from_millis(20));
                }
            };
            wait_for(&b"y\n".repeat(5000), &|texts| left_out(texts) + 200 == 5000);
            wait_for(b"password: ", &|texts| texts.last().unwrap() == "password: ");
            wait_for(b"\nnext\n", &|texts| texts.ends_with(&["password: ".to_owned(), "next".to_owned()]));
            drop(writer);
        });
    }

    #[test]
    fn the_last_lines_of_a_process_are_kept_written_or_not_until_the_next_begins() {
        let dir = tempfile::tempdir().unwrap();
        let log = PluginLog::new(dir.path().join("p.log"));
        log.begin(None);
        let recent = || log.recent().iter().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect::<Vec<_>>();
        assert!(recent().is_empty(), "notes are the host's: {:?}", recent());
        let flood: String = (0..20_000).map(|number| format!("line {number}\n")).collect();
        print(&log, flood.as_bytes());
        assert_eq!(recent(), (19_950..20_000).map(|number| format!("line {number}")).collect::<Vec<_>>());
        print(&log, format!("{}\n{}☕\nlast\x07 words", "\x01".repeat(500), "x".repeat(MAX_RECENT - 1)).as_bytes());
        let kept = recent();
        assert_eq!(kept[47..], ["\\x01".repeat(MAX_RECENT / 4), "x".repeat(MAX_RECENT - 1), "last\\x07 words".into()]);
        assert_eq!(kept.len(), RECENT_LINES);
        log.begin(None);
        assert!(recent().is_empty());
    }

    #[test]
    fn notes_do_not_wait_for_a_thread_that_waits_for_the_disk_and_are_written_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.log");
        let log = PluginLog::new(path.clone());
        let held = log.shared.writer.file.locked();
        (0..MAX_NOTES + 7).for_each(|number| log.note(&format!("note {number}")));
        assert_eq!(texts(&path), [""; 0]);
        drop(held);
        log.write(Timestamp::now(), b"a line");
        let written = texts(&path);
        assert_eq!(written.len(), MAX_NOTES + 2);
        assert_eq!(written[MAX_NOTES - 1], format!("plugrack: note {}", MAX_NOTES - 1));
        assert_eq!(written[MAX_NOTES..], ["plugrack: 7 notes were left out, because the disk was too slow", "a line"]);
        log.note(&"☕".repeat(MAX_NOTE));
        assert!(texts(&path).last().unwrap().len() <= MAX_NOTE);
    }
}
