//! What every part of the registry shares: the identity, the data directory, the store, and which process belongs to which plugin.

use crate::license::Time;
use crate::licensing::clock::{Clocks, TimeMark};
use crate::licensing::status;
use crate::lock::LockExt;
use crate::plugins::plugin::AnswerTime;
use crate::plugins::start_turns::Starts;
use crate::process::Bounds;
use crate::process::chown_tree::hand_over;
use crate::process::oom::Memory;
use crate::process::output::PluginLog;
use crate::process::watchdog::Guard;
use crate::store::limits::LimitsInForce;
use crate::store::{Store, StoreError, now_ms};
use crate::system::data_dir::DataDir;
use crate::system::rlimits::Room;
use crate::util::log_throttle::{Burst, Repeat, more};
use crossbeam_channel::Sender;
use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, UNIX_EPOCH};
use uuid::Uuid;

/// A day in milliseconds.
const DAY: i64 = 86_400_000;

/// The variable that tells a plugin where the host listens to it.
pub(crate) const HOST_SOCKET_VARIABLE: &str = "PLUGRACK_HOST_SOCKET";

/// Shared by all that serves plugins.
pub(crate) struct Host {
    /// The identity of this installation.
    pub(crate) instance_id: Uuid,
    /// Where everything is.
    pub(crate) data: DataDir,
    /// The database.
    pub(crate) store: Store,
    /// Whether memory has run out.
    pub(crate) memory: Memory,
    /// Which session is which plugin's.
    pub(crate) sessions: Sessions,
    /// The uids of plugins, where each has its own, and of the files that are asked who they are.
    pub(crate) plugin_uids: Option<RangeInclusive<u32>>,
    /// Turns to start a process.
    pub(crate) starts: Starts,
    /// Orders a look through the plugins directory.
    pub(crate) scan_requests: Sender<()>,
    /// Most memory of a plugin's process in bytes.
    pub(crate) plugin_memory: Option<u64>,
    /// How many plugins fit.
    pub(crate) room: Room,
    /// Time a file has to say who it is.
    pub(crate) metadata_timeout: Duration,
    /// The limits of plugins for which the operator has set no others.
    pub(crate) default_limits: LimitsInForce,
    /// How long the gate waits for an answer.
    pub(crate) answer_time: AnswerTime,
    /// Variables of the host's own environment that all plugins get.
    pub(crate) pass_env: Vec<(OsString, OsString)>,
    /// The time that licences are held to.
    pub(crate) time: LicenseTime,
}

impl Host {
    /// How a file in the plugins directory is bound while it is asked who it is: each file has a uid of its own, so that none can reach
    /// another's answer. Where the range has none left, they share its first.
    ///
    /// # Errors
    /// One sentence: the database cannot be read or written.
    pub(crate) fn program_bounds(&self, file: &str) -> Result<Bounds, String> {
        let own = |uids: &RangeInclusive<u32>| {
            let own = self.store.program_uid(file, &(uids.start() + 1..=*uids.end()));
            own.map(|uid| uid.unwrap_or(*uids.start())).map_err(|error| format!("cannot read or note its uid: {error}"))
        };
        Ok(self.bounds(self.plugin_uids.as_ref().map(own).transpose()?))
    }

    fn bounds(&self, uid: Option<u32>) -> Bounds {
        let (memory, open_files) = (self.plugin_memory, self.default_limits.open_files);
        Bounds { uid, memory, open_files, variables: self.pass_env.clone() }
    }

    /// The limits that apply to a plugin from its next start on.
    pub(crate) fn limits(&self, plugin: &str) -> Result<LimitsInForce, StoreError> {
        let mut limits = self.store.limits(plugin)?.over(self.default_limits);
        // It may have been set for a host that had more.
        limits.open_files = [limits.open_files, self.room.most_files()].into_iter().flatten().min();
        Ok(limits)
    }

    /// Has the plugins directory looked through soon: a file in it has changed.
    pub(crate) fn request_scan(&self) {
        // One that waits already will see all there is by then.
        self.scan_requests.try_send(()).ok();
    }

    /// How a plugin is bound; the uid of its own that it gets with this is its own for good.
    ///
    /// # Errors
    /// One sentence: there is no uid for it.
    pub(crate) fn plugin_bounds(&self, plugin: &str) -> Result<Bounds, String> {
        let uid = match &self.plugin_uids {
            None => None,
            Some(uids) => match self.store.uid(plugin, &(uids.start() + 1..=*uids.end())) {
                Ok(Some(uid)) => Some(uid),
                Ok(None) => {
                    let (first, last) = (uids.start(), uids.end());
                    return Err(format!("all uids of --plugin-uids {first}-{last} are other plugins': make the range longer"));
                }
                Err(error) => return Err(format!("cannot read or note its uid: {error}")),
            },
        };
        Ok(self.bounds(uid))
    }

    /// Makes directories of a plugin those of its user `uid`; those of the host's own, where it has none now and had one before.
    ///
    /// # Errors
    /// One sentence: what cannot be handed over, and why.
    pub(crate) fn hand_over(&self, plugin: &str, uid: Option<u32>, directories: &[PathBuf]) -> Result<(), String> {
        let (from, to) = match uid {
            Some(uid) => (None, uid),
            None => match self.store.last_uid(plugin).map_err(|error| format!("cannot read its uid: {error}"))? {
                Some(last) => (Some(last), rustix::process::geteuid().as_raw()),
                None => return Ok(()),
            },
        };
        directories.iter().try_for_each(|directory| hand_over(directory, from, to))
    }

    /// Warns in the log, once a day, of the end of the licence that a running plugin has.
    pub(crate) fn warn_of_license(&self, plugin: &str) {
        let day = self.time.day();
        // Where it cannot be read the store has said so.
        let token = self.store.license(plugin).ok().flatten();
        if let Some(warning) = token.and_then(|token| status::warning(&token, self.time.now())) {
            self.store.warn_of_license(plugin, day, warning);
        }
    }
}

/// The time that licences are held to: the clock's, but never before the high-water mark, which outlives the host.
pub(crate) struct LicenseTime {
    mark: Mutex<TimeMark>,
    /// Held while the mark is changed and written, so that of two changes the later one is kept.
    changing: Mutex<()>,
    /// The day it was when that was last asked, in days since 1970-01-01 UTC.
    day: AtomicI64,
}

impl LicenseTime {
    /// Goes on from what the store has.
    pub(crate) fn new(store: &Store) -> Result<Self, StoreError> {
        let mark = Mutex::new(TimeMark::new(store.time_mark()?, Instant::now()));
        let time = Self { mark, changing: Mutex::default(), day: AtomicI64::new(0) };
        time.keep(store);
        time.is_new_day();
        Ok(time)
    }

    /// The mark as `init` has it; none where the clock was never set.
    pub(crate) fn mark(&self) -> Option<String> {
        Some(time_at(self.lock().get()?).to_string())
    }

    /// The time now.
    pub(crate) fn now(&self) -> Time {
        time_at(self.now_ms())
    }

    /// In milliseconds since 1970-01-01 UTC.
    fn now_ms(&self) -> i64 {
        now_ms().max(self.lock().get().unwrap_or_default())
    }

    /// In days since 1970-01-01 UTC.
    fn day(&self) -> i64 {
        self.now_ms().div_euclid(DAY)
    }

    /// Lets the mark go on where that is due, and keeps it.
    pub(crate) fn keep(&self, store: &Store) {
        self.change(store, |mark| mark.advance(Instant::now(), now_ms()));
    }

    /// Lets the mark go on by whatever time has passed, and keeps it.
    pub(crate) fn keep_at_stop(&self, store: &Store) {
        self.change(store, |mark| mark.advance_now(Instant::now(), now_ms()));
    }

    fn change(&self, store: &Store, change: impl FnOnce(&mut TimeMark) -> Option<i64>) {
        let _changing = self.changing.locked();
        let changed = change(&mut self.lock());
        // A mark that cannot be written is written with the next step; the store has logged it.
        if let Some(mark) = changed {
            store.set_time_mark(mark).ok();
        }
    }

    /// Sets the mark to the system clock. Says whether it did: not while the clock was never set.
    ///
    /// # Errors
    /// It cannot be written, and nothing is changed.
    pub(crate) fn reset(&self, store: &Store) -> Result<bool, StoreError> {
        let _changing = self.changing.locked();
        let mut mark = *self.lock();
        let Some(reset) = mark.reset(Instant::now(), now_ms()) else { return Ok(false) };
        store.set_time_mark(reset)?;
        *self.lock() = mark;
        Ok(true)
    }

    /// The system clock and the mark.
    pub(crate) fn clocks(&self) -> Clocks {
        Clocks::new(now_ms(), self.lock().get())
    }

    /// Whether another day has begun since this was last asked.
    pub(crate) fn is_new_day(&self) -> bool {
        let day = self.day();
        self.day.swap(day, Ordering::Relaxed) != day
    }

    fn lock(&self) -> MutexGuard<'_, TimeMark> {
        self.mark.locked()
    }
}

/// The time so many milliseconds after 1970-01-01 UTC.
fn time_at(ms: i64) -> Time {
    Time::from(UNIX_EPOCH + Duration::from_millis(ms.unsigned_abs()))
}

/// Whose a session is.
pub(crate) struct Owner {
    /// The plugin's id.
    pub(crate) plugin: Arc<str>,
    /// The uid that its processes run as: one of its own, or else the host's.
    pub(crate) uid: u32,
    log: PluginLog,
    noted: Mutex<Burst>,
    crowded: Mutex<Repeat>,
}

impl Owner {
    /// The plugin of this id, with a uid of its own or none.
    pub(crate) fn new(plugin: &str, uid: Option<u32>, log: &PluginLog) -> Self {
        let uid = uid.unwrap_or_else(|| rustix::process::geteuid().as_raw());
        Self { plugin: plugin.into(), uid, log: log.clone(), noted: Mutex::default(), crowded: Mutex::default() }
    }

    /// Adds a line about the host socket to the plugin's log, unless it has had many of late.
    pub(crate) fn note(&self, what: &str) {
        let unsaid = self.noted.locked().came(Instant::now());
        if let Some(unsaid) = unsaid {
            self.log.note(&format!("{what}{}", more(unsaid)));
        }
    }

    /// Warns, once a minute at most, in the host's log and in the plugin's that it has used up a limit.
    pub(crate) fn warn(&self, what: &str) {
        let unsaid = self.crowded.locked().came(Instant::now());
        if let Some(unsaid) = unsaid {
            log::warn!("{}: {what}{}", self.plugin, more(unsaid));
            self.log.note(&format!("{what}{}", more(unsaid)));
        }
    }
}

/// Sessions of running plugins, by the process id that leads them.
pub(crate) struct Sessions {
    owners: Mutex<HashMap<i32, Arc<Owner>>>,
    guard: Guard,
}

impl Sessions {
    /// No session yet. All that come are told to the guard.
    pub(crate) fn new(guard: Guard) -> Self {
        Self { owners: Mutex::default(), guard }
    }

    /// Starts a process by `start`, and notes whose its session is before anyone can ask for it.
    pub(crate) fn enter<P>(
        &self,
        owner: Owner,
        start: impl FnOnce() -> io::Result<P>,
        pid: impl FnOnce(&P) -> i32,
    ) -> io::Result<P> {
        let mut owners = self.lock();
        let process = start()?;
        let session = pid(&process);
        self.guard.add(session);
        owners.insert(session, Arc::new(owner));
        Ok(process)
    }

    /// Forgets a session whose leader has ended, and reaps that by `reap`: only then can its id become another's. Where something of it
    /// may be `left`, the guard still sees to that.
    pub(crate) fn leave<T>(&self, session: i32, left: bool, reap: impl FnOnce() -> T) -> T {
        self.lock().remove(&session);
        let reaped = reap();
        if !left {
            self.guard.remove(session);
        }
        reaped
    }

    /// Ends what is left of all of them.
    pub(crate) fn finish(&self) {
        self.guard.finish();
    }

    /// Whose a session is.
    pub(crate) fn owner(&self, session: i32) -> Option<Arc<Owner>> {
        self.lock().get(&session).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Arc<Owner>>> {
        self.owners.locked()
    }
}
