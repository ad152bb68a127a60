//! The list of driver capabilities, as `NVIDIA_DRIVER_CAPABILITIES` and `--gpus capabilities=` write it.

use super::quoted;
use crate::{
    error::{Code, Error, Result},
    vocabulary::DriverCapability,
};

/// Words that Docker puts beside the driver's capabilities to find the GPU driver among its own. They grant nothing.
pub(super) const DOCKER_WORDS: &[&str] = &["gpu", "nvidia"];

/// The capabilities of `list`; `None` if it names none, so that the default holds. `source` is who says it, for
/// the message, and `neutral` are words that are allowed there and grant nothing.
pub fn parse(list: &str, source: &str, neutral: &[&str]) -> Result<Option<DriverCapability>> {
    let mut found = None;
    for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        let word_lower = word.to_ascii_lowercase();
        if neutral.contains(&word_lower.as_str()) {
            continue;
        }
        let one = if word_lower == "all" {
            DriverCapability::all()
        } else {
            DriverCapability::from_name(&word_lower.to_ascii_uppercase()).ok_or_else(|| {
                Error::new(
                    Code::BadCapability,
                    format!("{source} names {}, which is not a driver capability", quoted(word)),
                )
                .fix(format!("choose from {}, or `all`", DriverCapability::all().names().join(", ")))
            })?
        };
        found = Some(found.unwrap_or(DriverCapability::empty()) | one);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const C: DriverCapability = DriverCapability::COMPUTE;
    const U: DriverCapability = DriverCapability::UTILITY;

    #[test]
    fn lists() {
        for (list, meant) in [
            ("", None),
            (" , ", None),
            ("compute", Some(C)),
            ("compute,utility", Some(C | U)),
            ("utility, Compute,", Some(C | U)),
            ("compute,all", Some(DriverCapability::all())),
            ("gpu", None),
            ("gpu,compute", Some(C)),
        ] {
            assert_eq!(parse(list, "X", DOCKER_WORDS).unwrap(), meant, "{list:?}");
        }
    }

    #[test]
    fn an_unknown_word_names_the_choices() {
        assert_eq!(
            parse("compute,gpu", "NVIDIA_DRIVER_CAPABILITIES", &[]).unwrap_err().to_string(),
            "error[GPU-0022]: NVIDIA_DRIVER_CAPABILITIES names `gpu`, which is not a driver capability\n  \
             fix: choose from compat32, compute, display, graphics, ngx, utility, video, or `all`"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_a_list_or_a_message(text in "[a-z,| ]{0,20}|.{0,20}") { let _ = parse(&text, "X", &[]); }
    }
}
