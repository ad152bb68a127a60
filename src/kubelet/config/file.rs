//! NVIDIA's configuration file, `version: v1`, with the semantics of NVIDIA's plugin. Whatever that plugin accepts is
//! accepted with the same value; ignored keys are ignored with a warning; and errors are reported with their place in the
//! file. Two intended differences: a `sharing` entry without resources shares nothing (NVIDIA's plugin exits), and an empty
//! text counts as absent.

use super::{
    DiscoveryStrategy, IdStrategy, go_yaml,
    section::{Section, choice, wrong},
};
use crate::{
    resources::{MigStrategy, Replicated, Sharing, SharingStrategy, VENDOR, is_name},
    response::Strategy,
};
use gpurun::error::{Code, Error, Result};
use serde_json::Value;
use std::{collections::BTreeMap, path::PathBuf};

/// The file's settings; `None` for absent keys.
#[derive(Debug, Default)]
pub struct File {
    pub nvidia_driver_root: Option<PathBuf>,
    pub nvidia_dev_root: Option<PathBuf>,
    pub container_driver_root: Option<PathBuf>,
    pub mig_strategy: Option<MigStrategy>,
    pub fail_on_init_error: Option<bool>,
    pub gdrcopy_enabled: Option<bool>,
    pub gds_enabled: Option<bool>,
    pub mofed_enabled: Option<bool>,
    pub mps_root: Option<PathBuf>,
    pub discovery: Option<DiscoveryStrategy>,
    pub pass_device_specs: Option<bool>,
    pub device_list_strategy: Option<Vec<Strategy>>,
    pub device_id_strategy: Option<IdStrategy>,
    pub cdi_annotation_prefix: Option<String>,
    pub hook: Option<PathBuf>,
    pub no_timestamp: Option<bool>,
    pub machine_type: Option<PathBuf>,
    pub sharing: Sharing,
    pub imex_channel_ids: Option<Vec<u32>>,
    pub imex_required: Option<bool>,
    /// One sentence for each key without effect.
    pub warnings: Vec<String>,
}

impl File {
    /// Reads the file's text.
    ///
    /// # Errors
    /// [`Code::Config`]
    pub fn parse(text: &str) -> Result<Self> {
        let value = go_yaml::parse(text).map_err(|cause| {
            Error::new(Code::Config, "the text is neither YAML nor JSON")
                .cause(cause)
                .fix("correct the line; `version: v1` alone is a whole configuration")
        })?;
        let mut top = Section::new("", value, false)?;
        if let Some(version) = top.text("version")?.filter(|version| version != "v1") {
            return Err(Error::new(Code::Config, format!("its version is {version:?}"))
                .cause("the only version is v1")
                .fix("write `version: v1`"));
        }
        let mut file = Self::default();
        let mut ignored = Vec::new();
        let mut flags = top.section("flags", false)?;
        file.flags(&mut flags)?;
        let mut plugin = flags.section("plugin", false)?;
        file.plugin(&mut plugin)?;
        let mut discovery = flags.section("gfd", false)?;
        file.no_timestamp = discovery.switch("noTimestamp")?;
        file.machine_type = discovery.path("machineTypeFile")?;
        let mut sharing = top.section("sharing", false)?;
        file.sharing(&mut sharing, &mut ignored)?;
        let mut imex = top.section("imex", false)?;
        file.imex_required = imex.switch("required")?;
        file.imex_channel_ids = channel_ids(&mut imex)?;
        for section in [top, flags, plugin, discovery, sharing, imex] {
            section.ignored(&mut ignored);
        }
        let ignored = ignored.iter().map(|place| format!("{place} in the configuration file has no effect"));
        file.warnings.extend(ignored);
        Ok(file)
    }

    fn flags(&mut self, flags: &mut Section) -> Result<()> {
        self.nvidia_driver_root = flags.path("nvidiaDriverRoot")?;
        self.nvidia_dev_root = flags.path("nvidiaDevRoot")?;
        self.mig_strategy = flags.choice("migStrategy")?;
        self.fail_on_init_error = flags.switch("failOnInitError")?;
        self.gdrcopy_enabled = flags.switch("gdrcopyEnabled")?;
        self.gds_enabled = flags.switch("gdsEnabled")?;
        self.mofed_enabled = flags.switch("mofedEnabled")?;
        self.mps_root = flags.path("mpsRoot")?;
        self.discovery = flags.choice("deviceDiscoveryStrategy")?;
        Ok(())
    }

    fn plugin(&mut self, plugin: &mut Section) -> Result<()> {
        let place = plugin.place("deviceListStrategy");
        let words = plugin.words("deviceListStrategy")?;
        let strategies = words.map(|words| words.iter().map(|word| choice(&place, word)).collect());
        self.device_list_strategy = strategies.transpose()?;
        self.pass_device_specs = plugin.switch("passDeviceSpecs")?;
        self.device_id_strategy = plugin.choice("deviceIDStrategy")?;
        self.cdi_annotation_prefix = plugin.text("cdiAnnotationPrefix")?;
        self.container_driver_root = plugin.path("containerDriverRoot")?;
        let older = plugin.path("nvidiaCTKPath")?;
        self.hook = plugin.path("nvidiaCDIHookPath")?.or(older);
        Ok(())
    }

    /// MPS takes precedence over time slicing.
    fn sharing(&mut self, sharing: &mut Section, ignored: &mut Vec<String>) -> Result<()> {
        let time_slicing = self.replicated(sharing, "timeSlicing", SharingStrategy::TimeSlicing, ignored)?;
        let mps = self.replicated(sharing, "mps", SharingStrategy::Mps, ignored)?;
        self.sharing = if mps.resources.is_empty() {
            time_slicing
        } else {
            if !time_slicing.resources.is_empty() {
                let both = "the configuration file has sharing.mps and sharing.timeSlicing: GPUs are shared by MPS, and \
                            sharing.timeSlicing has no effect";
                self.warnings.push(both.into());
            }
            mps
        };
        Ok(())
    }

    fn replicated(
        &mut self,
        sharing: &mut Section,
        name: &str,
        by: SharingStrategy,
        ignored: &mut Vec<String>,
    ) -> Result<Sharing> {
        let mut section = sharing.section(name, true)?;
        let rename_by_default = section.switch("renameByDefault")?.unwrap_or(false);
        let one_alone = section.switch("failRequestsGreaterThanOne")?;
        if by == SharingStrategy::Mps && one_alone == Some(false) {
            ignored.push(section.place("failRequestsGreaterThanOne: false"));
        }
        let place = section.place("resources");
        let items = match section.take("resources") {
            None => Vec::new(),
            Some(Value::Array(items)) => items,
            Some(other) => return Err(wrong(&place, &other, "a list")),
        };
        let (mut replicas, mut renamed, mut chosen) = (BTreeMap::new(), false, false);
        for (number, item) in items.into_iter().enumerate() {
            let mut item = Section::new(format!("{place}[{number}]"), item, true)?;
            let entry = entry(&mut item)?;
            // Several entries for one resource add up in NVIDIA's plugin: ids 0 to n - 1 of each.
            let known: &mut u32 = replicas.entry(entry.name.clone()).or_default();
            *known = (*known).max(entry.replicas);
            let shared = format!("{}.shared", entry.name);
            renamed |= entry.rename.is_some_and(|rename| !rename_by_default || rename != shared);
            chosen |= !entry.all;
            item.ignored(ignored);
        }
        let as_shared = if rename_by_default { "NAME.shared" } else { "their own names" };
        if renamed {
            self.warnings.push(format!(
                "`rename` in {place} has no effect: the resources have {as_shared}; renameByDefault chooses between both"
            ));
        }
        if chosen {
            self.warnings.push(format!("`devices` in {place} has no effect: every device is shared"));
        }
        section.ignored(ignored);
        Ok(Sharing {
            by,
            rename_by_default,
            // An MPS daemon serves one GPU, so a container has a replica of one.
            fail_requests_greater_than_one: one_alone.unwrap_or(false) || by == SharingStrategy::Mps,
            resources: replicas.into_iter().map(|(name, replicas)| Replicated { name, replicas }).collect(),
        })
    }
}

/// An entry of `resources`.
struct Entry {
    name: String,
    rename: Option<String>,
    replicas: u32,
    all: bool,
}

fn entry(item: &mut Section) -> Result<Entry> {
    let missing = |item: &Section, key: &str| {
        let place = item.place(key);
        Error::new(Code::Config, format!("{place} is missing"))
            .cause("an entry needs `name` and `replicas`")
            .fix(format!("add {place}, or remove the entry"))
    };
    let Some(name) = item.text("name")? else { return Err(missing(item, "name")) };
    let name = resource_name(&item.place("name"), &name)?;
    let place = item.place("replicas");
    let Some(value) = item.take("replicas") else { return Err(missing(item, "replicas")) };
    let replicas = value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 1);
    let replicas = replicas.ok_or_else(|| wrong(&place, &value, "a number of two or more"))?;
    let place = item.place("rename");
    let rename = item.text("rename")?.map(|name| resource_name(&place, &name)).transpose()?;
    let place = item.place("devices");
    let all = item.take("devices").map_or(Ok(true), |devices| is_all(&place, &devices))?;
    Ok(Entry { name, rename, replicas, all })
}

/// Adds the vendor's prefix if it is missing.
fn resource_name(place: &str, name: &str) -> Result<String> {
    let bare = name.strip_prefix(VENDOR).unwrap_or(name);
    if !is_name(bare) {
        return Err(wrong(place, &name.into(), "a resource of nvidia.com, such as nvidia.com/gpu"));
    }
    Ok(format!("{VENDOR}{bare}"))
}

/// Whether `devices` means all of them: `all`, a number of devices, or a list of indices, `GPU:MIG` pairs and UUIDs.
fn is_all(place: &str, devices: &Value) -> Result<bool> {
    let is_index = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_device = |text: &str| {
        is_index(text)
            || text.split_once(':').is_some_and(|(gpu, mig)| is_index(gpu) && is_index(mig))
            || text.starts_with("GPU-")
            || text.starts_with("MIG-")
    };
    match devices {
        Value::String(text) if text == "all" => Ok(true),
        Value::Number(number) if number.as_u64().is_some_and(|number| number > 0) => Ok(false),
        Value::Array(items)
            if items.iter().all(|item| item.as_u64().is_some() || item.as_str().is_some_and(is_device)) =>
        {
            Ok(false)
        }
        other => Err(wrong(place, other, "all")),
    }
}

fn channel_ids(imex: &mut Section) -> Result<Option<Vec<u32>>> {
    let place = imex.place("channelIDs");
    let Some(value) = imex.take("channelIDs") else { return Ok(None) };
    let number = |item: &Value| item.as_u64().and_then(|number| u32::try_from(number).ok());
    let numbers = value.as_array().and_then(|items| items.iter().map(number).collect());
    numbers.map(Some).ok_or_else(|| wrong(&place, &value, "a list of channel numbers, such as [0]"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Parses a file with `sharing.timeSlicing: TEXT`.
    pub(crate) fn time_slicing(text: &str) -> Sharing {
        File::parse(&format!("sharing: {{timeSlicing: {text}}}")).unwrap().sharing
    }

    /// Answers of a Go program with NVIDIA's types and sigs.k8s.io/yaml 1.3.
    #[test]
    fn lenient_values_are_accepted_as_in_go() {
        for text in [
            "",
            "{}",
            "null",
            "version:",
            "version: v1",
            "flags: null",
            "sharing: null",
            "sharing: {mps: null}",
        ] {
            let file = File::parse(text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
            assert!(file.warnings.is_empty() && file.mig_strategy.is_none(), "{text:?}");
        }
        for (text, strategy) in [
            ("version: v1\nFlags: {MigStrategy: single}", MigStrategy::Single),
            ("FLAGS: {migstrategy: single}", MigStrategy::Single),
            ("flags: {migStrategy: single, MIGSTRATEGY: mixed}", MigStrategy::Single),
            ("flags: {MIGSTRATEGY: mixed, migStrategy: single}", MigStrategy::Single),
            ("flags: {migStrategy: single, migStrategy: mixed}", MigStrategy::Mixed),
            ("flag\u{17f}: {migStrategy: mixed}", MigStrategy::Mixed),
            ("{\"flags\": {\"migStrategy\": \"mixed\"}}", MigStrategy::Mixed),
            ("version: v1\nflags: {<<: {migStrategy: mixed}}\n---\nversion: v2", MigStrategy::Mixed),
        ] {
            let file = File::parse(text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
            assert_eq!(file.mig_strategy, Some(strategy), "{text:?}");
        }
        for (word, value) in
            [("yes", true), ("On", true), ("y", true), ("TRUE", true), ("no", false), ("off", false)]
        {
            let file = File::parse(&format!("flags: {{failOnInitError: {word}}}")).unwrap();
            assert_eq!(file.fail_on_init_error, Some(value), "{word}");
        }
        let annotations = File::parse("flags: {plugin: {cdiAnnotationPrefix: 1.50}}").unwrap();
        assert_eq!(annotations.cdi_annotation_prefix.as_deref(), Some("1.5"));
        for (replicas, number) in [("2.0", 2), ("0x10", 16), ("010", 8), ("1_000", 1000), ("1e3", 1000)] {
            let sharing = time_slicing(&format!("{{resources: [{{name: gpu, replicas: {replicas}}}]}}"));
            assert_eq!(sharing.resources[0].replicas, number, "{replicas}");
        }
        assert_eq!(
            File::parse("imex: {channelids: [1], required: yes}").unwrap().imex_channel_ids,
            Some(vec![1])
        );
    }

    #[test]
    fn what_go_refuses_is_refused_with_its_place() {
        for (text, place) in [
            ("version: v2", "v2"),
            ("version: 1", "\"1\""),
            ("version: [v1]", "version"),
            ("- a", "the whole file"),
            ("text", "the whole file"),
            ("[", "YAML"),
            ("flags: []", "flags"),
            ("flags: {failOnInitError: 'true'}", "flags.failOnInitError"),
            ("flags: {failOnInitError: tRue}", "flags.failOnInitError"),
            ("flags: {failOnInitError: 1}", "flags.failOnInitError"),
            ("flags: {migStrategy: some}", "flags.migStrategy"),
            ("flags: {migStrategy: 5}", "flags.migStrategy"),
            ("flags: {plugin: {deviceListStrategy: magic}}", "flags.plugin.deviceListStrategy"),
            ("flags: {plugin: {deviceListStrategy: [envvar, 1]}}", "flags.plugin.deviceListStrategy"),
            ("imex: {channelIDs: 0}", "imex.channelIDs"),
            ("imex: {channelIDs: ['0']}", "imex.channelIDs"),
            (
                "sharing: {timeSlicing: {resources: {name: gpu, replicas: 2}}}",
                "sharing.timeSlicing.resources",
            ),
            ("sharing: {mps: {resources: [{name: gpu}]}}", "sharing.mps.resources[0].replicas"),
            ("sharing: {mps: {resources: [{Name: gpu, replicas: 2}]}}", "sharing.mps.resources[0].name"),
            ("sharing: {mps: {resources: [{name: gpu, replicas: 1}]}}", "sharing.mps.resources[0].replicas"),
            ("sharing: {mps: {resources: [{name: gpu, replicas: -1}]}}", "sharing.mps.resources[0].replicas"),
            (
                "sharing: {mps: {resources: [{name: gpu, replicas: 2.5}]}}",
                "sharing.mps.resources[0].replicas",
            ),
            (
                "sharing: {mps: {resources: [{name: gpu, replicas: '2'}]}}",
                "sharing.mps.resources[0].replicas",
            ),
            (
                "sharing: {mps: {resources: [{name: gpu, replicas: 1e20}]}}",
                "sharing.mps.resources[0].replicas",
            ),
            ("sharing: {mps: {resources: [{name: 5, replicas: 2}]}}", "sharing.mps.resources[0].name"),
            (
                "sharing: {mps: {resources: [{name: amd.com/gpu, replicas: 2}]}}",
                "sharing.mps.resources[0].name",
            ),
            ("sharing: {mps: {resources: [{name: GPU, replicas: 2}]}}", "sharing.mps.resources[0].name"),
            (
                "sharing: {mps: {resources: [{name: gpu, replicas: 2, devices: some}]}}",
                "sharing.mps.resources[0].devices",
            ),
            (
                "sharing: {mps: {resources: [{name: gpu, replicas: 2, devices: 0}]}}",
                "sharing.mps.resources[0].devices",
            ),
            ("sharing: {mps: {resources: [null]}}", "sharing.mps.resources[0].name"),
            ("sharing: {mps: {renameByDefault: 'true'}}", "sharing.mps.renameByDefault"),
        ] {
            let error = File::parse(text).unwrap_err();
            assert!(error.code() == Code::Config && !error.fix_line().is_empty(), "{text:?}: {error}");
            assert!(error.what().contains(place), "{text:?}: {error}");
        }
    }

    #[test]
    fn what_has_no_effect_is_named_once() {
        let warnings = |text: &str| File::parse(text).unwrap().warnings;
        let two = "resources: [{name: gpu, replicas: 2, rename: gpu.mine, devices: [0]}, {name: mig-1g.5gb, replicas: 2, rename: x}]";
        let file = File::parse(&format!("sharing: {{timeSlicing: {{{two}}}}}")).unwrap();
        assert_eq!(file.warnings.len(), 2, "{:?}", file.warnings);
        assert!(file.warnings[0].contains("`rename`") && file.warnings[1].contains("`devices`"));
        assert_eq!(file.sharing.resources[0], Replicated { name: "nvidia.com/gpu".into(), replicas: 2 });
        assert!(!file.sharing.rename_by_default, "NVIDIA keeps the name");
        let renamed = "sharing: {timeSlicing: {renameByDefault: true, resources: [{name: gpu, replicas: 2, rename: gpu.shared}]}}";
        assert_eq!(warnings(renamed), Vec::<String>::new());
        assert_eq!(
            warnings(
                "flags: {gfd: {oneshot: false, sleepInterval: 60s}, magic: 1}\nresources: {gpus: [{pattern: '*', name: gpu}]}"
            ),
            ["resources", "flags.magic", "flags.gfd.sleepInterval"]
                .map(|place| format!("{place} in the configuration file has no effect"))
        );
        let memory = "sharing: {mps: {failRequestsGreaterThanOne: false, resources: [{name: gpu, replicas: 2, memoryGB: 3}]}}";
        assert_eq!(
            warnings(memory),
            ["sharing.mps.failRequestsGreaterThanOne: false", "sharing.mps.resources[0].memoryGB"]
                .map(|place| format!("{place} in the configuration file has no effect"))
        );
    }

    #[test]
    fn devices_are_shared_by_mps_where_both_are_named() {
        let mps = "sharing: {mps: {renameByDefault: true, resources: [{name: gpu, replicas: 2}]}}";
        let by_mps = File::parse(mps).unwrap();
        assert_eq!(by_mps.sharing.by, SharingStrategy::Mps);
        assert!(by_mps.sharing.fail_requests_greater_than_one && by_mps.sharing.rename_by_default);
        let both = mps.replace("{mps:", "{timeSlicing: {resources: [{name: gpu, replicas: 3}]}, mps:");
        let both = File::parse(&both).unwrap();
        assert_eq!(both.sharing, by_mps.sharing);
        assert!(both.warnings[0].contains("sharing.timeSlicing has no effect"), "{:?}", both.warnings);
        // The keys of a chart's values, of which one is used.
        let empty = "sharing: {mps: {resources: []}, timeSlicing: {resources: []}}";
        assert_eq!(File::parse(empty).unwrap().sharing, Sharing::default());
        let twice =
            time_slicing("{resources: [{name: gpu, replicas: 4}, {name: nvidia.com/gpu, replicas: 2}]}");
        assert_eq!(twice.resources, [Replicated { name: "nvidia.com/gpu".into(), replicas: 4 }]);
    }
}
