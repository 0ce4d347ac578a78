//! The end of a plugin's process, and what follows it.

use super::start::{refusal, told_text};
use super::{FILE_CHECK_PAUSE, KILLED, LOOK_EVERY, Phase, Running, SHUTDOWN_TIME, Supervisor, TERMINATE_TIME, Then};
use crate::apps::manifest::Kind;
use crate::license::{Code, Time, unverified};
use crate::licensing::status;
use crate::licensing::wait::LicenseWait;
use crate::plugins::plugin::{Admission, End, Quit, State};
use crate::plugins::restart_policy::{Decision, Run};
use crate::process::Reach;
use crate::process::exit::Exit;
use crate::process::failure_line::failure_line;
use crate::store::licenses::Given;
use crate::store::now_ms;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Supervisor {
    /// Makes the process end, if there is one: through its workers, which send `shutdown`, or by a signal if it is not ready or faulty.
    pub(super) fn stop(&mut self, why: &str, then: Then) {
        let admission = if matches!(then, Then::Stay) { self.shut() } else { Admission::Holding };
        let now = Instant::now();
        match std::mem::replace(&mut self.phase, Phase::Down { retry_at: None }) {
            Phase::Down { .. } => self.stopped(why),
            Phase::Starting { running, .. } => self.stopping(running, now, admission, why, then),
            Phase::Ready { running } if matches!(then, Then::Fault(..) | Then::WaitForCapacity(_)) => {
                self.stopping(running, now, admission, why, then)
            }
            Phase::Ready { running } => {
                // The update already serves, so requests under way may take the full request timeout.
                let time = if self.updated { running.limits.request_timeout.max(SHUTDOWN_TIME) } else { SHUTDOWN_TIME };
                self.stopping(running, now + time, admission, why, then);
            }
            Phase::Stopping { running, terminate_at, kill_at, .. } => {
                // When the host stops, the longer time of an updated process is cut to that of all others.
                let terminate_at = terminate_at.map(|at| at.min(now + SHUTDOWN_TIME));
                let kill_at = kill_at.min(now + SHUTDOWN_TIME + TERMINATE_TIME);
                self.phase = Phase::Stopping { running, terminate_at, kill_at, then };
                // Requests that wait for a process that will not come now are answered; later ones may be held again.
                self.enter(State::Stopping, admission, "stopping", why);
            }
        }
    }

    fn stopping(&mut self, mut running: Running, terminate_at: Instant, admission: Admission, why: &str, then: Then) {
        running.state.stopping.store(true, Ordering::SeqCst);
        running.stop = None;
        self.plugin.queue.wake_all();
        let (number, is_drained) = (running.state.number, self.plugin.scaling.connections.load(Ordering::SeqCst) == 0);
        self.phase = Phase::Stopping { running, terminate_at: Some(terminate_at), kill_at: terminate_at + TERMINATE_TIME, then };
        self.enter(State::Stopping, admission, "stopping", why);
        if is_drained {
            self.drained(number);
        }
    }

    /// All workers of a process that is to stop have ended: an application is told so by a signal, and where there is no process, that is
    /// the end.
    pub(super) fn drained(&mut self, number: u64) {
        let Phase::Stopping { running, terminate_at, .. } = &mut self.phase else { return };
        if running.state.number != number || running.state.kind() == Kind::Native {
            return;
        }
        match &running.process {
            Some(process) if terminate_at.take().is_some() => process.terminate(),
            Some(_) => {}
            None => self.exited(number),
        }
    }

    /// Handles the end of a process, expected or not.
    pub(super) fn exited(&mut self, number: u64) {
        let current = match &self.phase {
            Phase::Down { .. } => None,
            Phase::Starting { running, .. } | Phase::Ready { running } | Phase::Stopping { running, .. } => {
                Some(running.state.number)
            }
        };
        if current != Some(number) {
            return;
        }
        let (running, told, broken, then) = match std::mem::replace(&mut self.phase, Phase::Down { retry_at: None }) {
            Phase::Starting { running, told, broken, .. } => (running, told, broken, None),
            Phase::Ready { running } => (running, None, None, None),
            Phase::Stopping { running, then, .. } => (running, None, None, Some(then)),
            Phase::Down { .. } => return,
        };
        let run = running.so_far();
        let exit = self.finish(running);
        match then {
            Some(Then::Stay) => self.stopped(&exit.to_string()),
            Some(Then::Start) => {
                self.context.store.note_event(self.plugin.id(), "stopped", &exit.to_string());
                self.start();
            }
            Some(Then::WaitForCapacity(why)) if self.quitting.is_none() => self.wait_for_capacity(&why),
            Some(Then::WaitForCapacity(why)) => self.stopped(&why),
            Some(Then::Fault(exit, why)) => self.down(exit, run, &why),
            None => {
                let is_native = self.plugin.kind() == Kind::Native;
                let words = told.as_ref().map(told_text).or_else(|| self.last_words()).or(broken);
                let has_license = self.given.token.is_some();
                // An application has no reply in which it could refuse its licence.
                let unlicensed = || status::refusal_by_exit(exit, words.as_deref()?, has_license).filter(|_| !is_native);
                let exit = match told.as_ref().and_then(refusal) {
                    Some(refusal) => refusal,
                    None if exit == KILLED && self.context.oom.has_killed() => Exit::OutOfMemory,
                    None => unlicensed().map_or(exit, Exit::Unlicensed),
                };
                let why = match words {
                    // The exit already says everything.
                    Some(words) if matches!(exit, Exit::Unlicensed(_)) => words,
                    Some(words) => format!("{exit}: {words}"),
                    None if exit == Exit::Code(0) && !is_native => {
                        format!(
                            "{exit}: it ended, or went to the background; run it in the foreground, where the host watches it"
                        )
                    }
                    None if !run.ready && matches!(exit, Exit::Code(_) | Exit::Signal(_)) => {
                        format!("{exit} before it was ready")
                    }
                    None => exit.to_string(),
                };
                self.down(exit, run, &why);
            }
        }
    }

    /// Cleans up after a process has ended: its workers, orphans and socket.
    pub(super) fn finish(&self, running: Running) -> Exit {
        let Running { process, state, stop, .. } = running;
        state.stopping.store(true, Ordering::Relaxed);
        state.ended.store(true, Ordering::Relaxed);
        drop(stop);
        self.plugin.queue.wake_all();
        let Some(process) = process else {
            // If something stays, the next start removes it.
            drop(self.remove_run());
            return Exit::Code(0);
        };
        let session = process.pid();
        let reach = match state.uid {
            // When all plugins end, the watchdog kills the orphans of all of them at once.
            // Otherwise another process of the plugin may run under the same uid.
            Some(uid) if self.quitting == Some(Quit::HostStops) && !self.has_sibling() => Reach::UidUnseen(uid),
            _ if self.quitting == Some(Quit::HostStops) => Reach::Group,
            Some(uid) if !self.has_sibling() => Reach::Uid(uid),
            _ => Reach::Marked,
        };
        let exit =
            self.context.sessions.leave(session, matches!(reach, Reach::Group | Reach::UidUnseen(_)), || process.reap(reach));
        // If the socket stays, the next start removes it.
        drop(self.remove_run());
        exit
    }

    /// Whether another process of the plugin may run: its update, or the process that this update replaces.
    pub(super) fn has_sibling(&self) -> bool {
        self.trial.is_some() || self.updated
    }

    /// Removes the plugin's files in the run directory; only its socket if another process of it may use the rest.
    pub(super) fn remove_run(&self) -> std::io::Result<()> {
        if self.listener.is_some() && self.quitting.is_none() && !std::thread::panicking() {
            // The next process gets the host's socket, on which connections wait meanwhile.
            return Ok(());
        }
        if !self.has_sibling() {
            return self.context.data.remove_plugin_run(self.plugin.id());
        }
        match std::fs::remove_file(&self.plugin.socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The line of the process's output that says why it ended.
    fn last_words(&self) -> Option<String> {
        let lines = self.plugin.log.recent();
        let texts: Vec<&str> = lines.iter().filter_map(|line| line.split_once(' ')).map(|(_, text)| text).collect();
        failure_line(&texts).map(|text| text.chars().take(300).collect())
    }

    /// Handles an unexpected end: decides what follows, and keeps the evidence.
    pub(super) fn down(&mut self, exit: Exit, run: Run, why: &str) {
        if self.quitting.is_some() {
            return self.stopped(why);
        }
        if exit == Exit::Changed {
            // The registry will replace this plugin or refuse the file. Until then the supervisor keeps checking.
            self.phase = Phase::Down { retry_at: Some(Instant::now() + FILE_CHECK_PAUSE) };
            self.plugin.set_last_end(End { at: now_ms(), exit, reason: why.to_owned(), lines: Vec::new() });
            return self.enter(State::BackingOff, Admission::Holding, "changed", why);
        }
        let begins = self.license_begins(exit);
        if self.rejected_license(exit, begins.is_some(), why) {
            return self.start();
        }
        let time = self.context.license_clock.now();
        self.license_wait = begins.map(|begins| LicenseWait::refused(begins, self.license_wait, time));
        // The first byte of a random UUID serves as the random number.
        let random = f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 255.0;
        let decision = match self.look_at {
            _ if self.context.attempt.is_some() => Decision::Refuse,
            // It costs little to try again whether somebody listens.
            Some(_) => Decision::Retry(LOOK_EVERY),
            None => self.history.ended(exit, run, random),
        };
        let (state, kind, wait) = match decision {
            Decision::Retry(wait) => (State::BackingOff, "crashed", Some(wait)),
            Decision::CrashLoop(wait) => (State::CrashLooping, "crash_looping", Some(wait)),
            Decision::Refuse if matches!(exit, Exit::Unlicensed(_)) => {
                (State::Unlicensed, "unlicensed", self.license_wait.map(|wait| wait.pause(time)))
            }
            Decision::Refuse => (State::Refused, "refused", None),
        };
        let retry_at = wait.map(|wait| Instant::now() + wait);
        self.phase = Phase::Down { retry_at };
        self.plugin.set_last_end(End { at: now_ms(), exit, reason: why.to_owned(), lines: self.plugin.log.recent() });
        // The note follows the last lines in the log, so it does not repeat the last of them.
        let exit_text = exit.to_string();
        let said = if why.starts_with(&exit_text) { &exit_text } else { why };
        self.plugin.log.note(&format!("{kind}: {said}"));
        let admission = if self.holds() { Admission::Holding } else { Admission::Shut };
        self.enter(state, admission, kind, why);
    }

    /// The start of validity, from its token, of a licence that the process refused as not valid yet.
    fn license_begins(&self, exit: Exit) -> Option<Time> {
        let token = self.given.token.as_deref().filter(|_| exit == Exit::Unlicensed(Code::NotYetValid))?;
        unverified(token)?.nbf
    }

    /// Restores the plugin's previous licence if it ended because of one on trial, unless that only becomes valid later.
    fn rejected_license(&mut self, exit: Exit, begins_later: bool, why: &str) -> bool {
        let Given { token: Some(token), previous: Some(previous) } = std::mem::take(&mut self.given) else { return false };
        let id = self.plugin.id();
        // If this fails, the store has logged why, and the licence stays on trial.
        let restored = status::rejects_trial(exit, previous.ran, begins_later)
            && self.context.store.reject_license(id, &token).unwrap_or(false);
        if restored {
            self.plugin.note_refused_license(Some((token, why.to_owned())));
            self.plugin.set_last_end(End { at: now_ms(), exit, reason: why.to_owned(), lines: self.plugin.log.recent() });
            self.context.store.note_event(id, "license_restored", why);
            let verdict = status::verdict(why);
            log::warn!("{id}: it {verdict} its new licence, and is started with the previous one: {why}");
        }
        restored
    }

    /// The plugin was stopped on purpose.
    pub(super) fn stopped(&mut self, why: &str) {
        (self.wants_capacity, self.waits_for_turn, self.license_wait) = (false, false, None);
        self.phase = Phase::Down { retry_at: None };
        self.enter(State::Stopped, self.shut(), "stopped", why);
    }

    /// The admission of a plugin that will not start again, unless another one takes over.
    pub(super) fn shut(&self) -> Admission {
        if self.updated || self.quitting == Some(Quit::Replaced) { Admission::Holding } else { Admission::Shut }
    }
}
