//! The cluster's API server, as a pod reaches it ("Accessing the Kubernetes API from a Pod"), for the one thing that is asked of it: a
//! node's labels.

use crate::labels::Labels;
use gpurun::error::{Code, Error, OrFail, Result};
use serde_json::json;
use std::{
    env, fs, io,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Duration,
};
use ureq::{
    Agent,
    tls::{Certificate, PemItem, RootCerts, TlsConfig},
};

/// Where a pod's account lies.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// An API server that answers takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// By this name the API server knows which labels were set here, and takes away those that are not any more.
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
    /// [`Code::Cluster`] where this is no pod, [`Code::Config`] where it has no account.
    pub fn of_pod() -> Result<Self> {
        // ureq leaves it to programs which implementation of cryptography they bring.
        rustls::crypto::ring::default_provider()
            .install_default()
            .map_err(|_| Error::new(Code::Internal, "cryptography is set up twice"))?;
        let variable = |name| {
            env::var(name).or_fail(Code::Cluster, || "the API server is not known").map_err(|error| {
                error
                    .cause(format!("{name} is not set, which it is in every pod"))
                    .fix("run as a pod, or write the labels to a file with --labels-file")
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

    /// Lets the node have these labels, and none that were set here before (Kubernetes, "Server-Side Apply").
    ///
    /// # Errors
    /// [`Code::Cluster`] where it does not answer, or refuses.
    fn label(&self, node: &str, labels: &Labels) -> Result<()> {
        let failed = || format!("the node {node} cannot be labelled");
        // The kubelet renews it.
        let token = fs::read_to_string(self.account.join("token")).or_fail(Code::Config, failed)?;
        let object =
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": labels}});
        let mut answer = self
            .agent
            .patch(format!("{}/api/v1/nodes/{node}", self.base))
            .query("fieldManager", MANAGER)
            // node-feature-discovery may have set the same ones before.
            .query("force", "true")
            .header("Authorization", format!("Bearer {}", token.trim()))
            .header("Content-Type", "application/apply-patch+yaml")
            .send(object.to_string())
            .or_fail(Code::Cluster, failed)?;
        if answer.status().is_success() {
            // The node as it is now. Nobody needs it, and the API server says so in its log when it is not listened to.
            let _ = io::copy(&mut answer.body_mut().as_reader(), &mut io::sink());
            return Ok(());
        }
        let said = answer.body_mut().with_config().limit(1 << 16).read_to_string().unwrap_or_default();
        let message = serde_json::from_str::<serde_json::Value>(&said)
            .ok()
            .and_then(|status| Some(status.get("message")?.as_str()?.to_owned()));
        Err(Error::new(Code::Cluster, failed())
            .cause(format!("the API server answers {}: {}", answer.status(), message.unwrap_or(said)))
            .fix("let the plugin's account `patch` `nodes` (the chart: labels.target=node), or use --labels-file"))
    }

    /// Labels the node each time that there are other labels. What fails is tried again.
    pub fn keep_labelled(&self, node: &str, newest: &Receiver<Labels>) {
        let Ok(mut labels) = newest.recv() else { return };
        loop {
            let next = match self.label(node, &labels) {
                Ok(()) => {
                    newest.iter().find(|others| *others != labels).ok_or(RecvTimeoutError::Disconnected)
                }
                Err(error) => {
                    tracing::error!("{error}");
                    newest.recv_timeout(PATIENCE)
                }
            };
            match next {
                Ok(others) => labels = others,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
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
