//! `plugrack serve`: what is started in which order, what signals do, and how it all ends.

use crate::api::Api;
use crate::callback;
use crate::config::Serve;
use crate::data_dir::{DataDir, private_file};
use crate::host::{Host, Sessions};
use crate::http::Front;
use crate::process::SMALL_STACK;
use crate::rack::Rack;
use crate::store::Store;
use crate::store::kv::Limits;
use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{select, unbounded};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Runs the host until it is told to stop.
pub(crate) fn serve(data: &Path, settings: &Serve) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("cannot watch for signals")?;
    // A second SIGTERM or SIGINT ends the host at once; its plugins die with it.
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stopping))?;
        signal_hook::flag::register(signal, Arc::clone(&stopping))?;
    }

    raise_file_limit();
    let data = DataDir::create(data)?;
    let _lock = data.lock()?;
    data.sweep_run().context("cannot clear the run directory")?;
    data.free_reserve();
    let limits = Limits { keys: settings.kv_max_keys, bytes: settings.kv_max_bytes };
    let database = data.database();
    let store = Store::open(&database, limits).with_context(|| format!("cannot open {}", database.display()))?;
    let instance_id = store.instance_id().with_context(|| format!("cannot read {}", database.display()))?;
    let token = data.admin_token()?;
    let plugins = settings.plugins.clone().unwrap_or_else(|| data.plugins());
    fs::create_dir_all(&plugins).with_context(|| format!("cannot make the plugins directory {}", plugins.display()))?;
    let plugins = fs::canonicalize(&plugins)?;

    let address = settings.listen;
    let (front, failed) = Front::listen(address, settings.max_body)
        .with_context(|| format!("cannot listen on {address} (choose another with --listen)"))?;
    let front = Arc::new(front);
    let host = Host {
        instance_id,
        data: data.clone(),
        store: store.clone(),
        sessions: Sessions::default(),
        start_timeout: settings.start_timeout,
        request_timeout: settings.request_timeout,
    };
    let host = Arc::new(host);
    callback::listen(Arc::clone(&host)).context("cannot listen on the host socket")?;
    log::info!("plugrack {} is instance {instance_id}", env!("CARGO_PKG_VERSION"));
    let rack = Arc::new(Rack::new(host, plugins.clone()));
    // Requests that come before all plugins are known wait, so that none is told that its plugin does not exist.
    rack.rescan().with_context(|| format!("cannot read the plugins directory {}", plugins.display()))?;
    let api = Arc::new(Api::new(Arc::clone(&rack), token, settings.request_timeout));
    front.serve(&rack, &api).context("cannot start the threads that answer requests")?;
    write_listen(&data, &front).context("cannot write the run directory")?;
    data.keep_reserve();
    log::info!("listening on http://{}, plugins from {}", front.address(), plugins.display());
    if !address.ip().is_loopback() {
        log::warn!("{} is open to the network, in plain HTTP: put a reverse proxy with TLS in front", front.address());
    }

    let (sender, received) = unbounded();
    let watch = move || signals.forever().all(|signal| sender.send(signal).is_ok());
    std::thread::Builder::new().name("signals".into()).stack_size(SMALL_STACK).spawn(watch)?;
    let outcome = loop {
        select! {
            recv(received) -> signal => match signal {
                Ok(SIGHUP) => match rack.rescan() {
                    Ok(changes) => log::info!("looked through the plugins directory again: {changes:?}"),
                    Err(error) => log::error!("the plugins directory cannot be read: {error}"),
                },
                _ => break Ok(()),
            },
            recv(failed) -> _ => break Err(anyhow!("no connections can be accepted any more")),
        }
    };

    log::info!("stopping");
    front.close();
    rack.stop_all();
    store.sync().context("the last events were not recorded")?;
    data.sweep_run().context("cannot clear the run directory")?;
    // Space may have come since the start, which was on a full disk.
    data.keep_reserve();
    log::info!("stopped");
    outcome
}

/// Allows as many open files as the system lets this process have: each client and each plugin takes some.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        log::warn!("the limit of open files cannot be raised: {error}");
    }
}

/// Notes where the host listens, for the operator's commands: whole or not at all.
fn write_listen(data: &DataDir, front: &Front) -> Result<()> {
    let fresh = data.run().join("listen.new");
    writeln!(private_file().create(true).truncate(true).write(true).open(&fresh)?, "{}", front.address())?;
    Ok(fs::rename(fresh, data.listen())?)
}
