//! The plugin's life: takes in what the inventory, the driver, the kubelet's directory and the administrator say, and makes a
//! [`State`] of it, from which everybody is answered.

mod sockets;

use crate::{
    api_server::ApiServer,
    config::{Cli, IdStrategy, Options},
    dra::{Dra, Place},
    events::Watcher,
    health::{Event, Health, meaning},
    health_file::HealthFile,
    http_server::{self, Answers},
    labels::{self, Labels, Machine},
    metrics::Metrics,
    mps::{self, Daemons},
    node_labels,
    pods::Pods,
    registration,
    resources::{Resource, resources},
    response::{CDI_CLASS, CDI_IMEX, CDI_VENDOR, FEATURES},
    socket::Socket,
    state::State,
};
use gpurun::{
    apply::{
        cdi::{self, NameStrategy},
        whole_file,
    },
    commands::Context,
    error::{Code, OrFail, Result},
    formats,
    inventory::{FileKind, Fingerprint, Gpu, HostPath, Inventory, nvml::Report, watch},
    plan, programs,
    vocabulary::{DriverCapability, GatedFeature},
};
use sockets::Running;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::{
    net::TcpListener,
    select,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch as newest},
};

/// Retry interval after failures whose end is not reported.
const AGAIN: Duration = Duration::from_secs(30);
/// So long the same is not said again of the same GPU.
const SAID: Duration = Duration::from_secs(10);
/// Reports that wait: more than the driver has at a time.
const REPORTS: usize = 64;

struct Plugin {
    cli: Cli,
    context: Context,
    options: Options,
    /// The newest that was read.
    inventory: Option<Inventory>,
    /// Of the newest that could be read.
    driver: Option<Fingerprint>,
    /// GPUs that were there and do not answer any more: the node has them still.
    gone: Vec<Gpu>,
    health: Health,
    health_file: HealthFile,
    state: newest::Sender<Option<Arc<State>>>,
    metrics: Arc<Metrics>,
    pods: Pods,
    /// By resource.
    servers: BTreeMap<String, Running>,
    watcher: Option<Watcher>,
    reports: mpsc::Sender<Report>,
    /// To who takes in what was read of the host.
    read: mpsc::UnboundedSender<Result<Inventory>>,
    /// What was said of GPUs a moment ago, and how often since: programs can make errors as fast as they like.
    said: BTreeMap<(String, String), (Instant, u32)>,
    daemons: Daemons,
    /// What the newest driver has for MPS, under its names in this pod.
    mps: Result<Arc<mps::Driver>>,
    /// To who labels the node, if somebody does.
    labels: Option<std::sync::mpsc::Sender<Labels>>,
    /// Those of before.
    labelled: Option<Labels>,
    /// In place of servers, where the scheduler allocates devices.
    dra: Option<Dra>,
    again: Option<Instant>,
    /// Warnings that were already logged.
    warned: BTreeSet<String>,
}

/// Serves the kubelet until SIGTERM.
///
/// # Errors
/// [`Code::Config`], and those of the inventory where `--fail-on-init-error` wants it.
pub async fn serve(mut cli: Cli) -> Result<()> {
    let (options, warnings) = Options::read(&cli.flags)?;
    let here = options.container_driver_root.clone().or_else(|| options.driver_root.clone());
    cli.global.driver_root = cli.global.driver_root.or(here);
    cli.global.dev_root = cli.global.dev_root.or_else(|| options.dev_root.clone());
    let context = Context::new(&cli.global)?;
    let failed = || "signals cannot be waited for";
    let mut end = signal(SignalKind::terminate()).or_fail(Code::Internal, failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).or_fail(Code::Internal, failed)?;
    let mut reload = signal(SignalKind::hangup()).or_fail(Code::Internal, failed)?;
    let (notices, mut noticed) = mpsc::unbounded_channel();
    if let Some(socket) = &options.kubelet_socket
        && !options.dra
    {
        registration::watch(socket, notices)?;
    }
    let (state, newest_state) = newest::channel(None);
    let metrics = Arc::new(Metrics::default());
    let socket = PathBuf::from(&cli.flags.pod_resources_socket);
    let pods = Pods::new(Some(socket).filter(|socket| !socket.as_os_str().is_empty()));
    let answers = Answers { metrics: Arc::clone(&metrics), state: newest_state.clone(), pods: pods.clone() };
    let probe_socket = serve_http(&cli, answers).await?;
    let api_server = (options.dra || cli.flags.label_node.is_some()).then(ApiServer::of_pod).transpose()?;
    let api_server = api_server.map(Arc::new);
    let labels = match (&cli.flags.label_node, &api_server) {
        (Some(node), Some(api_server)) => Some(label(node, Arc::clone(api_server))?),
        _ => None,
    };
    let dra = match api_server.filter(|_| options.dra) {
        Some(api_server) => {
            let place = place(&cli, &context)?;
            select! {
                dra = Dra::start(&place, api_server, newest_state, Arc::clone(&metrics)) => Some(dra?),
                _ = end.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
            }
        }
        None => None,
    };
    let (reports, mut reported) = mpsc::channel(REPORTS);
    let (standings, mut standing) = mpsc::unbounded_channel();
    let (read, mut inventories) = mpsc::unbounded_channel();
    follow(&context, read.clone())?;
    let health_file = cli.flags.health_file.clone();
    let health_file = health_file.unwrap_or_else(|| context.state_dir.join("device-health.json"));
    let health_file = HealthFile::new(health_file, &context.host);
    let daemons = Daemons::new(options.mps_root.clone(), standings);
    let mut plugin = Plugin {
        cli,
        context,
        options,
        inventory: None,
        driver: None,
        gone: Vec::new(),
        health: Health::default(),
        health_file,
        state,
        metrics,
        pods,
        servers: BTreeMap::new(),
        watcher: None,
        reports,
        read,
        said: BTreeMap::new(),
        daemons,
        mps: Err(mps::missing()),
        labels,
        labelled: None,
        dra,
        again: None,
        warned: BTreeSet::new(),
    };
    plugin.warn_once(warnings);
    plugin.health.watch(plugin.options.watched.clone());
    plugin.health_file.read(&mut plugin.health);
    loop {
        let next = [plugin.health.next(), plugin.again].into_iter().flatten().min();
        select! {
            _ = end.recv() => break,
            _ = interrupt.recv() => break,
            _ = reload.recv() => plugin.reload(),
            Some(inventory) = inventories.recv() => plugin.inventory(inventory)?,
            Some(report) = reported.recv() => plugin.report(report),
            Some(what) = noticed.recv() => plugin.notice(what).await,
            () = until(next) => {
                plugin.health.pass(Instant::now());
                plugin.retake_sockets().await;
                plugin.publish();
            }
            Some(standing) = standing.recv() => plugin.standing(standing),
        }
    }
    // No container may use a daemon that is ending.
    plugin.servers.clear();
    drop(probe_socket);
    plugin.daemons.end().await;
    Ok(())
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Serves Prometheus and the kubelet's probes. The socket is removed when it is dropped.
async fn serve_http(cli: &Cli, answers: Answers) -> Result<Option<Socket>> {
    if let Some(address) = cli.flags.metrics_address {
        let listener = TcpListener::bind(address).await;
        let listener = listener
            .or_fail(Code::Config, || format!("{address} cannot be listened on"))
            .map_err(|error| error.fix("name a free address of this host with --metrics-address"))?;
        tokio::spawn(http_server::serve(listener, answers.clone()));
    }
    let Some(path) = &cli.flags.probe_socket else { return Ok(None) };
    let (listener, socket) = Socket::bind(path)?;
    tokio::spawn(http_server::serve(listener, answers));
    Ok(Some(socket))
}

/// Reads the host in a thread of its own, again each time it is another.
fn follow(context: &Context, read: mpsc::UnboundedSender<Result<Inventory>>) -> Result<()> {
    let (host, state_dir) = (context.host.clone(), context.state_dir.clone());
    let thread = std::thread::Builder::new().name("inventory".into()).spawn(move || {
        let ended = watch::follow(&host, &state_dir, |inventory| drop(read.send(inventory)));
        drop(read.send(ended.map(|never| match never {})));
    });
    thread.map(drop).or_fail(Code::Internal, || "no thread can be started")
}

/// Labels the node in a thread of its own: the API server answers when it can.
fn label(node: &str, api_server: Arc<ApiServer>) -> Result<std::sync::mpsc::Sender<Labels>> {
    let (labels, newest) = std::sync::mpsc::channel();
    let node = node.to_owned();
    let thread = std::thread::Builder::new().name("labels".into());
    let thread = thread.spawn(move || node_labels::keep(&api_server, &node, &newest));
    thread.map(|_| labels).or_fail(Code::Internal, || "no thread can be started")
}

/// Where the kubelet finds a driver of claims.
fn place(cli: &Cli, context: &Context) -> Result<Place> {
    let node = cli.flags.node_name.clone().filter(|name| !name.is_empty());
    let node =
        node.ok_or("its devices are a pool of its name").or_fail(Code::Config, || "the node has no name");
    let node = node.map_err(|error| error.fix("name it as the cluster does: --node-name, NODE_NAME"))?;
    Ok(Place {
        node,
        registrations: cli.flags.kubelet_registrar_directory_path.clone(),
        plugins: cli.flags.kubelet_plugins_directory_path.clone(),
        proc: context.host.proc.clone(),
        sys: context.host.sys.clone(),
    })
}

impl Plugin {
    /// Another configuration. One that cannot be used changes nothing.
    fn reload(&mut self) {
        match Options::read(&self.cli.flags) {
            Ok((options, warnings)) => {
                self.warn_once(warnings);
                self.health.watch(options.watched.clone());
                // Daemons run there, and running containers use it.
                let mps_root = self.options.mps_root.clone();
                // The inventory reads it.
                let container_driver_root = self.options.container_driver_root.clone();
                self.options = Options { mps_root, container_driver_root, ..options };
                self.servers.clear();
                self.publish();
            }
            Err(error) => tracing::error!("{error}"),
        }
    }

    fn warn_once(&mut self, warnings: impl IntoIterator<Item = String>) {
        for warning in warnings {
            if !self.warned.contains(&warning) {
                tracing::warn!("{warning}");
                self.warned.insert(warning);
            }
        }
    }

    /// The host is another.
    fn inventory(&mut self, inventory: Result<Inventory>) -> Result<()> {
        match inventory {
            Ok(inventory) => self.take(inventory),
            Err(error) if self.options.fail_on_init_error && self.inventory.is_none() => return Err(error),
            Err(error) => {
                // Nothing is given out of a driver that goes or is half there.
                tracing::error!("{error}");
                if error.code() == Code::NoDriver {
                    self.driver = None;
                    self.forget();
                }
                self.inventory = None;
                self.watcher = None;
                self.publish();
            }
        }
        Ok(())
    }

    /// A driver that is loaded anew has reset every GPU.
    fn forget(&mut self) {
        self.health.reset();
        self.gone.clear();
        self.keep_health();
    }

    /// What cannot be kept is said; nobody is refused a GPU for it.
    fn keep_health(&self) {
        if let Err(error) = self.health_file.write(&self.health) {
            tracing::warn!("{error}");
        }
    }

    fn take(&mut self, inventory: Inventory) {
        let now = &inventory.fingerprint;
        let same_driver = self.driver.as_ref().is_some_and(|was| was.module_version == now.module_version);
        let same_gpus = same_driver && self.driver.as_ref().is_some_and(|was| was.pci_gpus == now.pci_gpus);
        if !same_driver && self.driver.is_some() {
            self.forget();
        }
        let before = self.inventory.take();
        let was_there =
            |uuid: &str| before.iter().flat_map(|before| &before.gpus).any(|gpu| gpu.uuid == uuid);
        for gpu in inventory.gpus.iter().filter(|gpu| !was_there(&gpu.uuid)) {
            // The device may have been lost under a previous process, so only this check finds its recovery.
            for uuid in gpu.mig_devices.iter().map(|part| &part.uuid).chain([&gpu.uuid]) {
                self.health.event(Instant::now(), uuid, &Event::Answers);
            }
        }
        let known = before.into_iter().flat_map(|before| before.gpus).chain(std::mem::take(&mut self.gone));
        let still_driven = |gpu: &Gpu| {
            !inventory.gpus.iter().any(|now| now.uuid == gpu.uuid)
                && inventory.fingerprint.pci_gpus.contains(&gpu.pci)
        };
        self.gone = known.filter(still_driven).collect();
        if !same_gpus || self.watcher.is_none() {
            // First the old one ends: two would share what the driver says.
            self.watcher = None;
            self.watcher = nvml_of(&inventory).and_then(|nvml| {
                let started = Watcher::start(nvml, self.reports.clone());
                started.map_err(|error| tracing::error!("nobody watches the GPUs: {error}")).ok()
            });
        }
        self.driver = Some(inventory.fingerprint.clone());
        self.mps = mps::Driver::of(&inventory).map(Arc::new);
        // The kubelet and engines are outside the plugin's pod.
        self.inventory = Some(match &self.options.container_driver_root {
            Some(here) => {
                inventory.renamed(here, self.options.driver_root.as_deref().unwrap_or(Path::new("/")))
            }
            None => inventory,
        });
        self.publish();
    }

    /// An MPS control daemon is ready, or is not any more.
    fn standing(&mut self, standing: mps::Standing) {
        if standing.down.is_none() {
            self.metrics.mps_start(&standing.uuid);
        }
        if self.daemons.take(standing) {
            self.publish();
        }
    }

    /// The driver says something of a GPU.
    fn report(&mut self, report: Report) {
        let now = Instant::now();
        let (gpu, instance, event, words) = match report {
            Report::Xid { uuid, xid, instance } => {
                self.metrics.xid(&uuid, xid);
                (uuid, instance, Event::Xid(xid), Some(format!("XID {xid}: {}", meaning(xid))))
            }
            Report::Lost { uuid, words } => {
                (uuid, None, Event::Lost, Some(format!("it does not answer: {words}")))
            }
            Report::Answers { uuid } => (uuid, None, Event::Answers, None),
            Report::Unwatched { uuid, words } => {
                (uuid, None, Event::Unwatched, Some(format!("it cannot be watched: {words}")))
            }
            Report::Quiet => return,
        };
        let devices = self.devices(&gpu, instance);
        let mut changed = false;
        for device in &devices {
            changed |= self.health.event(now, device, &event);
        }
        if event != Event::Unwatched && !self.health.is_harmless(&event) {
            self.keep_health();
        }
        if changed {
            self.publish();
        }
        if let Some(words) = words {
            self.tell(&gpu, devices, words);
        }
        // One that was lost when the host was read is in no inventory, and nothing that is watched says that it has come back.
        let missing =
            self.inventory.as_ref().is_some_and(|now| !now.gpus.iter().any(|known| known.uuid == gpu));
        if event == Event::Answers && missing {
            let (host, read) = (self.context.host.clone(), self.read.clone());
            tokio::task::spawn_blocking(move || {
                if let Ok(inventory) = Inventory::read(&host) {
                    let _ = read.send(Ok(inventory));
                }
            });
        }
    }

    /// The devices that something which happened to a GPU, or to an instance of it, has happened to.
    fn devices(&self, uuid: &str, instance: Option<(u32, Option<u32>)>) -> Vec<String> {
        let gpus = self.inventory.iter().flat_map(|inventory| &inventory.gpus).chain(&self.gone);
        let Some(gpu) = gpus.into_iter().find(|gpu| gpu.uuid == uuid) else { return Vec::new() };
        let parts = gpu.mig_devices.iter().filter(|part| match instance {
            Some((gi, ci)) => part.gpu_instance == gi && ci.is_none_or(|ci| part.compute_instance == ci),
            None => true,
        });
        let whole = (instance.is_none() || !gpu.mig_enabled).then(|| gpu.uuid.clone());
        whole.into_iter().chain(parts.map(|part| part.uuid.clone())).collect()
    }

    /// Says what has happened to a GPU, and to whom: the pods that have it or the parts of it that it has happened to.
    fn tell(&mut self, gpu: &str, devices: Vec<String>, mut words: String) {
        let now = Instant::now();
        let before = self.said.get_mut(&(gpu.to_owned(), words.clone()));
        if let Some((_, often)) = before.filter(|(when, _)| now.duration_since(*when) < SAID) {
            *often += 1;
            return;
        }
        let often = self.said.insert((gpu.to_owned(), words.clone()), (now, 0)).map_or(0, |(_, often)| often);
        if often > 0 {
            let _ = write!(words, " ({often} times more in between)");
        }
        let gpu = gpu.to_owned();
        let (pods, state) = (self.pods.clone(), self.state.borrow().clone());
        tokio::spawn(async move {
            let held = match &state {
                Some(state) => pods.held(state).await.unwrap_or_default(),
                None => Vec::new(),
            };
            // Once for a container, however many replicas it has.
            let concerned: BTreeSet<_> = held
                .iter()
                .filter(|held| devices.contains(&held.device))
                .map(|held| (&held.device, &held.namespace, &held.pod, &held.container))
                .collect();
            if concerned.is_empty() {
                tracing::warn!(device = gpu, "{words}");
            }
            for (device, namespace, pod, container) in concerned {
                tracing::warn!(device, namespace, pod, container, "{words}");
            }
        });
    }

    /// Says which devices are given out no more, and which again.
    fn tell_health(&mut self, now: &State) {
        let before = self.state.borrow().as_ref().map(|before| before.unhealthy.clone()).unwrap_or_default();
        // That a daemon is started is as it should be.
        let said = |uuid: &String, why: &str| {
            why == mps::STARTED || before.get(uuid).is_some_and(|why| why != mps::STARTED)
        };
        for (uuid, why) in now.unhealthy.iter().filter(|(uuid, why)| !said(uuid, why)) {
            self.tell(uuid, vec![uuid.clone()], format!("it is given to no other container: {why}"));
        }
        for uuid in before.keys().filter(|uuid| !now.unhealthy.contains_key(*uuid)) {
            tracing::info!(device = uuid, "it is given out again");
        }
    }

    /// Makes a new state, and lets it be known.
    fn publish(&mut self) {
        let is_aside = self.servers.values().any(|running| running.is_aside);
        self.again = is_aside.then(|| Instant::now() + AGAIN);
        let state = match self.new_state() {
            Ok(state) => state.map(Arc::new),
            Err(error) => {
                tracing::error!("nothing is offered: {error}");
                self.again = Some(Instant::now() + AGAIN);
                None
            }
        };
        if let Some(state) = &state {
            self.tell_health(state);
        }
        if let Some(dra) = &self.dra {
            dra.offer(state.as_deref());
            self.state.send_replace(state);
            return;
        }
        let names: BTreeSet<String> =
            state.iter().flat_map(|state| &state.resources).map(|resource| resource.name.clone()).collect();
        let sockets: Vec<(String, String)> = state
            .iter()
            .flat_map(|state| &state.resources)
            .map(|resource| (resource.name.clone(), resource.socket()))
            .collect();
        self.state.send_replace(state);
        self.servers.retain(|name, _| names.contains(name));
        for (name, endpoint) in sockets {
            if self.servers.contains_key(&name) {
                continue;
            }
            match self.start(&name, &endpoint) {
                Ok(running) => drop(self.servers.insert(name, running)),
                Err(error) => {
                    tracing::error!("{error}");
                    self.again = Some(Instant::now() + AGAIN);
                }
            }
        }
    }

    fn new_state(&mut self) -> Result<Option<State>> {
        let Some(inventory) = &self.inventory else { return Ok(None) };
        // Nodes and majors that are not right are told of here, before anybody is sent to them.
        plan::driver::shared(inventory, DriverCapability::DEFAULT)?;
        let mut all = inventory.clone();
        all.gpus.extend(self.gone.iter().cloned());
        all.gpus.sort_by_key(|gpu| gpu.index);
        let resources = resources(&all, self.options.mig, &self.options.sharing)?;
        let mut without = Vec::new();
        if !inventory.gpus.is_empty() {
            let offered: Vec<_> = resources.iter().map(|resource| resource.name.as_str()).collect();
            without.extend(self.options.sharing.without_resource(&resources).map(|name| {
                format!(
                    "`sharing` in the configuration file has no effect for {name}: this node offers {}",
                    offered.join(", ")
                )
            }));
        }
        let mut options = self.options.clone();
        let channel = |n: &u32| plan::device::imex_channel(&inventory.driver, *n);
        if options.imex_required {
            options.shape.imex_channels.iter().try_for_each(|n| channel(n).map(drop))?;
        } else {
            options.shape.imex_channels.retain(|n| channel(n).is_ok());
        }
        if options.needs_cdi() && !inventory.gpus.is_empty() {
            write_documents(inventory, &options, &self.cli.flags.cdi_directory)?;
        }
        let gone =
            self.gone.iter().flat_map(|gpu| gpu.mig_devices.iter().map(|part| &part.uuid).chain([&gpu.uuid]));
        let mut unhealthy: BTreeMap<String, String> =
            gone.map(|uuid| (uuid.clone(), "it does not answer".to_owned())).collect();
        for device in resources.iter().flat_map(|resource| &resource.devices) {
            if let Some(why) = self.health.unhealthy(&device.uuid) {
                unhealthy.insert(device.uuid.clone(), why);
            }
        }
        let shares = mps::shares(&all, &resources);
        match &self.mps {
            Ok(driver) => self.daemons.keep(&shares, driver),
            Err(error) if !shares.is_empty() => return Err(error.clone()),
            Err(_) => {}
        }
        for share in shares {
            if let Some(why) = self.daemons.down(&share.uuid) {
                unhealthy.entry(share.uuid).or_insert(why);
            }
        }
        let (policy, inventory) = (self.context.config.policy()?, inventory.clone());
        self.tell_labels(&all, &resources);
        self.warn_once(without);
        let state = State { options, policy, inventory, resources, unhealthy };
        state.check_lists()?;
        Ok(Some(state))
    }

    /// Whoever is offered GPUs should not miss them for a label: what fails is said, no more.
    fn tell_labels(&mut self, inventory: &Inventory, resources: &[Resource]) {
        let file = &self.cli.flags.labels_file;
        if file.is_none() && self.labels.is_none() {
            return;
        }
        let machine =
            Machine::read(&self.context.host.sys, self.options.machine_type_file.as_deref(), inventory);
        let mut labels = labels::labels(inventory, &machine, resources, self.options.mig);
        if self.options.timestamp {
            labels::stamp(&mut labels, self.labelled.as_ref(), SystemTime::now());
        }
        self.labelled = Some(labels.clone());
        if let Some(path) = file
            && let Err(error) = whole_file::write(path, &labels::text(&labels), Code::Config)
        {
            tracing::error!("{error}");
        }
        if let Some(newest) = &self.labels {
            // Its thread lives as long as this does.
            let _ = newest.send(labels);
        }
    }
}

/// The CDI documents of this node. One that is the same is not written again.
fn write_documents(inventory: &Inventory, options: &Options, directory: &Path) -> Result<()> {
    let hook = match &options.hook {
        Some(hook) => hook.clone(),
        None => programs::find("gpurun-hook", Code::Cdi)?,
    };
    let document = |class: &str| cdi::Options {
        vendor: CDI_VENDOR.into(),
        class: class.into(),
        names: vec![match options.ids {
            IdStrategy::Uuid => NameStrategy::Uuid,
            IdStrategy::Index => NameStrategy::Index,
        }],
        only: None,
        all: true,
        hook: hook.clone(),
        newest: None,
    };
    let write = |class: &str, (document, warnings): (formats::cdi::Document, Vec<String>)| {
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        let path = directory.join(format!("{CDI_VENDOR}-{class}.json"));
        whole_file::write(&path, &formats::cdi::to_json(&document), Code::Cdi).map(drop)
    };
    let parts = plan::parts(inventory, DriverCapability::all() - DriverCapability::COMPAT32)?;
    write(CDI_CLASS, cdi::document(&parts, &document(CDI_CLASS))?)?;
    let shape = &options.shape;
    let features = FEATURES.iter().filter(|(feature, ..)| shape.features.contains(feature));
    let imex = (!shape.imex_channels.is_empty()).then_some((GatedFeature::Imex, CDI_IMEX));
    for (feature, class) in features.map(|(feature, _, class)| (*feature, *class)).chain(imex) {
        let offers = plan::device::offers(&inventory.driver, feature)?;
        write(class, cdi::feature(&offers, &document(class))?)?;
    }
    Ok(())
}

/// The driver's libnvidia-ml.
fn nvml_of(inventory: &Inventory) -> Option<HostPath> {
    inventory.driver.files.iter().find_map(|file| match &file.kind {
        FileKind::Library { name, is_32bit: false, .. } if name.starts_with("libnvidia-ml.so.") => {
            Some(file.path.clone())
        }
        _ => None,
    })
}
