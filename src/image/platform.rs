//! The platform of an image: operating system, architecture and variant.

use crate::error::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A platform, with the names of GOARCH and GOOS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: String,
}

impl Default for Platform {
    /// The platform of this machine.
    fn default() -> Self {
        Self { architecture: architecture().into(), os: "linux".into(), variant: String::new() }
    }
}

impl Platform {
    /// The platform with these three words, as in an image's configuration.
    pub fn new(os: &str, architecture: &str) -> Self {
        Self { architecture: architecture.into(), os: os.into(), variant: String::new() }
    }

    /// How well an image for `self` suits the platform `wanted`, 0 best; `None` if it does not run there (OCI image
    /// specification, image-index.md). An image without a variant runs on every variant; `amd64/v3` does not.
    pub fn rank(&self, wanted: &Self) -> Option<u8> {
        if self.os != wanted.os || self.architecture != wanted.architecture {
            return None;
        }
        match (self.variant.as_str(), wanted.variant.as_str()) {
            (has, wanted) if has == wanted => Some(0),
            ("", _) => Some(0),
            (_, wanted) if !wanted.is_empty() => None,
            ("v1" | "v8", _) => Some(0),
            _ => Some(1),
        }
    }

    /// Fails unless an image with this platform in its configuration is for `wanted`; an empty word matches everything.
    pub fn check(&self, wanted: &Self) -> Result<()> {
        let same = |has: &str, wanted: &str| has.is_empty() || has == wanted;
        if same(&self.os, &wanted.os) && same(&self.architecture, &wanted.architecture) {
            return Ok(());
        }
        Err(wrong_platform(&self.to_string(), wanted))
    }

    /// Whether it is a real platform: build attestations in an index have `unknown/unknown`.
    pub fn is_known(&self) -> bool {
        self.os != "unknown"
    }

    /// Whether this machine's processor runs it natively, including its 32-bit predecessor.
    pub fn is_native(&self) -> bool {
        let here = architecture();
        let runs = (here, self.architecture.as_str());
        here == self.architecture || matches!(runs, ("amd64", "386") | ("arm64", "arm"))
    }

    /// The machine number in ELF files (elf.h, `EM_*`).
    pub fn elf_machine(&self) -> Option<u16> {
        Some(match self.architecture.as_str() {
            "386" => 3,
            "ppc64le" => 21,
            "s390x" => 22,
            "arm" => 40,
            "amd64" => 62,
            "arm64" => 183,
            "riscv64" => 243,
            "loong64" => 258,
            _ => return None,
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

impl FromStr for Platform {
    type Err = String;
    /// `linux/ARCHITECTURE[/VARIANT]`, `linux` or `ARCHITECTURE`, in any case and with the kernel's names of architectures, as
    /// Docker's `--platform` (containerd/platforms, Parse). Empty is this machine's.
    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let words: Vec<&str> = lower.split('/').collect();
        let (os, architecture, variant) = match words.as_slice() {
            ["" | "linux"] => return Ok(Self::default()),
            [architecture] if ARCHITECTURES.iter().any(|known| known.contains(architecture)) => {
                ("linux", *architecture, "")
            }
            [os, architecture] => (*os, *architecture, ""),
            [os, architecture, variant] => (*os, *architecture, *variant),
            _ => ("", "", ""),
        };
        let word = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        let known = ARCHITECTURES.iter().find(|known| known.contains(&architecture)).map(|known| known[0]);
        let architecture = known.unwrap_or(architecture);
        if os != "linux" || architecture.is_empty() || !word(architecture) || !word(variant) {
            return Err(
                "a platform is linux/amd64 or linux/arm64, with a variant behind: linux/amd64/v3".into()
            );
        }
        Ok(Self { architecture: architecture.into(), os: os.into(), variant: variant.into() })
    }
}

/// Architectures: the name of GOARCH, and other names of the same.
const ARCHITECTURES: [&[&str]; 8] = [
    &["amd64", "x86_64", "x86-64"],
    &["arm64", "aarch64"],
    &["arm", "armhf", "armel"],
    &["386", "i386"],
    &["ppc64le"],
    &["s390x"],
    &["riscv64"],
    &["loong64", "loongarch64"],
];

/// This machine's architecture in the words of GOARCH, which images use.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// The error for an image that exists only for other platforms.
pub fn wrong_platform(has: &str, wanted: &Platform) -> Error {
    let whose = if *wanted == Platform::default() { "this machine is" } else { "what was asked for is" };
    Error::new(Code::WrongPlatform, format!("the image is for {has}, and {whose} {wanted}"))
        .fix(format!("name an image that was built for {wanted}; `--platform OS/ARCHITECTURE` fetches one for another machine"))
}
