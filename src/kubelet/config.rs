//! The administrator's settings: options, variables, and NVIDIA's configuration file ([`file`]). An option takes precedence over its
//! variable, and that over the file.

pub(crate) mod file;
mod go_yaml;
mod section;

use crate::{
    health::Watched,
    preference::SharedPolicy,
    resources::{MigStrategy, Sharing},
    response::{Shape, Strategy},
};
use clap::{Parser, ValueEnum};
use file::File;
use gpurun::{
    cli::{Global, go_flags::switch},
    error::{Code, Error, OrFail, Result},
    plan::Selected,
    text_file::TextFile,
    vocabulary::GatedFeature,
};
use std::{
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// Tells a Kubernetes node's kubelet of its GPUs.
#[derive(Debug, Parser)]
#[command(name = "gpurun-device-plugin", version)]
pub struct Cli {
    /// Where things are, and how much is said.
    #[command(flatten)]
    pub global: Global,
    /// What was typed, or set in the environment.
    #[command(flatten)]
    pub flags: Flags,
}

/// Options by the names, and variables, of NVIDIA's k8s-device-plugin.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    /// The configuration file (`version: v1`)
    #[arg(long, env = "CONFIG_FILE", value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// Driver root on the node; --driver-root overrides it
    #[arg(long, env = "NVIDIA_DRIVER_ROOT", value_name = "DIR")]
    nvidia_driver_root: Option<PathBuf>,
    /// Root of the device nodes on the node; --dev-root overrides it [default: the driver root]
    #[arg(long, env = "NVIDIA_DEV_ROOT", value_name = "DIR")]
    nvidia_dev_root: Option<PathBuf>,
    /// Device discovery strategy [default: auto]
    #[arg(long, env = "DEVICE_DISCOVERY_STRATEGY", value_enum, value_name = "STRATEGY")]
    device_discovery_strategy: Option<DiscoveryStrategy>,
    /// Driver root inside the plugin's pod [default: the driver root]
    #[arg(long, alias = "driver-root-ctr-path", env = "CONTAINER_DRIVER_ROOT", value_name = "DIR")]
    container_driver_root: Option<PathBuf>,
    /// How MIG devices are offered [default: none]
    #[arg(long, env = "MIG_STRATEGY", value_enum, value_name = "STRATEGY")]
    mig_strategy: Option<MigStrategy>,
    /// How containers get their devices; several between commas [default: envvar]
    #[arg(long, env = "DEVICE_LIST_STRATEGY", value_parser = strategy, value_delimiter = ',', value_name = "STRATEGY")]
    device_list_strategy: Option<Vec<Strategy>>,
    /// How devices are called in environments and CDI documents [default: uuid]
    #[arg(long, env = "DEVICE_ID_STRATEGY", value_enum, value_name = "NAME")]
    device_id_strategy: Option<IdStrategy>,
    /// The device nodes go with every strategy [default: false]
    #[arg(long, env = "PASS_DEVICE_SPECS", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch)]
    pass_device_specs: Option<bool>,
    /// End where there is no driver, instead of waiting for it [default: false]
    #[arg(long, env = "FAIL_ON_INIT_ERROR", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch)]
    fail_on_init_error: Option<bool>,
    /// Which replicas of shared devices are taken first [default: distributed]
    #[arg(long, env = "SHARED_DEVICES_ALLOCATION_POLICY", value_enum, value_name = "POLICY")]
    shared_devices_allocation_policy: Option<SharedPolicy>,
    /// The beginning of annotations with CDI names [default: cdi.k8s.io/]
    #[arg(long, env = "CDI_ANNOTATION_PREFIX", value_name = "PREFIX")]
    cdi_annotation_prefix: Option<String>,
    /// The hook's program on the host, for CDI documents [default: gpurun-hook beside this program]
    #[arg(long, alias = "nvidia-ctk-path", env = "NVIDIA_CDI_HOOK_PATH", value_name = "FILE")]
    nvidia_cdi_hook_path: Option<PathBuf>,
    /// Containers get /dev/gdrdrv [default: false]
    #[arg(long, env = "GDRCOPY_ENABLED", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch)]
    gdrcopy_enabled: Option<bool>,
    /// Containers get GPUDirect Storage [default: false]
    #[arg(long, env = "GDS_ENABLED", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch)]
    gds_enabled: Option<bool>,
    /// Containers get InfiniBand verbs [default: false]
    #[arg(long, env = "MOFED_ENABLED", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch)]
    mofed_enabled: Option<bool>,
    /// IMEX channels that containers get
    #[arg(long, env = "IMEX_CHANNEL_IDS", value_parser = channel, value_delimiter = ',', value_name = "N")]
    imex_channel_ids: Option<Vec<u32>>,
    /// Nothing is offered where such a channel is missing; otherwise containers do without it [default: false]
    #[arg(long, env = "IMEX_REQUIRED", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch)]
    imex_required: Option<bool>,
    /// Where MPS control daemons meet programs in containers [default: /run/nvidia/mps]
    #[arg(long, env = "MPS_ROOT", value_name = "DIR")]
    mps_root: Option<PathBuf>,
    /// The kubelet's socket; --kubelet-socket= registers with no kubelet [default: /var/lib/kubelet/device-plugins/kubelet.sock]
    #[arg(long, env = "KUBELET_SOCKET", value_name = "SOCKET")]
    kubelet_socket: Option<OsString>,
    /// What has happened to GPUs is kept here for the next plugin [default: device-health.json in GPURUN_STATE_DIR]
    #[arg(long, env = "HEALTH_FILE", value_name = "FILE")]
    pub health_file: Option<PathBuf>,
    /// Socket of the kubelet's pod resources API, for logs and metrics; --pod-resources-socket= turns it off
    #[arg(
        long,
        env = "POD_RESOURCES_SOCKET",
        default_value = "/var/lib/kubelet/pod-resources/kubelet.sock",
        value_name = "SOCKET"
    )]
    pub pod_resources_socket: OsString,
    /// Where CDI documents go
    #[arg(long, default_value = "/var/run/cdi", value_name = "DIR")]
    pub cdi_directory: PathBuf,
    /// Address for /metrics [default: not served]
    #[arg(long, env = "METRICS_ADDRESS", value_parser = address, value_name = "ADDRESS:PORT")]
    pub metrics_address: Option<SocketAddr>,
    /// Unix socket for /healthz and /readyz, used by --probe [default: not served]
    #[arg(long, env = "PROBE_SOCKET", value_name = "SOCKET")]
    pub probe_socket: Option<PathBuf>,
    /// Query a running plugin at --probe-socket; exits with 0 on success
    #[arg(long, value_enum, value_name = "QUESTION")]
    pub probe: Option<Probe>,
    /// The node's labels are written here, for node-feature-discovery (features.d/gpurun)
    #[arg(long, env = "LABELS_FILE", value_name = "FILE")]
    pub labels_file: Option<PathBuf>,
    /// The labels have no nvidia.com/gfd.timestamp [default: false]
    #[arg(long, env = "GFD_NO_TIMESTAMP", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch)]
    no_timestamp: Option<bool>,
    /// Where it says which machine this is [default: /sys/class/dmi/id/product_name]
    #[arg(long, env = "GFD_MACHINE_TYPE_FILE", value_name = "FILE")]
    machine_type_file: Option<PathBuf>,
    /// This node of the cluster gets the labels itself, from the API server; the pod's account must be allowed to patch it
    #[arg(long, env = "LABEL_NODE", value_name = "NODE")]
    pub label_node: Option<String>,
    /// Devices are allocated by the scheduler to claims (Dynamic Resource Allocation), and not by the kubelet [default: false]
    #[arg(long, env = "DRA", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch)]
    dra: Option<bool>,
    /// This node's name in the cluster, for --dra
    #[arg(long, env = "NODE_NAME", value_name = "NODE")]
    pub node_name: Option<String>,
    /// Where the kubelet looks for drivers, with --dra
    #[arg(
        long,
        env = "KUBELET_REGISTRAR_DIRECTORY_PATH",
        default_value = "/var/lib/kubelet/plugins_registry",
        value_name = "DIR"
    )]
    pub kubelet_registrar_directory_path: PathBuf,
    /// Where the driver has a directory of its own, with --dra
    #[arg(
        long,
        env = "KUBELET_PLUGINS_DIRECTORY_PATH",
        default_value = "/var/lib/kubelet/plugins",
        value_name = "DIR"
    )]
    pub kubelet_plugins_directory_path: PathBuf,
    /// XIDs that do not count: all, xids, or a list
    #[arg(
        long = "disable-healthchecks",
        env = "DP_DISABLE_HEALTHCHECKS",
        default_value = "",
        hide_default_value = true,
        value_name = "LIST"
    )]
    disable_healthchecks: String,
    /// XIDs that count all the same: all, or a list
    #[arg(
        long = "enable-healthchecks",
        env = "DP_ENABLE_HEALTHCHECKS",
        default_value = "",
        hide_default_value = true,
        value_name = "LIST"
    )]
    enable_healthchecks: String,
}

/// Parses a strategy such as `envvar`; spaces around it are allowed in comma-separated lists.
fn strategy(word: &str) -> Result<Strategy, String> {
    Strategy::from_str(word.trim(), false)
        .map_err(|_| "it can be envvar, volume-mounts, cdi-annotations, cdi-cri or direct".into())
}

/// Parses the number of an IMEX channel; spaces around it are allowed in comma-separated lists.
fn channel(word: &str) -> Result<u32, String> {
    word.trim().parse().map_err(|_| "a channel is a number from 0".into())
}

/// An address and a port; an IPv6 address may lack its brackets, as `$(POD_IP):9402` does.
fn address(text: &str) -> Result<SocketAddr, String> {
    let split = || {
        let (address, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
    };
    text.parse().ok().or_else(split).ok_or_else(|| "it must be ADDRESS:PORT, such as 0.0.0.0:9402".into())
}

/// The query of `--probe`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Probe {
    /// Whether the plugin's main loop runs
    Live,
    /// Whether devices are advertised
    Ready,
}

/// Device discovery strategy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DiscoveryStrategy {
    /// Through NVML
    #[default]
    Auto,
    /// Through NVML
    Nvml,
    /// Tegra's integrated GPU, which has no NVML
    Tegra,
}

/// How a device is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum IdStrategy {
    /// `GPU-…`, `MIG-…`
    #[default]
    Uuid,
    /// `0`, `0:1`
    Index,
}

impl IdStrategy {
    /// A device's name.
    pub fn name(self, device: Selected<'_>) -> String {
        match self {
            Self::Uuid => device.uuid().to_owned(),
            Self::Index => device.id().to_string(),
        }
    }
}

/// What holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How MIG devices are offered.
    pub mig: MigStrategy,
    /// What is shared.
    pub sharing: Sharing,
    /// Where MPS control daemons meet programs in containers.
    pub mps_root: PathBuf,
    /// Which replicas are taken first.
    pub shared_policy: SharedPolicy,
    /// How containers get their devices.
    pub shape: Shape,
    /// How devices are called.
    pub ids: IdStrategy,
    /// Driver root on the node.
    pub driver_root: Option<PathBuf>,
    /// Driver root in this process's mount namespace, if different.
    pub container_driver_root: Option<PathBuf>,
    /// Root of the device nodes in this process's mount namespace, if not the driver root.
    pub dev_root: Option<PathBuf>,
    /// The hook's program for CDI documents.
    pub hook: Option<PathBuf>,
    /// End where there is no driver.
    pub fail_on_init_error: bool,
    /// Containers get every IMEX channel that was named, or nothing.
    pub imex_required: bool,
    /// Where the plugin's own sockets are.
    pub sockets: PathBuf,
    /// The kubelet's; `None`: nobody is told.
    pub kubelet_socket: Option<PathBuf>,
    /// Which errors count.
    pub watched: Watched,
    /// Devices are allocated to claims, by the scheduler.
    pub dra: bool,
    /// Labels say when they last were others.
    pub timestamp: bool,
    /// Another file that says which machine this is.
    pub machine_type_file: Option<PathBuf>,
}

/// The longest configuration file, in bytes: as long as a ConfigMap may be.
const MAX_FILE: u64 = 1 << 20;

/// The kubelet's own (k8s.io/kubelet, pkg/apis/deviceplugin/v1beta1/constants.go).
const KUBELET_SOCKET: &str = "/var/lib/kubelet/device-plugins/kubelet.sock";

impl Options {
    /// The settings, and warnings about options without effect.
    ///
    /// # Errors
    /// [`Code::Config`]
    pub fn read(flags: &Flags) -> Result<(Self, Vec<String>)> {
        let mut file = match &flags.config_file {
            Some(path) => {
                let read = TextFile::read(path, MAX_FILE).and_then(|file| file.text().map(str::to_owned));
                let text = read
                    .or_fail(Code::Config, || format!("{} cannot be read", path.display()))
                    .map_err(|error| {
                        error.fix("name a readable file in CONFIG_FILE or --config-file, or leave both out")
                    })?;
                File::parse(&text)
                    .map_err(|error| error.context(format!("{} cannot be used", path.display())))?
            }
            None => File::default(),
        };
        let warnings = std::mem::take(&mut file.warnings);
        Ok((Self::merged(flags.clone(), file)?, warnings))
    }

    fn merged(flags: Flags, file: File) -> Result<Self> {
        let feature = |typed: Option<bool>, filed: Option<bool>, feature| {
            typed.or(filed).unwrap_or(false).then_some(feature)
        };
        if flags.device_discovery_strategy.or(file.discovery) == Some(DiscoveryStrategy::Tegra) {
            return Err(Error::new(Code::Config, "the device discovery strategy `tegra` is not supported")
                .cause("the plugin finds GPUs through NVML, which Tegra does not have")
                .fix("set --device-discovery-strategy=auto, and offer a Tegra GPU through `gpurun cdi generate --mode csv`"));
        }
        let driver_root = flags.nvidia_driver_root.or(file.nvidia_driver_root);
        let here = flags.container_driver_root.or(file.container_driver_root);
        let dev_root = flags.nvidia_dev_root.or(file.nvidia_dev_root);
        let socket = flags.kubelet_socket.map_or_else(|| KUBELET_SOCKET.into(), PathBuf::from);
        let socket = Some(socket).filter(|socket| !socket.as_os_str().is_empty());
        let directory = socket.as_deref().unwrap_or(Path::new(KUBELET_SOCKET)).parent();
        let directory = directory.unwrap_or(Path::new("/")).to_path_buf();
        Self {
            mig: flags.mig_strategy.or(file.mig_strategy).unwrap_or_default(),
            sharing: file.sharing,
            mps_root: flags.mps_root.or(file.mps_root).unwrap_or_else(|| PathBuf::from("/run/nvidia/mps")),
            shared_policy: flags.shared_devices_allocation_policy.unwrap_or_default(),
            shape: Shape {
                strategies: flags
                    .device_list_strategy
                    .or(file.device_list_strategy)
                    .unwrap_or_else(|| vec![Strategy::Envvar]),
                pass_device_specs: flags.pass_device_specs.or(file.pass_device_specs).unwrap_or(false),
                annotation_prefix: flags
                    .cdi_annotation_prefix
                    .or(file.cdi_annotation_prefix)
                    .unwrap_or_else(|| "cdi.k8s.io/".into()),
                features: [
                    feature(flags.gdrcopy_enabled, file.gdrcopy_enabled, GatedFeature::GdrCopy),
                    feature(flags.gds_enabled, file.gds_enabled, GatedFeature::Gds),
                    feature(flags.mofed_enabled, file.mofed_enabled, GatedFeature::Mofed),
                ]
                .into_iter()
                .flatten()
                .collect(),
                imex_channels: flags.imex_channel_ids.or(file.imex_channel_ids).unwrap_or_default(),
            },
            ids: flags.device_id_strategy.or(file.device_id_strategy).unwrap_or_default(),
            dev_root: dev_root
                .and_then(|dev_root| dev_root_here(&dev_root, driver_root.as_deref(), here.as_deref())),
            driver_root,
            container_driver_root: here,
            hook: flags.nvidia_cdi_hook_path.or(file.hook),
            fail_on_init_error: flags.fail_on_init_error.or(file.fail_on_init_error).unwrap_or(false),
            imex_required: flags.imex_required.or(file.imex_required).unwrap_or(false),
            sockets: directory,
            kubelet_socket: socket,
            watched: Watched::new(&flags.disable_healthchecks, &flags.enable_healthchecks),
            dra: flags.dra.unwrap_or(false),
            timestamp: !flags.no_timestamp.or(file.no_timestamp).unwrap_or(false),
            machine_type_file: flags.machine_type_file.or(file.machine_type),
        }
        .of_claims()
    }

    /// Claims say themselves which MIG devices they want, and what they share.
    fn of_claims(self) -> Result<Self> {
        if !self.dra {
            return Ok(self);
        }
        if !self.sharing.resources.is_empty() {
            return Err(Error::new(Code::Config, "devices that claims get cannot be shared by replicas")
                .cause("--dra is given, and the configuration file has `sharing`")
                .fix("leave `sharing` out: containers that name one claim share its devices"));
        }
        // The kubelet keeps a claim's names for as long as its pod lives; numbers are others' by then, perhaps.
        Ok(Self { mig: MigStrategy::Mixed, ids: IdStrategy::Uuid, ..self })
    }

    /// Whether documents are to be written.
    pub fn needs_cdi(&self) -> bool {
        self.dra
            || self
                .shape
                .strategies
                .iter()
                .any(|one| matches!(one, Strategy::CdiAnnotations | Strategy::CdiCri))
    }
}

/// The path of `dev_root` (a path on the node) in this process's mount namespace; `None` is the driver root.
fn dev_root_here(dev_root: &Path, driver_root: Option<&Path>, here: Option<&Path>) -> Option<PathBuf> {
    let driver_root = driver_root.unwrap_or(Path::new("/"));
    if dev_root == driver_root {
        return None;
    }
    let beneath = here.and_then(|here| Some(here.join(dev_root.strip_prefix(driver_root).ok()?)));
    Some(beneath.unwrap_or_else(|| dev_root.to_path_buf()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use clap::Args;

    const FILE: &str = "
version: v1
flags:
  migStrategy: mixed
  failOnInitError: true
  nvidiaDriverRoot: /run/nvidia/driver
  gdsEnabled: false
  plugin:
    passDeviceSpecs: true
    deviceListStrategy: [volume-mounts, cdi-cri]
    deviceIDStrategy: index
    containerDriverRoot: /driver-root
  gfd: {oneshot: false, noTimestamp: true, sleepInterval: 60s}
sharing:
  timeSlicing:
    renameByDefault: true
    failRequestsGreaterThanOne: true
    resources: [{name: nvidia.com/gpu, replicas: 4}]
imex: {channelIDs: [0], required: false}
";

    pub(crate) fn options(words: &[&str], file: &str) -> Options {
        let words = ["gpurun-device-plugin"].iter().chain(words).map(OsString::from);
        let cli: Cli = gpurun::cli::go_flags::parse(words).unwrap();
        Options::merged(cli.flags, File::parse(file).unwrap()).unwrap()
    }

    #[test]
    fn an_option_overrides_the_file_and_that_the_default() {
        let plain = options(&[], "version: v1");
        assert_eq!((plain.mig, plain.ids), (MigStrategy::None, IdStrategy::Uuid));
        assert_eq!(plain.shape.strategies, [Strategy::Envvar]);
        assert_eq!(plain.kubelet_socket.as_deref(), Some(std::path::Path::new(KUBELET_SOCKET)));
        let filed = options(&[], FILE);
        assert_eq!((filed.mig, filed.ids), (MigStrategy::Mixed, IdStrategy::Index));
        assert_eq!(filed.shape.strategies, [Strategy::VolumeMounts, Strategy::CdiCri]);
        assert!(filed.fail_on_init_error && filed.shape.pass_device_specs && filed.needs_cdi());
        assert!(filed.sharing.rename_by_default && filed.sharing.resources[0].replicas == 4);
        assert_eq!(filed.driver_root.as_deref(), Some(std::path::Path::new("/run/nvidia/driver")));
        assert_eq!(filed.shape.imex_channels, [0]);
        let words = "--mig-strategy single --device-list-strategy=direct --pass-device-specs=false \
                     --kubelet-socket= --gds-enabled";
        let typed = options(&words.split_whitespace().collect::<Vec<_>>(), FILE);
        assert_eq!((typed.mig, &typed.shape.strategies[..]), (MigStrategy::Single, &[Strategy::Direct][..]));
        assert!(!typed.shape.pass_device_specs && !typed.needs_cdi() && typed.kubelet_socket.is_none());
        assert_eq!(typed.sockets, Path::new("/var/lib/kubelet/device-plugins"));
        assert!(!typed.imex_required && options(&["--imex-required"], FILE).imex_required);
        assert_eq!(typed.shape.features, [GatedFeature::Gds]);
    }

    #[test]
    fn every_option_is_in_its_page_and_every_one_there_exists() {
        use clap::CommandFactory;
        let section = include_str!("../../packaging/doc/kubernetes.md");
        // Other programs have options of their own.
        let named: Vec<&str> = section
            .lines()
            .filter(|line| !line.starts_with("$ "))
            .flat_map(|line| line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')))
            .filter_map(|word| word.strip_prefix("--"))
            .filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase()) && *name != "watch")
            .collect();
        let command = Cli::command();
        let known: Vec<&str> = command.get_arguments().filter_map(clap::Arg::get_long).collect();
        for name in &named {
            assert!(known.contains(name), "the page names --{name}, which does not exist");
        }
        let flags = Flags::augment_args(clap::Command::new("flags"));
        for argument in flags.get_arguments() {
            let option = argument.get_long().unwrap();
            let variable = argument.get_env().and_then(|name| name.to_str()).unwrap_or_default();
            assert!(
                named.contains(&option) || section.contains(&format!("`{variable}`")),
                "the page lacks --{option}"
            );
        }
    }

    #[test]
    fn options_are_read_as_nvidias_plugin_reads_them() {
        let plain = options(&[], "");
        for words in [
            &["-mig-strategy", "single"][..],
            &["--mig-strategy=mixed", "-mig-strategy=single"],
            &["--mig-strategy=single", "--fail-on-init-error=0"],
        ] {
            assert_eq!(
                options(words, "flags: {migStrategy: mixed}"),
                Options { mig: MigStrategy::Single, ..plain.clone() }
            );
        }
        for word in [
            "--pass-device-specs",
            "-pass-device-specs=T",
            "--pass-device-specs=1",
            "-pass-device-specs=True",
        ] {
            assert!(options(&[word], "").shape.pass_device_specs, "{word}");
        }
        for words in [
            &["--device-list-strategy=envvar, cdi-cri"][..],
            &["--device-list-strategy", "envvar", "-device-list-strategy=cdi-cri"],
        ] {
            assert_eq!(
                options(words, "").shape.strategies,
                [Strategy::Envvar, Strategy::CdiCri],
                "{words:?}"
            );
        }
        assert_eq!(options(&["--imex-channel-ids=0, 1"], "").shape.imex_channels, [0, 1]);
        for strategy in ["auto", "nvml"] {
            assert_eq!(options(&["--device-discovery-strategy", strategy], ""), plain);
            assert_eq!(options(&[], &format!("flags: {{deviceDiscoveryStrategy: {strategy}}}")), plain);
        }
        let tegra = File::parse("flags: {deviceDiscoveryStrategy: tegra}").unwrap();
        let words = ["gpurun-device-plugin"].map(OsString::from);
        let cli: Cli = gpurun::cli::go_flags::parse(words).unwrap();
        assert!(Options::merged(cli.flags, tegra).unwrap_err().to_string().contains("tegra"));
    }

    #[test]
    fn a_dev_root_is_where_the_plugin_finds_it() {
        let dev_root = |words: &[&str], file: &str| options(words, file).dev_root;
        assert_eq!(dev_root(&[], ""), None);
        let driver = "--nvidia-driver-root=/run/nvidia/driver";
        let here = "--container-driver-root=/driver-root";
        assert_eq!(dev_root(&["--nvidia-dev-root=/", driver, here], ""), Some("/".into()));
        assert_eq!(dev_root(&[driver, here], "flags: {nvidiaDevRoot: /}"), Some("/".into()));
        assert_eq!(dev_root(&["--nvidia-dev-root=/run/nvidia/driver", driver, here], ""), None);
        assert_eq!(dev_root(&["--nvidia-dev-root=/other", here], ""), Some("/driver-root/other".into()));
        assert_eq!(dev_root(&["--nvidia-dev-root=/other"], ""), Some("/other".into()));
        let filed = options(&[], "flags: {plugin: {containerDriverRoot: /driver-root}}");
        assert_eq!(filed.container_driver_root.as_deref(), Some(Path::new("/driver-root")));
    }

    #[test]
    fn a_pods_address_needs_no_brackets() {
        for (text, address) in [
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("fd00::1:9402", "[fd00::1]:9402"),
            ("[fd00::1]:9402", "[fd00::1]:9402"),
        ] {
            assert_eq!(super::address(text).unwrap().to_string(), address);
        }
        assert!(super::address(":9402").is_err() && super::address("9402").is_err());
    }

    #[test]
    fn the_mps_root_is_an_options_or_the_files() {
        assert_eq!(options(&[], "").mps_root, Path::new("/run/nvidia/mps"));
        assert_eq!(options(&["--mps-root", "/mps"], "flags: {mpsRoot: /other}").mps_root, Path::new("/mps"));
        assert_eq!(options(&[], "version: v1\nflags: {mpsRoot: /mps}").mps_root, Path::new("/mps"));
    }
}
