//! `plugrack serve` and `plugrack run`: the order of startup and shutdown, and the handling of signals.

mod data_watch;
pub(crate) mod options;

use crate::api::{Api, operator_socket};
use crate::gate::hosts::Hosts;
use crate::gate::{ClientLimits, Gate, Listener, Router, Settings, api_pool};
use crate::http::proxies::Networks;
use crate::http::response_channel::response_channel;
use crate::plugins::attempt::Attempt;
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
use crate::system::data_dir::{DataDir, Lock, private_file};
use crate::system::rlimits::{self, Capacity};
use crate::util::threads;
use anyhow::{Context as _, Result, anyhow, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, at, bounded, never, select, unbounded};
use rustix::process::geteuid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Interval at which refused files are checked for changes: long enough to cost nothing, and short enough after an operator has fixed a
/// file. Also the longest time between an out-of-memory kill and the exit that it explains.
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

/// Time for the follower of an attempt to return, once the application has ended.
const FOLLOWER_TIME: Duration = Duration::from_secs(2);

/// What follows an application: it gets the host's URL, or its address if it has none, and returns when the application has ended.
pub(crate) type Follower = Box<dyn FnOnce(&Registry, &str) + Send>;

/// Runs the host until it is told to stop.
///
/// # Errors
/// What failed, and, where that was for want of files, threads or memory, what to raise.
pub(crate) fn serve(data: &Path, settings: &Serve) -> Result<()> {
    explained(run(data, settings, None))
}

/// Runs the host for an attempt with one application, until it is told to stop or `follow` returns. The data directory is temporary: it
/// is removed if this process is killed.
///
/// # Errors
/// See [`serve`].
pub(crate) fn attempt(data: &Path, settings: &Serve, attempt: Attempt, follow: Follower) -> Result<()> {
    explained(run(data, settings, Some((attempt, follow))))
}

fn explained(outcome: Result<()>) -> Result<()> {
    outcome.map_err(|error| match error.root_cause().downcast_ref().map(|cause| rlimits::explain(&error.to_string(), cause)) {
        Some((sentence, true)) => anyhow!(sentence),
        _ => error,
    })
}

fn run(data: &Path, settings: &Serve, attempt: Option<(Attempt, Follower)>) -> Result<()> {
    let (attempt, follow) = attempt.unzip();
    let temporary = attempt.as_ref().map(|_| data.to_owned());
    check_user(settings)?;
    let signals = catch_signals().context("cannot watch for signals")?;
    process::find_own_program().map_err(|error| anyhow!(error))?;
    let capacity = Capacity::measure().map_err(anyhow::Error::msg)?;
    if let Some(warning) = capacity.warning() {
        log::warn!("{warning}");
    }
    let (data, lock, former) = open_data_dir(data, settings)?;
    process::reap_orphans().context("cannot watch for processes to reap")?;
    let watchdog =
        Watchdog::start(&data.host_socket(), settings.plugin_uids.clone(), temporary).context("cannot start the watchdog")?;
    kill_orphans(&data, former, settings);
    let (scan_requests, scan_requested) = bounded(1);
    let context = Arc::new(open_context(&data, settings, capacity, watchdog, scan_requests.clone(), attempt)?);
    let store = context.store.clone();
    let token = data.admin_token()?;
    let plugins = open_plugins_dir(&data, settings)?;

    let listener = open_listener(settings)?;
    let listening = listener.address().map_or_else(|| settings.listen.to_string(), |address| address.to_string());
    host_socket::listen(Arc::clone(&context)).context("cannot listen on the host socket")?;
    log::info!("plugrack {} is instance {}", env!("CARGO_PKG_VERSION"), context.instance_id);
    let url = base_url(settings, &listening);
    url.clone().into_iter().for_each(|url| drop(context.base_url.set(url)));
    let registry = Arc::new(Registry::new(context, plugins.clone()));
    let api = Arc::new(Api::new(Arc::clone(&registry), token, url.clone()));
    let operator_ended = operator_socket::serve(&api, data.api_socket()).context("cannot serve the operator's socket")?;
    let (gate, gate_ended) = start_gate(listener, settings, &data, &registry, &api)?;
    write_listen(&data, &listening).context("cannot write the run directory")?;
    data.reserve().keep();
    let (data_watch, must_end) =
        Watch::start(&data, store.clone(), lock).context("cannot start the thread that watches the data directory")?;
    log::info!("listening on {}{listening}, plugins from {}", scheme(settings), plugins.display());
    if follow.is_none() {
        warn_of_exposure(settings, &listening);
    }

    // The gate already serves. Requests for plugins that are not known yet wait for the first scan, so none gets a 404.
    let scanned = Arc::clone(&registry);
    let discovery = std::thread::Builder::new().name("discovery".into());
    threads::restarting(discovery, move || scan_loop(&scanned, &scan_requested))
        .context("cannot start the thread that scans the plugins directory")?;
    let signals = receive_signals(signals).context("cannot start the thread that receives signals")?;
    let followed = follow.map(|follow| start_follower(follow, &registry, url.unwrap_or(listening))).transpose();
    let followed = followed.context("cannot start the thread that follows the application")?;
    let failures = Failures { gate_ended, operator_ended, must_end, followed: followed.clone().unwrap_or_else(never) };
    let outcome = wait_for_stop(settings, &gate, &signals, &scan_requests, &failures, followed.is_some());

    log::info!("stopping");
    // None if another host has the directory by now.
    let lock = data_watch.end();
    let deadline = Instant::now() + STOP_ALL_TIME;
    gate.drain(Instant::now() + DRAIN_TIME);
    gate.close();
    registry.stop_all(deadline);
    gate.end(deadline.max(Instant::now()) + FLUSH_TIME);
    if let Some(followed) = followed {
        followed.recv_timeout(FOLLOWER_TIME).ok();
    }
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

/// Refuses `--plugin-uids` for a host that cannot change uids.
fn check_user(settings: &Serve) -> Result<()> {
    let user = geteuid();
    if settings.plugin_uids.is_some() && !user.is_root() {
        bail!(
            "--plugin-uids is for a host that runs as root, and this one is uid {}: start it as root, or leave the setting out",
            user.as_raw()
        );
    }
    Ok(())
}

/// Catches the signals that the host handles. A second SIGTERM or SIGINT ends the host at once; its plugins die with it.
fn catch_signals() -> std::io::Result<Signals> {
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stopping))?;
        signal_hook::flag::register(signal, Arc::clone(&stopping))?;
    }
    Ok(signals)
}

/// Creates, locks and prepares the data directory. Also returns the host sockets that earlier runs may have used, by which their plugins
/// are found.
fn open_data_dir(data: &Path, settings: &Serve) -> Result<(DataDir, Lock, Vec<PathBuf>)> {
    let data = DataDir::create(data, settings.run.as_deref())?;
    let lock = data.lock()?;
    check_listen(&settings.listen, &data)?;
    let former = data.former_host_sockets()?;
    data.reserve().release();
    data.announce()?;
    if let Some(uids) = &settings.plugin_uids {
        check_uids(uids)?;
    }
    data.set_modes(settings.plugin_uids.is_some()).context("cannot set the modes of the data directory")?;
    data.sweep_run().context("cannot clear the run directory")?;
    Ok((data, lock, former))
}

/// Kills the processes of plugins that an earlier run of the host has left behind.
fn kill_orphans(data: &DataDir, former: Vec<PathBuf>, settings: &Serve) {
    let of_socket = |socket: PathBuf| Selector { variable: Some((HOST_SOCKET_VARIABLE, socket.into())), ..Selector::default() };
    let own = Selector { uids: settings.plugin_uids.clone(), ..of_socket(data.host_socket()) };
    let selectors = std::iter::once(own).chain(former.into_iter().map(of_socket));
    let killed: usize = selectors.map(|selector| orphans::kill_all(&selector, ORPHANS_TIME).killed).sum();
    if killed > 0 {
        log::warn!("killed {killed} processes that an earlier run of the host had left behind");
    }
}

/// Opens the database, and collects what all plugins share.
fn open_context(
    data: &DataDir,
    settings: &Serve,
    capacity: Capacity,
    watchdog: Watchdog,
    scan_requests: Sender<()>,
    attempt: Option<Attempt>,
) -> Result<Context> {
    let quota = kv::Quota { keys: settings.kv_max_keys, bytes: settings.kv_max_bytes };
    let database = data.database();
    let cannot_read = || format!("cannot read {}", database.display());
    let store = Store::open(&database, quota).with_context(|| format!("cannot open {}", database.display()))?;
    let longest = store.longest_time_limit().with_context(cannot_read)?;
    let answer_time = AnswerTime::default();
    answer_time.outlast(longest.max(settings.start_timeout).max(settings.request_timeout));
    Ok(Context {
        instance_id: store.instance_id().with_context(cannot_read)?,
        data: data.clone(),
        oom: OomMonitor::new(),
        sessions: Sessions::new(watchdog),
        plugin_uids: settings.plugin_uids.clone(),
        starts: Starts::new(),
        scan_requests,
        plugin_memory: settings.plugin_memory,
        metadata_timeout: settings.metadata_timeout,
        default_limits: LimitsInForce {
            open_files: capacity.plugin_files(),
            start_timeout: settings.start_timeout,
            request_timeout: settings.request_timeout,
        },
        capacity,
        answer_time,
        pass_env: passed(&settings.pass_env),
        license_clock: SharedLicenseClock::new(&store).with_context(cannot_read)?,
        store,
        base_url: OnceLock::new(),
        attempt,
    })
}

/// Creates the plugins directory if it is missing, and checks that it can be read.
fn open_plugins_dir(data: &DataDir, settings: &Serve) -> Result<PathBuf> {
    let plugins = settings.plugins.clone().unwrap_or_else(|| data.plugins());
    fs::create_dir_all(&plugins).with_context(|| format!("cannot make the plugins directory {}", plugins.display()))?;
    let plugins = fs::canonicalize(&plugins)?;
    discovery::list(&plugins).with_context(|| format!("cannot read the plugins directory {}", plugins.display()))?;
    Ok(plugins)
}

/// The scheme and `://` of the host's URLs; empty for a Unix socket, which has none.
fn scheme(settings: &Serve) -> &'static str {
    match (&settings.listen, settings.tls().is_some()) {
        (Listen::Unix(_), _) => "",
        (_, true) => "https://",
        (_, false) => "http://",
    }
}

/// The URL of the host as its own machine reaches it; none for a Unix socket.
fn base_url(settings: &Serve, listening: &str) -> Option<String> {
    let port = listening.strip_prefix("0.0.0.0:").or_else(|| listening.strip_prefix("[::]:"));
    let reachable = port.map_or_else(|| listening.to_owned(), |port| format!("localhost:{port}"));
    let scheme = scheme(settings);
    (!scheme.is_empty()).then(|| format!("{scheme}{reachable}"))
}

/// Starts the gate. The channel that is returned closes if the gate ends by itself.
fn start_gate(
    listener: Listener,
    settings: &Serve,
    data: &DataDir,
    registry: &Arc<Registry>,
    api: &Arc<Api>,
) -> Result<(Gate, Receiver<()>)> {
    let max_connections = registry.context().capacity.connections(settings.limits.max_connections);
    let limits = ClientLimits { max_connections, ..settings.limits.clone() };
    let per_plugin = limits.max_connections_per_plugin.of(max_connections);
    let api_queue = api_pool::start(api, registry).context("cannot start the threads of the API")?;
    let attempt = registry.context().attempt.as_ref().filter(|attempt| attempt.has_origin);
    let hosts = Hosts { sole: attempt.map(|attempt| attempt.id.clone()), ..settings.hosts(&listener) };
    let router = Router::new(Arc::clone(registry), Arc::clone(api), api_queue, per_plugin, hosts);
    let gate_settings = Settings {
        limits,
        proxies: Networks::all(&settings.trust_proxy),
        spool: data.spool(),
        answer_time: registry.context().answer_time.clone(),
    };
    let channel = response_channel().context("cannot make the response channel")?;
    Gate::start(vec![listener], gate_settings, router, channel).context("cannot start the gate")
}

/// Warns of a host that is open to the network in plain HTTP, and of plugins that run as root.
fn warn_of_exposure(settings: &Serve, listening: &str) {
    if matches!(settings.listen, Listen::Tcp(address) if !address.ip().is_loopback()) && !settings.tls().is_some() {
        log::warn!("{listening} is open to the network, in plain HTTP: set --tls-cert, or put a reverse proxy with TLS in front");
    }
    if geteuid().is_root() && settings.plugin_uids.is_none() {
        log::warn!("plugins run as root: set --plugin-uids to give each a uid of its own, or start the host as another user");
    }
}

/// Receives signals on a thread of its own, and passes them to the channel that is returned.
fn receive_signals(mut signals: Signals) -> std::io::Result<Receiver<i32>> {
    let (sender, received) = unbounded();
    let forward = move || {
        for signal in signals.forever() {
            if sender.send(signal).is_err() {
                return;
            }
        }
    };
    threads::restarting(threads::small_thread("signals"), forward)?;
    Ok(received)
}

/// Starts the thread that follows an application. The channel that is returned closes when it has ended.
fn start_follower(follow: Follower, registry: &Arc<Registry>, url: String) -> std::io::Result<Receiver<()>> {
    let (alive, ended) = bounded(0);
    let registry = Arc::clone(registry);
    std::thread::Builder::new().name("follower".into()).spawn(move || {
        follow(&registry, &url);
        drop::<Sender<()>>(alive);
    })?;
    Ok(ended)
}

/// What ends the host apart from signals. The first two channels close when their part has ended.
struct Failures {
    gate_ended: Receiver<()>,
    operator_ended: Receiver<()>,
    /// Receives why the host must not go on with its data directory.
    must_end: Receiver<String>,
    /// Closes when the application of an attempt has ended, which is no failure of the host.
    followed: Receiver<()>,
}

/// Handles signals until one of them, or a failure, ends the host. SIGHUP does so if the host belongs to a terminal.
///
/// # Errors
/// The failure.
fn wait_for_stop(
    settings: &Serve,
    gate: &Gate,
    signals: &Receiver<i32>,
    scan_requests: &Sender<()>,
    failures: &Failures,
    ends_on_hang_up: bool,
) -> Result<()> {
    let (mut hung_up, mut hang_up_at) = (never(), Instant::now());
    loop {
        select! {
            recv(signals) -> signal => match signal {
                Ok(SIGHUP) if !ends_on_hang_up => hung_up = at(hang_up_at.max(Instant::now())),
                _ => return Ok(()),
            },
            recv(hung_up) -> _ => {
                (hung_up, hang_up_at) = (never(), Instant::now() + HANG_UP_PAUSE);
                read_certificates_again(settings, gate);
                // A request that is already waiting leads to a scan that finds all changes up to now.
                scan_requests.try_send(()).unwrap_or_default();
            },
            recv(failures.gate_ended) -> _ => bail!("the gate has ended, and with it all connections of clients"),
            recv(failures.operator_ended) -> _ => bail!("the operator's socket has failed"),
            recv(failures.followed) -> _ => return Ok(()),
            recv(failures.must_end) -> sentence => match sentence {
                Ok(sentence) => bail!(sentence),
                Err(_) => bail!("the thread that watches the data directory has ended"),
            },
        }
    }
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

/// Opens the socket for clients.
fn open_listener(settings: &Serve) -> Result<Listener> {
    match &settings.listen {
        Listen::Unix(_) if settings.tls().is_some() => {
            let setting = if settings.tls_cert.is_empty() { "--tls-dir" } else { "--tls-cert" };
            bail!("TLS is set up in the reverse proxy if the host listens on a Unix socket: leave {setting} out")
        }
        Listen::Unix(path) => Listener::unix(path, PROXY_MODE),
        Listen::Tcp(address) => Listener::tcp(*address, settings.tls().load()?.map(|(config, _)| config)),
    }
}

/// Reads the certificates again, for new connections. If one of them is invalid, all stay as they were.
fn read_certificates_again(settings: &Serve, gate: &Gate) {
    match settings.tls().load() {
        Ok(None) => {}
        Ok(Some((config, number))) => {
            gate.set_certificates(config);
            match number {
                1 => log::info!("the certificate was read again"),
                _ => log::info!("the {number} certificates were read again"),
            }
        }
        Err(error) if settings.tls_cert.len() == 1 && settings.tls_dir.is_none() => {
            log::error!("the certificate stays as it was: {error:#}");
        }
        Err(error) => log::error!("all certificates stay as they were: {error:#}"),
    }
}

/// Writes the address of the host to a file, for people and scripts. The file is replaced as a whole.
fn write_listen(data: &DataDir, listening: &str) -> Result<()> {
    let fresh = data.run().join("listen.new");
    writeln!(private_file().create(true).truncate(true).write(true).open(&fresh)?, "{listening}")?;
    Ok(fs::rename(fresh, data.listen())?)
}
