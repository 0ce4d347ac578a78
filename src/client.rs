//! The operator's side of the API: how the commands talk to the running host.

use crate::data_dir::DataDir;
use anyhow::{Context, Result, bail};
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

/// Time for one call: longer than any command waits for its plugin.
const CALL_TIME: Duration = Duration::from_secs(60);

/// Largest answer in bytes: 10 000 lines of a log are the most there is.
const MAX_ANSWER: u64 = 256 * 1024 * 1024;

/// What stays as it is in a path segment (RFC 3986, unreserved).
const SEGMENT: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Where the API is as a URL; the host is not looked up, since the socket leads there.
const BASE: &str = "http://127.0.0.1/api";

/// A way to the running host's API.
pub(crate) struct ApiClient {
    agent: Agent,
    socket: PathBuf,
    token: String,
}

impl ApiClient {
    /// Finds the host that runs on a data directory.
    pub(crate) fn new(data: &DataDir) -> Result<Self> {
        let socket = data.api_socket();
        match UnixStream::connect(&socket) {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                if let Some(pid) = data.holder() {
                    bail!(
                        "the host that runs on this data directory (process {pid}) does not listen at {}, which was removed: restart it",
                        socket.display()
                    );
                }
                bail!("no host runs on this data directory: start it with plugrack serve")
            }
            Err(error) => return Err(error).with_context(|| format!("cannot connect to {}", socket.display())),
        }
        let config = Agent::config_builder().http_status_as_error(false).proxy(None).build();
        let agent = Agent::with_parts(config, Socket { path: socket.clone() }, DefaultResolver::default());
        Ok(Self { agent, socket, token: data.read_admin_token()? })
    }

    /// Calls the API: the JSON it answers, or the sentence of its error.
    pub(crate) fn call(&self, method: &str, path: &str, body: &[u8]) -> Result<Value> {
        self.call_within(CALL_TIME, method, path, body)
    }

    /// Calls the API, and waits for its answer for as long as `time`.
    pub(crate) fn call_within(&self, time: Duration, method: &str, path: &str, body: &[u8]) -> Result<Value> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{BASE}{path}"))
            .header("authorization", format!("Bearer {}", self.token))
            .body(body)?;
        let request = self.agent.configure_request(request).timeout_global(Some(time)).build();
        let mut response =
            self.agent.run(request).with_context(|| format!("the host at {} does not answer", self.socket.display()))?;
        let text = response.body_mut().with_config().limit(MAX_ANSWER).read_to_string()?;
        let answer: Value = serde_json::from_str(&text).context("the host's answer is not JSON")?;
        match answer["error"]["message"].as_str() {
            Some(message) => bail!("{message}"),
            None => Ok(answer),
        }
    }
}

/// A path segment, encoded.
pub(crate) fn segment(text: &str) -> String {
    utf8_percent_encode(text, &SEGMENT).to_string()
}

/// Connects to a Unix socket, wherever the URL leads.
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
        // A command makes one call after the other on a connection, and a call that finds it closed is made on another.
        false
    }
}

fn timed_out(error: io::Error, timeout: &NextTimeout) -> Error {
    if error.kind() == io::ErrorKind::WouldBlock { Error::Timeout(timeout.reason) } else { error.into() }
}
