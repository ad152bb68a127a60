//! The cluster's API server, as a pod reaches it ("Accessing the Kubernetes API from a Pod").

use gpurun::error::{Code, Error, OrFail, Result};
use http::StatusCode;
use serde_json::Value;
use std::{
    env, fs,
    io::BufReader,
    path::{Path, PathBuf},
    time::Duration,
};
use ureq::{
    Agent, Body,
    tls::{Certificate, PemItem, RootCerts, TlsConfig},
};

/// Where a pod's account lies.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// An API server that answers takes milliseconds. A kubelet waits 45 seconds for a claim, for which two answers are needed.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it is left alone after something has failed.
pub const LATER: Duration = Duration::from_secs(30);
/// After so long the API server ends a watch, and another is begun.
const WATCHED: Duration = Duration::from_secs(300);
/// An object is smaller: etcd takes 1.5 MB, and a list or a watch here has a handful.
const LONGEST: u64 = 1 << 24;
/// By this name the API server knows what was set here, and takes away what is not any more.
const MANAGER: &str = "gpurun-device-plugin";

/// The API server and the pod's account there.
#[derive(Debug)]
pub struct ApiServer {
    agent: Agent,
    base: String,
    account: PathBuf,
}

impl ApiServer {
    /// The one of the pod's cluster.
    ///
    /// # Errors
    /// [`Code::Cluster`] if this is no pod, [`Code::Config`] if it has no account.
    pub fn of_pod() -> Result<Self> {
        // ureq leaves it to programs which implementation of cryptography they bring.
        rustls::crypto::ring::default_provider()
            .install_default()
            .map_err(|_| Error::new(Code::Internal, "cryptography is set up twice"))?;
        let variable = |name| {
            env::var(name).ok().filter(|value| !value.is_empty()).ok_or_else(|| {
                Error::new(Code::Cluster, "the API server is not known")
                    .cause(format!("{name} is not set, which it is in every pod"))
                    .fix("run as a pod (packaging/kubernetes); a program on the node goes without --dra, and writes labels to a file: --labels-file")
            })
        };
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        // An IPv6 address.
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let base = format!("https://{host}:{}", variable("KUBERNETES_SERVICE_PORT")?);
        let account = PathBuf::from(ACCOUNT);
        let tls =
            TlsConfig::builder().root_certs(RootCerts::from(authorities(&account.join("ca.crt"))?)).build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .https_only(true)
            .http_status_as_error(false)
            // Nothing between a pod and its API server.
            .proxy(None)
            .timeout_global(Some(PATIENCE))
            .user_agent(concat!("gpurun/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self { agent: agent.into(), base, account })
    }

    /// An object or a list, if it is there.
    ///
    /// # Errors
    /// [`Code::Cluster`] if the API server does not answer, or refuses; [`Code::Config`] if the pod's account has no token.
    pub fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Option<Value>> {
        let request = self.agent.get(self.url(path)).query_pairs(query.iter().copied());
        let answer = request.header("Authorization", self.token()?).call();
        done(&format!("{path} cannot be read"), answer)?.map(|answer| object(path, answer)).transpose()
    }

    /// Lets an object be as this says, without what was said here of it before and is not any more (Kubernetes, "Server-Side
    /// Apply"). Answers how it is then.
    ///
    /// # Errors
    /// As for [`Self::get`].
    pub fn apply(&self, path: &str, wanted: &Value) -> Result<Value> {
        let failed = format!("{path} cannot be set");
        let answer = self
            .agent
            .patch(self.url(path))
            .query("fieldManager", MANAGER)
            // Another program may have set the same before.
            .query("force", "true")
            .header("Authorization", self.token()?)
            .header("Content-Type", "application/apply-patch+yaml")
            .send(wanted.to_string());
        match done(&failed, answer)? {
            Some(answer) => object(path, answer),
            None => Err(Error::new(Code::Cluster, failed).cause("the API server knows no such object")),
        }
    }

    /// Takes an object away, if it is there.
    ///
    /// # Errors
    /// As for [`Self::get`].
    pub fn delete(&self, path: &str) -> Result<()> {
        let answer = self.agent.delete(self.url(path)).header("Authorization", self.token()?).call();
        // A response without a reader would be an error in the API server's log.
        done(&format!("{path} cannot be deleted"), answer)?
            .map(|answer| object(path, answer))
            .transpose()
            .map(drop)
    }

    /// What happens to a list's objects from its `resourceVersion` on, until the API server ends it, as it does every few minutes
    /// (Kubernetes, "Efficient detection of changes").
    ///
    /// # Errors
    /// As for [`Self::get`].
    pub fn watch(
        &self,
        path: &str,
        query: &[(&str, &str)],
    ) -> Result<impl Iterator<Item = Result<Value>> + use<>> {
        let failed = format!("{path} cannot be watched");
        let request = self
            .agent
            .get(self.url(path))
            .query_pairs(query.iter().copied())
            .query("watch", "true")
            .query("timeoutSeconds", WATCHED.as_secs().to_string())
            .header("Authorization", self.token()?);
        // Also ends silent dead connections.
        let request = request.config().timeout_global(Some(WATCHED + PATIENCE)).build();
        let answer = done(&failed, request.call())?;
        let events = answer.into_iter().flat_map(|answer| {
            let reader = BufReader::new(answer.into_body().into_with_config().limit(LONGEST).reader());
            serde_json::Deserializer::from_reader(reader).into_iter::<Value>()
        });
        Ok(events.map(move |event| event.or_fail(Code::Cluster, || failed.clone())))
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Read each time: the kubelet renews it.
    fn token(&self) -> Result<String> {
        let token = fs::read_to_string(self.account.join("token"));
        let token = token.or_fail(Code::Config, || "the pod's account has no token")?;
        Ok(format!("Bearer {}", token.trim()))
    }
}

/// The answer, if it is yes; none where there is no such object.
fn done(
    failed: &str,
    answer: Result<http::Response<Body>, ureq::Error>,
) -> Result<Option<http::Response<Body>>> {
    let mut answer = answer.or_fail(Code::Cluster, || failed.to_owned())?;
    let status = answer.status();
    if status.is_success() {
        return Ok(Some(answer));
    }
    if status == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    let said = answer.body_mut().with_config().limit(1 << 16).read_to_string().unwrap_or_default();
    let message = serde_json::from_str::<Value>(&said)
        .ok()
        .and_then(|status| Some(status.get("message")?.as_str()?.to_owned()));
    let message = message.unwrap_or(said);
    Err(Error::new(Code::Cluster, failed).cause(format!("the API server answers {status}: {message}")))
}

fn object(path: &str, answer: http::Response<Body>) -> Result<Value> {
    let reader = answer.into_body().into_with_config().limit(LONGEST).reader();
    serde_json::from_reader(BufReader::new(reader))
        .or_fail(Code::Cluster, || format!("what the API server says of {path} cannot be understood"))
}

fn authorities(path: &Path) -> Result<Vec<Certificate<'static>>> {
    let failed = || format!("{} cannot be used", path.display());
    let bytes = fs::read(path).or_fail(Code::Config, failed);
    let bytes = bytes.map_err(|error| {
        error.fix("let the pod have its account (automountServiceAccountToken), or use --labels-file")
    })?;
    let items: Result<Vec<_>, _> = ureq::tls::parse_pem(&bytes).collect();
    let items = items.or_fail(Code::Config, failed)?;
    Ok(items
        .into_iter()
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect())
}
