//! What names content: `sha256:…`.

use crate::error::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::{fmt, fmt::Write as _};

/// A SHA-256 digest as images write it, `sha256:` and 64 lower-case hexadecimal digits
/// (OCI image specification, descriptor.md).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// From its text; 64 digits without `sha256:` are understood too, as docker-archive file names have them.
    pub fn parse(text: &str) -> Result<Self> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let good = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if good {
            return Ok(Self(hex.to_owned()));
        }
        let shown: String = text.chars().take(100).collect();
        Err(Error::new(Code::ImageBroken, format!("{shown:?} is not a digest that gpurun can check"))
            .cause("a digest is sha256: and 64 lower-case hexadecimal digits"))
    }

    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Hasher::new().and(bytes).finish()
    }

    /// The digits alone, 64 of them.
    pub fn hex(&self) -> &str {
        &self.0
    }

    /// Fails unless these are the bytes that the digest names; `what` says whose bytes they are.
    pub fn verify(&self, actual: &Digest, what: impl fmt::Display) -> Result<()> {
        if self == actual {
            return Ok(());
        }
        Err(Error::new(Code::DigestMismatch, format!("{what} is not what its digest promises"))
            .cause(format!("promised {self}, found {actual}"))
            .fix("copy the image again: the bytes were damaged or changed on their way"))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}
impl TryFrom<String> for Digest {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}
impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A digest in the making.
pub struct Hasher(Sha256);

impl Hasher {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self(Sha256::new())
    }
    /// Takes in more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    fn and(mut self, bytes: &[u8]) -> Self {
        self.update(bytes);
        self
    }
    /// The digest of all that came in.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        }))
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
        assert_eq!(Digest::parse(empty).unwrap(), Digest::parse(&empty[7..]).unwrap());
        for bad in
            ["", "sha256:", "sha512:00", &empty.to_uppercase(), &empty[..70], "sha256:../../../etc/passwd"]
        {
            assert_eq!(Digest::parse(bad).unwrap_err().code(), Code::ImageBroken, "{bad}");
        }
        let error = Digest::of(b"a").verify(&Digest::of(b"b"), "x").unwrap_err();
        assert_eq!(error.code(), Code::DigestMismatch);
    }
    proptest! {
        #[test]
        fn any_text_is_a_digest_or_a_message(text in ".{0,80}") { let _ = Digest::parse(&text); }
    }
}
