//! `plugrack serve`: what is started in which order, what signals do, and how it all ends.

use crate::api::Api;
use crate::callback;
use crate::config::Serve;
use crate::data_dir::{DataDir, private_file};
use crate::discovery;
use crate::guard::Guard;
use crate::host::{HOST_SOCKET_VARIABLE, Host, LicenseTime, Sessions};
use crate::http::Front;
use crate::memory::Memory;
use crate::process;
use crate::rack::Rack;
use crate::remains::{self, Marks};
use crate::room::{self, LOOK_RETRY, Room};
use crate::store::Store;
use crate::store::kv::Limits;
use anyhow::{Context, Result, anyhow, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select, unbounded};
use rustix::process::geteuid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// How often files that were refused are looked at for a change, and how long ago the kernel's last killing for want of memory may be
/// for it to be a plugin's end: seldom enough to cost nothing, soon enough for an operator who has mended a file.
const WATCH_EVERY: Duration = Duration::from_secs(5);

/// Time in which what an earlier run has left behind is ended.
const REMAINS_TIME: Duration = Duration::from_secs(2);

/// Runs the host until it is told to stop.
///
/// # Errors
/// What failed, and, where that was for want of files, threads or memory, what to raise.
pub(crate) fn serve(data: &Path, settings: &Serve) -> Result<()> {
    run(data, settings).map_err(|error| {
        match error.root_cause().downcast_ref().map(|cause| room::explain(&error.to_string(), cause)) {
            Some((sentence, true)) => anyhow!(sentence),
            _ => error,
        }
    })
}

fn run(data: &Path, settings: &Serve) -> Result<()> {
    let user = geteuid();
    if settings.plugin_uids.is_some() && !user.is_root() {
        bail!(
            "--plugin-uids is for a host that runs as root, and this one is uid {}: start it as root, or leave the setting out",
            user.as_raw()
        );
    }
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("cannot watch for signals")?;
    // A second SIGTERM or SIGINT ends the host at once; its plugins die with it.
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stopping))?;
        signal_hook::flag::register(signal, Arc::clone(&stopping))?;
    }

    process::find_own_program().map_err(|error| anyhow!(error))?;
    let room = Room::measure().map_err(anyhow::Error::msg)?;
    if let Some(warning) = room.warning() {
        log::warn!("{warning}");
    }
    let data = DataDir::create(data)?;
    let _lock = data.lock()?;
    data.set_modes(settings.plugin_uids.is_some()).context("cannot set the modes of the data directory")?;
    data.sweep_run().context("cannot clear the run directory")?;
    let left = remains::end(&Marks::variable(HOST_SOCKET_VARIABLE, data.host_socket().as_os_str()), REMAINS_TIME);
    if left > 0 {
        log::warn!("ended {left} processes that an earlier run of the host had left behind");
    }
    process::reap_orphans().context("cannot watch for processes to reap")?;
    let guard = Guard::start().context("cannot start the guard")?;
    data.free_reserve();
    let limits = Limits { keys: settings.kv_max_keys, bytes: settings.kv_max_bytes };
    let database = data.database();
    let store = Store::open(&database, limits).with_context(|| format!("cannot open {}", database.display()))?;
    let instance_id = store.instance_id().with_context(|| format!("cannot read {}", database.display()))?;
    let time = LicenseTime::new(&store).with_context(|| format!("cannot read {}", database.display()))?;
    let token = data.admin_token()?;
    let plugins = settings.plugins.clone().unwrap_or_else(|| data.plugins());
    fs::create_dir_all(&plugins).with_context(|| format!("cannot make the plugins directory {}", plugins.display()))?;
    let plugins = fs::canonicalize(&plugins)?;
    discovery::scan(&plugins).with_context(|| format!("cannot read the plugins directory {}", plugins.display()))?;

    let address = settings.listen;
    let (front, failed) = Front::listen(address, settings.max_body)
        .with_context(|| format!("cannot listen on {address} (choose another with --listen)"))?;
    let front = Arc::new(front);
    let host = Host {
        instance_id,
        data: data.clone(),
        store: store.clone(),
        memory: Memory::new(),
        sessions: Sessions::new(guard),
        plugin_uids: settings.plugin_uids.clone(),
        plugin_memory: settings.plugin_memory,
        room,
        start_timeout: settings.start_timeout,
        request_timeout: settings.request_timeout,
        time,
    };
    let host = Arc::new(host);
    callback::listen(Arc::clone(&host)).context("cannot listen on the host socket")?;
    log::info!("plugrack {} is instance {instance_id}", env!("CARGO_PKG_VERSION"));
    let (looking, known) = bounded(0);
    let rack = Arc::new(Rack::new(host, plugins.clone(), known));
    let api = Arc::new(Api::new(Arc::clone(&rack), token, settings.request_timeout));
    front.serve(&rack, &api).context("cannot start the threads that answer requests")?;
    write_listen(&data, &front).context("cannot write the run directory")?;
    data.keep_reserve();
    log::info!("listening on http://{}, plugins from {}", front.address(), plugins.display());
    if !address.ip().is_loopback() {
        log::warn!("{} is open to the network, in plain HTTP: put a reverse proxy with TLS in front", front.address());
    }

    // The host answers meanwhile: requests for what is not known yet wait, so that none is told that its plugin does not exist.
    let (order, orders) = bounded(1);
    let looker = Arc::clone(&rack);
    let looks = std::thread::Builder::new().name("discovery".into()).spawn(move || look(&looker, &orders, looking));
    looks.context("cannot start the thread that looks for plugins")?;

    let (sender, received) = unbounded();
    let watch = move || signals.forever().all(|signal| sender.send(signal).is_ok());
    process::small_thread("signals").spawn(watch)?;
    let outcome = loop {
        select! {
            recv(received) -> signal => match signal {
                // One that waits already will see all there is by then.
                Ok(SIGHUP) => drop(order.try_send(())),
                _ => break Ok(()),
            },
            recv(failed) -> _ => break Err(anyhow!("no connections can be accepted any more")),
        }
    };

    log::info!("stopping");
    front.close();
    rack.stop_all();
    rack.host().sessions.finish();
    store.sync().context("the last events were not recorded")?;
    data.sweep_run().context("cannot clear the run directory")?;
    // Space may have come since the start, which was on a full disk.
    data.keep_reserve();
    log::info!("stopped");
    outcome
}

/// Looks through the plugins directory: once at the start, and then whenever it is told to, or something is to be tried again.
fn look(rack: &Rack, orders: &Receiver<()>, first: Sender<()>) {
    say_found(rack, true);
    drop(first);
    let mut retry_at = Instant::now() + LOOK_RETRY;
    loop {
        match orders.recv_timeout(WATCH_EVERY) {
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(()) => say_found(rack, true),
            Err(RecvTimeoutError::Timeout) => {
                rack.host().memory.look();
                rack.keep_time();
                let retry = Instant::now() >= retry_at;
                if retry {
                    retry_at = Instant::now() + LOOK_RETRY;
                }
                if (retry && rack.is_wanting()) || rack.is_mended() {
                    say_found(rack, false);
                }
            }
        }
    }
}

/// Looks through the plugins directory, and logs what was found, or else only what has changed.
fn say_found(rack: &Rack, always: bool) {
    match rack.rescan() {
        Ok(changes) => {
            let [added, changed, removed] = [&changes.added, &changes.changed, &changes.removed].map(Vec::len);
            if always || added + changed + removed > 0 {
                log::info!("looked through the plugins directory: {added} added, {changed} changed, {removed} removed");
            }
        }
        Err(error) => log::error!("the plugins directory cannot be read: {error}"),
    }
}

/// Notes where the host listens, for the operator's commands: whole or not at all.
fn write_listen(data: &DataDir, front: &Front) -> Result<()> {
    let fresh = data.run().join("listen.new");
    writeln!(private_file().create(true).truncate(true).write(true).open(&fresh)?, "{}", front.address())?;
    Ok(fs::rename(fresh, data.listen())?)
}
