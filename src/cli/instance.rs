//! `plugrack instance`: the id of the installation.

use super::console::{Console, NOT_FOUND, failure, print};
use crate::licensing::status;
use crate::store::Store;
use crate::store::identity::read_instance_id;
use crate::store::kv::Quota;
use crate::system::data_dir::{DataDir, Lock};
use anyhow::{Context, Result};
use serde_json::json;
use std::path::PathBuf;
use uuid::Uuid;

/// The word that confirms a new instance id.
const ROTATE: &str = "rotate";

/// `plugrack instance`: prints the instance id, with or without a running host.
pub(super) fn show(console: &Console) -> Result<()> {
    let (_, database) = existing(console)?;
    let id = read_instance_id(&database).with_context(|| format!("cannot read {}", database.display()))?;
    console.print(&json!({"instance_id": id.to_string()}), |_| format!("{id}\n"))
}

/// The data directory and its database.
///
/// # Errors
/// There is no database yet.
fn existing(console: &Console) -> Result<(DataDir, PathBuf)> {
    let data = console.data()?;
    let database = data.database();
    if !database.exists() {
        let at = console.data.display();
        return Err(failure(NOT_FOUND, format!("there is no instance at {at} yet: the first plugrack serve creates it")));
    }
    Ok((data, database))
}

/// Opens the store for an offline change, with the lock that prevents a host from starting.
///
/// # Errors
/// A host runs, there is no database, or it cannot be opened.
pub(super) fn locked_store(console: &Console) -> Result<(Lock, Store)> {
    let (data, database) = existing(console)?;
    let lock = data.lock()?;
    // No keys are written here, so the quotas do not matter.
    let limits = Quota { keys: u64::MAX, bytes: u64::MAX };
    let store = Store::open(&database, limits).with_context(|| format!("cannot open {}", database.display()))?;
    Ok((lock, store))
}

/// `plugrack instance rotate`: creates a new instance id while no host runs on the directory.
pub(super) fn rotate(console: &Console, yes: bool) -> Result<()> {
    let (_lock, store) = locked_store(console)?;
    let cannot = || format!("cannot change the database in {}", console.data.display());
    let old = store.instance_id().with_context(cannot)?;
    let mut licenses = store.licenses().with_context(cannot)?;
    licenses.retain(|_, token| status::names(token, &old.to_string()));
    let lost: Vec<_> = licenses.into_keys().collect();
    if !console.json {
        for plugin in &lost {
            print(&format!("the licence of {plugin} is for instance {old} and will no longer match\n"))?;
        }
    }
    if !yes {
        console.confirm(ROTATE, "create a new instance id")?;
    }
    let id = Uuid::new_v4();
    store.rotate(id).with_context(cannot)?;
    let answer = json!({"instance_id": id.to_string(), "before": old.to_string(), "licenses_lost": lost});
    console.print(&answer, |_| format!("{id}\n"))
}
