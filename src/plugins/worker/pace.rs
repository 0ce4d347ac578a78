//! How quick a plugin is, as one worker sees it.

use crate::plugins::plugin::Plugin;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Number of recent requests that dominate the moving average of the time for one.
const MEMORY: u32 = 16;

/// Time for a batch from which it counts as blocking: far more than a quick plugin needs, wake-ups included.
const LONG: Duration = Duration::from_millis(20);

/// A moving average of the time for a request; none before the first measurement.
#[derive(Default)]
pub(super) struct Pace(Option<Duration>);

impl Pace {
    /// The average.
    pub(super) fn get(&self) -> Option<Duration> {
        self.0
    }

    /// Counts some requests that were answered in this time.
    pub(super) fn measure(&mut self, plugin: &Plugin, elapsed: Duration, requests: usize) {
        let count = u32::try_from(requests).unwrap_or(u32::MAX);
        if elapsed >= LONG {
            plugin.scaling.note_blocking();
        }
        if let Some(each) = elapsed.checked_div(count.saturating_mul(plugin.scaling.side_by_side())) {
            let weight = count.min(MEMORY / 2);
            let pace = self.0.map_or(each, |pace| (pace * (MEMORY - weight) + each * weight) / MEMORY);
            self.0 = Some(pace);
            plugin.scaling.set_pace(pace);
        }
        plugin.answered.fetch_add(requests as u64, Ordering::Relaxed);
    }
}
