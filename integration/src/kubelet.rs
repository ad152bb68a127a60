//! A kubelet of ours, as far as a device plugin sees one: takes registrations on kubelet.sock and speaks to what is registered.

use crate::{Simulated, TestHost, dist, run, until};
use gpurun_device_plugin::{
    api::device_plugin::{
        AllocateRequest, ContainerAllocateRequest, ContainerAllocateResponse,
        ContainerPreferredAllocationRequest, Device, Empty, ListAndWatchResponse, PreferredAllocationRequest,
        RegisterRequest,
        device_plugin_client::DevicePluginClient,
        registration_server::{Registration, RegistrationServer},
    },
    api::dra::{
        Claim, NodePrepareResourcesRequest, NodeUnprepareResourcesRequest, dra_plugin_client::DraPluginClient,
    },
    api::dra_health::{
        DeviceHealth, HealthStatus, NodeWatchResourcesRequest,
        dra_resource_health_client::DraResourceHealthClient,
    },
    api::pod_resources::{
        CdiDevice, ClaimResource, ContainerDevices, ContainerResources, DynamicResource,
        ListPodResourcesRequest, ListPodResourcesResponse, PodResources,
        pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer},
    },
    api::registration::{
        InfoRequest, PluginInfo, RegistrationStatus, registration_client::RegistrationClient,
    },
    grpc,
};
use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};
use tokio::net::UnixListener;
use tonic::{Request, Response, Status};

/// Registrations, and when each came.
type Registered = Arc<Mutex<Vec<(RegisterRequest, Instant)>>>;

/// A node's kubelet. It ends when it is dropped, and leaves its socket behind, as one that is killed.
#[derive(Debug)]
pub struct Kubelet {
    socket: PathBuf,
    registered: Registered,
    runtime: tokio::runtime::Runtime,
}

struct Registrations(Registered);

#[tonic::async_trait]
impl Registration for Registrations {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        self.0.lock().expect("nobody panics with it").push((request.into_inner(), Instant::now()));
        Ok(Response::new(Empty {}))
    }
}

impl Kubelet {
    /// Starts one in a directory, as the real one starts: whatever is in it goes first.
    pub fn start(directory: &Path) -> Self {
        for entry in fs::read_dir(directory).expect("a directory").flatten() {
            fs::remove_file(entry.path()).expect("a socket");
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let registered = Registered::default();
        let socket = directory.join("kubelet.sock");
        let listener = {
            let _entered = runtime.enter();
            UnixListener::bind(&socket).expect("a new socket")
        };
        let service = RegistrationServer::new(Registrations(Arc::clone(&registered)));
        runtime.spawn(async move { match grpc::serve(listener, service).await {} });
        Self { socket, registered, runtime }
    }

    /// Tells of pods at this socket.
    pub fn tell_pods(&self, socket: &Path) -> Pods {
        let pods = Pods::default();
        let listener = {
            let _entered = self.runtime.enter();
            UnixListener::bind(socket).expect("a new socket")
        };
        let service = PodResourcesListerServer::new(pods.clone());
        self.runtime.spawn(async move { match grpc::serve(listener, service).await {} });
        pods
    }

    /// The registration of a resource, once it has come.
    pub fn registration(&self, resource: &str) -> (RegisterRequest, Instant) {
        let mut found = None;
        until(resource, || {
            let all = self.registered.lock().expect("nobody panics with it");
            found = all.iter().find(|(request, _)| request.resource_name == resource).cloned();
            found.is_some()
        });
        found.expect("it was waited for")
    }

    /// The names of what is registered.
    pub fn resources(&self) -> Vec<String> {
        let all = self.registered.lock().expect("nobody panics with it");
        all.iter().map(|(request, _)| request.resource_name.clone()).collect()
    }

    /// The service of a resource, by the socket that it registered with.
    pub fn resource(&self, resource: &str) -> Resource<'_> {
        let endpoint = self.registration(resource).0.endpoint;
        let channel = self.runtime.block_on(grpc::connect(&self.socket.with_file_name(endpoint)));
        Resource { kubelet: self, client: DevicePluginClient::new(channel.expect("it listens")) }
    }
}

/// A resource's service.
#[derive(Debug)]
pub struct Resource<'a> {
    kubelet: &'a Kubelet,
    client: DevicePluginClient<grpc::Channel>,
}

impl Resource<'_> {
    /// What a container gets with these devices, or the refusal.
    pub fn allocate(&mut self, ids: &[&str]) -> Result<ContainerAllocateResponse, Status> {
        let container =
            ContainerAllocateRequest { devices_ids: ids.iter().map(ToString::to_string).collect() };
        let request = AllocateRequest { container_requests: vec![container] };
        let response = self.kubelet.runtime.block_on(self.client.allocate(request))?.into_inner();
        let [response] = <[_; 1]>::try_from(response.container_responses).expect("one for one container");
        Ok(response)
    }

    /// Which devices it would take.
    pub fn preferred(&mut self, available: &[&str], size: i32) -> Vec<String> {
        let container = ContainerPreferredAllocationRequest {
            available_device_i_ds: available.iter().map(ToString::to_string).collect(),
            must_include_device_i_ds: Vec::new(),
            allocation_size: size,
        };
        let request = PreferredAllocationRequest { container_requests: vec![container] };
        let response = self.kubelet.runtime.block_on(self.client.get_preferred_allocation(request));
        let response = response.expect("it prefers some").into_inner();
        response.container_responses.into_iter().flat_map(|container| container.device_i_ds).collect()
    }

    /// Its lists from now on.
    pub fn watch(&mut self) -> Lists {
        let stream = self.kubelet.runtime.block_on(self.client.list_and_watch(Empty {}));
        let mut stream = stream.expect("it tells its devices").into_inner();
        let (list, lists) = mpsc::channel();
        self.kubelet.runtime.spawn(async move {
            while let Ok(Some(next)) = stream.message().await {
                if list.send((next, Instant::now())).is_err() {
                    return;
                }
            }
        });
        Lists { lists, newest: ListAndWatchResponse::default() }
    }
}

/// Lists of devices, as they come.
#[derive(Debug)]
pub struct Lists {
    lists: mpsc::Receiver<(ListAndWatchResponse, Instant)>,
    newest: ListAndWatchResponse,
}

impl Lists {
    /// Waits for one that is like this, and says when it came.
    pub fn until(&mut self, what: &str, is_it: impl Fn(&[Device]) -> bool) -> Instant {
        loop {
            let next = self.lists.recv_timeout(Duration::from_secs(60));
            let (list, when) =
                next.unwrap_or_else(|error| panic!("{what}: {error}; last: {:?}", self.newest));
            self.newest = list;
            if is_it(&self.newest.devices) {
                return when;
            }
        }
    }

    /// The ids of the newest list's devices that are like this.
    pub fn ids(&self, health: &str) -> Vec<&str> {
        let devices = self.newest.devices.iter().filter(|device| device.health == health);
        devices.map(|device| device.id.as_str()).collect()
    }

    /// Waits until these are unhealthy, and all others healthy.
    pub fn until_unhealthy(&mut self, ids: &[&str]) -> Instant {
        self.until(&format!("{ids:?} unhealthy"), |devices| {
            let unhealthy: Vec<_> = devices
                .iter()
                .filter(|device| device.health != "Healthy")
                .map(|device| device.id.as_str())
                .collect();
            !devices.is_empty() && unhealthy == ids
        })
    }

    /// Whether no other list has come.
    pub fn is_quiet(&self) -> bool {
        self.lists.try_recv().is_err()
    }
}

/// What the kubelet tells of its pods, at a socket of its own: a test says it.
#[derive(Debug, Clone, Default)]
pub struct Pods(Arc<Mutex<Vec<PodResources>>>);

#[tonic::async_trait]
impl PodResourcesLister for Pods {
    async fn list(
        &self,
        _: Request<ListPodResourcesRequest>,
    ) -> Result<Response<ListPodResourcesResponse>, Status> {
        let pod_resources = self.0.lock().expect("nobody panics with it").clone();
        Ok(Response::new(ListPodResourcesResponse { pod_resources }))
    }
}

impl Pods {
    /// A pod's container `main` has these devices of a resource, and these CDI devices by a claim.
    pub fn have(&self, pod: &str, resource: &str, devices: &[&str], by_claim: &[&str]) {
        let strings = |words: &[&str]| words.iter().map(ToString::to_string).collect();
        let cdi_devices = by_claim.iter().map(|name| CdiDevice { name: (*name).into() }).collect();
        let container = ContainerResources {
            name: "main".into(),
            devices: vec![ContainerDevices { resource_name: resource.into(), device_ids: strings(devices) }],
            dynamic_resources: vec![DynamicResource { claim_resources: vec![ClaimResource { cdi_devices }] }],
        };
        let pod = PodResources { name: pod.into(), namespace: "ml".into(), containers: vec![container] };
        self.0.lock().expect("nobody panics with it").push(pod);
    }
}

/// A driver of claims, by the sockets that it has for kubelets.
#[derive(Debug)]
pub struct Driver {
    runtime: tokio::runtime::Runtime,
    info: PluginInfo,
}

/// What was prepared for a claim: devices with the CDI names of each, or the refusal.
pub type Prepared = Result<Vec<(String, Vec<String>)>, String>;

impl Driver {
    /// Finds it in the directory of registrations, as a kubelet does, and tells it that it is known.
    pub fn find(host: &TestHost) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let mut found = None;
        until("a registration", || {
            found = runtime.block_on(async {
                let channel =
                    grpc::connect(&host.path().join("registry/gpu.nvidia.com-reg.sock")).await.ok()?;
                let mut client = RegistrationClient::new(channel);
                let info = client.get_info(InfoRequest {}).await.ok()?.into_inner();
                let status = RegistrationStatus { plugin_registered: true, error: String::new() };
                client.notify_registration_status(status).await.ok()?;
                Some(info)
            });
            found.is_some()
        });
        Self { runtime, info: found.expect("it was waited for") }
    }

    /// What it said of itself: type, name, services.
    pub fn info(&self) -> (&str, &str, Vec<&str>) {
        let services = self.info.supported_versions.iter().map(String::as_str).collect();
        (&self.info.r#type, &self.info.name, services)
    }

    /// Prepares a claim of the namespace `ml`, in the words of a version of the API.
    pub fn prepare(&self, version: &'static str, name: &str, uid: &str) -> Prepared {
        let request = NodePrepareResourcesRequest { claims: vec![claim(name, uid)] };
        let response =
            self.runtime.block_on(async { self.client(version).await.node_prepare_resources(request).await });
        let answer =
            response.expect("no claim fails all").into_inner().claims.remove(uid).expect("an answer");
        if !answer.error.is_empty() {
            return Err(answer.error);
        }
        Ok(answer.devices.into_iter().map(|device| (device.device_name, device.cdi_device_ids)).collect())
    }

    /// Takes it back.
    pub fn unprepare(&self, name: &str, uid: &str) -> String {
        let request = NodeUnprepareResourcesRequest { claims: vec![claim(name, uid)] };
        let response =
            self.runtime.block_on(async { self.client("v1").await.node_unprepare_resources(request).await });
        response.expect("no claim fails all").into_inner().claims.remove(uid).expect("an answer").error
    }

    /// The devices' health as it is now, in the words of a version of the API: `Healthy`, or why not, by name.
    pub fn health(&self, version: &'static str) -> BTreeMap<String, String> {
        let response = self.runtime.block_on(async {
            let channel = grpc::connect(Path::new(&self.info.endpoint)).await.expect("it listens");
            let mut client = DraResourceHealthClient::new(Speaking { channel, version });
            let mut stream = client
                .node_watch_resources(NodeWatchResourcesRequest {})
                .await
                .expect("a stream")
                .into_inner();
            stream.message().await.expect("it does not end").expect("a first list")
        });
        let health = |one: DeviceHealth| {
            let healthy = one.health == i32::from(HealthStatus::Healthy);
            let name = one.device.expect("it is required").device_name;
            (name, if healthy { "Healthy".into() } else { one.message })
        };
        response.devices.into_iter().map(health).collect()
    }

    async fn client(&self, version: &'static str) -> DraPluginClient<Speaking> {
        let channel = grpc::connect(Path::new(&self.info.endpoint)).await.expect("it listens");
        DraPluginClient::new(Speaking { channel, version })
    }
}

fn claim(name: &str, uid: &str) -> Claim {
    Claim { namespace: "ml".into(), uid: uid.into(), name: name.into() }
}

/// A connection on which v1's methods have the names of another version.
#[derive(Debug, Clone)]
struct Speaking {
    channel: grpc::Channel,
    version: &'static str,
}

impl tower_service::Service<http::Request<tonic::body::Body>> for Speaking {
    type Response = <grpc::Channel as tower_service::Service<http::Request<tonic::body::Body>>>::Response;
    type Error = <grpc::Channel as tower_service::Service<http::Request<tonic::body::Body>>>::Error;
    type Future = <grpc::Channel as tower_service::Service<http::Request<tonic::body::Body>>>::Future;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<tonic::body::Body>) -> Self::Future {
        // /k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/…, /v1.DRAResourceHealth/…
        let path = request.uri().path().replacen("v1.DRA", &format!("{}.DRA", self.version), 1);
        *request.uri_mut() = path.parse().expect("a path");
        self.channel.call(request)
    }
}

/// gpurun-device-plugin on a simulated host, with a kubelet's directory of its own.
#[derive(Debug)]
pub struct Plugin {
    process: Child,
    directory: PathBuf,
}

impl Plugin {
    /// The directory of a host's kubelet.
    pub fn directory(host: &TestHost) -> PathBuf {
        let directory = host.path().join("device-plugins");
        fs::create_dir_all(&directory).expect("a directory of its own");
        directory
    }

    /// The command.
    pub fn command(host: &TestHost, options: &[&str]) -> Command {
        let directory = Self::directory(host);
        let mut command = Command::new(dist("gpurun-device-plugin"));
        command
            .env_clear()
            .env("GPURUN_SIMULATED_HOST", host.path())
            .env("GPURUN_STATE_DIR", host.state_dir(0))
            .env("KUBELET_SOCKET", directory.join("kubelet.sock"))
            .arg("--cdi-directory")
            .arg(host.path().join("cdi"))
            .args(options)
            .stdin(Stdio::null());
        command
    }

    /// One that runs.
    pub fn of(host: &TestHost, process: Child) -> Self {
        Self { process, directory: Self::directory(host) }
    }

    /// Starts it.
    pub fn start(host: &TestHost, options: &[&str]) -> Self {
        let process = Self::command(host, options).spawn().expect("gpurun-device-plugin");
        Self::of(host, process)
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends it a signal: `-HUP`.
    pub fn signal(&self, name: &str) {
        assert_eq!(run(Command::new("kill").args([name, &self.id().to_string()])).code, 0);
    }

    /// Waits for its end, and says the exit code.
    pub fn end(&mut self) -> Option<i32> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().expect("our own child") {
                return status.code();
            }
            assert!(started.elapsed() < Duration::from_secs(10), "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its sockets that are there.
    pub fn sockets(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory).expect("a directory").flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| name != "kubelet.sock");
        names.sort_unstable();
        names
    }

    /// The programs that it runs, by name.
    pub fn children(&self) -> BTreeMap<u32, String> {
        let id = self.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        let name =
            |id: &u32| fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default().trim().to_owned();
        children.split_whitespace().filter_map(|id| id.parse().ok()).map(|id| (id, name(&id))).collect()
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.process.kill().and_then(|()| self.process.wait());
    }
}

/// Lets the simulated driver report something: `xid GPU-… 79`.
pub fn driver_says(host: &impl Simulated, line: &str) -> Instant {
    let fifo = OpenOptions::new().read(true).write(true).open(host.directory().join("events"));
    let now = Instant::now();
    fifo.and_then(|mut fifo| fifo.write_all(format!("{line}\n").as_bytes())).expect("a FIFO");
    now
}

/// Takes a GPU away from NVML, or gives it back.
pub fn lose(host: &impl Simulated, uuid: &str, lost: bool) -> Instant {
    let file = host.directory().join("gpus").join(uuid);
    if lost {
        fs::write(file, "lost").expect("a directory of its own");
    } else {
        fs::remove_file(file).expect("it was lost");
    }
    driver_says(host, "look")
}
