//! What is started for a plugin: its executable, or the command of its manifest.

use crate::apps::endpoint::Endpoint;
use crate::apps::manifest::{FILE, Kind, Listen, Run, expand};
use crate::apps::static_files::Site;
use crate::plugins::context::{Context, HOST_SOCKET_VARIABLE};
use crate::plugins::plugin::Plugin;
use crate::plugins::process_state::ScriptStarter;
use crate::plugins::worker::{files_beside, site_options};
use crate::process::exit::Exit;
use crate::process::{Bounds, DEFAULT_PATH, Launch, SOCKET_VARIABLE, preflight};
use crate::protocol::message::{Init, PROTOCOL_VERSION};
use crate::system::data_dir::private_file;
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The variable with the path of the file that holds what `init` tells a plugin of the plugin protocol.
const CONTEXT_VARIABLE: &str = "PLUGRACK_CONTEXT";

/// What a plugin of some kind needs to run.
pub(crate) struct Prepared {
    /// The process; none if the host starts none.
    pub(crate) launch: Option<Launch>,
    /// Where it listens, or, if nobody does, its socket's path.
    pub(crate) endpoint: Endpoint,
    /// How its scripts are started, if it has a process for each request.
    pub(crate) scripts: Option<ScriptStarter>,
}

/// Prepares the start of a plugin. `listener` keeps a socket that the host makes for it. The variables of the manifest are added to
/// `bounds`, before the operator's.
///
/// # Errors
/// The kind of failure, and one sentence.
pub(crate) fn prepare(
    plugin: &Plugin,
    context: &Arc<Context>,
    init: &Init,
    listener: &mut Option<OwnedFd>,
    bounds: &mut Bounds,
) -> Result<Prepared, (Exit, String)> {
    let home = context.data.plugin_data(plugin.id());
    let mut env = vec![
        (SOCKET_VARIABLE.to_owned(), plugin.socket.clone().into_os_string()),
        (HOST_SOCKET_VARIABLE.to_owned(), context.data.host_socket().into_os_string()),
        ("PLUGRACK_PLUGIN_ID".to_owned(), plugin.id().into()),
        ("HOME".to_owned(), home.clone().into()),
    ];
    if plugin.kind() == Kind::Native {
        env.push(("PLUGRACK_PROTOCOL".to_owned(), PROTOCOL_VERSION.to_string().into()));
    }
    let socket = Endpoint::Unix(plugin.socket.clone());
    let Some(run) = plugin.run() else {
        preflight::check(&plugin.program).map_err(|why| (Exit::Unfit, why))?;
        let (program, arguments, listener) = (plugin.program.clone(), Vec::new(), None);
        let launch = Launch { program, arguments, directory: home, env, listener };
        return Ok(Prepared { launch: Some(launch), endpoint: socket, scripts: None });
    };
    match run.kind {
        Kind::Static => drop(Site::open(&site_options(run)).map_err(|error| (Exit::NotStarted, error.to_string()))?),
        Kind::Cgi | Kind::FastCgi => {
            check_root(run)?;
            drop(Site::open(&files_beside(run)).map_err(|error| (Exit::NotStarted, error.to_string()))?);
        }
        Kind::Native | Kind::Http => {}
    }
    if !run.has_process() && run.kind != Kind::Cgi {
        let endpoint = if let Listen::Attached(endpoint) = &run.listen { endpoint.clone() } else { socket };
        return Ok(Prepared { launch: None, endpoint, scripts: None });
    }
    let passing = |what: &'static str| move |error: io::Error| (Exit::NotStarted, format!("cannot {what}: {error}"));
    let mut port = None;
    let endpoint = match &run.listen {
        _ if run.kind == Kind::Native => socket,
        Listen::Socket => socket,
        Listen::Descriptor => {
            // Somebody may have removed its path, without which it is out of reach.
            if listener.is_none() || !plugin.socket.exists() {
                let bound = UnixListener::bind(&plugin.socket).map_err(passing("make its socket"))?;
                *listener = Some(bound.into());
            }
            socket
        }
        Listen::Port => {
            let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|bound| bound.local_addr());
            let free = free.map_err(passing("find a free port for it"))?;
            port = Some(free.port());
            env.push(("PORT".to_owned(), free.port().to_string().into()));
            Endpoint::Tcp(free)
        }
        Listen::Attached(endpoint) => endpoint.clone(),
    };
    if run.kind != Kind::Native {
        // Beside the socket, whose name an update has not in common with the running process.
        let mut path = plugin.socket.clone().into_os_string();
        path.push(".json");
        let path = PathBuf::from(path);
        write_context(&path, init, bounds.uid).map_err(passing("write its context file"))?;
        env.push((CONTEXT_VARIABLE.to_owned(), path.into()));
    }
    let expanded = |text: &str| {
        expand(text, |name| match name {
            "socket" => Some(plugin.socket.display().to_string()),
            "port" => port.map(|port: u16| port.to_string()),
            "route" => Some(plugin.metadata.route.clone().unwrap_or_default()),
            "url" => Some(context.url_of(&plugin.metadata)),
            "data" => Some(home.display().to_string()),
            "id" => Some(plugin.id().to_owned()),
            _ => None,
        })
    };
    let variables = run.env.iter().map(|(name, value)| (OsString::from(name), OsString::from(expanded(value))));
    let mut variables: Vec<_> = variables.collect();
    variables.append(&mut bounds.variables);
    bounds.variables = variables;
    let mut words = run.command.iter().map(|word| expanded(word));
    let directory = context.attempt.as_ref().map_or(&run.directory, |attempt| &attempt.directory).clone();
    let program = words.next().map(|command| find_program(&command, &directory, bounds)).transpose()?;
    let arguments: Vec<_> = words.map(OsString::from).collect();
    if run.kind == Kind::Cgi {
        if let Some(script) = run.script.as_ref().filter(|_| program.is_none()) {
            preflight::check(&run.root.join(script)).map_err(|why| (Exit::Unfit, format!("cannot run {script}: {why}")))?;
        }
        let command = program.map(|program| (program, arguments));
        let starter = ScriptStarter { context: Arc::clone(context), command, env, bounds: bounds.clone() };
        return Ok(Prepared { launch: None, endpoint, scripts: Some(starter) });
    }
    let program = program.ok_or_else(|| (Exit::Unfit, format!("{FILE} has no run.command")))?;
    let listener = listener.as_ref().map(OwnedFd::try_clone).transpose().map_err(passing("pass on its socket"))?;
    let launch = Launch { program, arguments, directory, env, listener };
    Ok(Prepared { launch: Some(launch), endpoint, scripts: None })
}

/// Checks that the directory of scripts or files is one.
fn check_root(run: &Run) -> Result<(), (Exit, String)> {
    match std::fs::metadata(&run.root) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err((Exit::Unfit, format!("its root {} is not a directory: set run.root in {FILE}", run.root.display()))),
        Err(error) => Err((Exit::NotStarted, format!("cannot open its root {}: {error}", run.root.display()))),
    }
}

/// Finds the program of a command: a path is relative to the working directory, and a name is searched in the `PATH` of the plugin.
fn find_program(command: &str, directory: &Path, bounds: &Bounds) -> Result<PathBuf, (Exit, String)> {
    if command.contains('/') {
        let program = directory.join(command);
        preflight::check(&program).map_err(|why| (Exit::Unfit, format!("cannot run {command}: {why}")))?;
        return Ok(program);
    }
    let set = bounds.variables.iter().rev().find(|(name, _)| name == "PATH").map(|(_, path)| path.clone());
    let path = set.or_else(|| std::env::var_os("PATH")).unwrap_or_else(|| DEFAULT_PATH.into());
    let found = std::env::split_paths(&path).map(|directory| directory.join(command)).find(|program| program.is_file());
    let program = found.ok_or_else(|| {
        let path = Path::new(OsStr::new(&path)).display();
        (
            Exit::Unfit,
            format!("there is no command {command} in PATH ({path}): install it, or give its path, such as ./{command}"),
        )
    })?;
    preflight::check(&program).map_err(|why| (Exit::Unfit, format!("cannot run {}: {why}", program.display())))?;
    Ok(program)
}

/// Writes what `init` tells into a file that only the plugin's user can read.
fn write_context(path: &Path, init: &Init, uid: Option<u32>) -> io::Result<()> {
    let mut content = serde_json::to_value(init)?;
    if let Value::Object(fields) = &mut content {
        // These are of the message.
        fields.remove("type");
        fields.remove("id");
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = private_file().create_new(true).write(true).open(path)?;
    file.write_all(&serde_json::to_vec_pretty(&content)?)?;
    match uid {
        Some(uid) => chown(path, Some(uid), Some(uid)),
        None => Ok(()),
    }
}
