//! `plugrack serve`: the order of startup and shutdown, and the handling of signals.

mod data_watch;
pub(crate) mod options;

use crate::api::{Api, operator_socket};
use crate::gate::{Gate, Limits, Listener, Router, Settings, api_pool, tls};
use crate::http::proxies::Networks;
use crate::http::response_channel::response_channel;
use crate::plugins::context::{Context, HOST_SOCKET_VARIABLE, Sessions, SharedLicenseClock};
use crate::plugins::discovery;
use crate::plugins::host_socket;
use crate::plugins::plugin::AnswerTime;
use crate::plugins::registry::{Registry, STOP_ALL_TIME, ScanReason};
use crate::plugins::start_turns::Starts;
use crate::process;
use crate::process::oom::OomMonitor;
use crate::process::orphans::{self, Selector};
use crate::process::watchdog::Watchdog;
use crate::server::data_watch::Watch;
use crate::server::options::{Listen, Names, Serve};
use crate::store::Store;
use crate::store::kv;
use crate::store::limits::LimitsInForce;
use crate::system::data_dir::{DataDir, private_file};
use crate::system::rlimits::{self, Capacity};
use crate::util::threads;
use anyhow::{Context as _, Result, anyhow, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, at, bounded, never, select, unbounded};
use rustix::process::geteuid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Interval at which refused files are checked for changes, and the longest time between an out-of-memory kill and the exit that it
/// explains: long enough to cost nothing, and short enough for an operator who has fixed a file.
const WATCH_EVERY: Duration = Duration::from_secs(5);

/// Least time between two scans on SIGHUP. Signals that arrive meanwhile count as one, so that a storm of them neither keeps the host busy
/// nor floods its log.
const HANG_UP_PAUSE: Duration = Duration::from_secs(1);

/// Part of [`STOP_ALL_TIME`] in which requests under way are answered before the plugins are told to stop.
const DRAIN_TIME: Duration = Duration::from_secs(1);

/// Time at the end to flush answers to clients.
const FLUSH_TIME: Duration = Duration::from_millis(200);

/// The mode of the socket for a reverse proxy: for the host's user and group. A proxy under another user must be a member of the group.
const PROXY_MODE: u32 = 0o660;

/// Time limit for killing orphans of an earlier run.
const ORPHANS_TIME: Duration = Duration::from_secs(2);

/// Runs the host until it is told to stop.
///
/// # Errors
/// What failed, and, where that was for want of files, threads or memory, what to raise.
pub(crate) fn serve(data: &Path, settings: &Serve) -> Result<()> {
    run(data, settings).map_err(|error| {
        match error.root_cause().downcast_ref().map(|cause| rlimits::explain(&error.to_string(), cause)) {
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
    let capacity = Capacity::measure().map_err(anyhow::Error::msg)?;
    if let Some(warning) = capacity.warning() {
        log::warn!("{warning}");
    }
    let data = DataDir::create(data, settings.run.as_deref())?;
    let lock = data.lock()?;
    check_listen(&settings.listen, &data)?;
    // Of a host that had another run directory: its plugins are known by its socket.
    let former = data.former_host_sockets()?;
    data.reserve().release();
    data.announce()?;
    if let Some(uids) = &settings.plugin_uids {
        check_uids(uids)?;
    }
    data.set_modes(settings.plugin_uids.is_some()).context("cannot set the modes of the data directory")?;
    data.sweep_run().context("cannot clear the run directory")?;
    process::reap_orphans().context("cannot watch for processes to reap")?;
    let watchdog = Watchdog::start(&data.host_socket(), settings.plugin_uids.clone()).context("cannot start the watchdog")?;
    let selector = Selector {
        variable: Some((HOST_SOCKET_VARIABLE, data.host_socket().into())),
        uids: settings.plugin_uids.clone(),
        ..Selector::default()
    };
    let mut left = orphans::kill_all(&selector, ORPHANS_TIME).killed;
    for socket in former {
        let selector = Selector { variable: Some((HOST_SOCKET_VARIABLE, socket.into())), ..Selector::default() };
        left += orphans::kill_all(&selector, ORPHANS_TIME).killed;
    }
    if left > 0 {
        log::warn!("killed {left} processes that an earlier run of the host had left behind");
    }
    let quota = kv::Limits { keys: settings.kv_max_keys, bytes: settings.kv_max_bytes };
    let database = data.database();
    let store = Store::open(&database, quota).with_context(|| format!("cannot open {}", database.display()))?;
    let instance_id = store.instance_id().with_context(|| format!("cannot read {}", database.display()))?;
    let license_clock = SharedLicenseClock::new(&store).with_context(|| format!("cannot read {}", database.display()))?;
    let token = data.admin_token()?;
    let plugins = settings.plugins.clone().unwrap_or_else(|| data.plugins());
    fs::create_dir_all(&plugins).with_context(|| format!("cannot make the plugins directory {}", plugins.display()))?;
    let plugins = fs::canonicalize(&plugins)?;
    discovery::list(&plugins).with_context(|| format!("cannot read the plugins directory {}", plugins.display()))?;

    let listen = &settings.listen;
    let listener = open_listener(settings)?;
    let listening = listener.address().map_or_else(|| listen.to_string(), |address| address.to_string());
    let (scan_requests, scan_requested) = bounded(1);
    let default_limits = LimitsInForce {
        open_files: capacity.plugin_files(),
        start_timeout: settings.start_timeout,
        request_timeout: settings.request_timeout,
    };
    let answer_time = AnswerTime::default();
    let longest = store.longest_time_limit().with_context(|| format!("cannot read {}", database.display()))?;
    answer_time.outlast(longest.max(settings.start_timeout).max(settings.request_timeout));
    let context = Context {
        instance_id,
        data: data.clone(),
        store: store.clone(),
        oom: OomMonitor::new(),
        sessions: Sessions::new(watchdog),
        plugin_uids: settings.plugin_uids.clone(),
        starts: Starts::new(),
        scan_requests: scan_requests.clone(),
        plugin_memory: settings.plugin_memory,
        capacity,
        metadata_timeout: settings.metadata_timeout,
        default_limits,
        answer_time,
        pass_env: passed(&settings.pass_env),
        license_clock,
    };
    let context = Arc::new(context);
    host_socket::listen(Arc::clone(&context)).context("cannot listen on the host socket")?;
    log::info!("plugrack {} is instance {instance_id}", env!("CARGO_PKG_VERSION"));
    let registry = Arc::new(Registry::new(context, plugins.clone()));
    let scheme = match (listen, &settings.tls_cert) {
        (Listen::Unix(_), _) => "",
        (_, Some(_)) => "https://",
        (_, None) => "http://",
    };
    // Of a host that listens at every address, the one that leads to it from its own machine.
    let port = listening.strip_prefix("0.0.0.0:").or_else(|| listening.strip_prefix("[::]:"));
    let reachable = port.map_or_else(|| listening.clone(), |port| format!("localhost:{port}"));
    let base = (!scheme.is_empty()).then(|| format!("{scheme}{reachable}"));
    let api = Arc::new(Api::new(Arc::clone(&registry), token, base));
    let max_connections = registry.context().capacity.connections(settings.limits.max_connections);
    let limits = Limits { max_connections, ..settings.limits.clone() };
    let per_plugin = limits.max_connections_per_plugin.of(max_connections);
    let operator_ended = operator_socket::serve(&api, data.api_socket()).context("cannot serve the operator's socket")?;
    let api_queue = api_pool::start(&api, &registry).context("cannot start the threads of the API")?;
    let router = Router::new(Arc::clone(&registry), Arc::clone(&api), api_queue, per_plugin);
    let gate_settings = Settings {
        limits,
        proxies: Networks::all(&settings.trust_proxy),
        spool: data.spool(),
        answer_time: registry.context().answer_time.clone(),
    };
    let channel = response_channel().context("cannot make the response channel")?;
    let (gate, gate_ended) = Gate::start(vec![listener], gate_settings, router, channel).context("cannot start the gate")?;
    write_listen(&data, &listening).context("cannot write the run directory")?;
    data.reserve().keep();
    let (data_watch, must_end) =
        Watch::start(&data, store.clone(), lock).context("cannot start the thread that watches the data directory")?;
    log::info!("listening on {scheme}{listening}, plugins from {}", plugins.display());
    if matches!(listen, Listen::Tcp(address) if !address.ip().is_loopback()) && settings.tls_cert.is_none() {
        log::warn!("{listening} is open to the network, in plain HTTP: set --tls-cert, or put a reverse proxy with TLS in front");
    }
    if user.is_root() && settings.plugin_uids.is_none() {
        log::warn!("plugins run as root: set --plugin-uids to give each a uid of its own, or start the host as another user");
    }

    // The host answers meanwhile: requests for what is not known yet wait, so that none is told that its plugin does not exist.
    let scanned = Arc::clone(&registry);
    let discovery = std::thread::Builder::new().name("discovery".into());
    threads::restarting(discovery, move || scan_loop(&scanned, &scan_requested))
        .context("cannot start the thread that scans the plugins directory")?;

    let (sender, received) = unbounded();
    let watch = move || {
        for signal in signals.forever() {
            if sender.send(signal).is_err() {
                return;
            }
        }
    };
    threads::restarting(threads::small_thread("signals"), watch)?;
    let (mut hung_up, mut hang_up_at) = (never(), Instant::now());
    let outcome = loop {
        select! {
            recv(received) -> signal => match signal {
                Ok(SIGHUP) => hung_up = at(hang_up_at.max(Instant::now())),
                _ => break Ok(()),
            },
            recv(hung_up) -> _ => {
                (hung_up, hang_up_at) = (never(), Instant::now() + HANG_UP_PAUSE);
                read_certificate_again(settings, &gate);
                // One that waits already will see all there is by then.
                scan_requests.try_send(()).unwrap_or_default();
            },
            recv(gate_ended) -> _ => break Err(anyhow!("the gate has ended, and with it all connections of clients")),
            recv(operator_ended) -> _ => break Err(anyhow!("the operator's socket has failed")),
            recv(must_end) -> sentence => match sentence {
                Ok(sentence) => break Err(anyhow!(sentence)),
                Err(_) => break Err(anyhow!("the thread that watches the data directory has ended")),
            },
        }
    };

    log::info!("stopping");
    // None if another host has the directory by now.
    let lock = data_watch.end();
    let deadline = Instant::now() + STOP_ALL_TIME;
    gate.drain(Instant::now() + DRAIN_TIME);
    gate.close();
    registry.stop_all(deadline);
    gate.end(deadline.max(Instant::now()) + FLUSH_TIME);
    registry.context().sessions.finish();
    registry.context().license_clock.advance_at_stop(&store);
    let saved = store.finish().context("the last changes are not in the database");
    if lock.is_some() {
        data.leave_run().context("cannot clear the run directory")?;
        // There may be space now, even if the disk was full at the start.
        data.reserve().keep();
    }
    log::info!("stopped");
    outcome.and(saved)
}

/// The variables of this process's environment that plugins get. Skips unset ones.
fn passed(names: &[Names]) -> Vec<(OsString, OsString)> {
    names.iter().flat_map(|names| &names.0).filter_map(|name| Some((name.into(), std::env::var_os(name)?))).collect()
}

/// Refuses a socket in the run directory, which the host empties and closes to other users.
fn check_listen(listen: &Listen, data: &DataDir) -> Result<()> {
    let Listen::Unix(path) = listen else { return Ok(()) };
    let directory = path.parent().and_then(|parent| fs::canonicalize(parent).ok());
    match directory.filter(|directory| [data.run(), data.spool()].contains(directory)) {
        Some(directory) => bail!(
            "--listen {listen} is in {}, which is closed to the reverse proxy: choose a path in another directory",
            directory.display()
        ),
        None => Ok(()),
    }
}

/// Checks that nothing else uses the plugins' uids, because everything under them is killed with the plugins.
fn check_uids(uids: &RangeInclusive<u32>) -> Result<()> {
    let (first, last) = (uids.start(), uids.end());
    // Without the file there are no accounts.
    let accounts = fs::read_to_string("/etc/passwd").unwrap_or_default();
    for account in accounts.lines() {
        let fields: Vec<_> = account.split(':').collect();
        if let [name, _, uid, ..] = fields[..]
            && uid.parse().is_ok_and(|uid| uids.contains(&uid))
        {
            bail!("--plugin-uids {first}-{last} holds the uid {uid} of the account {name}: choose a range without accounts");
        }
    }
    if let Some((uid, host)) = orphans::used_by_another(uids) {
        bail!(
            "uid {uid} of --plugin-uids {first}-{last} is in use by the plugin of another plugrack (process {host}): choose another range"
        );
    }
    Ok(())
}

/// Scans the plugins directory: once at the start, then on each request, and when a refused file has changed or is due for a retry.
fn scan_loop(registry: &Arc<Registry>, requested: &Receiver<()>) {
    begin_scan(registry, ScanReason::Ordered);
    loop {
        let wait = registry.next_retry().map_or(WATCH_EVERY, |at| at.saturating_duration_since(Instant::now()).min(WATCH_EVERY));
        match requested.recv_timeout(wait) {
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(()) => begin_scan(registry, ScanReason::Ordered),
            Err(RecvTimeoutError::Timeout) => {
                registry.context().oom.reset();
                registry.advance_license_clock();
                if registry.needs_scan() {
                    begin_scan(registry, ScanReason::Due);
                }
            }
        }
    }
}

fn begin_scan(registry: &Arc<Registry>, reason: ScanReason) {
    if let Err(error) = registry.begin_scan(reason) {
        log::error!("the plugins directory cannot be read: {error}");
    }
}

/// The way in for clients.
fn open_listener(settings: &Serve) -> Result<Listener> {
    match &settings.listen {
        Listen::Unix(_) if settings.tls_cert.is_some() => {
            bail!("TLS is the reverse proxy's where the host listens on a Unix socket: leave --tls-cert out")
        }
        Listen::Unix(path) => Listener::unix(path, PROXY_MODE),
        Listen::Tcp(address) => Listener::tcp(*address, certificate(settings)?),
    }
}

/// The certificate that clients get, where TLS is set.
fn certificate(settings: &Serve) -> Result<Option<Arc<rustls::ServerConfig>>> {
    match (&settings.tls_cert, &settings.tls_key) {
        (Some(certificate), Some(key)) => tls::load(certificate, key).map(Some),
        _ => Ok(None),
    }
}

/// Gives new connections the certificate that is in its file now; one that is wrong changes nothing.
fn read_certificate_again(settings: &Serve, gate: &Gate) {
    match certificate(settings) {
        Ok(None) => {}
        Ok(Some(config)) => {
            gate.set_certificate(config);
            log::info!("the certificate was read again");
        }
        Err(error) => log::error!("the certificate stays as it was: {error:#}"),
    }
}

/// Notes where the host listens, for people and their tools: whole or not at all.
fn write_listen(data: &DataDir, listening: &str) -> Result<()> {
    let fresh = data.run().join("listen.new");
    writeln!(private_file().create(true).truncate(true).write(true).open(&fresh)?, "{listening}")?;
    Ok(fs::rename(fresh, data.listen())?)
}
