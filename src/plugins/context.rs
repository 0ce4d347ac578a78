//! The context that all plugins share: identity, data directory, store, licence clock, limits, and the sessions of running plugins.

use crate::apps::manifest::Run;
use crate::license::Time;
use crate::licensing::clock::{ClockReadings, LicenseClock};
use crate::licensing::status;
use crate::lock::LockExt;
use crate::plugins::attempt::Attempt;
use crate::plugins::plugin::AnswerTime;
use crate::plugins::start_turns::Starts;
use crate::process::Bounds;
use crate::process::chown_tree::chown_tree;
use crate::process::oom::OomMonitor;
use crate::process::output::PluginLog;
use crate::process::watchdog::Watchdog;
use crate::protocol::metadata::Metadata;
use crate::store::limits::{LimitsInForce, PluginLimits};
use crate::store::{Store, StoreError, now_ms};
use crate::system::data_dir::DataDir;
use crate::system::rlimits::Capacity;
use crate::util::log_throttle::{BurstThrottle, LogThrottle, suppressed_note};
use crossbeam_channel::Sender;
use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant, UNIX_EPOCH};
use uuid::Uuid;

/// A day in milliseconds.
const DAY: i64 = 86_400_000;

/// The environment variable with the path of the host socket.
pub(crate) const HOST_SOCKET_VARIABLE: &str = "PLUGRACK_HOST_SOCKET";

/// Shared by the registry, the supervisors and the host socket.
pub(crate) struct Context {
    /// The identity of this installation.
    pub(crate) instance_id: Uuid,
    pub(crate) data: DataDir,
    pub(crate) store: Store,
    /// Detects out-of-memory kills.
    pub(crate) oom: OomMonitor,
    /// The owner of each session.
    pub(crate) sessions: Sessions,
    /// The uid range of plugins and `--metadata` calls, if each has a uid of its own.
    pub(crate) plugin_uids: Option<RangeInclusive<u32>>,
    /// Turns to start a process.
    pub(crate) starts: Starts,
    /// Requests a scan of the plugins directory.
    pub(crate) scan_requests: Sender<()>,
    /// Memory limit of a plugin's process in bytes.
    pub(crate) plugin_memory: Option<u64>,
    /// The number of plugins and clients that the resource limits allow.
    pub(crate) capacity: Capacity,
    /// Time limit of a `--metadata` call.
    pub(crate) metadata_timeout: Duration,
    /// Limits of plugins for which the operator has set none.
    pub(crate) default_limits: LimitsInForce,
    pub(crate) answer_time: AnswerTime,
    /// Variables of the host's own environment that all plugins get.
    pub(crate) pass_env: Vec<(OsString, OsString)>,
    /// The time by which licences are judged.
    pub(crate) license_clock: SharedLicenseClock,
    /// The URL of the host, once it listens on one.
    pub(crate) base_url: OnceLock<String>,
    /// The attempt with one application, if the host was started for that.
    pub(crate) attempt: Option<Attempt>,
}

impl Context {
    /// The URL of a plugin: by its route, or else by its host name. Without scheme and host if the host does not know its own.
    pub(crate) fn url_of(&self, metadata: &Metadata) -> String {
        let base = self.base_url.get().map(String::as_str).unwrap_or_default();
        if self.attempt.as_ref().is_some_and(|attempt| attempt.has_origin) {
            return base.to_owned();
        }
        match (&metadata.route, metadata.exact_host()) {
            (None, Some(name)) => {
                let scheme = base.split_once("://").map_or("http", |(scheme, _)| scheme);
                let port = base.rsplit_once(':').map(|(_, port)| port).filter(|port| port.parse::<u16>().is_ok());
                port.map_or_else(|| format!("{scheme}://{name}"), |port| format!("{scheme}://{name}:{port}"))
            }
            (route, _) => base.to_owned() + route.as_deref().unwrap_or_default(),
        }
    }

    /// The bounds of a file's `--metadata` call. Each file gets a uid of its own, so that no call can tamper with another's answer. Files
    /// beyond the range share its first uid.
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

    /// The limits that apply to a plugin from its next start on: those that the operator has set, then those of its manifest, then the
    /// host's.
    pub(crate) fn limits(&self, plugin: &str, run: Option<&Run>) -> Result<LimitsInForce, StoreError> {
        let manifest = run.map_or_else(PluginLimits::default, |run| PluginLimits {
            open_files: run.open_files,
            start_timeout: run.start_timeout,
            request_timeout: run.request_timeout,
        });
        let mut limits = self.store.limits(plugin)?.over(manifest.over(self.default_limits));
        self.answer_time.outlast(limits.request_timeout);
        // The limit may have been set while the host had a higher one.
        limits.open_files = [limits.open_files, self.capacity.most_files()].into_iter().flatten().min();
        Ok(limits)
    }

    /// Requests a scan of the plugins directory, because a file in it has changed.
    pub(crate) fn request_scan(&self) {
        // If the channel is full, the waiting request covers this change too.
        self.scan_requests.try_send(()).ok();
    }

    /// The bounds of a plugin's process. Reserves a uid for the plugin permanently, if plugins have uids of their own.
    ///
    /// # Errors
    /// One sentence: all uids are taken, or the database cannot be read.
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

    /// Changes the owner of a plugin's directories to its `uid`; back to the host's user if the plugin had a uid and has none now.
    ///
    /// # Errors
    /// One sentence: whose owner cannot be changed, and why.
    pub(crate) fn chown_dirs(&self, plugin: &str, uid: Option<u32>, directories: &[PathBuf]) -> Result<(), String> {
        let (from, to) = match uid {
            Some(uid) => (None, uid),
            None => match self.store.last_uid(plugin).map_err(|error| format!("cannot read its uid: {error}"))? {
                Some(last) => (Some(last), rustix::process::geteuid().as_raw()),
                None => return Ok(()),
            },
        };
        directories.iter().try_for_each(|directory| chown_tree(directory, from, to))
    }

    /// Logs, at most once a day, that the licence of a running plugin expires soon.
    pub(crate) fn warn_of_license(&self, plugin: &str) {
        let day = self.license_clock.day();
        // If the licence cannot be read, the store has logged it.
        let token = self.store.license(plugin).ok().flatten();
        if let Some(warning) = token.and_then(|token| status::warning(&token, self.license_clock.now())) {
            self.store.warn_of_license(plugin, day, warning);
        }
    }
}

/// The time by which licences are judged: the system clock's, but never before the stored high-water mark.
pub(crate) struct SharedLicenseClock {
    clock: Mutex<LicenseClock>,
    /// Held while the mark is changed and written, so that the later of two changes is stored last.
    changing: Mutex<()>,
    /// The day at the last call of [`SharedLicenseClock::is_new_day`], in days since 1970-01-01 UTC.
    day: AtomicI64,
}

impl SharedLicenseClock {
    /// Continues from the stored mark.
    pub(crate) fn new(store: &Store) -> Result<Self, StoreError> {
        let clock = Mutex::new(LicenseClock::new(store.license_clock_mark()?, Instant::now()));
        let shared = Self { clock, changing: Mutex::default(), day: AtomicI64::new(0) };
        shared.advance(store);
        shared.is_new_day();
        Ok(shared)
    }

    /// The mark in the form of `init`; none if the clock was never set.
    pub(crate) fn mark(&self) -> Option<String> {
        Some(time_at(self.lock().get()?).to_string())
    }

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

    /// Advances and stores the mark if that is due.
    pub(crate) fn advance(&self, store: &Store) {
        self.change(store, |clock| clock.advance(Instant::now(), now_ms()));
    }

    /// Advances the mark by the elapsed time, however short, and stores it.
    pub(crate) fn advance_at_stop(&self, store: &Store) {
        self.change(store, |clock| clock.advance_now(Instant::now(), now_ms()));
    }

    fn change(&self, store: &Store, change: impl FnOnce(&mut LicenseClock) -> Option<i64>) {
        let _changing = self.changing.locked();
        let changed = change(&mut self.lock());
        // A mark that cannot be written is written with the next step; the store has logged it.
        if let Some(mark) = changed {
            store.set_license_clock_mark(mark).ok();
        }
    }

    /// Sets the mark to the system clock. False, without a change, if the clock was never set.
    ///
    /// # Errors
    /// The mark cannot be written; nothing changes.
    pub(crate) fn reset(&self, store: &Store) -> Result<bool, StoreError> {
        let _changing = self.changing.locked();
        let mut clock = *self.lock();
        let Some(reset) = clock.reset(Instant::now(), now_ms()) else { return Ok(false) };
        store.set_license_clock_mark(reset)?;
        *self.lock() = clock;
        Ok(true)
    }

    /// The system clock and the mark.
    pub(crate) fn readings(&self) -> ClockReadings {
        ClockReadings::new(now_ms(), self.lock().get())
    }

    /// Whether a new day has begun since the last call.
    pub(crate) fn is_new_day(&self) -> bool {
        let day = self.day();
        self.day.swap(day, Ordering::Relaxed) != day
    }

    fn lock(&self) -> MutexGuard<'_, LicenseClock> {
        self.clock.locked()
    }
}

/// The time so many milliseconds after 1970-01-01 UTC.
fn time_at(ms: i64) -> Time {
    Time::from(UNIX_EPOCH + Duration::from_millis(ms.unsigned_abs()))
}

/// The plugin that a session belongs to.
pub(crate) struct Owner {
    /// The plugin's id.
    pub(crate) plugin: Arc<str>,
    /// The uid of its processes: its own, or else the host's.
    pub(crate) uid: u32,
    log: PluginLog,
    notes: Mutex<BurstThrottle>,
    warnings: Mutex<LogThrottle>,
}

impl Owner {
    /// The owner with this plugin id, and a uid of its own or none.
    pub(crate) fn new(plugin: &str, uid: Option<u32>, log: &PluginLog) -> Self {
        let uid = uid.unwrap_or_else(|| rustix::process::geteuid().as_raw());
        Self { plugin: plugin.into(), uid, log: log.clone(), notes: Mutex::default(), warnings: Mutex::default() }
    }

    /// Adds a line about the host socket to the plugin's log, throttled.
    pub(crate) fn note(&self, what: &str) {
        let suppressed = self.notes.locked().hit(Instant::now());
        if let Some(suppressed) = suppressed {
            self.log.note(&format!("{what}{}", suppressed_note(suppressed)));
        }
    }

    /// Warns in the host's log and the plugin's, at most once a minute, that the plugin has reached a limit.
    pub(crate) fn warn(&self, what: &str) {
        let suppressed = self.warnings.locked().hit(Instant::now());
        if let Some(suppressed) = suppressed {
            log::warn!("{}: {what}{}", self.plugin, suppressed_note(suppressed));
            self.log.note(&format!("{what}{}", suppressed_note(suppressed)));
        }
    }
}

/// Sessions of running plugins, by the process id of the session leader.
pub(crate) struct Sessions {
    owners: Mutex<HashMap<i32, Arc<Owner>>>,
    watchdog: Watchdog,
}

impl Sessions {
    /// No sessions yet. The watchdog is told about each.
    pub(crate) fn new(watchdog: Watchdog) -> Self {
        Self { owners: Mutex::default(), watchdog }
    }

    /// Starts a process by `start`, and records the owner of its session before anyone can look it up.
    pub(crate) fn enter<P>(
        &self,
        owner: Owner,
        start: impl FnOnce() -> io::Result<P>,
        pid: impl FnOnce(&P) -> i32,
    ) -> io::Result<P> {
        let mut owners = self.lock();
        let process = start()?;
        let session = pid(&process);
        self.watchdog.add(session);
        owners.insert(session, Arc::new(owner));
        Ok(process)
    }

    /// Forgets a session whose leader has ended, and reaps the leader by `reap`, which frees its id. If processes of the session may be
    /// `left`, the watchdog keeps it.
    pub(crate) fn leave<T>(&self, session: i32, left: bool, reap: impl FnOnce() -> T) -> T {
        self.lock().remove(&session);
        let reaped = reap();
        if !left {
            self.watchdog.remove(session);
        }
        reaped
    }

    /// Kills all processes that are left of any session.
    pub(crate) fn finish(&self) {
        self.watchdog.finish();
    }

    pub(crate) fn owner(&self, session: i32) -> Option<Arc<Owner>> {
        self.lock().get(&session).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Arc<Owner>>> {
        self.owners.locked()
    }
}
