//! Small tools without state of the host's: units, escapes, times, throttles.

pub(crate) mod escape;
pub(crate) mod json_number;
pub(crate) mod log_throttle;
pub(crate) mod pause;
pub(crate) mod threads;
pub(crate) mod units;
pub(crate) mod utc;
