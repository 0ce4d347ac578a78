//! The API client: how the commands talk to the running host.

use crate::api::BY_PLUGIN;
use crate::system::data_dir::DataDir;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use ureq::http::Request;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport};
use ureq::{Agent, Error};

/// Timeout of one call: longer than any command waits for its plugin.
const CALL_TIME: Duration = Duration::from_secs(60);

/// Largest answer in bytes: 10 000 log lines.
const MAX_ANSWER: u64 = 256 * 1024 * 1024;

/// Characters that a path segment does not encode (RFC 3986, unreserved).
const SEGMENT: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Base URL of the API. The address is not used, because the connection goes through the socket.
const BASE: &str = "http://127.0.0.1/api";

/// Why an API call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// No host runs on the data directory.
    #[error("no host runs on this data directory; to start one: plugrack serve")]
    NoHost,
    /// A host runs, and its socket was removed.
    #[error("the host on this data directory (process {pid}) has lost its socket {socket}, which was removed: restart the host")]
    NoSocket {
        /// The host's process id.
        pid: String,
        /// The path of the socket.
        socket: String,
    },
    /// The host's socket or token cannot be used.
    #[error("{0}")]
    Unreachable(String),
    /// The host did not answer, or not with valid JSON.
    #[error("the host at {socket} does not answer: {why}")]
    NoAnswer {
        /// The path of the socket.
        socket: String,
        /// What happened instead.
        why: String,
    },
    /// The host answered with an error.
    #[error("{message}")]
    Refused {
        /// The API's code.
        code: String,
        /// The API's message.
        message: String,
    },
    /// The plugin answered with an error.
    #[error("{message} ({code})")]
    ByPlugin {
        /// The plugin's code.
        code: String,
        /// The plugin's message.
        message: String,
    },
}

impl ClientError {
    /// The error's code, for programs.
    pub(crate) fn code(&self) -> &str {
        match self {
            Self::NoHost | Self::NoSocket { .. } => "no_host",
            Self::Unreachable(_) => "unreachable",
            Self::NoAnswer { .. } => "no_answer",
            Self::Refused { code, .. } | Self::ByPlugin { code, .. } => code,
        }
    }

    /// The error's message without its code.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Refused { message, .. } | Self::ByPlugin { message, .. } => message.clone(),
            other => other.to_string(),
        }
    }
}

/// A client of the running host's API.
pub(crate) struct ApiClient {
    agent: Agent,
    socket: PathBuf,
    token: String,
}

impl ApiClient {
    /// Finds the host that runs on a data directory.
    ///
    /// # Errors
    /// No host runs there, or its socket or token cannot be used.
    pub(crate) fn new(data: &DataDir) -> Result<Self, ClientError> {
        let socket = data.api_socket();
        match UnixStream::connect(&socket) {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Err(match data.holder() {
                    Some(pid) => ClientError::NoSocket { pid, socket: socket.display().to_string() },
                    None => ClientError::NoHost,
                });
            }
            Err(error) => return Err(ClientError::Unreachable(format!("cannot connect to {}: {error}", socket.display()))),
        }
        let config = Agent::config_builder().http_status_as_error(false).proxy(None).build();
        let agent = Agent::with_parts(config, Socket { path: socket.clone() }, DefaultResolver::default());
        let token = data.read_admin_token().map_err(|error| ClientError::Unreachable(format!("{error:#}")))?;
        Ok(Self { agent, socket, token })
    }

    /// Calls the API and returns its JSON answer.
    ///
    /// # Errors
    /// The host does not answer, or answers with an error.
    pub(crate) fn call(&self, method: &str, path: &str, body: &[u8]) -> Result<Value, ClientError> {
        self.call_within(CALL_TIME, method, path, body)
    }

    /// Like [`ApiClient::call`], with a timeout of `time`.
    ///
    /// # Errors
    /// Those of [`ApiClient::call`].
    pub(crate) fn call_within(&self, time: Duration, method: &str, path: &str, body: &[u8]) -> Result<Value, ClientError> {
        let no_answer = |why: String| ClientError::NoAnswer { socket: self.socket.display().to_string(), why };
        let request = Request::builder()
            .method(method)
            .uri(format!("{BASE}{path}"))
            .header("authorization", format!("Bearer {}", self.token))
            .body(body)
            .map_err(|error| no_answer(error.to_string()))?;
        let request = self.agent.configure_request(request).timeout_global(Some(time)).build();
        let mut response = self.agent.run(request).map_err(|error| no_answer(error.to_string()))?;
        let by_plugin = response.headers().get(BY_PLUGIN.0).is_some_and(|by| by.as_bytes() == BY_PLUGIN.1.as_bytes());
        let text = response.body_mut().with_config().limit(MAX_ANSWER).read_to_string();
        let text = text.map_err(|error| no_answer(error.to_string()))?;
        let answer: Value = serde_json::from_str(&text).map_err(|_| no_answer("its answer is not JSON".to_owned()))?;
        let error = &answer["error"];
        let Some(message) = error["message"].as_str().map(str::to_owned) else { return Ok(answer) };
        let code = error["code"].as_str().unwrap_or_default().to_owned();
        Err(if by_plugin { ClientError::ByPlugin { code, message } } else { ClientError::Refused { code, message } })
    }
}

/// Percent-encodes a path segment.
pub(crate) fn segment(text: &str) -> String {
    utf8_percent_encode(text, &SEGMENT).to_string()
}

/// Connects to a Unix socket, regardless of the URL.
#[derive(Debug)]
struct Socket {
    path: PathBuf,
}

impl Connector for Socket {
    type Out = SocketTransport;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<SocketTransport>, Error> {
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(SocketTransport { stream: UnixStream::connect(&self.path)?, buffers }))
    }
}

#[derive(Debug)]
struct SocketTransport {
    stream: UnixStream,
    buffers: LazyBuffers,
}

impl Transport for SocketTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.set_write_timeout(timeout.not_zero().map(|time| *time))?;
        self.stream.write_all(&self.buffers.output()[..amount]).map_err(|error| timed_out(error, &timeout))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.set_read_timeout(timeout.not_zero().map(|time| *time))?;
        let read = self.stream.read(self.buffers.input_append_buf()).map_err(|error| timed_out(error, &timeout))?;
        self.buffers.input_appended(read);
        Ok(read > 0)
    }

    fn is_open(&mut self) -> bool {
        // A command makes its calls one after another on a connection, and opens another if that is closed.
        false
    }
}

fn timed_out(error: io::Error, timeout: &NextTimeout) -> Error {
    if error.kind() == io::ErrorKind::WouldBlock { Error::Timeout(timeout.reason) } else { error.into() }
}
