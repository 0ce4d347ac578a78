//! A pause of this thread: the one wait that nothing ends early, so a short one.

use crossbeam_channel::never;
use std::time::Duration;

/// Waits for a time, as a rule until something is worth another try.
pub(crate) fn pause(time: Duration) {
    // Nothing comes from this channel but the end of the time.
    never::<()>().recv_timeout(time).unwrap_or_default();
}
