//! Which CUDA a driver runs, and what to say where it does not.

use crate::{
    error::{Code, Error},
    vocabulary::Version,
};
use std::cmp::Ordering;

/// The first driver for Linux on x86-64 with each CUDA release, newest first: NVIDIA's CUDA Toolkit release notes,
/// "CUDA Toolkit and Corresponding Driver Versions". A driver that is there says itself what it speaks; this is for
/// advice about drivers that are not there.
const FIRST_DRIVER: [((u32, u32), &str); 32] = [
    ((13, 4), "615"),
    ((13, 3), "610.43.02"),
    ((13, 2), "595.45.04"),
    ((13, 1), "590.44.01"),
    ((13, 0), "580.65.06"),
    ((12, 9), "575.51.03"),
    ((12, 8), "570.26"),
    ((12, 6), "560.28.03"),
    ((12, 5), "555.42.02"),
    ((12, 4), "550.54.14"),
    ((12, 3), "545.23.06"),
    ((12, 2), "535.54.03"),
    ((12, 1), "530.30.02"),
    ((12, 0), "525.60.13"),
    ((11, 8), "520.61.05"),
    ((11, 7), "515.43.04"),
    ((11, 6), "510.39.01"),
    ((11, 5), "495.29.05"),
    ((11, 4), "470.42.01"),
    ((11, 3), "465.19.01"),
    ((11, 2), "460.27.03"),
    ((11, 1), "455.23"),
    ((11, 0), "450.51.05"),
    ((10, 2), "440.33"),
    ((10, 1), "418.39"),
    ((10, 0), "410.48"),
    ((9, 2), "396.26"),
    ((9, 1), "390.46"),
    ((9, 0), "384.81"),
    ((8, 0), "367.48"),
    ((7, 5), "352.31"),
    ((7, 0), "346.46"),
];

/// The oldest driver that speaks `cuda`; `None` if it is newer than the table.
pub fn first_driver(cuda: &Version) -> Option<&'static str> {
    let speaks = FIRST_DRIVER.iter().rev().find(|((major, minor), _)| Version::of(*major, *minor) >= *cuda);
    speaks.map(|(_, driver)| *driver)
}

/// How an image's CUDA and the driver's get on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The driver speaks it.
    Fine,
    /// Same major from 11 on: compiled programs run, PTX that is newer than the driver does not.
    MinorVersion,
    /// Only with the user-mode driver that the image itself may bring (`cuda-compat`).
    ForwardCompat,
    /// Nothing will run it.
    Refusal,
}

/// Compares the CUDA of an image with the one of the driver; `forward` says whether the GPUs take a user-mode driver
/// that is newer than the kernel's (see [`takes_forward_compat`]).
pub fn verdict(image: &Version, driver: &Version, forward: bool) -> Verdict {
    match image.cmp(driver) {
        Ordering::Less | Ordering::Equal => Verdict::Fine,
        // "CUDA Compatibility", chapter on minor version compatibility: since CUDA 11.
        Ordering::Greater if image.major() == driver.major() && image.major() >= 11 => Verdict::MinorVersion,
        // No cuda-compat package has reached over more than one major; what is further has no chance.
        Ordering::Greater if forward && image.major() <= driver.major().saturating_add(1) => {
            Verdict::ForwardCompat
        }
        Ordering::Greater => Verdict::Refusal,
    }
}

/// Whether GPUs of this brand take a newer user-mode driver. "CUDA Compatibility" allows data-centre GPUs and some
/// professional ones; on a GeForce or TITAN it ends with CUDA's error 804, so it is better not tried.
pub fn takes_forward_compat(brand: &str) -> bool {
    let brand = brand.to_ascii_lowercase();
    !(brand.starts_with("geforce") || brand.starts_with("titan"))
}

/// The refusal of an image whose CUDA the driver cannot run.
pub fn too_new(image: &Version, driver: &Version, driver_cuda: &Version) -> Error {
    Error::new(
        Code::CudaTooNew,
        format!("the image is made for CUDA {image} and driver {driver} speaks CUDA {driver_cuda} at most"),
    )
    .fix(remedy(image, driver_cuda))
}

/// What to do where `wanted` is more than the driver speaks.
pub(super) fn remedy(wanted: &Version, driver_cuda: &Version) -> String {
    let tag = format!("an image for CUDA {driver_cuda} (a tag such as `{driver_cuda}`)");
    match first_driver(wanted) {
        Some(driver) => format!("install driver {driver} or newer, or use {tag}"),
        None => format!("use {tag}: no driver known to this gpurun speaks CUDA {wanted}"),
    }
}

/// The warning for [`Verdict::MinorVersion`].
pub(super) fn minor_version_warning(image: &Version, driver: &Version, driver_cuda: &Version) -> String {
    format!(
        "the image is made for CUDA {image} and driver {driver} speaks CUDA {driver_cuda}: compiled programs run, \
         PTX compiled at run time may fail; {}",
        remedy(image, driver_cuda)
    )
}

#[cfg(test)]
mod tests {
    use super::{Verdict::*, *};

    fn v(text: &str) -> Version {
        text.parse().unwrap()
    }

    #[test]
    fn the_table_descends_in_both_columns() {
        for pair in FIRST_DRIVER.windows(2) {
            assert!(pair[0].0 > pair[1].0 && v(pair[0].1) >= v(pair[1].1), "{pair:?}");
        }
    }

    #[test]
    fn the_oldest_driver_for_a_release() {
        for (cuda, driver) in [
            ("12.4", Some("550.54.14")),
            ("12.4.1", Some("555.42.02")),
            ("12.7", Some("570.26")),
            ("12", Some("525.60.13")),
            ("6.5", Some("346.46")),
            ("13.4", Some("615")),
            ("13.5", None),
            ("99", None),
        ] {
            assert_eq!(first_driver(&v(cuda)), driver, "{cuda}");
        }
    }

    #[test]
    fn verdicts() {
        for (image, driver, forward, is) in [
            ("12.4", "12.4", false, Fine),
            ("10.2", "12.4", false, Fine),
            ("12.6", "12.4", false, MinorVersion),
            ("11.8", "11.0", true, MinorVersion),
            ("10.2", "10.1", false, Refusal),
            ("10.2", "10.1", true, ForwardCompat),
            ("13.0", "12.2", true, ForwardCompat),
            ("13.0", "12.2", false, Refusal),
            ("13.0", "11.4", true, Refusal),
            ("99.0", "12.4", true, Refusal),
            ("4294967295", "4294967294", true, ForwardCompat),
        ] {
            assert_eq!(verdict(&v(image), &v(driver), forward), is, "{image} on {driver}");
        }
    }

    #[test]
    fn a_refusal_says_which_driver_or_image_would_do() {
        assert_eq!(
            too_new(&v("13.0"), &v("535.104.05"), &v("12.2")).to_string(),
            "error[GPU-0031]: the image is made for CUDA 13.0 and driver 535.104.05 speaks CUDA 12.2 at most\n  \
             fix: install driver 580.65.06 or newer, or use an image for CUDA 12.2 (a tag such as `12.2`)"
        );
        assert_eq!(
            remedy(&v("99.0"), &v("12.4")),
            "use an image for CUDA 12.4 (a tag such as `12.4`): no driver known to this gpurun speaks CUDA 99.0"
        );
        assert_eq!(
            minor_version_warning(&v("12.6"), &v("550.163.01"), &v("12.4")),
            "the image is made for CUDA 12.6 and driver 550.163.01 speaks CUDA 12.4: compiled programs run, PTX compiled at \
             run time may fail; install driver 560.28.03 or newer, or use an image for CUDA 12.4 (a tag such as `12.4`)"
        );
    }

    #[test]
    fn brands_that_take_forward_compatibility() {
        assert!(
            takes_forward_compat("tesla")
                && takes_forward_compat("nvidia")
                && takes_forward_compat("quadrortx")
        );
        assert!(!takes_forward_compat("GeForceRTX") && !takes_forward_compat("titan"));
    }
}
