//! The operator's side of the API: how the commands talk to the running host.

use crate::data_dir::DataDir;
use anyhow::{Context, Result, bail};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use std::fs;
use std::io;
use std::time::Duration;
use ureq::Agent;
use ureq::http::Request;

/// Time for one call: longer than any command waits for its plugin.
const CALL_TIME: Duration = Duration::from_secs(60);

/// Largest answer in bytes: 10 000 lines of a log are the most there is.
const MAX_ANSWER: u64 = 256 * 1024 * 1024;

/// What stays as it is in a path segment (RFC 3986, unreserved).
const SEGMENT: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A way to the running host's API.
pub(crate) struct ApiClient {
    agent: Agent,
    address: String,
    token: String,
}

impl ApiClient {
    /// Finds the host that runs on a data directory.
    pub(crate) fn new(data: &DataDir) -> Result<Self> {
        let path = data.listen();
        let address = match fs::read_to_string(&path) {
            Ok(address) => address.trim().to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!("no host runs on this data directory: start it with plugrack serve")
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let config = Agent::config_builder().http_status_as_error(false).timeout_global(Some(CALL_TIME)).proxy(None).build();
        Ok(Self { agent: config.into(), address, token: data.read_admin_token()? })
    }

    /// Calls the API: the JSON it answers, or the sentence of its error.
    pub(crate) fn call(&self, method: &str, path: &str, body: &[u8]) -> Result<Value> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}/api{path}", self.address))
            .header("authorization", format!("Bearer {}", self.token))
            .body(body)?;
        let mut response = self.agent.run(request).with_context(|| format!("the host at {} does not answer", self.address))?;
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
