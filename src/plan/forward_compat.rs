//! Whether an image's own user-mode driver (`cuda-compat`, /usr/local/cuda/compat) goes before the host's.

use super::ForwardCompat;
use crate::vocabulary::Version;
use serde::Deserialize;

/// The JSON in the ELF note `.note.cuda.fwd_compatibility` (owner "NVIDIA Corporation") of an image's libcuda.
#[derive(Deserialize)]
struct Note {
    #[serde(rename = "CUDA Version")]
    cuda: Option<Version>,
    /// The driver branches on whose kernel module the library runs.
    #[serde(rename = "Driver", default)]
    branches: Vec<u32>,
}

/// Decides for an image's libcuda of version `compat` (from its file name) with this note, or none.
///
/// * It names driver branches: the host's must be one of them, and the library newer than the host's driver, which
///   holds for a newer minor version, too.
/// * It names none: its CUDA must be newer than the host's.
/// * There is no note, or it cannot be read: no. Such libraries are too old to say on which drivers they run, and a
///   wrong guess ends with CUDA's error 803 in a container that would have worked.
pub fn decide(note: Option<&str>, compat: &Version, host: &ForwardCompat) -> bool {
    let Some(note) = note.and_then(|json| serde_json::from_str::<Note>(json).ok()) else { return false };
    if note.branches.is_empty() {
        note.cuda.is_some_and(|cuda| cuda > host.cuda)
    } else {
        note.branches.contains(&host.driver.major()) && *compat > host.driver
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decided(note: Option<&str>, compat: &str, driver: &str, cuda: &str) -> bool {
        let v = |text: &str| text.parse::<Version>().unwrap();
        decide(note, &v(compat), &ForwardCompat { driver: v(driver), cuda: v(cuda), needed_for: None })
    }

    #[test]
    fn the_notes_rule() {
        let note = Some(
            r#"{"Format": 1, "CUDA Version": "13.1", "Driver": [535, 550, 580, 590], "Device": [1, 2, 14]}"#,
        );
        assert!(decided(note, "590.44.01", "535.104.05", "12.2"), "an older branch of the list");
        assert!(decided(note, "590.44.01", "590.44", "13.1"), "an older driver of the same branch");
        assert!(!decided(note, "590.44.01", "590.44.01", "13.1"), "the same driver");
        assert!(!decided(note, "590.44.01", "590.48.01", "13.1"), "a newer driver");
        assert!(!decided(note, "590.44.01", "565.57.01", "12.7"), "a branch that is not in the list");
        assert!(!decided(note, "590.44.01", "610.43.02", "13.3"));
    }

    #[test]
    fn without_branches_cuda_decides_and_without_a_note_nothing_is_used() {
        let note = Some(r#"{"CUDA Version": "12.4", "Driver": []}"#);
        assert!(
            decided(note, "550.54.14", "535.104.05", "12.2")
                && !decided(note, "550.54.14", "560.28.03", "12.4")
        );
        assert!(decided(Some(r#"{"CUDA Version": "12.10"}"#), "1", "2", "12.9"));
        for unreadable in [
            None,
            Some(""),
            Some("{}"),
            Some("[]"),
            Some(r#"{"Driver": ["535"]}"#),
            Some(r#"{"CUDA Version": "x"}"#),
        ] {
            assert!(!decided(unreadable, "590.44.01", "535.104.05", "12.2"), "{unreadable:?}");
        }
    }

    proptest! {
        #[test]
        fn any_note_is_decided(text in ".{0,60}|[{}\\[\\]:,0-9\"A-Z]{0,40}") { decided(Some(&text), "1", "2", "3"); }
    }
}
