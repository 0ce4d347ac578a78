//! Licences as the host sees them: what it can tell of a token without a key, and the clock that licences are held to.

pub(crate) mod clock;
pub(crate) mod status;
pub(crate) mod wait;
