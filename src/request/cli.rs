//! The launcher's request: `--gpus`, `-e`, and what the image says.

use super::{DeviceRequest, env::Environment, env::cuda_release, selection};
use crate::{error::Result, vocabulary::EnvVar};
use std::collections::BTreeMap;

impl DeviceRequest {
    /// Checks the grammar of `--gpus`, which depends on no image.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`] and [`crate::error::Code::BadCapability`], as [`DeviceRequest::from_cli`].
    pub fn check_option(gpus: Option<&str>) -> Result<()> {
        gpus.map_or(Ok(()), |text| selection::gpus(text).map(drop))
    }

    /// What the launcher is asked for; `None` is a container without GPUs.
    ///
    /// `--gpus` decides. Without it `NVIDIA_VISIBLE_DEVICES` does, if the *user* typed it (`-e`, `--env-file`): an
    /// image that bakes in `NVIDIA_VISIBLE_DEVICES=all`, as every CUDA image does, would otherwise take every GPU of
    /// the host unasked. For the same reason only the user's variables ask for gated features and IMEX channels. What
    /// only narrows or describes (capabilities, requirements, `CUDA_VERSION`) is read from both, the user's last.
    ///
    /// Fails where something that was asked for cannot be understood; nothing is skipped in silence.
    pub fn from_cli(
        gpus: Option<&str>,
        user_env: &[EnvVar],
        image_env: &[EnvVar],
        labels: &BTreeMap<String, String>,
    ) -> Result<Option<Self>> {
        const VISIBLE: &str = "NVIDIA_VISIBLE_DEVICES";
        let user = Environment::new(user_env);
        let both = Environment::new(image_env.iter().chain(user_env));

        let asked = match (gpus, user.get(VISIBLE)) {
            (Some(text), _) => selection::gpus(text)?,
            (None, list) => selection::Gpus {
                selection: selection::visible_devices(list.unwrap_or_default(), VISIBLE)?,
                filter: super::GpuFilter::default(),
                capabilities: None,
            },
        };
        let Some(selection) = asked.selection else { return Ok(None) };

        // Also the way around a requirement that cannot be read.
        let disable_require = both.disable_require();
        let label = || labels.get("com.nvidia.cuda.version").and_then(|version| cuda_release(version));
        Ok(Some(Self {
            selection,
            filter: asked.filter,
            capabilities: match asked.capabilities {
                Some(capabilities) => Some(capabilities),
                None => both.capabilities()?,
            },
            requirements: if disable_require { Vec::new() } else { both.requirements()? },
            image_cuda: if both.requires_cuda() { None } else { both.legacy_cuda().or_else(label) },
            disable_require,
            features: user.features()?,
            imex_channels: user.imex_channels()?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        request::{DeviceId, DeviceSelection::*},
        vocabulary::{DriverCapability, GatedFeature, Version},
    };
    use proptest::prelude::*;

    fn env(variables: &[(&str, &str)]) -> Vec<EnvVar> {
        variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    fn ask(gpus: Option<&str>, user: &[(&str, &str)], image: &[(&str, &str)]) -> Option<DeviceRequest> {
        DeviceRequest::from_cli(gpus, &env(user), &env(image), &BTreeMap::new())
            .unwrap_or_else(|e| panic!("{e}"))
    }

    fn refused(user: &[(&str, &str)]) -> String {
        DeviceRequest::from_cli(Some("all"), &env(user), &[], &BTreeMap::new()).unwrap_err().to_string()
    }

    #[test]
    fn an_image_alone_never_takes_a_gpu() {
        let image = [("NVIDIA_VISIBLE_DEVICES", "all"), ("CUDA_VERSION", "12.4.1")];
        assert_eq!(ask(None, &[], &image), None);
        assert_eq!(ask(None, &[("NVIDIA_VISIBLE_DEVICES", "void")], &image), None);
        assert_eq!(ask(None, &[("NVIDIA_VISIBLE_DEVICES", "")], &image), None);
        assert_eq!(ask(Some("0"), &[("NVIDIA_VISIBLE_DEVICES", "all")], &image), None);
        let user = [("NVIDIA_VISIBLE_DEVICES", "all"), ("NVIDIA_VISIBLE_DEVICES", "1")];
        assert_eq!(ask(None, &user, &image).unwrap().selection, Ids(vec![DeviceId::Index(1)]));
        assert_eq!(ask(Some("2"), &user, &image).unwrap().selection, Count(2));
    }

    #[test]
    fn capabilities_come_from_the_option_then_the_user_then_the_image() {
        let image = [("NVIDIA_DRIVER_CAPABILITIES", "all")];
        let user = [("NVIDIA_DRIVER_CAPABILITIES", "utility")];
        let of = |gpus, user: &[_], image: &[_]| ask(Some(gpus), user, image).unwrap().capabilities;
        assert_eq!(of("all,capabilities=video", &user, &image), Some(DriverCapability::VIDEO));
        assert_eq!(of("all,capabilities=gpu", &user, &image), Some(DriverCapability::UTILITY));
        assert_eq!(of("all", &[], &image), Some(DriverCapability::all()));
        assert_eq!(of("all", &[], &[]), None);
    }

    #[test]
    fn the_image_says_which_cuda_it_needs_in_one_of_three_ways() {
        let of = |image: &[(&str, &str)], label: Option<&str>| {
            let labels = label
                .map(|text| ("com.nvidia.cuda.version".to_owned(), text.to_owned()))
                .into_iter()
                .collect();
            DeviceRequest::from_cli(Some("all"), &[], &env(image), &labels).unwrap().unwrap()
        };
        let required = of(&[("CUDA_VERSION", "12.4.1"), ("NVIDIA_REQUIRE_CUDA", "cuda>=12.4")], Some("11.0"));
        assert_eq!((required.requirements.len(), required.image_cuda), (1, None));
        let legacy = of(&[("CUDA_VERSION", "9.0.176"), ("NVIDIA_REQUIRE_CUDA", "")], Some("11.0"));
        assert_eq!((legacy.requirements.len(), legacy.image_cuda.unwrap().as_str()), (0, "9.0"));
        assert_eq!(of(&[("CUDA_VERSION", "cu121")], Some("12.1.0")).image_cuda, Some(Version::of(12, 1)));
        assert_eq!(of(&[], None).image_cuda, None);
    }

    #[test]
    fn requirements_are_every_variable_but_jetpacks() {
        let image = [
            ("NVIDIA_REQUIRE_CUDA", "cuda>=12"),
            ("NVIDIA_REQUIRE_DRIVER", "driver>=500"),
            ("NVIDIA_REQUIRE_JETPACK", "csv-mounts=all"),
            ("NVIDIA_REQUIRE_JETPACK_HOST_MOUNTS", "base-only"),
            ("NVIDIA_REQUIRE_EMPTY", ""),
        ];
        let names =
            |request: DeviceRequest| request.requirements.into_iter().map(|r| r.variable).collect::<Vec<_>>();
        assert_eq!(
            names(ask(Some("all"), &[], &image).unwrap()),
            ["NVIDIA_REQUIRE_CUDA", "NVIDIA_REQUIRE_DRIVER"]
        );
        // A user takes a requirement back by emptying it.
        let user = [("NVIDIA_REQUIRE_CUDA", "")];
        assert_eq!(names(ask(Some("all"), &user, &image).unwrap()), ["NVIDIA_REQUIRE_DRIVER"]);
    }

    #[test]
    fn disable_require_takes_gos_words() {
        for (word, meant) in
            [("1", true), ("True", true), ("t", true), ("0", false), ("yes", false), ("", false)]
        {
            let request = ask(Some("all"), &[], &[("NVIDIA_DISABLE_REQUIRE", word)]).unwrap();
            assert_eq!(request.disable_require, meant, "{word}");
        }
        let image = [("NVIDIA_REQUIRE_CUDA", "nonsense")];
        assert!(
            ask(Some("all"), &[("NVIDIA_DISABLE_REQUIRE", "1")], &image).unwrap().requirements.is_empty()
        );
    }

    #[test]
    fn only_the_user_asks_for_features_and_channels() {
        let words = [
            ("NVIDIA_GDS", "enabled"),
            ("NVIDIA_MOFED", "disabled"),
            ("NVIDIA_MIG_MONITOR_DEVICES", "all"),
            ("NVIDIA_IMEX_CHANNELS", "7,0, 7"),
        ];
        let request = ask(Some("all"), &words, &[]).unwrap();
        assert_eq!(request.features, [GatedFeature::Gds, GatedFeature::MigMonitor]);
        assert_eq!(request.imex_channels, [0, 7]);
        let request = ask(Some("all"), &[], &words).unwrap();
        assert!(request.features.is_empty() && request.imex_channels.is_empty());
    }

    #[test]
    fn features_and_channels_that_are_none_say_so() {
        assert_eq!(
            refused(&[("NVIDIA_GDS", "yes")]),
            "error[GPU-0020]: NVIDIA_GDS=`yes` cannot be understood\n  fix: say NVIDIA_GDS=enabled, or leave it out"
        );
        assert_eq!(
            refused(&[("NVIDIA_MIG_CONFIG_DEVICES", "0")]),
            "error[GPU-0020]: NVIDIA_MIG_CONFIG_DEVICES=`0` cannot be understood\n  \
             fix: say NVIDIA_MIG_CONFIG_DEVICES=all, or leave it out"
        );
        for word in ["all", "1048576", "+1", ""] {
            assert_eq!(
                refused(&[("NVIDIA_IMEX_CHANNELS", &format!("0,{word}"))]),
                format!(
                    "error[GPU-0020]: NVIDIA_IMEX_CHANNELS names `{word}`, which is not an IMEX channel\n  \
                     fix: name channels by number, 0 to 1048575, with commas between them"
                )
            );
        }
    }

    proptest! {
        #[test]
        fn any_environment_is_a_request_or_a_message(
            gpus in proptest::option::of("[a-z0-9,=]{0,12}"),
            values in proptest::collection::vec("[a-z0-9,.>= -]{0,20}|.{0,12}", 8),
        ) {
            let names = ["NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_REQUIRE_CUDA", "CUDA_VERSION",
                "NVIDIA_DISABLE_REQUIRE", "NVIDIA_GDS", "NVIDIA_IMEX_CHANNELS", "NVIDIA_MIG_CONFIG_DEVICES"];
            let all: Vec<EnvVar> = names.iter().map(|n| (*n).to_owned()).zip(values).collect();
            let _ = DeviceRequest::from_cli(gpus.as_deref(), &all, &all, &BTreeMap::new());
        }
    }
}
