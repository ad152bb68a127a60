//! Dynamic resource allocation, in place of the device plugin API: the scheduler chooses devices for claims, by attributes.
//!
//! ```text
//!  State ─► slice ─► publish ──► API server: ResourceSlices, watched            (scheduler: claims get devices)
//!    └────► server ◄── kubelet: NodePrepareResources(claim)
//!             ├─ claim ◄── API server: which devices the claim has got
//!             ├─ checkpoint: which claims are prepared, through any end of this process
//!             ├─ health ──► kubelet: how devices are, for the pods that have them
//!             └─► names of devices in the node's CDI document
//! ```
//!
//! The driver's name, and what it tells of devices, are those of NVIDIA's own DRA driver, so that device classes and claims written for
//! that one mean the same here.

mod checkpoint;
mod claim;
mod health;
mod publish;
mod server;
mod slice;

use crate::{
    api::dra::dra_plugin_server::DraPluginServer,
    api::dra_health::dra_resource_health_server::DraResourceHealthServer,
    api::registration::registration_server::RegistrationServer,
    api_server::ApiServer,
    grpc,
    metrics::Metrics,
    socket::{self, Socket, Standing},
    state::State,
};
use checkpoint::Checkpoint;
use gpurun::error::{Code, OrFail, Result};
use health::Health;
use hyper::body::Incoming;
use publish::Publisher;
use rustix::{fs::FlockOperation, io::Errno};
use server::{Claims, Registrar, Services};
use std::{
    convert::Infallible,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::UnixListener,
    select,
    sync::{Mutex, watch},
    task::JoinHandle,
};
use tonic::body::Body;
use tower_service::Service;

/// The driver's name, by which claims and kubelets know it.
pub const DRIVER: &str = "gpu.nvidia.com";

/// Between two looks at whether another process has ended.
const AGAIN: Duration = Duration::from_secs(1);
/// Interval between checks whether a socket was removed.
const LOST: Duration = Duration::from_secs(2);

/// Where a driver is to be found by this node's kubelet, and as what.
#[derive(Debug, Clone)]
pub struct Place {
    /// The node's name in the cluster: its pool of devices has it, too.
    pub node: String,
    /// Where the kubelet looks for registrations: /var/lib/kubelet/plugins_registry.
    pub registrations: PathBuf,
    /// Where drivers have a directory of their own: /var/lib/kubelet/plugins.
    pub plugins: PathBuf,
    /// procfs and sysfs: boot id, PCIe root complexes.
    pub proc: PathBuf,
    /// See `proc`.
    pub sys: PathBuf,
}

/// The driver at work. Its sockets go when it is dropped, so that the kubelet knows.
#[derive(Debug)]
pub struct Dra {
    publisher: Publisher,
    sys: PathBuf,
    /// Held as long as this lives: whoever comes after waits, and finds everything in the file.
    _lock: File,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Dra {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Dra {
    /// Answers the kubelet, and publishes what [`Dra::offer`] is told. Waits until no other process does.
    ///
    /// # Errors
    /// [`Code::Config`] if the kubelet's directories cannot be used.
    pub async fn start(
        place: &Place,
        api_server: Arc<ApiServer>,
        state: watch::Receiver<Option<Arc<State>>>,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let own = place.plugins.join(DRIVER);
        let failed = || format!("{} cannot be made", own.display());
        fs::create_dir_all(&own).or_fail(Code::Config, failed)?;
        let boot_id = fs::read_to_string(place.proc.join("sys/kernel/random/boot_id"));
        let boot_id = boot_id.or_fail(Code::Inventory, || "the boot id cannot be read")?;
        let lock = lock(&own.join("lock")).await?;
        let checkpoint = Checkpoint::open(&own.join("checkpoint.json"), boot_id.trim());
        metrics.claims(checkpoint.len());
        let health = Health { node: place.node.clone(), state: state.clone() };
        let claims = Claims {
            node: place.node.clone(),
            api_server: Arc::clone(&api_server),
            state,
            metrics,
            checkpoint: Arc::new(Mutex::new(checkpoint)),
        };
        let endpoint = own.join("dra.sock");
        let registration = place.registrations.join(format!("{DRIVER}-reg.sock"));
        let registrar = Registrar { endpoint: endpoint.clone() };
        let services =
            Services { claims: DraPluginServer::new(claims), health: DraResourceHealthServer::new(health) };
        // The kubelet calls the endpoint as soon as it finds the registration.
        let service = tokio::spawn(serve_at(Socket::bind(&endpoint)?, services));
        let registrations =
            tokio::spawn(serve_at(Socket::bind(&registration)?, RegistrationServer::new(registrar)));
        Ok(Self {
            publisher: Publisher::start(api_server, place.node.clone())?,
            sys: place.sys.clone(),
            _lock: lock,
            tasks: [registrations, service],
        })
    }

    /// What can be allocated from now on; nothing without a state.
    pub fn offer(&self, state: Option<&State>) {
        let devices = state.map(|state| {
            let roots = slice::pcie_roots(&self.sys, &state.inventory);
            let described = |device| slice::described(device, &state.inventory.driver, &roots);
            slice::offered(state).map(described).collect()
        });
        self.publisher.offer(devices.unwrap_or_default());
    }
}

async fn lock(path: &Path) -> Result<File> {
    let failed = || format!("{} cannot be locked", path.display());
    let file = File::create(path).or_fail(Code::Config, failed)?;
    let mut said = false;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(errno).or_fail(Code::Config, failed),
        }
        if !said {
            tracing::warn!("another process is {DRIVER} on this node; its end is waited for");
            said = true;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Serves at a socket, and makes a new one if the socket is removed. If another program listens under the name, this waits
/// for its end. The socket is removed with the task.
async fn serve_at<S>(first: (UnixListener, Socket), service: S)
where
    S: Service<http::Request<Incoming>, Response = http::Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    let (mut listener, mut socket) = first;
    loop {
        select! {
            never = grpc::serve(listener, service.clone()) => match never {},
            () = lost(&socket) => {}
        }
        let path = socket.path().to_path_buf();
        loop {
            match Socket::bind(&path) {
                Ok(bound) => break (listener, socket) = bound,
                Err(error) => tracing::error!("{error}"),
            }
            tokio::time::sleep(LOST).await;
        }
        tracing::info!("{} was removed and made again", path.display());
    }
}

/// Waits until no process listens under the name.
async fn lost(socket: &Socket) {
    let mut said = false;
    loop {
        tokio::time::sleep(LOST).await;
        match socket.standing() {
            Standing::Ours => said = false,
            Standing::Gone => return,
            Standing::Taken => match socket::listener_of(socket.path()).await {
                None => return,
                Some(other) if !said => {
                    tracing::warn!(
                        "{other} has taken {}: it is {DRIVER} on this node now, and this driver waits for its end; run one of both",
                        socket.path().display()
                    );
                    said = true;
                }
                Some(_) => {}
            },
        }
    }
}

/// A checkpoint that another process has left.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    checkpoint::fuzz(bytes);
}
