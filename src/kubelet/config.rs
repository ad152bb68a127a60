//! What the administrator set: options, variables, and the peer's configuration file (`version: v1`). An option goes before its
//! variable, and that before the file.

use crate::{
    health::Watched,
    preference::SharedPolicy,
    resources::{MigStrategy, Sharing, SharingStrategy},
    response::{Shape, Strategy},
};
use clap::{Parser, ValueEnum};
use gpurun::{
    cli::Global,
    error::{Code, Error, OrFail, Result},
    plan::Selected,
    vocabulary::GatedFeature,
};
use serde::{Deserialize, Deserializer};
use serde_norway::Value;
use std::{
    collections::BTreeMap,
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
    /// Where the driver's files are; --driver-root goes before it
    #[arg(long, env = "NVIDIA_DRIVER_ROOT", value_name = "DIR")]
    nvidia_driver_root: Option<PathBuf>,
    /// Where that is for the plugin itself, which runs in a pod [default: there]
    #[arg(long, alias = "driver-root-ctr-path", env = "CONTAINER_DRIVER_ROOT", value_name = "DIR")]
    pub container_driver_root: Option<PathBuf>,
    /// How MIG devices are offered [default: none]
    #[arg(long, env = "MIG_STRATEGY", value_enum, value_name = "STRATEGY")]
    mig_strategy: Option<MigStrategy>,
    /// How containers get their devices; several between commas [default: envvar]
    #[arg(long, env = "DEVICE_LIST_STRATEGY", value_enum, value_delimiter = ',', value_name = "STRATEGY")]
    device_list_strategy: Option<Vec<Strategy>>,
    /// How devices are called in environments and CDI documents [default: uuid]
    #[arg(long, env = "DEVICE_ID_STRATEGY", value_enum, value_name = "NAME")]
    device_id_strategy: Option<IdStrategy>,
    /// The device nodes go with every strategy [default: false]
    #[arg(long, env = "PASS_DEVICE_SPECS", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pass_device_specs: Option<bool>,
    /// End where there is no driver, instead of waiting for it [default: false]
    #[arg(long, env = "FAIL_ON_INIT_ERROR", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
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
    #[arg(long, env = "GDRCOPY_ENABLED", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    gdrcopy_enabled: Option<bool>,
    /// Containers get GPUDirect Storage [default: false]
    #[arg(long, env = "GDS_ENABLED", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    gds_enabled: Option<bool>,
    /// Containers get InfiniBand verbs [default: false]
    #[arg(long, env = "MOFED_ENABLED", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    mofed_enabled: Option<bool>,
    /// IMEX channels that containers get
    #[arg(long, env = "IMEX_CHANNEL_IDS", value_delimiter = ',', value_name = "N")]
    imex_channel_ids: Option<Vec<u32>>,
    /// Nothing is offered where such a channel is missing; otherwise containers do without it [default: false]
    #[arg(long, env = "IMEX_REQUIRED", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    imex_required: Option<bool>,
    /// Where MPS control daemons meet programs in containers [default: /run/nvidia/mps]
    #[arg(long, env = "MPS_ROOT", value_name = "DIR")]
    mps_root: Option<PathBuf>,
    /// The kubelet's socket; empty: nobody is told [default: /var/lib/kubelet/device-plugins/kubelet.sock]
    #[arg(long, env = "KUBELET_SOCKET", value_name = "SOCKET")]
    kubelet_socket: Option<OsString>,
    /// Where the kubelet tells which pods have which devices, for logs and metrics; empty: it is not asked
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
    /// Metrics, /healthz and /readyz are answered here; nobody listens unless it is set
    #[arg(long, env = "METRICS_ADDRESS", value_name = "ADDRESS:PORT")]
    pub metrics_address: Option<SocketAddr>,
    /// The node's labels are written here, for node-feature-discovery (features.d/gpurun)
    #[arg(long, env = "LABELS_FILE", value_name = "FILE")]
    pub labels_file: Option<PathBuf>,
    /// The labels have no nvidia.com/gfd.timestamp [default: false]
    #[arg(long, env = "GFD_NO_TIMESTAMP", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_timestamp: Option<bool>,
    /// Where it says which machine this is [default: /sys/class/dmi/id/product_name]
    #[arg(long, env = "GFD_MACHINE_TYPE_FILE", value_name = "FILE")]
    machine_type_file: Option<PathBuf>,
    /// This node of the cluster gets the labels itself, from the API server; the pod's account must be allowed to patch it
    #[arg(long, env = "LABEL_NODE", value_name = "NODE")]
    pub label_node: Option<String>,
    /// Devices are allocated by the scheduler to claims (Dynamic Resource Allocation), and not by the kubelet [default: false]
    #[arg(long, env = "DRA", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
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

/// How a device is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
    /// Where the driver's files are.
    pub driver_root: Option<PathBuf>,
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

/// The kubelet's own (k8s.io/kubelet, pkg/apis/deviceplugin/v1beta1/constants.go).
const KUBELET_SOCKET: &str = "/var/lib/kubelet/device-plugins/kubelet.sock";

impl Options {
    /// What was typed over what the file says, and what of the file is not honoured.
    ///
    /// # Errors
    /// [`Code::Config`]
    pub fn read(flags: &Flags) -> Result<(Self, Vec<String>)> {
        let (file, unheard) = match &flags.config_file {
            Some(path) => {
                let text = std::fs::read_to_string(path);
                let text = text.or_fail(Code::Config, || format!("{} cannot be read", path.display()));
                let text = text.map_err(|error| {
                    error.fix("name a file that can be in CONFIG_FILE or --config-file, or none")
                })?;
                File::parse(&text)
                    .map_err(|error| error.context(format!("{} cannot be used", path.display())))?
            }
            None => (File::default(), Vec::new()),
        };
        Ok((Self::merged(flags.clone(), file)?, unheard))
    }

    fn merged(flags: Flags, file: File) -> Result<Self> {
        let plugin = file.flags.plugin;
        let feature = |typed: Option<bool>, filed: Option<bool>, feature| {
            typed.or(filed).unwrap_or(false).then_some(feature)
        };
        let socket = flags.kubelet_socket.map_or_else(|| KUBELET_SOCKET.into(), PathBuf::from);
        let socket = Some(socket).filter(|socket| !socket.as_os_str().is_empty());
        let directory = socket.as_deref().unwrap_or(Path::new(KUBELET_SOCKET)).parent();
        let directory = directory.unwrap_or(Path::new("/")).to_path_buf();
        Self {
            mig: flags.mig_strategy.or(file.flags.mig_strategy).unwrap_or_default(),
            sharing: file.sharing.of_both()?,
            mps_root: flags
                .mps_root
                .or(file.flags.mps_root)
                .unwrap_or_else(|| PathBuf::from("/run/nvidia/mps")),
            shared_policy: flags.shared_devices_allocation_policy.unwrap_or_default(),
            shape: Shape {
                strategies: flags
                    .device_list_strategy
                    .or(plugin.device_list_strategy)
                    .unwrap_or_else(|| vec![Strategy::Envvar]),
                pass_device_specs: flags.pass_device_specs.or(plugin.pass_device_specs).unwrap_or(false),
                annotation_prefix: flags
                    .cdi_annotation_prefix
                    .or(plugin.cdi_annotation_prefix)
                    .unwrap_or_else(|| "cdi.k8s.io/".into()),
                features: [
                    feature(flags.gdrcopy_enabled, file.flags.gdrcopy_enabled, GatedFeature::GdrCopy),
                    feature(flags.gds_enabled, file.flags.gds_enabled, GatedFeature::Gds),
                    feature(flags.mofed_enabled, file.flags.mofed_enabled, GatedFeature::Mofed),
                ]
                .into_iter()
                .flatten()
                .collect(),
                imex_channels: flags.imex_channel_ids.or(file.imex.channel_ids).unwrap_or_default(),
            },
            ids: flags.device_id_strategy.or(plugin.device_id_strategy).unwrap_or_default(),
            driver_root: flags.nvidia_driver_root.or(file.flags.nvidia_driver_root),
            hook: flags.nvidia_cdi_hook_path.or(plugin.hook),
            fail_on_init_error: flags.fail_on_init_error.or(file.flags.fail_on_init_error).unwrap_or(false),
            imex_required: flags.imex_required.or(file.imex.required).unwrap_or(false),
            sockets: directory,
            kubelet_socket: socket,
            watched: Watched::new(&flags.disable_healthchecks, &flags.enable_healthchecks),
            dra: flags.dra.unwrap_or(false),
            timestamp: !flags.no_timestamp.or(file.flags.gfd.no_timestamp).unwrap_or(false),
            machine_type_file: flags.machine_type_file.or(file.flags.gfd.machine_type_file),
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

/// Keys that gpurun does not know.
type Unknown = BTreeMap<String, Value>;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct File {
    version: String,
    flags: FileFlags,
    sharing: FileSharing,
    imex: Imex,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct FileFlags {
    nvidia_driver_root: Option<PathBuf>,
    mig_strategy: Option<MigStrategy>,
    fail_on_init_error: Option<bool>,
    #[serde(rename = "gdrcopyEnabled", alias = "gdrCopyEnabled")]
    gdrcopy_enabled: Option<bool>,
    gds_enabled: Option<bool>,
    mofed_enabled: Option<bool>,
    mps_root: Option<PathBuf>,
    plugin: FilePlugin,
    gfd: FileDiscovery,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct FilePlugin {
    pass_device_specs: Option<bool>,
    #[serde(deserialize_with = "one_or_more")]
    device_list_strategy: Option<Vec<Strategy>>,
    #[serde(rename = "deviceIDStrategy")]
    device_id_strategy: Option<IdStrategy>,
    cdi_annotation_prefix: Option<String>,
    #[serde(rename = "nvidiaCDIHookPath", alias = "nvidiaCTKPath")]
    hook: Option<PathBuf>,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct FileDiscovery {
    no_timestamp: Option<bool>,
    machine_type_file: Option<PathBuf>,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct FileSharing {
    time_slicing: Sharing,
    mps: Sharing,
    #[serde(flatten)]
    unknown: Unknown,
}

impl FileSharing {
    /// The one that is used.
    fn of_both(self) -> Result<Sharing> {
        match (self.time_slicing.resources.is_empty(), self.mps.resources.is_empty()) {
            (_, true) => Ok(self.time_slicing),
            // A daemon serves one GPU, so a container has a replica of one.
            (true, false) => Ok(Sharing {
                by: SharingStrategy::Mps,
                fail_requests_greater_than_one: Some(true),
                ..self.mps
            }),
            (false, false) => Err(Error::new(Code::Config, "devices are shared by time slicing or by MPS")
                .cause("the configuration file has both sharing.timeSlicing and sharing.mps")
                .fix("leave one of them out")),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Imex {
    #[serde(rename = "channelIDs")]
    channel_ids: Option<Vec<u32>>,
    required: Option<bool>,
    #[serde(flatten)]
    unknown: Unknown,
}

/// `envvar`, `envvar,cdi-cri` or a list.
fn one_or_more<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<Strategy>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMore {
        One(String),
        More(Vec<String>),
    }
    let words = match Option::<OneOrMore>::deserialize(from)? {
        None => return Ok(None),
        Some(OneOrMore::One(text)) => text.split(',').map(|word| word.trim().to_owned()).collect(),
        Some(OneOrMore::More(words)) => words,
    };
    let strategy = |word: String| Strategy::from_str(&word, false).map_err(serde::de::Error::custom);
    words.into_iter().map(strategy).collect::<Result<_, _>>().map(Some)
}

impl File {
    fn parse(text: &str) -> Result<(Self, Vec<String>)> {
        let file: Self = serde_norway::from_str(text)
            .or_fail(Code::Config, || "it is no configuration of a device plugin")
            .map_err(|error| error.fix("compare it with NVIDIA's k8s-device-plugin, `version: v1`"))?;
        if file.version != "v1" {
            return Err(Error::new(Code::Config, format!("its version is {:?} and not v1", file.version)));
        }
        let keys = [
            ("", &file.unknown),
            ("flags.", &file.flags.unknown),
            ("flags.plugin.", &file.flags.plugin.unknown),
            ("flags.gfd.", &file.flags.gfd.unknown),
            ("sharing.", &file.sharing.unknown),
            ("imex.", &file.imex.unknown),
        ];
        // As clusters have them who changed nothing.
        let is_default = |value: &Value| matches!(value, Value::Null | Value::Bool(false));
        let unheard = keys.into_iter().flat_map(|(before, keys)| {
            keys.iter().filter(|(_, value)| !is_default(value)).map(move |(key, _)| format!("{before}{key}"))
        });
        let several = (file.sharing.mps.fail_requests_greater_than_one == Some(false))
            .then(|| "sharing.mps.failRequestsGreaterThanOne".to_owned());
        let unheard = unheard.chain(several).collect();
        Ok((file, unheard))
    }
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
        let cli = Cli::try_parse_from([&["gpurun-device-plugin"], words].concat()).unwrap();
        Options::merged(cli.flags, File::parse(file).unwrap().0).unwrap()
    }

    #[test]
    fn what_is_typed_goes_before_the_file_and_that_before_the_default() {
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
    fn every_option_is_in_the_readme_and_every_one_there_exists() {
        use clap::CommandFactory;
        let (_, section) = include_str!("../../README.md").split_once("\n## Kubernetes\n").unwrap();
        let (section, _) = section.split_once("\n## ").unwrap();
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
            assert!(known.contains(name), "README.md names --{name}, which does not exist");
        }
        let flags = Flags::augment_args(clap::Command::new("flags"));
        for argument in flags.get_arguments() {
            let option = argument.get_long().unwrap();
            let variable = argument.get_env().and_then(|name| name.to_str()).unwrap_or_default();
            assert!(
                named.contains(&option) || section.contains(&format!("`{variable}`")),
                "README.md lacks --{option}"
            );
        }
    }

    #[test]
    fn what_is_not_honoured_is_named() {
        let unheard = File::parse(FILE).unwrap().1;
        assert_eq!(unheard, ["flags.plugin.containerDriverRoot", "flags.gfd.sleepInterval"]);
    }

    #[test]
    fn devices_are_shared_by_time_slicing_or_by_mps() {
        let mps =
            "version: v1\nsharing: {mps: {renameByDefault: true, resources: [{name: gpu, replicas: 2}]}}";
        let by_mps = options(&[], mps);
        assert_eq!(
            (by_mps.sharing.by, by_mps.sharing.fail_requests_greater_than_one),
            (SharingStrategy::Mps, Some(true))
        );
        assert!(by_mps.sharing.rename_by_default);
        assert_eq!(by_mps.mps_root, Path::new("/run/nvidia/mps"));
        assert_eq!(options(&["--mps-root", "/mps"], mps).mps_root, Path::new("/mps"));
        assert_eq!(options(&[], "version: v1\nflags: {mpsRoot: /mps}").mps_root, Path::new("/mps"));
        let (several, unheard) =
            File::parse(&mps.replace("renameByDefault: true", "failRequestsGreaterThanOne: false")).unwrap();
        assert_eq!(unheard, ["sharing.mps.failRequestsGreaterThanOne"]);
        assert_eq!(several.sharing.of_both().unwrap().fail_requests_greater_than_one, Some(true));
        // The keys of a chart's values, of which one is used.
        let empty =
            options(&[], "version: v1\nsharing: {mps: {resources: []}, timeSlicing: {resources: []}}");
        assert_eq!(empty.sharing, Sharing::default());
        let both = mps.replace("{mps:", "{timeSlicing: {resources: [{name: gpu, replicas: 3}]}, mps:");
        let error = File::parse(&both).unwrap().0.sharing.of_both().unwrap_err();
        assert!(error.code() == Code::Config && error.to_string().contains("sharing.mps"), "{error}");
    }

    #[test]
    fn a_file_that_means_something_else_is_refused() {
        for wrong in [
            "version: v2",
            "flags: {}",
            "version: v1\nflags: {migStrategy: some}",
            "version: v1\nflags: {plugin: {deviceListStrategy: magic}}",
            "version: v1\nsharing: {mps: {resources: [{name: nvidia.com/gpu, replicas: 2, memoryGB: 2}]}}",
            "version: v1\nsharing: {timeSlicing: {resources: [{name: nvidia.com/gpu}]}}",
            "[",
        ] {
            assert_eq!(File::parse(wrong).unwrap_err().code(), Code::Config, "{wrong}");
        }
        let one = "version: v1\nflags: {plugin: {deviceListStrategy: 'envvar,cdi-cri'}}";
        assert_eq!(options(&[], one).shape.strategies, [Strategy::Envvar, Strategy::CdiCri]);
    }
}
