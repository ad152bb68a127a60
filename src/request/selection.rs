//! Which GPUs: Docker's grammar of `--gpus`, and the list of `NVIDIA_VISIBLE_DEVICES`, which is also what
//! `--gpus device=` takes.

use super::{DeviceId, DeviceSelection, GpuFilter, annotation, capability, csv, quoted};
use crate::{
    error::{Code, Error, OrFail, Result},
    vocabulary::{DriverCapability, Version},
};
use std::str::FromStr;

/// The words of a message that says how a GPU is named.
const NAMES: &str = "name GPUs by index (`0`), UUID (`GPU-…`), PCI address (`0000:65:00.0`) or, for a MIG device, \
                     `0:1` or `MIG-…`, with commas between them, or say `all` or `none`; `gpurun ls` lists them";

/// How `--gpus` is written, for messages.
const GRAMMAR: &str =
    "write --gpus all, --gpus 2, --gpus '\"device=0,1\"' or --gpus 'all,\"capabilities=compute,video\"'";

/// What `--gpus` says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gpus {
    /// `None`: no GPU is asked for (`--gpus 0`).
    pub(super) selection: Option<DeviceSelection>,
    pub(super) filter: GpuFilter,
    pub(super) capabilities: Option<DriverCapability>,
}

/// Reads `--gpus`: one CSV record of `all`, a number, or `key=value`, as Docker's command line takes it, and beside
/// Docker's keys the conditions `arch>=9.0` and `mem>=40GiB`.
///
/// `options=` is accepted and means nothing, as Docker's NVIDIA driver has none.
pub(super) fn gpus(text: &str) -> Result<Gpus> {
    let refuse = |cause: String| {
        Error::new(Code::BadRequest, format!("--gpus {} cannot be understood", quoted(text))).cause(cause)
    };
    let (mut count, mut device, mut capabilities) = (None, None, None);
    let mut filter = GpuFilter::default();
    let mut seen = Vec::new();
    for field in with_whole_lists(csv::record(text).map_err(|cause| refuse(cause.into()).fix(GRAMMAR))?) {
        let (key, value) = match field.split_once(">=") {
            Some((key @ ("arch" | "mem" | "free"), value)) => (key, value),
            _ => field.split_once('=').unwrap_or(("count", &field)),
        };
        if seen.iter().any(|before| before == key) {
            return Err(
                refuse(format!("`{key}` is said twice")).fix(meant(text).unwrap_or_else(|| GRAMMAR.into()))
            );
        }
        match key {
            "count" => {
                let usual = || {
                    let list = if text.contains(',') { "a list needs quotes of its own: " } else { "" };
                    format!("{list}{GRAMMAR}")
                };
                let parsed = parse_count(value).ok_or_else(|| {
                    refuse(format!("{} is neither `all` nor a number of GPUs", quoted(value)))
                        .fix(meant(text).unwrap_or_else(usual))
                })?;
                count = Some(parsed);
            }
            "device" => {
                if value.is_empty() {
                    return Err(refuse("`device=` names no GPU".into()).fix(NAMES));
                }
                device = Some(match without_ranges(value) {
                    Some(list) => {
                        return Err(
                            refuse("a range names no GPU".into()).fix(format!("write --gpus device={list}"))
                        );
                    }
                    None => visible_devices(value, "--gpus device=")?,
                });
            }
            "capabilities" => {
                capabilities = capability::parse(value, "--gpus capabilities=", capability::DOCKER_WORDS)?;
            }
            // Docker's names for its NVIDIA driver; other vendors' GPUs are not ours to give.
            "driver" if matches!(value, "" | "nvidia" | "nvidia.runtime-hook" | "nvidia.cdi") => {}
            "driver" => {
                return Err(refuse(format!("there is no driver {}", quoted(value)))
                    .fix("write `driver=nvidia`, or leave it out"));
            }
            "options" => {}
            "arch" => {
                filter.arch =
                    Some(value.parse::<Version>().map_err(|cause| refuse(cause).fix("write `arch>=9.0`"))?);
            }
            "mem" => {
                filter.memory = Some(bytes(value).map_err(|cause| refuse(cause).fix("write `mem>=40GiB`"))?);
            }
            "free" => {
                return Err(refuse(
                    "`free>=` asks for the memory that is free now, which this version does not measure"
                        .into(),
                )
                .fix("ask for a GPU's whole memory (`mem>=40GiB`), or name the GPUs"));
            }
            _ => {
                return Err(refuse(format!("there is no key {}", quoted(key))).fix(
                    "the keys are `count=`, `device=`, `capabilities=`, `driver=` and `options=`, and the conditions `arch>=` and `mem>=`",
                ));
            }
        }
        seen.push(key.to_owned());
    }
    if count.is_some() && device.is_some() {
        return Err(refuse("it both counts GPUs and names them".into())
            .fix(format!("a list needs quotes of its own: {GRAMMAR}")));
    }
    if device.is_some() && filter != GpuFilter::default() {
        return Err(refuse("it both names GPUs and says what they must have".into())
            .fix("leave out `device=`, or the conditions"));
    }
    // Docker counts one GPU where neither a number nor a name is given.
    let selection = device.or(count).unwrap_or(Some(DeviceSelection::Count(1)));
    Ok(Gpus { selection, filter, capabilities })
}

/// The option that was probably meant: names of GPUs without `device=`, or a list of capabilities without quotes.
fn meant(text: &str) -> Option<String> {
    let is_name = |name: &str| name.parse::<DeviceId>().is_ok();
    if text.eq_ignore_ascii_case("all") {
        return Some("write --gpus all".into());
    }
    if let Some(list) = without_ranges(text) {
        return Some(format!("write --gpus device={list}"));
    }
    if text.split(',').all(is_name) {
        return Some(format!("write --gpus device={text}"));
    }
    let (before, list) = text.split_once("capabilities=")?;
    let lacks_quotes = list.contains(',') && !list.contains(['=', '"', '\'']) && !before.contains('"');
    lacks_quotes.then(|| format!("write --gpus '{before}\"capabilities={list}\"'"))
}

/// The list of names with each range `0-3` as `0,1,2,3`; `None` if it has no range, or something else than names and ranges.
fn without_ranges(list: &str) -> Option<String> {
    /// More GPUs than a host has.
    const MOST: u32 = 64;
    let range = |word: &str| {
        let (first, last) = word.split_once('-')?;
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        (first..=last).contains(&last).then_some((first, last)).filter(|(first, last)| last - first < MOST)
    };
    let mut words = Vec::new();
    for word in list.split(',').map(str::trim) {
        match range(word) {
            Some((first, last)) => words.extend((first..=last).map(|index| index.to_string())),
            None => words.push(word.parse::<DeviceId>().ok().map(|_| word.to_owned())?),
        }
    }
    list.split(',').any(|word| range(word.trim()).is_some()).then(|| words.join(","))
}

/// A shell takes the inner quotes from `--gpus "device=0,1"`: a field that names neither a key nor a count and stands behind
/// `device=` belongs to its list, and so does a number. Docker refuses such a text, so it means nothing else.
fn with_whole_lists(fields: Vec<String>) -> Vec<String> {
    let mut whole: Vec<String> = Vec::new();
    let mut in_list = false;
    for field in fields {
        let is_name = !field.is_empty() && !field.contains('=') && field != "all" && field != "none";
        match whole.last_mut() {
            Some(list) if in_list && is_name => {
                list.push(',');
                list.push_str(&field);
            }
            _ => {
                in_list = field.starts_with("device=") && field.len() > "device=".len();
                whole.push(field);
            }
        }
    }
    whole
}

/// `Some(None)` is no GPU, which Docker lets one ask for; `None` is not a count.
#[allow(clippy::option_option)] // The outer one is this function's failure, the inner one `--gpus 0`.
fn parse_count(text: &str) -> Option<Option<DeviceSelection>> {
    match text {
        "all" | "-1" => Some(Some(DeviceSelection::All)),
        _ if text.bytes().all(|byte| byte.is_ascii_digit()) => match text.parse().ok()? {
            0 => Some(None),
            count => Some(Some(DeviceSelection::Count(count))),
        },
        _ => None,
    }
}

/// A number of bytes with its unit, `40GiB`.
fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 6] = [
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
    ];
    UNITS
        .iter()
        .find_map(|(unit, size)| Some((text.strip_suffix(unit)?, size)))
        .filter(|(number, _)| number.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|(number, size)| number.parse::<u64>().ok()?.checked_mul(*size))
        .ok_or_else(|| {
            format!("{} is not a size such as 40GiB (MiB, GiB, TiB, or MB, GB, TB by tens)", quoted(text))
        })
}

/// Reads a list of devices, as `NVIDIA_VISIBLE_DEVICES` holds it; `source` is who says it. `None` is a container
/// without GPUs: the list is empty, or `void` is anywhere in it.
pub(super) fn visible_devices(list: &str, source: &str) -> Result<Option<DeviceSelection>> {
    // `nvidia.com/gpu=0` is the same GPU as `0`, whoever says it.
    let words: Vec<&str> = list.split(',').map(|word| annotation::gpu(word.trim())).collect();
    if list.trim().is_empty() || words.contains(&"void") {
        return Ok(None);
    }
    let refuse = |cause: &str| {
        Error::new(Code::BadRequest, format!("{source} {} cannot be understood", quoted(list)))
            .cause(cause)
            .fix(NAMES)
    };
    if words.contains(&"") {
        return Err(refuse("between or after its commas a name is missing"));
    }
    for (word, meant) in [("all", DeviceSelection::All), ("none", DeviceSelection::DriverOnly)] {
        if words.iter().all(|one| *one == word) {
            return Ok(Some(meant));
        }
        if words.contains(&word) {
            return Err(refuse(&format!("`{word}` stands beside other names")));
        }
    }
    let mut ids = Vec::with_capacity(words.len());
    // A list of a thousand names is nobody's: this bounds the comparisons below.
    if words.len() > 1024 {
        return Err(refuse("it names more than 1024 devices"));
    }
    for word in words {
        let id = word
            .parse::<DeviceId>()
            .or_fail(Code::BadRequest, || format!("{source} {} cannot be understood", quoted(list)));
        let id = id.map_err(|error| error.fix(NAMES))?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(Some(DeviceSelection::Ids(ids)))
}

impl FromStr for DeviceId {
    type Err = String;

    /// Reads one device's name: index, `i:j`, `GPU-…` or `MIG-…`, PCI address. Says why it is none of them.
    fn from_str(word: &str) -> Result<Self, String> {
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = |text: &str| {
            text.parse::<u32>().map_err(|_| format!("no GPU has a number as large as {}", quoted(text)))
        };
        if digits(word) {
            return Ok(Self::Index(number(word)?));
        }
        if let Some((gpu, device)) = word.split_once(':')
            && digits(gpu)
            && digits(device)
        {
            return Ok(Self::Mig(number(gpu)?, number(device)?));
        }
        if let Some((kind, rest)) = word.split_once('-')
            && (kind.eq_ignore_ascii_case("GPU") || kind.eq_ignore_ascii_case("MIG"))
        {
            // 8-4-4-4-12 hexadecimal digits; a beginning of them will do.
            return if (1..=36).contains(&rest.len())
                && rest.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
                && !rest.starts_with('-')
            {
                Ok(Self::Uuid(word.into()))
            } else {
                Err(format!("{} is not a UUID or the beginning of one", quoted(word)))
            };
        }
        pci_address(word).map(Self::Pci).ok_or_else(|| format!("{} is not a device's name", quoted(word)))
    }
}

/// `65:00.0`, `0000:65:00.0`, or with the eight digits of a domain that nvidia-smi prints; in sysfs' form.
fn pci_address(word: &str) -> Option<String> {
    let hex = |text: &str, width: usize| {
        let fits = (1..=width).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        fits.then(|| u32::from_str_radix(text, 16).ok()).flatten()
    };
    let (address, function) = word.rsplit_once('.')?;
    let (rest, device) = address.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    let (domain, bus, device, function) = (hex(domain, 8)?, hex(bus, 2)?, hex(device, 2)?, hex(function, 1)?);
    Some(format!("{domain:04x}:{bus:02x}:{device:02x}.{function:x}"))
}

#[cfg(test)]
mod tests {
    use super::{DeviceId::*, DeviceSelection::*, *};
    use proptest::prelude::*;

    const UUID: &str = "GPU-0a1b2c3d-0000-1111-2222-333344445555";

    fn selected(text: &str) -> Option<DeviceSelection> {
        gpus(text).unwrap_or_else(|error| panic!("{error}")).selection
    }

    #[test]
    fn dockers_grammar() {
        let uuid = || Uuid(UUID.into());
        for (text, meant) in [
            ("all", Some(All)),
            ("2", Some(Count(2))),
            ("0", None),
            ("-1", Some(All)),
            ("count=all", Some(All)),
            ("count=3", Some(Count(3))),
            ("driver=nvidia", Some(Count(1))),
            ("capabilities=utility", Some(Count(1))),
            ("device=0", Some(Ids(vec![Index(0)]))),
            ("\"device=0,1\"", Some(Ids(vec![Index(0), Index(1)]))),
            ("device=0,1", Some(Ids(vec![Index(0), Index(1)]))),
            ("device=0,1,capabilities=gpu", Some(Ids(vec![Index(0), Index(1)]))),
            ("\"device=0,0\"", Some(Ids(vec![Index(0)]))),
            (&format!("\"device=0,{UUID},0:1\",driver=nvidia"), Some(Ids(vec![Index(0), uuid(), Mig(0, 1)]))),
            ("driver=,options=a=b,device=3", Some(Ids(vec![Index(3)]))),
            ("device=all", Some(All)),
            ("device=none", Some(DriverOnly)),
            ("device=void", None),
        ] {
            assert_eq!(selected(text), meant, "{text}");
        }
    }

    #[test]
    fn capabilities_and_conditions() {
        let given = gpus("2,\"capabilities=gpu,compute,video\",arch>=9.0,mem>=40GiB").unwrap();
        assert_eq!(given.capabilities, Some(DriverCapability::COMPUTE | DriverCapability::VIDEO));
        assert_eq!(given.selection, Some(Count(2)));
        assert_eq!(given.filter, GpuFilter { arch: Some(Version::of(9, 0)), memory: Some(40 << 30) });
        assert_eq!(gpus("all,capabilities=gpu").unwrap().capabilities, None);
        assert_eq!(gpus("mem>=80GB").unwrap().filter.memory, Some(80_000_000_000));
    }

    #[test]
    fn what_docker_refuses_is_refused_with_a_way_out() {
        let list = format!("a list needs quotes of its own: {GRAMMAR}");
        for (text, code, cause, fix) in [
            ("", 20, "it is empty", GRAMMAR),
            ("\"device=0", 20, "a quote is not closed", GRAMMAR),
            ("de\"vice=0\"", 20, "a quote stands inside a field and not around it", GRAMMAR),
            ("\"all\"x", 20, "a quote is followed by something else than a comma", GRAMMAR),
            ("all,all", 20, "`count` is said twice", GRAMMAR),
            ("device=0,device=1", 20, "`device` is said twice", GRAMMAR),
            ("count=2,device=0", 20, "it both counts GPUs and names them", &list),
            ("0,1", 20, "`count` is said twice", "write --gpus device=0,1"),
            (
                "all,capabilities=utility,compute",
                20,
                "`count` is said twice",
                "write --gpus 'all,\"capabilities=utility,compute\"'",
            ),
            ("some", 20, "`some` is neither `all` nor a number of GPUs", GRAMMAR),
            ("-2", 20, "`-2` is neither `all` nor a number of GPUs", GRAMMAR),
            ("99999999999", 20, "`99999999999` is neither `all` nor a number of GPUs", GRAMMAR),
            ("ALL", 20, "`ALL` is neither `all` nor a number of GPUs", "write --gpus all"),
            ("0-3", 20, "`0-3` is neither `all` nor a number of GPUs", "write --gpus device=0,1,2,3"),
            (
                "GPU-0a1b",
                20,
                "`GPU-0a1b` is neither `all` nor a number of GPUs",
                "write --gpus device=GPU-0a1b",
            ),
            ("device=0-1,3", 20, "a range names no GPU", "write --gpus device=0,1,3"),
            ("\"device=0-1,GPU-0a1b\"", 20, "a range names no GPU", "write --gpus device=0,1,GPU-0a1b"),
            ("3-0", 20, "`3-0` is neither `all` nor a number of GPUs", GRAMMAR),
            ("0-9999", 20, "`0-9999` is neither `all` nor a number of GPUs", GRAMMAR),
            ("device=", 20, "`device=` names no GPU", NAMES),
            ("driver=amd", 20, "there is no driver `amd`", "write `driver=nvidia`, or leave it out"),
            (
                "gpus=2",
                20,
                "there is no key `gpus`",
                "the keys are `count=`, `device=`, `capabilities=`, `driver=` and `options=`, and the conditions `arch>=` and `mem>=`",
            ),
            ("arch>=x", 20, "\"x\" is not a version such as 12.4", "write `arch>=9.0`"),
            (
                "mem>=40",
                20,
                "`40` is not a size such as 40GiB (MiB, GiB, TiB, or MB, GB, TB by tens)",
                "write `mem>=40GiB`",
            ),
            (
                "2,free>=20GiB",
                20,
                "`free>=` asks for the memory that is free now, which this version does not measure",
                "ask for a GPU's whole memory (`mem>=40GiB`), or name the GPUs",
            ),
            (
                "device=0,arch>=9.0",
                20,
                "it both names GPUs and says what they must have",
                "leave out `device=`, or the conditions",
            ),
        ] {
            let error = gpus(text).unwrap_err();
            assert_eq!(error.code() as u16, code, "{text}");
            assert_eq!(
                (error.what(), error.cause_line().as_str(), error.fix_line()),
                (format!("--gpus `{text}` cannot be understood").as_str(), cause, fix)
            );
        }
        assert_eq!(
            gpus("capabilities=cuda").unwrap_err().what(),
            "--gpus capabilities= names `cuda`, which is not a driver capability"
        );
    }

    #[test]
    fn visible_devices_means_what_the_peers_table_says() {
        for (list, meant) in [
            ("", None),
            ("void", None),
            ("0,void,1", None),
            ("void,nonsense", None),
            ("all", Some(All)),
            ("all,all", Some(All)),
            ("none", Some(DriverOnly)),
            (" 1 , 0,1", Some(Ids(vec![Index(1), Index(0)]))),
            ("nvidia.com/gpu=1, runtime.nvidia.com/gpu=0:1", Some(Ids(vec![Index(1), Mig(0, 1)]))),
            ("nvidia.com/gpu=all", Some(All)),
            ("mig-0a1b", Some(Ids(vec![Uuid("mig-0a1b".into())]))),
            ("00000000:65:00.0,0000:65:00.0,65:0.0", Some(Ids(vec![Pci("0000:65:00.0".into())]))),
            ("10000:E1:1f.7", Some(Ids(vec![Pci("10000:e1:1f.7".into())]))),
        ] {
            assert_eq!(visible_devices(list, "X").unwrap(), meant, "{list:?}");
        }
    }

    #[test]
    fn a_list_that_is_none_names_the_choices() {
        let number = "4".repeat(40);
        let many = vec!["0"; 1025].join(",");
        for (list, cause) in [
            ("0,", "between or after its commas a name is missing"),
            (",", "between or after its commas a name is missing"),
            ("-1", "`-1` is not a device's name"),
            ("GPU0", "`GPU0` is not a device's name"),
            ("0-3", "`0-3` is not a device's name"),
            ("amd.com/gpu=0", "`amd.com/gpu=0` is not a device's name"),
            ("nvidia.com/gpu=", "between or after its commas a name is missing"),
            ("nvidia.com/gpu=all,0", "`all` stands beside other names"),
            ("GPU-", "`GPU-` is not a UUID or the beginning of one"),
            ("GPU-xyz", "`GPU-xyz` is not a UUID or the beginning of one"),
            ("0:99999999999", "no GPU has a number as large as `99999999999`"),
            (&number, &format!("no GPU has a number as large as `{number}`")),
            ("0,all", "`all` stands beside other names"),
            ("none,0", "`none` stands beside other names"),
            (&many, "it names more than 1024 devices"),
        ] {
            let error = visible_devices(list, "NVIDIA_VISIBLE_DEVICES").unwrap_err();
            assert_eq!(
                (error.code(), error.what(), error.cause_line().as_str(), error.fix_line()),
                (
                    Code::BadRequest,
                    format!("NVIDIA_VISIBLE_DEVICES {} cannot be understood", quoted(list)).as_str(),
                    cause,
                    NAMES
                )
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_request_or_a_message(text in "[a-z0-9,=\":.>-]{0,30}|.{0,30}") {
            let _ = gpus(&text);
            let _ = visible_devices(&text, "X");
            let _ = text.parse::<DeviceId>();
        }
        #[test]
        fn a_name_is_read_back_as_it_is_shown(text in "[0-9]{1,9}(:[0-9]{1,9})?|(GPU|MIG)-[0-9a-f]{1,8}|([0-9A-F]{1,8}:)?[0-9A-F]{1,2}:[01][0-9A-F].[0-7]") {
            if let Ok(id) = text.parse::<DeviceId>() {
                prop_assert_eq!(id.to_string().parse::<DeviceId>(), Ok(id));
            }
        }
        #[test]
        fn duplicates_collapse_in_order(list in proptest::collection::vec(0u32..4, 1..12)) {
            let text = list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let mut expected: Vec<DeviceId> = Vec::new();
            for index in list {
                if !expected.contains(&Index(index)) { expected.push(Index(index)); }
            }
            prop_assert_eq!(selected(&format!("\"device={text}\"")), Some(Ids(expected)));
        }
        #[test]
        fn a_quoted_csv_field_keeps_what_is_in_it(fields in proptest::collection::vec("[a\",=]{0,6}", 1..4)) {
            let text = fields.iter().map(|f| format!("\"{}\"", f.replace('"', "\"\""))).collect::<Vec<_>>().join(",");
            prop_assert_eq!(csv::record(&text), Ok(fields));
        }
    }
}
