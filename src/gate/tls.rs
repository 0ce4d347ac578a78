//! TLS: the operator's certificate and key.

use anyhow::{Context, Result, anyhow, bail};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

/// Largest record of TLS in bytes. A client reads a record as a whole, so that a slow one would seem to read nothing for as long as the
/// 16 KiB of the largest that TLS knows take it.
const RECORD: usize = 4 * 1024;

/// Most bytes that are read of a certificate or key: many times what the longest chain has.
const MAX_FILE: u64 = 1024 * 1024;

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

/// Reads a certificate, followed by those that lead to its authority, and its private key; both are PEM.
///
/// # Errors
/// One sentence: which file is wrong, in what, and how to correct it.
pub(crate) fn load(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>> {
    let chain = CertificateDer::pem_slice_iter(&Part::Certificate.read(certificate)?).collect::<Result<Vec<_>, _>>();
    let chain = chain.with_context(|| format!("cannot use the certificate {}", certificate.display()))?;
    let private = PrivateKeyDer::from_pem_slice(&Part::Key.read(key)?);
    let private = private.with_context(|| format!("cannot use the private key {}", key.display()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| {
            let (certificate, key) = (certificate.display(), key.display());
            match error {
                rustls::Error::InconsistentKeys(_) => {
                    anyhow!("the private key {key} does not belong to the certificate {certificate}")
                }
                error => anyhow!("cannot use the certificate {certificate} with the private key {key}: {error}"),
            }
        })?;
    config.max_fragment_size = Some(RECORD);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
