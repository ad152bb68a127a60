//! Finds the credentials for a registry: in files of Docker and Podman, and through credential helpers.

use super::{
    auth_file::{self, Entry, Secret},
    helper::{self, Limits},
    status::Status,
};
use crate::{
    error::{Code, Error, OrFail, Result},
    own_directory::{self, Purpose},
    text_file::TextFile,
};
use serde::Deserialize;
use std::{env, ffi::OsStr, io::ErrorKind, path::PathBuf};

/// The longest file of credentials, in bytes.
const MAX_FILE: u64 = 8 << 20;

/// The credentials for a registry.
pub struct Credentials {
    /// The secret; requests are anonymous if `None`.
    pub secret: Option<Secret>,
    /// The source of the secret, or the reason why it is missing. For messages.
    pub found: String,
}

/// Finds the credentials for a repository.
///
/// If a file in a default place cannot be read, or a credentials store fails, the request is anonymous: public images need no
/// credentials. [`Credentials::found`] names these failures in case the registry requires credentials.
///
/// # Errors
/// [`Code::NotAuthorised`] if a file is damaged, or the helper that is configured for this host fails.
pub fn find(host: &str, repository: &str, status: &Status) -> Result<Credentials> {
    let mut notes = Vec::new();
    let files = AuthFiles::locate();
    for (path, legacy) in &files.paths {
        let shown = path.display();
        let file = match TextFile::read(path, MAX_FILE) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
            Err(error) if !files.explicit => {
                notes.push(format!("{shown} cannot be read: {error}"));
                continue;
            }
            read => {
                read.or_fail(Code::NotAuthorised, || format!("{shown} cannot be read")).map_err(|error| {
                    error.fix(format!("chown or chmod {shown}, or name another file in REGISTRY_AUTH_FILE"))
                })?
            }
        };
        let entry = auth_file::look_up(file.bytes(), *legacy, host, repository).map_err(|error| {
            error
                .context(format!("the credentials in {shown} cannot be used"))
                .fix(format!("correct {shown}, or move it away and log in again: docker login {host}"))
        })?;
        match entry {
            None => {}
            Some(Entry::Unusable(why)) => notes.push(format!("{shown}: {why}")),
            Some(Entry::Secret(secret)) => {
                let found = match &secret {
                    Secret::Password { user, .. } => {
                        format!("{:?} in {shown}", String::from_utf8_lossy(user))
                    }
                    Secret::IdentityToken(_) => format!("the identity token in {shown}"),
                };
                return Ok(Credentials { secret: Some(secret), found });
            }
            Some(Entry::Helper(name)) => {
                let asked = ask_helper(&name, host, status).map_err(|error| {
                    error.fix(format!(
                        "install docker-credential-{name} or log in with it; or take {host} out of credHelpers in {shown}"
                    ))
                })?;
                match asked {
                    Some(secret) => return Ok(kept_by(&name, secret)),
                    None => notes.push(format!("docker-credential-{name} has none for {host}")),
                }
            }
            Some(Entry::Store(name)) => match ask_helper(&name, host, status) {
                Ok(Some(secret)) => return Ok(kept_by(&name, secret)),
                Ok(None) => notes.push(format!("docker-credential-{name} has none for {host}")),
                Err(error) => {
                    notes.push(format!("{} (credsStore in {shown}): {}", error.what(), error.cause_line()));
                }
            },
        }
    }
    if notes.is_empty() {
        let names: Vec<_> = files.paths.iter().map(|(path, _)| path.display().to_string()).collect();
        notes.push(format!("no credentials for {host} are in {}", names.join(", ")));
    }
    Ok(Credentials { secret: None, found: notes.join("; ") })
}

fn kept_by(helper: &str, secret: Secret) -> Credentials {
    Credentials { secret: Some(secret), found: format!("those that docker-credential-{helper} has") }
}

/// The files in the order in which Podman reads them (containers-auth.json(5)).
struct AuthFiles {
    /// Whether the file has the format of `~/.dockercfg`.
    paths: Vec<(PathBuf, bool)>,
    /// Whether the user named the file.
    explicit: bool,
}

impl AuthFiles {
    /// `REGISTRY_AUTH_FILE` alone, or the default places. `podman login` without `XDG_RUNTIME_DIR` writes below `/run/containers`;
    /// `DOCKER_CONFIG` is Docker's.
    fn locate() -> Self {
        if let Some(file) = env::var_os("REGISTRY_AUTH_FILE").filter(|file| !file.is_empty()) {
            return Self { paths: vec![(file.into(), false)], explicit: true };
        }
        let home = own_directory::home(Purpose::Read);
        let below = |directory: &str| home.as_ref().map(|home| home.join(directory));
        let runtime = own_directory::named_by("XDG_RUNTIME_DIR", Purpose::Read)
            .map(|directory| directory.join("containers"));
        let own_runtime = PathBuf::from(format!("/run/containers/{}", rustix::process::getuid().as_raw()));
        let config = own_directory::named_by("XDG_CONFIG_HOME", Purpose::Read)
            .or_else(|| below(".config"))
            .map(|dir| dir.join("containers"));
        let named = env::var_os("DOCKER_CONFIG").map(PathBuf::from).filter(|path| path.is_absolute());
        let docker = named.or_else(|| below(".docker"));
        let podman =
            [runtime, Some(own_runtime), config].into_iter().flatten().map(|dir| dir.join("auth.json"));
        let docker = docker.map(|directory| directory.join("config.json"));
        let current = podman.chain(docker).map(|path| (path, false));
        Self { paths: current.chain(below(".dockercfg").map(|path| (path, true))).collect(), explicit: false }
    }
}

/// Runs `docker-credential-NAME get` (docker/docker-credential-helpers), which reads an address and prints an object.
fn ask_helper(name: &str, host: &str, status: &Status) -> Result<Option<Secret>> {
    if name.contains('/') || name.contains('\0') {
        return Err(Error::new(
            Code::NotAuthorised,
            format!("{name:?} is not the name of a credential helper"),
        )
        .cause("it is the last part of a program's name: docker-credential-NAME"));
    }
    for address in auth_file::helper_addresses(host) {
        let found = ask_helper_for(OsStr::new(&format!("docker-credential-{name}")), &address, status)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn ask_helper_for(program: &OsStr, address: &str, status: &Status) -> Result<Option<Secret>> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "PascalCase", default)]
    struct Answer {
        username: String,
        secret: String,
    }
    let fail = || format!("the credential helper {} failed", program.display());
    let _waiting = status.waiting(format!("the credential helper {}", program.display()));
    let output = helper::run(program, address, Limits::DEFAULT)?;
    if !output.status.success() {
        // The helpers' library prints its failures to stdout; others, and their libraries, to stderr.
        let said = [&output.stdout, &output.stderr].map(|bytes| one_line(bytes));
        if said.iter().any(|said| said.contains("credentials not found")) {
            return Ok(None);
        }
        let said: Vec<_> = said.into_iter().filter(|said| !said.is_empty()).collect();
        let said = if said.is_empty() { output.status.to_string() } else { said.join("; ") };
        return Err(Error::new(Code::NotAuthorised, fail()).cause(said));
    }
    let answer: Answer = crate::formats::go_json::from_slice(&output.stdout)
        .or_fail(Code::NotAuthorised, fail)
        .map_err(|error| match one_line(&output.stderr) {
            said if said.is_empty() => error,
            said => error.cause(said),
        })?;
    Ok(match answer.username.as_str() {
        "<token>" => (!answer.secret.is_empty()).then_some(Secret::IdentityToken(answer.secret)),
        _ => auth_file::password_of(answer.username.into_bytes(), answer.secret.into_bytes()),
    })
}

/// The output of a program, in one line of bounded length.
fn one_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(400).collect()
}

/// `Authorization: Basic` (RFC 7617).
pub fn basic(user: &[u8], password: &[u8]) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    format!("Basic {}", STANDARD.encode([user, b":", password].concat()))
}
