//! Client of one repository: asks its mirrors and the registry itself in turn, with the credentials for each of them.

use super::{
    Pull,
    address::{Address, Origin},
    auth_file::Secret,
    challenge::Challenge,
    credentials::{self, Credentials, basic},
    failure::{Attempts, Failure, denied, login_name, refused, status_line, unreachable},
    http::{Answer, Http, Paced, Request, Trust},
    registries::{self, Place, Places},
    status::Status,
    token,
};
use crate::{
    error::{Code, Error, Result},
    image::{
        Digest, RegistryName,
        layout::MAX_DOCUMENT,
        manifest::{
            Descriptor, INDEXES, MANIFESTS, RawDescriptor, ambiguous, check_document, not_an_image,
            plain_type,
        },
        reference::{DOCKER_HUB, DOCKER_HUB_HOST},
    },
};
use serde::{Deserialize, de::IgnoredAny};
use std::{
    io::Read,
    ops::Range,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};
use ureq::{
    Body,
    http::{Response, StatusCode, header},
};

pub use super::http::CONNECTIONS;

/// The longest time for one document, in seconds.
const DOCUMENT_SECONDS: u64 = 120;
/// The least bytes of a blob in a second, on average. A pull that fails for this continues where it was.
const BLOB_SPEED: u64 = 16 << 10;

/// A request to a repository.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    /// The path below the repository.
    path: &'a str,
    /// The requested bytes.
    range: Option<&'a Range<u64>>,
    /// Whether the digest of the content is known.
    verified: bool,
    /// The longest time for the body of the response.
    time: Duration,
}

/// A registry, as far as one repository is concerned.
pub struct Client<'a> {
    name: RegistryName,
    /// Mirrors, then the registry itself.
    endpoints: Vec<Endpoint>,
    status: &'a Status,
}

/// A server that has the repository.
struct Endpoint {
    /// `https://HOST/v2/REPOSITORY`, and `http://…` if plain HTTP is allowed.
    bases: Vec<Address>,
    /// The base that answered first; the others are not asked afterwards.
    base: OnceLock<usize>,
    http: Http,
    repository: String,
    credentials: Credentials,
    /// Whether the secret was sent to the registry or to its token service.
    shown: AtomicBool,
    /// The header that was accepted last, and its origin, because credentials belong to an origin.
    authorization: Mutex<Option<(Origin, String)>>,
}

impl<'a> Client<'a> {
    /// Finds mirrors, certificates and credentials. Sends no request.
    ///
    /// # Errors
    /// If one of their files cannot be used.
    pub fn new(name: &RegistryName, pull: &Pull, status: &'a Status) -> Result<Self> {
        let Places { mirrors, own } = registries::find(name)?;
        let mut endpoints = match pull.mirrors.get(&name.host) {
            Some(ours) => ours
                .iter()
                .map(|address| Endpoint::of_mirror(address, &name.repository, pull, status))
                .collect::<Result<Vec<_>>>(),
            None => mirrors.iter().map(|place| Endpoint::at(place, pull, status)).collect(),
        }?;
        endpoints.push(Endpoint::at(&own, pull, status)?);
        Ok(Self { name: name.clone(), endpoints, status })
    }

    /// The progress of the pull.
    pub fn status(&self) -> &Status {
        self.status
    }

    /// What the name stands for: a descriptor of a manifest or an index, and its bytes.
    pub fn resolve(&self) -> Result<(RawDescriptor, Vec<u8>)> {
        let wanted = match (&self.name.digest, &self.name.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".into(),
        };
        let (kind, bytes) = self.document(&format!("manifests/{wanted}"), self.name.digest.is_some())?;
        let digest = match &self.name.digest {
            Some(promised) => {
                promised.verify_bytes(&bytes, format!("the manifest of {}", self.name))?;
                promised.clone()
            }
            None => Digest::of(&bytes),
        };
        let media_type = media_type(&bytes, kind.as_deref())
            .map_err(|error| error.context(format!("{} cannot be used", self.name)))?;
        Ok((RawDescriptor::of(media_type, &digest, &bytes), bytes))
    }

    /// A manifest or a configuration, checked.
    pub fn read(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let is_manifest = is_known(&plain_type(&descriptor.media_type));
        let place = if is_manifest { "manifests" } else { "blobs" };
        let (_, bytes) = self.document(&format!("{place}/{}", descriptor.digest), true)?;
        check_document(descriptor, bytes)
    }

    /// Fetches a document; returns its bytes and Content-Type. `verified`: the caller knows its digest.
    fn document(&self, path: &str, verified: bool) -> Result<(Option<String>, Vec<u8>)> {
        let mut attempts = Attempts::default();
        loop {
            let time = Duration::from_secs(DOCUMENT_SECONDS);
            let failure = match self.get(Wanted { path, range: None, verified, time }).and_then(|response| {
                let kind = response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
                let kind = kind.map(plain_type);
                Ok((kind, self.read_document(response, path)?))
            }) {
                Ok(read) => return Ok(read),
                Err(failure) => failure,
            };
            attempts.after(failure, |pause, why| {
                let _waiting = self.status.waiting(why.to_owned());
                thread::sleep(pause);
            })?;
        }
    }

    fn read_document(&self, response: Response<Body>, path: &str) -> Result<Vec<u8>, Failure> {
        let _waiting = self.status.waiting(format!("{} ({path})", self.name.host));
        let mut bytes = Vec::new();
        let body = Paced::new(response.into_body().into_reader()).for_seconds(DOCUMENT_SECONDS);
        body.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).map_err(|error| self.cut(error))?;
        // Some servers compress although only `identity` was accepted. JSON never begins with these bytes.
        if bytes.starts_with(&[0x1f, 0x8b]) {
            let mut inflated = Vec::new();
            let reader = flate2::read::MultiGzDecoder::new(bytes.as_slice());
            reader.take(MAX_DOCUMENT + 1).read_to_end(&mut inflated).map_err(|error| self.cut(error))?;
            bytes = inflated;
        }
        if bytes.len() as u64 > MAX_DOCUMENT {
            let what = format!("{path} of {} is too long", self.name);
            let error = Error::new(Code::ImageBroken, what)
                .cause(format!("a document of an image has at most {MAX_DOCUMENT} bytes"))
                .fix(
                    "have the image built again (`docker build`) with fewer labels and a shorter history, or pull another tag",
                );
            return Err(Failure::lasting(error));
        }
        Ok(bytes)
    }

    /// The length of a blob in bytes, for a layer whose manifest does not say it. 0 if the registry does not say it either.
    ///
    /// # Errors
    /// [`Code::Registry`], [`Code::NotAuthorised`], [`Code::ImageBroken`] if the registry does not send the blob.
    pub fn length(&self, digest: &Digest, urls: &[String]) -> Result<u64> {
        let mut attempts = Attempts::default();
        loop {
            let failure = match self.get_blob(digest, 0, urls, None) {
                Ok(response) => {
                    let length = response.headers().get(header::CONTENT_LENGTH);
                    return Ok(length.and_then(|length| length.to_str().ok()?.parse().ok()).unwrap_or(0));
                }
                Err(failure) => failure,
            };
            attempts.after(failure, |pause, why| {
                let _waiting = self.status.waiting(why.to_owned());
                thread::sleep(pause);
            })?;
        }
    }

    /// Requests a blob of `size` bytes or a range of it, in one attempt. `urls` are asked in turn for a blob that the registry
    /// does not have; they are like servers that the registry redirects to, so no credential is sent there.
    pub fn get_blob(
        &self,
        digest: &Digest,
        size: u64,
        urls: &[String],
        range: Option<&Range<u64>>,
    ) -> Result<Response<Body>, Failure> {
        let time = Duration::from_secs(DOCUMENT_SECONDS + size / BLOB_SPEED);
        let path = format!("blobs/{digest}");
        let wanted = Wanted { path: &path, range, verified: true, time };
        let mut failure = match self.get(wanted) {
            Err(failure) if failure.error.code() == Code::ImageBroken => failure,
            done => return done,
        };
        let Some(registry) = self.endpoints.last() else { return Err(failure) };
        for url in urls {
            match registry.get_url(url, wanted, &self.name, self.status) {
                Ok(response) => return Ok(response),
                Err(also) => {
                    failure = failure.cause(format!("{}: {}", also.error.what(), also.error.cause_line()));
                }
            }
        }
        Err(failure)
    }

    /// Makes one attempt at each endpoint, until one has the file.
    fn get(&self, wanted: Wanted<'_>) -> Result<Response<Body>, Failure> {
        let mut before: Vec<Error> = Vec::new();
        let mut last: Option<Failure> = None;
        for endpoint in &self.endpoints {
            match endpoint.get(wanted, &self.name, self.status) {
                Ok(response) => return Ok(response),
                Err(failure) => before.extend(last.replace(failure).map(|failure| failure.error)),
            }
        }
        let failure = last.unwrap_or_else(|| {
            Failure::lasting(unreachable(format!("there is no address for {}", self.name.host)))
        });
        Err(before.into_iter().fold(failure, |failure, error| {
            failure.cause(format!("a mirror: {}: {}", error.what(), error.cause_line()))
        }))
    }

    /// The failure of a connection that ended too early.
    pub fn cut(&self, error: impl std::fmt::Display) -> Failure {
        let what = format!("the connection to {} was cut", self.name.host);
        Failure::passing(unreachable(what).cause(error))
    }
}

/// Whether it is the media type of an index or a manifest, without parameters.
fn is_known(kind: &str) -> bool {
    INDEXES.contains(&kind) || MANIFESTS.contains(&kind)
}

/// The media type of a document: its own, else the Content-Type, else a guess by its keys (containers/image,
/// `GuessMIMEType`). Manifests of OCI 1.0 have no media type of their own. A document that is an index by the one and a
/// manifest by the other is refused.
fn media_type(bytes: &[u8], registry: Option<&str>) -> Result<String> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Typed {
        media_type: String,
        schema_version: i64,
        config: Option<IgnoredAny>,
        manifests: Option<IgnoredAny>,
    }
    let typed: Typed = crate::image::manifest::parse(bytes, "the image's manifest")?;
    let own = plain_type(&typed.media_type);
    let mut named = [Some(own.as_str()), registry].into_iter().flatten();
    let known: Vec<&str> = named.clone().filter(|kind| is_known(kind)).collect();
    if let [own, registrys] = known[..]
        && INDEXES.contains(&own) != INDEXES.contains(&registrys)
    {
        return Err(ambiguous("the image's manifest"));
    }
    if let Some(kind) = known.first() {
        return Ok((*kind).to_owned());
    }
    let guess = match (typed.config, typed.manifests) {
        (Some(_), None) => MANIFESTS.first(),
        (None, Some(_)) => INDEXES.first(),
        _ => None,
    };
    // A known type of something else is kept.
    if let Some(guess) = guess.filter(|_| typed.media_type.is_empty()) {
        return Ok((*guess).to_owned());
    }
    let kind = named.find(|kind| !kind.is_empty()).unwrap_or_default();
    if typed.schema_version == 1 {
        return Err(Error::new(Code::ImageBroken, "the image has a manifest of Docker's first version")
            .cause("its parts have no digests to check; Docker 28 refuses it as well")
            .fix("push the image again with a current tool: `skopeo copy --format v2s2 docker://IMAGE docker://IMAGE`"));
    }
    Err(not_an_image(kind))
}

/// The error for access denied by a server that the registry redirected to. Logging in does not help there.
fn store_denied(answer: Answer, base: &Address, name: &RegistryName) -> Failure {
    let (registry, store) = (base.origin().host(), answer.from.origin().host());
    let what = format!("{store}, to which {registry} redirects, denied access to {name}");
    let cause = status_line(answer.response);
    Failure::lasting(
        Error::new(Code::NotAuthorised, what)
            .cause(format!("{cause}: credentials for {registry} are not sent to {store}"))
            .fix(format!(
                "pull again, because such redirects expire; if it fails again, ask the administrator of {registry} to correct its storage backend"
            )),
    )
}

impl Endpoint {
    /// Endpoint of a location from registries.conf and the image's name.
    fn at(place: &Place, pull: &Pull, status: &Status) -> Result<Self> {
        let fail = |why: String| {
            Error::new(Code::ImageReference, format!("{:?} {why}", place.host)).fix(
                "write HOST/REPOSITORY or HOST:PORT/REPOSITORY, for example registry.example:5000/team/app",
            )
        };
        let trust = Trust::of(&place.host, place.insecure, pull).map_err(fail)?;
        Self::new(None, &place.host, &place.repository, trust, status).map_err(fail)?
    }

    /// Endpoint of an entry of registry-mirrors: a host, or a base address with its scheme.
    fn of_mirror(address: &str, repository: &str, pull: &Pull, status: &Status) -> Result<Self> {
        let fail = |why: String| {
            Error::new(Code::Config, format!("registry-mirrors: {address:?} {why}")).fix(
                "write an address such as \"https://mirror.example\" or \"mirror.example:5000\" into gpurun's configuration",
            )
        };
        let (scheme, rest) =
            address.split_once("://").map_or((None, address), |(scheme, rest)| (Some(scheme), rest));
        let host = rest.split('/').next().unwrap_or_default();
        // http:// in the configuration allows plain HTTP.
        let trust = Trust::of(host, scheme == Some("http"), pull).map_err(fail)?;
        Self::new(scheme, rest.trim_end_matches('/'), repository, trust, status).map_err(fail)?
    }

    /// `place` is a host and optionally a path. The outer error is about this address.
    fn new(
        scheme: Option<&str>,
        place: &str,
        repository: &str,
        trust: Trust,
        status: &Status,
    ) -> Result<Result<Self>, String> {
        let host = place.split('/').next().unwrap_or_default();
        let schemes = match scheme {
            Some(scheme) => vec![scheme],
            // Docker tries plain HTTP where certificates are not checked (dockerd(8), "insecure registries").
            None if trust.may_be_plain(host)? => vec!["https", "http"],
            None => vec!["https"],
        };
        let address = if place == DOCKER_HUB { DOCKER_HUB_HOST } else { place };
        let bases =
            schemes.iter().map(|scheme| Address::parse(&format!("{scheme}://{address}/v2/{repository}")));
        let bases = bases.collect::<Result<_, _>>()?;
        Ok(credentials::find(host, repository, status).map(|credentials| Self {
            bases,
            base: OnceLock::new(),
            http: Http::new(trust),
            repository: repository.into(),
            credentials,
            shown: AtomicBool::new(false),
            authorization: Mutex::new(None),
        }))
    }

    fn get(
        &self,
        wanted: Wanted<'_>,
        name: &RegistryName,
        status: &Status,
    ) -> Result<Response<Body>, Failure> {
        let (base, mut answer) = self.answer(wanted, status)?;
        // Only the challenge of the requested server is answered: another server could direct the secret anywhere.
        if answer.response.status() == StatusCode::UNAUTHORIZED && !answer.left {
            let challenges = answer.response.headers().get_all(header::WWW_AUTHENTICATE);
            let texts: Vec<_> =
                challenges.iter().map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
            let challenge = Challenge::choose(texts.iter().map(AsRef::as_ref));
            if let Some(header) = self.authorize(challenge, base, name, status)? {
                let mut known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner);
                *known = Some((base.origin().clone(), header));
                drop(known);
                answer = self.send(base, wanted, status)?;
            }
        }
        match answer.response.status() {
            code if code.is_success() => Ok(answer.response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if answer.left => {
                Err(store_denied(answer, base, name))
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let who = login_name(base);
                Err(denied(&who, name, &who, status_line(answer.response)).cause(self.about_credentials()))
            }
            _ => Err(refused(answer.response, &answer.from, wanted.path, name)),
        }
    }

    /// Requests a blob from an address of the manifest.
    fn get_url(
        &self,
        url: &str,
        Wanted { range, time, .. }: Wanted<'_>,
        name: &RegistryName,
        status: &Status,
    ) -> Result<Response<Body>, Failure> {
        let base = &self.bases[self.base.get().copied().unwrap_or(0)];
        let address = Address::parse(url).and_then(|address| {
            self.http.trust().may_lead(base.origin(), address.origin(), true)?;
            Ok(address)
        });
        let address = address.map_err(|why| {
            let shown: String = url.split('?').next().unwrap_or_default().chars().take(200).collect();
            Failure::lasting(
                Error::new(Code::Registry, format!("{shown:?} of the manifest is not asked"))
                    .cause(format!("the address {why}"))
                    .fix("have the image pushed with its layers: `skopeo copy SOURCE docker://IMAGE`"),
            )
        })?;
        let request = Request {
            address: &address,
            authorization: None,
            accept: "*/*",
            range,
            form: None,
            verified: true,
            time,
        };
        let answer = self.http.send(&request, status)?;
        if answer.response.status().is_success() {
            return Ok(answer.response);
        }
        Err(refused(answer.response, &answer.from, "", name).cause(address.public()))
    }

    /// The credentials that were sent to the registry, for messages.
    fn about_credentials(&self) -> String {
        match (&self.credentials.secret, self.shown.load(Ordering::Relaxed)) {
            (None, _) => format!("not logged in: {}", self.credentials.found),
            (Some(_), true) => format!("the credentials that were sent are {}", self.credentials.found),
            (Some(_), false) => format!("it did not ask for the credentials: {}", self.credentials.found),
        }
    }

    /// Sends a request to the bases in turn. Returns the first response and its base.
    fn answer(&self, wanted: Wanted<'_>, status: &Status) -> Result<(&Address, Answer), Failure> {
        let bases = match self.base.get() {
            Some(&chosen) => &self.bases[chosen..=chosen],
            None => &self.bases[..],
        };
        let mut failure = None;
        for base in bases {
            match self.send(base, wanted, status) {
                Ok(answer) => {
                    self.base.get_or_init(|| self.bases.iter().position(|one| one == base).unwrap_or(0));
                    return Ok((base, answer));
                }
                Err(error) => failure = Some(error),
            }
        }
        Err(failure
            .unwrap_or_else(|| Failure::lasting(unreachable(format!("{} has no address", self.repository)))))
    }

    fn send(&self, base: &Address, wanted: Wanted<'_>, status: &Status) -> Result<Answer, Failure> {
        let Wanted { path, range, verified, time } = wanted;
        let accept = [MANIFESTS, INDEXES, &["*/*"]].concat().join(", ");
        let address = base.below(path);
        let known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let authorization = known.filter(|(origin, _)| origin == base.origin()).map(|(_, header)| header);
        let authorization = authorization.as_deref();
        self.http.send(
            &Request { address: &address, authorization, accept: &accept, range, form: None, verified, time },
            status,
        )
    }

    /// The Authorization header for the registry's challenge; `None` without credentials for it.
    fn authorize(
        &self,
        challenge: Option<Challenge>,
        base: &Address,
        name: &RegistryName,
        status: &Status,
    ) -> Result<Option<String>, Failure> {
        match (challenge, &self.credentials.secret) {
            (Some(Challenge::Bearer { realm, service, scope }), secret) => {
                self.shown.fetch_or(secret.is_some(), Ordering::Relaxed);
                let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
                let demand = token::Demand {
                    registry: base,
                    realm: &realm,
                    service: service.as_deref(),
                    scope: &scope,
                };
                token::fetch(&self.http, &demand, &self.credentials, name, status).map(Some)
            }
            (Some(Challenge::Basic), Some(Secret::Password { user, password })) => {
                self.shown.store(true, Ordering::Relaxed);
                Ok(Some(basic(user, password)))
            }
            _ => Ok(None),
        }
    }
}
