//! What names content: `sha256:…`.

use crate::error::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use std::{fmt, fmt::Write as _};

/// A digest as images write it: `ALGORITHM:` and lower-case hexadecimal digits (OCI image specification, descriptor.md). The
/// algorithms are those of Go's `opencontainers/go-digest`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    algorithm: Algorithm,
    hex: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Algorithm {
    Sha256,
    Sha384,
    Sha512,
}

impl Algorithm {
    const ALL: [Self; 3] = [Self::Sha256, Self::Sha384, Self::Sha512];

    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// Hexadecimal digits of a digest.
    fn digits(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha384 => 96,
            Self::Sha512 => 128,
        }
    }
}

impl Digest {
    /// Parses `ALGORITHM:HEX`.
    ///
    /// # Errors
    /// [`Code::ImageBroken`] for anything else, and for an algorithm that is not known.
    pub fn parse(text: &str) -> Result<Self> {
        Self::read(text).ok_or_else(|| {
            let shown: String = text.chars().take(100).collect();
            Error::new(Code::ImageBroken, format!("{shown:?} is not a digest that gpurun can check"))
                .cause(CAUSE)
                .fix("have the image written again, `skopeo copy --format oci …`, by a tool that uses sha256 or sha512")
        })
    }

    /// Parses the digits of a file name; their number tells the algorithm. `None` if the file is not named by a digest.
    pub fn parse_hex(hex: &str) -> Option<Self> {
        let algorithm = Algorithm::ALL.into_iter().find(|one| hex.len() == one.digits())?;
        let good = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        good.then(|| Self { algorithm, hex: hex.to_owned() })
    }

    fn read(text: &str) -> Option<Self> {
        let (name, hex) = text.split_once(':')?;
        Self::parse_hex(hex).filter(|digest| digest.algorithm() == name)
    }

    /// The SHA-256 digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Hasher::new().and(bytes).finish()
    }

    /// The name of the algorithm: the directory of such blobs in an OCI layout.
    pub fn algorithm(&self) -> &'static str {
        self.algorithm.name()
    }

    /// The digits alone: 64, 96 or 128 of them.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// A hasher of the same algorithm, to check bytes against this digest.
    pub fn hasher(&self) -> Hasher {
        match self.algorithm {
            Algorithm::Sha256 => Hasher::Sha256(Sha256::new()),
            Algorithm::Sha384 => Hasher::Sha384(Sha384::new()),
            Algorithm::Sha512 => Hasher::Sha512(Sha512::new()),
        }
    }

    /// Whether the other digest is of the same algorithm, so that one pass over the bytes checks both.
    pub fn is_like(&self, other: &Self) -> bool {
        self.algorithm == other.algorithm
    }

    /// Whether the bytes have this digest.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        self.hasher().and(bytes).finish() == *self
    }

    /// Fails unless these are the bytes that the digest names; `what` says whose bytes they are.
    pub fn verify_bytes(&self, bytes: &[u8], what: impl fmt::Display) -> Result<()> {
        self.verify(&self.hasher().and(bytes).finish(), what)
    }

    /// Fails unless `actual`, of the same algorithm, equals this digest; `what` names the bytes in the error.
    pub fn verify(&self, actual: &Digest, what: impl fmt::Display) -> Result<()> {
        if self == actual {
            return Ok(());
        }
        Err(Error::new(Code::DigestMismatch, format!("{what} is not what its digest promises"))
            .cause(format!("promised {self}, found {actual}"))
            .fix("copy the image again (`skopeo copy`, `docker save`, `gpurun pull`): the bytes were damaged or changed on their way"))
    }
}

const CAUSE: &str = "a digest is sha256: or sha512: and 64 or 128 lower-case hexadecimal digits";

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}
impl TryFrom<String> for Digest {
    /// One line, because it becomes part of the sentence about the document.
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::read(&text).ok_or_else(|| {
            let shown: String = text.chars().take(100).collect();
            format!("{shown:?} is not a digest that gpurun can check: {CAUSE}")
        })
    }
}
impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A digest in the making.
pub enum Hasher {
    /// Of SHA-256.
    Sha256(Sha256),
    /// Of SHA-384.
    Sha384(Sha384),
    /// Of SHA-512.
    Sha512(Sha512),
}

impl Hasher {
    /// An empty SHA-256 hasher.
    pub fn new() -> Self {
        Self::Sha256(Sha256::new())
    }
    /// Takes in more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha384(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }
    fn and(mut self, bytes: &[u8]) -> Self {
        self.update(bytes);
        self
    }
    /// The digest of all that came in.
    pub fn finish(self) -> Digest {
        let hex = |bytes: &[u8]| {
            bytes.iter().fold(String::with_capacity(128), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            })
        };
        match self {
            Self::Sha256(hasher) => Digest { algorithm: Algorithm::Sha256, hex: hex(&hasher.finalize()) },
            Self::Sha384(hasher) => Digest { algorithm: Algorithm::Sha384, hex: hex(&hasher.finalize()) },
            Self::Sha512(hasher) => Digest { algorithm: Algorithm::Sha512, hex: hex(&hasher.finalize()) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn digests_are_read_written_and_checked() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert_eq!(Digest::parse(empty).unwrap(), Digest::parse_hex(&empty[7..]).unwrap());
        for bad in [
            "",
            "sha256:",
            "sha512:00",
            &empty[7..],
            &empty.replace(':', "::"),
            &format!("sha1:{}", &empty[7..47]),
            &empty.to_uppercase(),
            &empty[..70],
            "sha256:../../../etc/passwd",
        ] {
            assert_eq!(Digest::parse(bad).unwrap_err().code(), Code::ImageBroken, "{bad}");
        }
        let long = format!("sha512:{}", "0f".repeat(64));
        assert_eq!(Digest::parse(&long).unwrap().to_string(), long);
        assert_eq!(Digest::parse(&long).unwrap(), Digest::parse_hex(&long[7..]).unwrap());
        assert!(Digest::parse(&long.replace("sha512", "sha256")).is_err());
        // FIPS 180-4 examples: the empty message.
        let empty = "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e";
        let empty = Digest::parse_hex(empty).unwrap();
        assert!(empty.matches(b"") && !empty.matches(b"a") && !empty.is_like(&Digest::of(b"")));
        let error = Digest::of(b"a").verify(&Digest::of(b"b"), "x").unwrap_err();
        assert_eq!(error.code(), Code::DigestMismatch);
    }
    proptest! {
        #[test]
        fn any_text_is_a_digest_or_a_message(text in ".{0,80}") { let _ = Digest::parse(&text); }
    }
}
