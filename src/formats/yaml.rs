//! YAML, read with a bound on memory: a short text with aliases of aliases can stand for gigabytes.
#![forbid(unsafe_code)]

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::{cell::Cell, fmt};

/// The most memory that a text may stand for, in bytes. The largest CDI specs, of hosts with MIG, have a few hundred KiB.
const MAX_MEMORY: usize = 16 << 20;

/// The value of a text that holds one document.
///
/// # Errors
/// The text is not YAML, JSON cannot express it, or it stands for more than [`MAX_MEMORY`].
pub fn from_str(text: &str) -> Result<Value, serde_norway::Error> {
    let left = Cell::new(MAX_MEMORY);
    Bounded { left: &left }.deserialize(serde_norway::Deserializer::from_str(text))
}

/// Builds a value, and counts its memory.
#[derive(Clone, Copy)]
struct Bounded<'a> {
    left: &'a Cell<usize>,
}

impl Bounded<'_> {
    fn count<E: Error>(self, text: &str) -> Result<(), E> {
        let left = self.left.get().checked_sub(size_of::<Value>() + text.len());
        self.left.set(left.ok_or_else(|| E::custom("its aliases stand for more than 16 MiB"))?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON has")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.count("").map(|()| value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.count("").map(|()| value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.count("").map(|()| value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.count("").map(|()| value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.count(value).map(|()| value.into())
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.count("").map(|()| Value::Null)
    }

    /// The value of an empty text.
    fn visit_none<E: Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        self.count("")?;
        let mut items = Vec::new();
        while let Some(item) = sequence.next_element_seed(self)? {
            items.push(item);
        }
        Ok(items.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        self.count("")?;
        let mut members = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.count(&key)?;
            members.insert(key, map.next_value_seed(self)?);
        }
        Ok(members.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_those_of_json() {
        for (text, value) in [
            ("", json!(null)),
            (
                "{a: 1, b: [-2, 1.5, yes, true, ~, '3'], 4: x}",
                json!({"a": 1, "b": [-2, 1.5, "yes", true, null, "3"], "4": "x"}),
            ),
            ("a: &x {b: c}\nd: [*x, *x]", json!({"a": {"b": "c"}, "d": [{"b": "c"}, {"b": "c"}]})),
        ] {
            assert_eq!(from_str(text).unwrap(), value, "{text}");
            assert_eq!(serde_norway::from_str::<Value>(text).unwrap(), value, "{text}");
        }
        for bad in ["a: [", "a: 1\n---\nb: 2", "!tag x", "[*a]"] {
            assert!(from_str(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn aliases_are_bounded() {
        let long = format!("a: &a {}\nb: [{}]", "x".repeat(30_000), "*a, ".repeat(8000));
        let levels: String =
            (1..9).map(|n| format!("a{n}: &a{n} [{}]\n", format!("*a{}, ", n - 1).repeat(20))).collect();
        for text in [long, format!("a0: &a0 x\n{levels}")] {
            assert!(from_str(&text).is_err(), "{}", &text[..20]);
        }
    }
}
