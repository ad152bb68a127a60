//! Parses sizes in the format of Docker's options.

use super::usage;
use crate::error::Result;

/// Bytes from `64m`, `2g`, `1.5GiB`, `.5g`, `4096`; powers of 1024, as Docker counts (go-units RAMInBytes). `Gi`, the suffix of
/// Kubernetes, is accepted as well.
pub fn size(option: &str, text: &str) -> Result<u64> {
    let bad = || {
        usage(format!("{option} {text:?} is not a size"))
            .fix("write a number with b, k, m, g or t: `512m`, `16g`")
    };
    let lower = text.to_ascii_lowercase();
    let end = lower.rfind(|c: char| c.is_ascii_digit() || c == '.').map_or(0, |last| last + 1);
    let (number, unit) = lower.split_at(end);
    // One blank, as go-units has it.
    let unit = unit.strip_prefix(' ').unwrap_or(unit);
    let shift = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix(['b', 'i'])).unwrap_or(unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(bad()),
    };
    let number = number.strip_prefix('+').unwrap_or(number);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return Err(bad());
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| bad())? };
    // Six digits are enough in practice and can be computed exactly with integers.
    let digits: String = fraction.chars().chain("000000".chars()).take(6).collect();
    let millionths: u64 = digits.parse().map_err(|_| bad())?;
    let whole = whole.checked_mul(1 << shift).ok_or_else(bad)?;
    whole
        .checked_add(((u128::from(millionths) << shift) / 1_000_000).try_into().map_err(|_| bad())?)
        .ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_dockers() {
        for (text, bytes) in [
            ("64m", 64 << 20),
            ("2g", 2 << 30),
            ("1.5GiB", 3 << 29),
            ("4096", 4096),
            ("1kb", 1024),
            ("0", 0),
            ("1 MB", 1 << 20),
            (".5g", 1 << 29),
            ("5.k", 5 << 10),
            ("+64m", 64 << 20),
            ("1p", 1 << 50),
            ("4Gi", 4 << 30),
            ("1B", 1),
        ] {
            assert_eq!(size("--shm-size", text).unwrap(), bytes, "{text}");
        }
        for text in [
            "",
            "m",
            "-1",
            "1x",
            "1.2.3",
            ".",
            "+",
            "++1",
            "1,5g",
            "64bb",
            "64ibb",
            "4gg",
            "50%",
            "64m ",
            " 64m",
            "64  m",
            "max",
            "0x10",
            "99999999999999999999",
            "99999999t",
        ] {
            assert!(
                size("--shm-size", text).unwrap_err().to_string().starts_with("error[GPU-0001]: --shm-size"),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_or_an_error(text in ".{0,40}") {
            let _ = size("x", &text);
        }
    }
}
