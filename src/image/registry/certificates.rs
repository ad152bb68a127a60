//! Whom to believe: the system's authorities, and what is laid down for a host in certs.d (containers-certs.d(5)).

use crate::error::{Code, Error, OrFail, Result};
use std::path::{Path, PathBuf};
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig};

/// The directories, where the host's own is looked for; the user's first.
const DIRECTORIES: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// How a host is spoken to. One that has authorities of its own is checked against them, also where it need not be.
///
/// # Errors
/// [`Code::Registry`] where a file cannot be read, or holds no certificate.
pub fn configure(host: &str, insecure: bool) -> Result<TlsConfig> {
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".config/containers/certs.d"));
    let directories = home.into_iter().chain(DIRECTORIES.map(PathBuf::from)).map(|dir| dir.join(host));
    let (mut authorities, mut client) = (Vec::new(), None);
    for directory in directories.filter(|directory| directory.is_dir()) {
        let fail = || format!("{} cannot be read", directory.display());
        for entry in directory.read_dir().or_fail(Code::Registry, fail)? {
            let path = entry.or_fail(Code::Registry, fail)?.path();
            match path.extension().and_then(|end| end.to_str()) {
                Some("crt") => authorities.extend(certificates(&path)?),
                Some("cert") => {
                    client = Some(pair(&path)?);
                }
                _ => {}
            }
        }
    }
    let unchecked = insecure && authorities.is_empty();
    if !unchecked {
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::warn!("a certificate of the system cannot be used: {error}");
        }
        authorities.extend(system.certs.iter().map(|one| Certificate::from_der(one).to_owned()));
    }
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::from(authorities))
        .client_cert(client)
        .disable_verification(unchecked)
        .build())
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>> {
    let fail = || format!("{} cannot be used", path.display());
    let bytes = std::fs::read(path).or_fail(Code::Registry, fail)?;
    let items: Result<Vec<_>, _> = ureq::tls::parse_pem(&bytes).collect();
    let found: Vec<_> = items
        .or_fail(Code::Registry, fail)?
        .into_iter()
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        return Err(Error::new(Code::Registry, fail()).cause("it holds no certificate in PEM"));
    }
    Ok(found)
}

/// A certificate of ours and its key, beside it. That they belong together is checked here: ureq takes it for granted.
fn pair(path: &Path) -> Result<ClientCert> {
    let key_path = path.with_extension("key");
    let fail = || format!("{} cannot be used", key_path.display());
    let chain = certificates(path)?;
    let bytes = std::fs::read(&key_path).or_fail(Code::Registry, fail)?;
    let key = PrivateKey::from_pem(&bytes).or_fail(Code::Registry, fail)?;
    let der = rustls::pki_types::PrivateKeyDer::try_from(key.der())
        .map_err(|cause| Error::new(Code::Registry, fail()).cause(cause))?;
    let certified = rustls::sign::CertifiedKey::from_der(
        chain.iter().map(|one| one.der().to_vec().into()).collect(),
        der.clone_key(),
        &rustls::crypto::ring::default_provider(),
    );
    certified
        .or_fail(Code::Registry, fail)
        .map_err(|error| error.fix(format!("put the key there that {} was made for", path.display())))?;
    Ok(ClientCert::new_with_certs(&chain, key))
}
