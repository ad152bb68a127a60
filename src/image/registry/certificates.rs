//! Certificates: the system's authorities, and the authorities and client certificates of a host in `certs.d`
//! (containers-certs.d(5)). A client certificate is sent only to the host of its directory.

use super::address::Origin;
use crate::{
    error::{Code, Error, OrFail, Result},
    own_directory::{self, Purpose},
    text_file::TextFile,
};
use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig};

/// The longest file of certificates, in bytes. A system's bundle has 300 KiB.
const MAX_FILE: u64 = 8 << 20;

/// The directories, where the host's own is looked for; the user's first.
const DIRECTORIES: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// The directories of a host under each of its names; the user's directories first.
fn directories(origin: &Origin) -> Vec<PathBuf> {
    let own = own_directory::home(Purpose::Read).map(|home| home.join(".config/containers/certs.d"));
    let roots: Vec<_> = own.into_iter().chain(DIRECTORIES.map(PathBuf::from)).collect();
    let named = roots.iter().flat_map(|root| origin.names().into_iter().map(|name| root.join(name)));
    named.filter(|directory| directory.is_dir()).collect()
}

/// Whether an authority is configured for this host. Then its certificate is checked even if the host is insecure.
pub fn has_authorities(origin: &Origin) -> bool {
    let entries = directories(origin).into_iter().filter_map(|directory| directory.read_dir().ok()).flatten();
    entries.flatten().any(|entry| entry.path().extension().is_some_and(|end| end == "crt"))
}

/// TLS settings for a host.
///
/// # Errors
/// [`Code::Registry`] if a file cannot be read, or holds no certificate.
pub fn configure(origin: &Origin, insecure: bool) -> Result<TlsConfig> {
    let (mut authorities, mut client) = (Vec::new(), None);
    for directory in directories(origin) {
        let fail = || format!("{} cannot be read", directory.display());
        let fix = |error: Error| error.fix(format!("chmod a+rx {}", directory.display()));
        for entry in directory.read_dir().or_fail(Code::Registry, fail).map_err(fix)? {
            let path = entry.or_fail(Code::Registry, fail).map_err(fix)?.path();
            match path.extension().and_then(|end| end.to_str()) {
                Some("crt") => authorities.extend(certificates(&path)?),
                Some("cert") => client = Some(pair(&path)?),
                _ => {}
            }
        }
    }
    let unchecked = insecure && authorities.is_empty();
    if !unchecked {
        authorities.extend(system().iter().cloned());
    }
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::from(authorities))
        .client_cert(client)
        .disable_verification(unchecked)
        .build())
}

/// The authorities of the system, read once.
fn system() -> &'static [Certificate<'static>] {
    static SYSTEM: OnceLock<Vec<Certificate<'static>>> = OnceLock::new();
    SYSTEM.get_or_init(|| {
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::warn!("a certificate of the system cannot be used: {error}");
        }
        system.certs.iter().map(|one| Certificate::from_der(one).to_owned()).collect()
    })
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>> {
    let fail = || format!("{} cannot be used", path.display());
    let fix = |error: Error| {
        error.fix(format!("put a certificate in PEM into {}, or move the file away", path.display()))
    };
    let file = TextFile::read(path, MAX_FILE).or_fail(Code::Registry, fail).map_err(fix)?;
    let items: Result<Vec<_>, _> = ureq::tls::parse_pem(file.bytes()).collect();
    let found: Vec<_> = items
        .or_fail(Code::Registry, fail)
        .map_err(fix)?
        .into_iter()
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        return Err(fix(Error::new(Code::Registry, fail()).cause("it holds no certificate in PEM")));
    }
    Ok(found)
}

/// Reads a client certificate and the key beside it. Checks that they belong together, because ureq does not.
fn pair(path: &Path) -> Result<ClientCert> {
    let key_path = path.with_extension("key");
    let fail = || format!("{} cannot be used", key_path.display());
    let chain = certificates(path)?;
    let fix =
        |error: Error| error.fix(format!("put the key of {} into {}", path.display(), key_path.display()));
    let file = TextFile::read(&key_path, MAX_FILE).or_fail(Code::Registry, fail).map_err(fix)?;
    let key = PrivateKey::from_pem(file.bytes()).or_fail(Code::Registry, fail).map_err(fix)?;
    let der =
        rustls::pki_types::PrivateKeyDer::try_from(key.der()).or_fail(Code::Registry, fail).map_err(fix)?;
    let certified = rustls::sign::CertifiedKey::from_der(
        chain.iter().map(|one| one.der().to_vec().into()).collect(),
        der.clone_key(),
        &rustls::crypto::ring::default_provider(),
    );
    certified.or_fail(Code::Registry, fail).map_err(fix)?;
    Ok(ClientCert::new_with_certs(&chain, key))
}
