//! What makes a plugin proprietary: its vendor's keys, and the check at its start.

use super::Error;
use super::context::{Context, Refusal};
use crate::license::{Date, Keyring, Place, Time, verify};
use std::time::SystemTime;

/// What a licence is checked against, of what the plugin knows itself.
pub(super) struct Licensed {
    keyring: Keyring,
    released: Date,
}

impl Licensed {
    pub(super) fn new(keys: &[(&str, &str)], released: &str) -> Result<Self, Error> {
        let keyring = keys.iter().try_fold(Keyring::new(), |keyring, (kid, key)| keyring.with(kid, key))?;
        Ok(Self { keyring, released: released.parse()? })
    }

    /// Checks the licence that came with `init`, and puts what it grants into the context.
    pub(super) fn check(&self, context: &Context) -> Result<(), Refusal> {
        let place = Place {
            plugin_id: context.plugin_id(),
            instance_id: context.instance_id(),
            release_date: Some(self.released),
            now: Time::from(SystemTime::now()),
            // A mark that is no time says nothing: the clock alone is left.
            not_before_time: context.not_before_time().and_then(|time| time.parse().ok()),
        };
        context.grant(verify(context.license(), &self.keyring, &place)?);
        Ok(())
    }
}
