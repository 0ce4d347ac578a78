//! Small tools that know nothing of the host: units, escapes, times, throttles, counts, send buffers.

pub(crate) mod escape;
pub(crate) mod json_number;
pub(crate) mod key_counts;
pub(crate) mod log_throttle;
pub(crate) mod pause;
pub(crate) mod send_buffer;
pub(crate) mod threads;
pub(crate) mod units;
pub(crate) mod utc;
