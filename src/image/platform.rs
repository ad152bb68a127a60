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
    /// The platform of an image's configuration.
    pub fn new(os: &str, architecture: &str) -> Self {
        Self { architecture: architecture.into(), os: os.into(), variant: String::new() }
    }

    /// The same platform in the words that Go uses. Tools that do not use them write those of `uname` (containerd,
    /// `platforms.Normalize`).
    fn normal(&self) -> Self {
        let word = self.architecture.to_ascii_lowercase();
        let (architecture, implied) = match word.as_str() {
            "x86_64" | "x86-64" => ("amd64", ""),
            "aarch64" => ("arm64", ""),
            "i386" | "i486" | "i586" | "i686" => ("386", ""),
            "armhf" => ("arm", "v7"),
            "armel" => ("arm", "v6"),
            other => (other, ""),
        };
        let variant = match (architecture, self.variant.to_ascii_lowercase().as_str()) {
            (_, "") => implied.to_owned(),
            // The first variant of an architecture is the architecture itself.
            ("amd64", "v1") | ("arm64", "8" | "v8") => String::new(),
            ("arm", digit @ ("5" | "6" | "7" | "8")) => format!("v{digit}"),
            (_, variant) => variant.to_owned(),
        };
        Self { architecture: architecture.into(), os: self.os.to_ascii_lowercase(), variant }
    }

    /// How well an image for `self` suits the platform `wanted`, 0 best; `None` if it does not run there (OCI image
    /// specification, image-index.md). An image without a variant runs on every variant; `amd64/v3` does not. An image for
    /// `arm/v6` runs on `arm/v7`, not the other way round.
    pub fn rank(&self, wanted: &Self) -> Option<u8> {
        let (has, wanted) = (self.normal(), wanted.normal());
        if has.os != wanted.os || has.architecture != wanted.architecture {
            return None;
        }
        if has.architecture == "arm" {
            // Without a word it is v7, as in Docker.
            let [level, limit] = [&has, &wanted].map(|one| match one.variant.as_str() {
                "" => Some(7),
                variant => variant.strip_prefix('v')?.parse::<u8>().ok(),
            });
            let (level, limit) = level.zip(limit)?;
            return limit.checked_sub(level).or_else(|| wanted.variant.is_empty().then_some(u8::MAX));
        }
        match (has.variant.as_str(), wanted.variant.as_str()) {
            (has, wanted) if has == wanted => Some(0),
            ("", _) => Some(0),
            (_, wanted) if !wanted.is_empty() => None,
            _ => Some(1),
        }
    }

    /// Fails unless an image with this platform in its configuration is for `wanted`; an empty word matches everything.
    pub fn check(&self, wanted: &Self) -> Result<()> {
        let same = |has: &str, wanted: &str| has.is_empty() || has == wanted;
        let (has, needed) = (self.normal(), wanted.normal());
        if same(&has.os, &needed.os) && same(&has.architecture, &needed.architecture) {
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
    /// `linux/ARCHITECTURE[/VARIANT]` or `ARCHITECTURE`, as Docker's `--platform`; the words of `uname` are those of Go then.
    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let words: Vec<&str> = lower.split('/').collect();
        let (os, architecture, variant) = match words[..] {
            // Empty is no option, as in Docker.
            ["" | "linux"] => ("linux", architecture(), ""),
            [architecture] => ("linux", architecture, ""),
            [os, architecture] => (os, architecture, ""),
            [os, architecture, variant] => (os, architecture, variant),
            _ => ("", "", ""),
        };
        let asked =
            Self { architecture: architecture.into(), os: os.into(), variant: variant.into() }.normal();
        // A word alone is an operating system or an architecture, so only those that are known count.
        let is_known = words.len() > 1 || asked.elf_machine().is_some();
        let is_word =
            |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if asked.os != "linux"
            || architecture.is_empty()
            || !is_known
            || !is_word(&asked.architecture)
            || !is_word(variant)
        {
            return Err(
                "a platform is linux/amd64 or linux/arm64, with a variant behind: linux/amd64/v3".into()
            );
        }
        Ok(asked)
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let mut words = text.split('/').map(str::to_owned);
        let mut next = || words.next().unwrap_or_default();
        Platform { os: next(), architecture: next(), variant: next() }
    }

    #[test]
    fn every_spelling_of_a_platform_is_understood() {
        for (typed, meant) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("Linux/X86-64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("amd64", "linux/amd64"),
            ("aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm64/8", "linux/arm64"),
            ("linux/i386", "linux/386"),
            ("linux/arm/v7", "linux/arm/v7"),
            ("linux/arm/7", "linux/arm/v7"),
            ("armhf", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/arm", "linux/arm"),
            ("linux/riscv64", "linux/riscv64"),
        ] {
            assert_eq!(typed.parse::<Platform>().unwrap().to_string(), meant, "{typed}");
        }
        assert_eq!("linux".parse::<Platform>().unwrap(), Platform::default());
        for bad in [
            "/",
            "linux/",
            "windows/amd64",
            "windows",
            "linux/amd64/v1/x",
            "linux/a b",
            "vax",
            "linux//v1",
            "linux/amd64/V 1",
        ] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_best_variant_is_chosen() {
        for (has, wanted, rank) in [
            ("linux/amd64", "linux/amd64", Some(0)),
            ("Linux/x86_64", "linux/amd64", Some(0)),
            ("linux/amd64/v1", "linux/amd64", Some(0)),
            ("linux/amd64/v3", "linux/amd64", Some(1)),
            ("linux/amd64/v3", "linux/amd64/v3", Some(0)),
            ("linux/amd64", "linux/amd64/v3", Some(0)),
            ("linux/amd64/v2", "linux/amd64/v3", None),
            ("linux/arm64/v8", "linux/arm64", Some(0)),
            ("linux/aarch64", "linux/arm64", Some(0)),
            ("linux/arm64", "linux/amd64", None),
            ("windows/amd64", "linux/amd64", None),
            ("linux/arm/v7", "linux/arm/v7", Some(0)),
            ("linux/arm", "linux/arm/v7", Some(0)),
            ("linux/arm/v6", "linux/arm/v7", Some(1)),
            ("linux/arm/v5", "linux/arm/v7", Some(2)),
            ("linux/arm/v7", "linux/arm/v6", None),
            ("linux/arm/v7", "linux/arm", Some(0)),
            ("linux/arm/v6", "linux/arm", Some(1)),
            ("linux/arm/v8", "linux/arm", Some(u8::MAX)),
            ("linux/arm/odd", "linux/arm", None),
            ("/amd64", "linux/amd64", None),
        ] {
            assert_eq!(platform(has).rank(&platform(wanted)), rank, "{has} for {wanted}");
        }
        for (has, good) in [
            ("linux/x86_64", true),
            ("Linux/AMD64", true),
            ("/", true),
            ("linux/arm64", false),
            ("darwin/amd64", false),
        ] {
            assert_eq!(platform(has).check(&platform("linux/amd64")).is_ok(), good, "{has}");
        }
    }
}
