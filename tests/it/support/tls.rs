//! A certificate authority of a test's own, and a client that trusts it alone.

use super::http::{Client, Transport};
use super::{PATIENCE, command};
use rustls::crypto::ring;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, IpAddr, ServerName};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// A client's side of a connection with TLS.
pub(crate) type TlsStream = StreamOwned<ClientConnection, TcpStream>;

impl Transport for TlsStream {
    fn end_sending(&mut self) {
        self.conn.send_close_notify();
        while self.conn.wants_write() {
            self.conn.write_tls(&mut self.sock).unwrap();
        }
        self.sock.shutdown(Shutdown::Write).unwrap();
    }

    fn set_read_time(&mut self, time: Duration) {
        self.sock.set_read_timeout(Some(time)).unwrap();
    }
}

/// A certificate and its key, both in PEM files.
#[derive(Debug, Clone)]
pub(crate) struct Certificate {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Certificate {
    /// The arguments of `plugrack serve` for it.
    pub(crate) fn arguments(&self) -> [&str; 4] {
        ["--tls-cert", self.certificate.to_str().unwrap(), "--tls-key", self.key.to_str().unwrap()]
    }

    /// The certificate's bytes.
    pub(crate) fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(&self.certificate).unwrap()
    }
}

/// An authority that issues certificates for 127.0.0.1, by openssl.
pub(crate) struct Authority {
    dir: TempDir,
    own: Certificate,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let own = Certificate { certificate: dir.path().join("ca.pem"), key: dir.path().join("ca.key") };
        request(&own, "test authority", "ec", &[]);
        Self { dir, own }
    }

    /// The file with its certificate.
    pub(crate) fn file(&self) -> &Path {
        &self.own.certificate
    }

    /// A certificate with a key of openssl's default for elliptic curves.
    pub(crate) fn issue(&self, name: &str) -> Certificate {
        self.issue_with(name, "ec")
    }

    /// A certificate with a key of some kind, `ec` or `rsa`.
    pub(crate) fn issue_with(&self, name: &str, kind: &str) -> Certificate {
        let path = |ending: &str| self.dir.path().join(format!("{name}.{ending}"));
        let issued = Certificate { certificate: path("pem"), key: path("key") };
        self.issue_to(&issued, name, kind, "IP:127.0.0.1");
        issued
    }

    /// A certificate for these DNS names, with its files `NAME.crt` and `NAME.key` in a directory.
    pub(crate) fn issue_for(&self, dir: &Path, name: &str, names: &[&str]) -> Certificate {
        let path = |ending: &str| dir.join(format!("{name}.{ending}"));
        let issued = Certificate { certificate: path("crt"), key: path("key") };
        let names: Vec<_> = names.iter().map(|name| format!("DNS:{name}")).collect();
        self.issue_to(&issued, name, "ec", &names.join(","));
        issued
    }

    fn issue_to(&self, issued: &Certificate, name: &str, kind: &str, names: &str) {
        let (certificate, key) = (self.own.certificate.to_str().unwrap(), self.own.key.to_str().unwrap());
        let names = format!("subjectAltName={names}");
        let more = ["-CA", certificate, "-CAkey", key, "-addext", &names, "-addext", "basicConstraints=CA:FALSE"];
        request(issued, name, kind, &more);
    }

    /// A certificate for a DNS name that is valid between two times, such as `20200101000000Z`.
    pub(crate) fn issue_between(&self, name: &str, from: &str, to: &str) -> Certificate {
        let path = |ending: &str| self.dir.path().join(format!("{name}.{ending}"));
        let issued = Certificate { certificate: path("pem"), key: path("key") };
        let dir = self.dir.path().display();
        let settings = format!(
            "[ca]\ndefault_ca=own\n[own]\ndatabase={dir}/index\nserial={dir}/serial\nnew_certs_dir={dir}\npolicy=any\nx509_extensions=names\n\
             [any]\ncommonName=supplied\n[names]\nsubjectAltName=DNS:{name}\n"
        );
        std::fs::write(path("cnf"), settings).unwrap();
        std::fs::write(self.dir.path().join("index"), "").unwrap();
        std::fs::write(self.dir.path().join("serial"), "01").unwrap();
        let openssl = |arguments: &[&str], configure: &dyn Fn(&mut std::process::Command)| {
            let mut openssl = command("openssl");
            configure(openssl.args(arguments));
            let output = openssl.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        let key =
            ["req", "-new", "-noenc", "-subj", &format!("/CN={name}"), "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
        openssl(&key, &|openssl| {
            openssl.arg("-keyout").arg(&issued.key).arg("-out").arg(path("csr"));
        });
        openssl(&["ca", "-batch", "-notext", "-md", "sha256", "-startdate", from, "-enddate", to], &|openssl| {
            openssl.arg("-config").arg(path("cnf")).arg("-in").arg(path("csr")).arg("-out").arg(&issued.certificate);
            openssl.arg("-cert").arg(&self.own.certificate).arg("-keyfile").arg(&self.own.key);
        });
        issued
    }

    /// Connects, with the handshake done.
    #[track_caller]
    pub(crate) fn connect(&self, address: SocketAddr) -> TlsStream {
        let mut roots = RootCertStore::empty();
        roots.add(self.own.der()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::IpAddress(IpAddr::from(address.ip()));
        let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        while connection.is_handshaking() {
            connection.complete_io(&mut socket).unwrap();
        }
        StreamOwned::new(connection, socket)
    }

    /// A client with a connection of its own.
    #[track_caller]
    pub(crate) fn client(&self, address: SocketAddr) -> Client {
        Client::over(self.connect(address))
    }
}

/// Makes a key and a certificate for it.
#[track_caller]
fn request(made: &Certificate, name: &str, kind: &str, more: &[&str]) {
    let mut openssl = command("openssl");
    openssl.args(["req", "-x509", "-noenc", "-days", "2", "-subj", &format!("/CN={name}"), "-newkey"]);
    match kind {
        "ec" => openssl.args(["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]),
        kind => openssl.arg(format!("{kind}:2048")),
    };
    openssl.arg("-keyout").arg(&made.key).arg("-out").arg(&made.certificate).args(more);
    let output = openssl.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
