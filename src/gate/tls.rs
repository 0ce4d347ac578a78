//! TLS: the operator's certificate and key.

use anyhow::{Context, Result};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::path::Path;
use std::sync::Arc;

/// Largest record of TLS in bytes. A client reads a record as a whole, so that a slow one would seem to read nothing for as long as the
/// 16 KiB of the largest that TLS knows take it.
const RECORD: usize = 4 * 1024;

/// Reads a certificate, with those that lead to its authority behind it, and its private key; both are PEM.
///
/// # Errors
/// Which file is wrong, and in what.
pub(crate) fn load(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>> {
    let of_certificate = || format!("cannot use the certificate {}", certificate.display());
    let chain: Vec<_> = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect)
        .map_err(anyhow::Error::from)
        .with_context(of_certificate)?;
    anyhow::ensure!(!chain.is_empty(), "there is no certificate in {}: it must be PEM", certificate.display());
    let private = PrivateKeyDer::from_pem_file(key).with_context(|| format!("cannot use the private key {}", key.display()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .with_context(|| format!("{} and {} do not belong together", certificate.display(), key.display()))?;
    config.max_fragment_size = Some(RECORD);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
