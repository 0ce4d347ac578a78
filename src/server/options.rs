//! The settings of `plugrack serve`: command line and environment, validated.

use crate::gate::hosts::{Hosts, OwnName, OwnNames};
use crate::gate::tls::Sources;
use crate::gate::{ClientLimits, Listener};
use crate::http::proxies::Networks;
use crate::process::check_variable;
use crate::util::units::{parse_request_time, parse_size, parse_start_time, parse_time};
use clap::builder::{FalseyValueParser, Resettable};
use clap::{Args, FromArgMatches};
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// Default data directory.
pub(crate) const DEFAULT_DATA: &str = "/var/lib/plugrack";

/// Smallest `--plugin-memory`: with less, not even an interpreter starts.
const MIN_MEMORY: u64 = 16 << 20;

/// All valid uids except root's. The kernel reserves the largest number for "no uid".
const UIDS: RangeInclusive<u32> = 1..=u32::MAX - 1;

/// The arguments of `plugrack serve`. A command line argument takes precedence over the environment, and that over the default.
#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    /// The plugins directory [default: DATA/plugins]
    #[arg(long, value_name = "DIR", env = "PLUGRACK_PLUGINS")]
    pub(crate) plugins: Option<PathBuf>,

    /// Directory for sockets and locks, if the data directory cannot hold them; used by this host alone [default: DATA/run]
    #[arg(long, value_name = "DIR", env = "PLUGRACK_RUN_DIR")]
    pub(crate) run: Option<PathBuf>,

    /// Address and port to listen on, or unix:PATH, a socket for a reverse proxy; port 0 picks a free port and writes it to DATA/run/listen
    #[arg(long, value_name = "ADDR:PORT|unix:PATH", env = "PLUGRACK_LISTEN", default_value = "127.0.0.1:8080", value_parser = parse_listen)]
    pub(crate) listen: Listen,

    /// Certificate chain for TLS: PEM, server certificate first; reloaded on SIGHUP; may be repeated, then the client's SNI chooses [default: none]
    #[arg(long, value_name = "FILE", env = "PLUGRACK_TLS_CERT", value_delimiter = ',', requires = "tls_key")]
    pub(crate) tls_cert: Vec<PathBuf>,

    /// Private key of the certificate, PEM; once for each certificate, in the same order [default: none]
    #[arg(long, value_name = "FILE", env = "PLUGRACK_TLS_KEY", value_delimiter = ',', requires = "tls_cert")]
    pub(crate) tls_key: Vec<PathBuf>,

    /// Directory of more certificates for TLS: NAME.crt or NAME.pem, each with NAME.key [default: none]
    #[arg(long, value_name = "DIR", env = "PLUGRACK_TLS_DIR")]
    pub(crate) tls_dir: Option<PathBuf>,

    /// Names and IP addresses of the host itself, such as rack.example.org; may be repeated [default: none]
    #[arg(long, value_name = "NAMES", env = "PLUGRACK_HOST_NAME", value_parser = parse_own_names)]
    pub(crate) host_name: Vec<OwnNameList>,

    /// Answer 421 to a request whose host is neither a plugin's nor one of the host's own [default: off]
    #[arg(long, env = "PLUGRACK_ONLY_KNOWN_HOSTS", value_parser = FalseyValueParser::new())]
    pub(crate) only_known_hosts: bool,

    /// Networks of reverse proxies whose x-forwarded-for and related headers are trusted, such as 10.0.0.0/8,fd00::/8; may be repeated [default: none]
    #[arg(long, value_name = "CIDR", env = "PLUGRACK_TRUST_PROXY", value_parser = Networks::parse)]
    pub(crate) trust_proxy: Vec<Networks>,

    /// Time from a request to the start of its response, up to 24h; then 504
    #[arg(long, value_name = "TIME", env = "PLUGRACK_REQUEST_TIMEOUT", default_value = "30s", value_parser = parse_request_time)]
    pub(crate) request_timeout: Duration,

    /// Time for a file to print its metadata; on failure the host retries with exponential backoff
    #[arg(long, value_name = "TIME", env = "PLUGRACK_METADATA_TIMEOUT", default_value = "10s", value_parser = parse_time)]
    pub(crate) metadata_timeout: Duration,

    /// Time for a plugin to become ready, up to 1h
    #[arg(long, value_name = "TIME", env = "PLUGRACK_START_TIMEOUT", default_value = "10s", value_parser = parse_start_time)]
    pub(crate) start_timeout: Duration,

    /// Total size of one plugin's keys and values in the key-value store
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_KV_MAX_BYTES", default_value = "64MiB", value_parser = parse_size)]
    pub(crate) kv_max_bytes: u64,

    /// Range of uids, such as 200000-265535: each plugin runs under a uid of its own; requires root [default: none]
    #[arg(long, value_name = "FIRST-LAST", env = "PLUGRACK_PLUGIN_UIDS", value_parser = parse_uids)]
    pub(crate) plugin_uids: Option<RangeInclusive<u32>>,

    /// Memory limit of each plugin process, such as 256MiB: heap and private writable memory [default: none]
    #[arg(long, value_name = "SIZE", env = "PLUGRACK_PLUGIN_MEMORY", value_parser = parse_memory)]
    pub(crate) plugin_memory: Option<u64>,

    /// Number of keys of one plugin in the key-value store
    #[arg(long, value_name = "N", env = "PLUGRACK_KV_MAX_KEYS", default_value_t = 100_000)]
    pub(crate) kv_max_keys: u64,

    /// Variables of the host's environment that every plugin inherits, such as http_proxy,SSL_CERT_FILE; may be repeated [default: none]
    #[arg(long, value_name = "NAMES", env = "PLUGRACK_PASS_ENV", value_parser = parse_names)]
    pub(crate) pass_env: Vec<Names>,

    #[command(flatten)]
    pub(crate) limits: ClientLimits,
}

impl Serve {
    /// The defaults, whatever the environment says.
    ///
    /// # Errors
    /// A default is not valid.
    pub(crate) fn defaults() -> Result<Self, clap::Error> {
        let command = Self::augment_args(clap::Command::new("serve")).mut_args(|argument| argument.env(Resettable::Reset));
        Self::from_arg_matches(&command.try_get_matches_from(["serve"])?)
    }

    /// Where certificates and private keys are.
    pub(crate) fn tls(&self) -> Sources<'_> {
        Sources { certificates: &self.tls_cert, keys: &self.tls_key, directory: self.tls_dir.as_deref() }
    }

    /// How the host tells host names apart behind a listener.
    pub(crate) fn hosts(&self, listener: &Listener) -> Hosts {
        let own = OwnNames::new(self.host_name.iter().flat_map(|names| &names.0));
        let proxies = Networks::all(&self.trust_proxy);
        // A proxy on this machine passes on hosts that others have chosen.
        let local = listener.loopback().is_some_and(|address| !proxies.contain(address));
        Hosts { own, local, only_known: self.only_known_hosts, sole: None }
    }
}

/// Names and addresses of the host itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OwnNameList(Vec<OwnName>);

/// Names of environment variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names(pub(crate) Vec<String>);

/// Where the host listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listen {
    /// A TCP address, for any client.
    Tcp(SocketAddr),
    /// A Unix socket, for a reverse proxy on this machine.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

pub(crate) fn parse_listen(text: &str) -> Result<Listen, String> {
    match text.strip_prefix("unix:") {
        Some(path) if path.starts_with('/') => Ok(Listen::Unix(path.into())),
        Some(_) => Err("the path of a socket must be absolute, such as unix:/run/plugrack/http.sock".into()),
        None => text
            .parse()
            .map(Listen::Tcp)
            .map_err(|_| "expected an address and a port, such as 127.0.0.1:8080, or unix:/PATH".into()),
    }
}

fn parse_memory(text: &str) -> Result<u64, String> {
    parse_size(text).and_then(|size| if size >= MIN_MEMORY { Ok(size) } else { Err("the minimum is 16MiB".into()) })
}

/// Comma-separated names. Empty text gives none, so that the setting's environment variable may be empty.
pub(crate) fn parse_names(text: &str) -> Result<Names, String> {
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    names.map(|name| check_variable(name).map(|()| name.to_owned())).collect::<Result<_, _>>().map(Names)
}

/// Comma-separated names and addresses. Empty text gives none, so that the setting's environment variable may be empty.
fn parse_own_names(text: &str) -> Result<OwnNameList, String> {
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    names.map(OwnName::parse).collect::<Result<_, _>>().map(OwnNameList)
}

fn parse_uids(text: &str) -> Result<RangeInclusive<u32>, String> {
    let number = |text: &str| text.parse::<u32>().ok().filter(|uid| UIDS.contains(uid));
    match text.split_once('-').and_then(|(first, last)| Some((number(first)?, number(last)?))) {
        Some((first, last)) if first < last => Ok(first..=last),
        Some(_) => {
            Err("the range must have at least two uids: the first is reserved for reading metadata, the others are for plugins"
                .into())
        }
        None => Err("expected two uids from 1 to 4294967294 with a - between them, such as 200000-265535".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_enough_for_an_interpreter() {
        assert_eq!(parse_memory("16MiB"), Ok(16 << 20));
        assert!(parse_memory("16777215").is_err());
    }

    #[test]
    fn the_host_listens_on_a_port_or_a_socket() {
        assert_eq!(parse_listen("[::1]:80"), Ok(Listen::Tcp("[::1]:80".parse().unwrap())));
        assert_eq!(parse_listen("unix:/run/x.sock"), Ok(Listen::Unix("/run/x.sock".into())));
        for wrong in ["", "8080", "localhost:8080", "unix:", "unix:x.sock", "/run/x.sock"] {
            assert!(parse_listen(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn variables_are_passed_by_name_and_none_of_the_hosts_own() {
        let names = |names: &[&str]| Ok(Names(names.iter().map(|&name| name.to_owned()).collect()));
        assert_eq!(parse_names("http_proxy, SSL_CERT_FILE"), names(&["http_proxy", "SSL_CERT_FILE"]));
        assert_eq!((parse_names(""), parse_names("A,")), (names(&[]), names(&["A"])));
        for wrong in ["HOME", "A,PLUGRACK_DATA", "A=1", "1A", "a-b", "A B"] {
            assert!(parse_names(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_of_the_host_are_given_with_commas() {
        let list = parse_own_names("rack.example.org, 192.0.2.1,").unwrap();
        assert_eq!(list.0, [OwnName::Name("rack.example.org".into()), OwnName::Address([192, 0, 2, 1].into())]);
        assert_eq!(parse_own_names(""), Ok(OwnNameList(Vec::new())));
        assert!(parse_own_names("rack.example.org,Rack").unwrap_err().starts_with("\"Rack\" is neither"));
    }

    #[test]
    fn uids_are_a_range_of_two_at_least_and_never_root() {
        assert_eq!(parse_uids("200000-265535"), Ok(200_000..=265_535));
        assert_eq!(parse_uids("1-4294967294"), Ok(1..=u32::MAX - 1));
        for wrong in ["", "5", "0-9", "9-9", "9-5", "-5-9", "5-", "a-b", "1-4294967295", "1 - 5"] {
            assert!(parse_uids(wrong).is_err(), "{wrong}");
        }
    }
}
