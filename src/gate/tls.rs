//! TLS: the operator's certificates and keys, and which of them a client gets.

use crate::protocol::metadata::WILDCARD;
use crate::util::utc;
use anyhow::{Context, Result, anyhow, bail};
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use webpki::{EndEntityCert, KeyUsage};

/// Largest record of TLS in bytes. A client reads a record as a whole, so that a slow one would seem to read nothing for as long as the
/// 16 KiB of the largest that TLS knows take it.
const RECORD: usize = 4 * 1024;

/// Most bytes that are read of a certificate or key: many times what the longest chain has.
const MAX_FILE: u64 = 1024 * 1024;

/// Most pairs in a directory: all are read at once, and 1000 take seconds on a slow disk.
const MAX_PAIRS: usize = 1000;

/// The first byte of a certificate or key in DER: the tag of a SEQUENCE (X.690, 8.9.1).
const DER_SEQUENCE: u8 = 0x30;

/// What a file of the pair has to hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Certificate,
    Key,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::Key => "private key",
        }
    }

    /// What its PEM header ends with: a key's begins with its kind (RFC 7468).
    fn label(self) -> &'static str {
        match self {
            Self::Certificate => "CERTIFICATE-----",
            Self::Key => "PRIVATE KEY-----",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Certificate => Self::Key,
            Self::Key => Self::Certificate,
        }
    }

    /// The command of openssl that reads it.
    fn tool(self) -> &'static str {
        match self {
            Self::Certificate => "x509",
            Self::Key => "pkey",
        }
    }

    /// Reads a file, and makes sure that it holds this in PEM.
    fn read(self, path: &Path) -> Result<Vec<u8>> {
        let (name, shown) = (self.name(), path.display());
        let mut pem = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut pem));
        read.with_context(|| format!("cannot read the {name} {shown}"))?;
        if pem.len() as u64 > MAX_FILE {
            bail!("the {name} {shown} is larger than {} MiB", MAX_FILE >> 20);
        }
        let text = String::from_utf8_lossy(&pem);
        let has =
            |part: Self| text.lines().any(|line| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(part.label()));
        if self == Self::Key && (text.contains("BEGIN ENCRYPTED PRIVATE KEY") || text.contains("Proc-Type: 4,ENCRYPTED")) {
            bail!("the private key {shown} is encrypted: decrypt it with openssl pkey -in {shown} -out FILE");
        }
        if has(self) {
            return Ok(pem);
        }
        if pem.is_empty() {
            bail!("the {name} {shown} is empty");
        }
        if has(self.other()) {
            bail!("{shown} holds a {} and no {name}: check --tls-cert and --tls-key", self.other().name());
        }
        if pem[0] == DER_SEQUENCE {
            let tool = self.tool();
            bail!(
                "the {name} {shown} is not PEM, it may be DER: convert it with openssl {tool} -inform der -in {shown} -out FILE"
            );
        }
        bail!("the {name} {shown} is not PEM: it has no line -----BEGIN … {}", self.label())
    }
}

/// A certificate's file and its private key's.
type Pair = (PathBuf, PathBuf);

/// Where the operator keeps certificates and private keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sources<'a> {
    /// Files of certificates, each followed by those that lead to its authority. The first certificate is the default.
    pub(crate) certificates: &'a [PathBuf],
    /// The files of their private keys, in the same order.
    pub(crate) keys: &'a [PathBuf],
    /// A directory with more pairs.
    pub(crate) directory: Option<&'a Path>,
}

impl Sources<'_> {
    /// Whether clients are to speak TLS.
    pub(crate) fn is_some(&self) -> bool {
        !self.certificates.is_empty() || self.directory.is_some()
    }

    /// Reads all pairs, in PEM. Returns the settings of TLS, and the number of certificates; none without TLS.
    ///
    /// # Errors
    /// One sentence: which file is wrong, in what, and how to correct it.
    pub(crate) fn load(&self) -> Result<Option<(Arc<ServerConfig>, usize)>> {
        if !self.is_some() {
            return Ok(None);
        }
        let (certificates, keys) = (self.certificates.len(), self.keys.len());
        if certificates != keys {
            bail!(
                "--tls-cert has {certificates} files and --tls-key has {keys}: set --tls-key once for each --tls-cert, in the same order"
            );
        }
        let mut pairs: Vec<Pair> = self.certificates.iter().cloned().zip(self.keys.iter().cloned()).collect();
        if let Some(directory) = self.directory {
            pairs.extend(pairs_in(directory)?);
        }
        let provider = Arc::new(ring::default_provider());
        let certificates = Certificates::load(&pairs, &provider)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(certificates));
        config.max_fragment_size = Some(RECORD);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Some((Arc::new(config), pairs.len())))
    }
}

/// The pairs in a directory, in the order of their names: NAME.crt or NAME.pem, and NAME.key. Other files are left alone.
fn pairs_in(directory: &Path) -> Result<Vec<Pair>> {
    let shown = directory.display();
    let cannot_read = || format!("cannot read the directory of certificates {shown}");
    let (mut certificates, mut keys) = (BTreeMap::new(), BTreeMap::new());
    for entry in fs::read_dir(directory).with_context(cannot_read)? {
        let path = entry.with_context(cannot_read)?.path();
        let (Some(name), Some(ending)) = (path.file_stem(), path.extension()) else { continue };
        let (name, is_key) = (name.to_owned(), ending == "key");
        if name.as_encoded_bytes().starts_with(b".") || !(is_key || ending == "crt" || ending == "pem") {
            continue;
        }
        let other = if is_key { &mut keys } else { &mut certificates }.insert(name, path.clone());
        if let Some(other) = other {
            bail!("{} and {} are both the certificate of one name: remove one of them", other.display(), path.display());
        }
    }
    if let Some((_, key)) = keys.iter().find(|(name, _)| !certificates.contains_key(*name)) {
        bail!(
            "the private key {0} has no certificate beside it: add {1}, or move the key elsewhere",
            key.display(),
            key.with_extension("crt").display()
        );
    }
    if certificates.is_empty() {
        bail!("the directory of certificates {shown} has no pair: put NAME.crt (or NAME.pem) and NAME.key into it");
    }
    if certificates.len() > MAX_PAIRS {
        bail!("the directory of certificates {shown} has more than {MAX_PAIRS} pairs: move some elsewhere");
    }
    let pair = |(name, certificate): (OsString, PathBuf)| match keys.remove(&name) {
        Some(key) => Ok((certificate, key)),
        None => {
            let key = certificate.with_extension("key");
            bail!(
                "the certificate {} has no private key beside it: add {}, or move the certificate elsewhere",
                certificate.display(),
                key.display()
            );
        }
    };
    certificates.into_iter().map(pair).collect()
}

/// The certificates of the host, by the names in them. The first is for clients that name no host, or an unknown one.
#[derive(Debug)]
struct Certificates {
    first: Arc<CertifiedKey>,
    by_name: HashMap<Box<str>, Vec<Arc<CertifiedKey>>>,
}

impl Certificates {
    fn load(pairs: &[Pair], provider: &CryptoProvider) -> Result<Self> {
        let mut first = None;
        let mut by_name: HashMap<Box<str>, Vec<Arc<CertifiedKey>>> = HashMap::new();
        for (file, key_file) in pairs {
            let pair = Arc::new(load_pair(file, key_file, provider)?);
            let names = names_in(file, &pair)?;
            if names.is_empty() && first.is_some() {
                log::warn!(
                    "the certificate {} names no host, so no client gets it: issue it with subject alternative names",
                    file.display()
                );
            }
            names.into_iter().for_each(|name| by_name.entry(name).or_default().push(Arc::clone(&pair)));
            first.get_or_insert(pair);
        }
        Ok(Self { first: first.ok_or_else(|| anyhow!("there is no certificate: set --tls-cert and --tls-key"))?, by_name })
    }

    /// The certificates for a name: those that have it, or else those with a wildcard in place of its first label (RFC 9525, section 6.3).
    fn of(&self, name: &str) -> &[Arc<CertifiedKey>] {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let found = self.by_name.get(name.as_str());
        let found = found.or_else(|| self.by_name.get(format!("{WILDCARD}{}", name.split_once('.')?.1).as_str()));
        found.map_or(&[], Vec::as_slice)
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let found = hello.server_name().map_or(&[][..], |name| self.of(name));
        // One name may have certificates with keys of several kinds.
        let can_use = |pair: &&Arc<CertifiedKey>| pair.key.choose_scheme(hello.signature_schemes()).is_some();
        Some(Arc::clone(found.iter().find(can_use).or(found.first()).unwrap_or(&self.first)))
    }
}

/// Reads a pair, and makes sure that the key belongs to the certificate.
fn load_pair(certificate: &Path, key: &Path, provider: &CryptoProvider) -> Result<CertifiedKey> {
    let chain = CertificateDer::pem_slice_iter(&Part::Certificate.read(certificate)?).collect::<Result<Vec<_>, _>>();
    let chain = chain.with_context(|| format!("cannot use the certificate {}", certificate.display()))?;
    let private = PrivateKeyDer::from_pem_slice(&Part::Key.read(key)?);
    let private = private.with_context(|| format!("cannot use the private key {}", key.display()))?;
    CertifiedKey::from_der(chain, private, provider).map_err(|error| {
        let (certificate, key) = (certificate.display(), key.display());
        match error {
            rustls::Error::InconsistentKeys(_) => {
                anyhow!(
                    "the private key {key} does not belong to the certificate {certificate}: check the pair, or issue it again"
                )
            }
            error => anyhow!("cannot use the certificate {certificate} with the private key {key}: {error}"),
        }
    })
}

/// The DNS names in a certificate, in lower case. Warns of one that clients refuse for its time: a host without it would serve nobody, and
/// the clock of this machine may be the fault.
fn names_in(file: &Path, pair: &CertifiedKey) -> Result<Vec<Box<str>>> {
    let shown = file.display();
    let first = pair.end_entity_cert().with_context(|| format!("cannot use the certificate {shown}"))?;
    let certificate = EndEntityCert::try_from(first).with_context(|| format!("cannot use the certificate {shown}"))?;
    // Without an authority that could have signed it, only the certificate itself is judged, beginning with its time.
    let judged = certificate.verify_for_usage(&[], &[], &[], UnixTime::now(), KeyUsage::server_auth(), None, None).err();
    let at = |time: UnixTime| utc::rfc3339(i64::try_from(time.as_secs()).unwrap_or(i64::MAX).saturating_mul(1000));
    match judged {
        Some(webpki::Error::CertExpired { not_after, .. }) => {
            log::warn!("the certificate {shown} has expired at {}: renew it, then send SIGHUP", at(not_after));
        }
        Some(webpki::Error::CertNotValidYet { not_before, .. }) => {
            log::warn!(
                "the certificate {shown} is not valid before {}: set the clock of this machine, or use an older one",
                at(not_before)
            );
        }
        _ => {}
    }
    Ok(certificate.valid_dns_names().map(|name| name.to_ascii_lowercase().into()).collect())
}
