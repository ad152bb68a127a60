//! JSON as Go's `encoding/json` reads it.
//!
//! Images, registries and engines write JSON with Go programs and test it with Go programs. One rule decides how lenient this
//! parser is: **what Go's `json.Unmarshal` accepts is accepted with the value that Go finds, and what Go refuses is refused.**
//!
//! | in the document | value |
//! |---|---|
//! | keys in another case (`Config` for `config`), by Unicode's simple folding | the field's, as with the exact spelling |
//! | a key that occurs twice | the later string, number or list; objects are merged |
//! | `null` for a string, number, list or object | the empty one, as if the key were missing |
//! | unknown keys, nested to any depth | ignored |
//! | bytes that are not UTF-8, halves of surrogate pairs | U+FFFD |
//! | a byte order mark, data after the value, `1.0` or `1e3` for an integer, a number out of range | refused |
//!
//! The document is read in place, so memory is needed for the fields that are asked for and not for the document. The number of
//! list elements and object keys that are kept is bounded by [`MAX_ENTRIES`].

use serde::{
    Deserialize, Deserializer,
    de::{
        self, DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor,
        value::{MapAccessDeserializer, StrDeserializer},
    },
};
use serde_json::{Error, value::RawValue};
use std::{cell::Cell, fmt, marker::PhantomData};

/// The most list elements and object keys in a document. The largest known image index has a few hundred.
pub const MAX_ENTRIES: usize = 50_000;
/// The deepest nesting of used values; Go's limit is 10000.
const MAX_DEPTH: usize = 64;

/// Reads a whole document.
///
/// # Errors
/// One line of text, with line and column for a syntax error.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err("it begins with a byte order mark, which JSON does not allow".into());
    }
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err("it is empty".into());
    }
    let text = String::from_utf8_lossy(bytes);
    let raw: &RawValue = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let left = Cell::new(MAX_ENTRIES);
    T::deserialize(Value { raws: vec![raw], left: &left, depth: 0 }).map_err(|error| without_place(&error))
}

/// A value, and earlier values of the same key, which are merged if they are objects.
struct Value<'de, 'a> {
    /// In the order of the document; never empty.
    raws: Vec<&'de RawValue>,
    /// Entries that may still be kept.
    left: &'a Cell<usize>,
    depth: usize,
}

impl<'de> Value<'de, '_> {
    fn text(&self) -> &'de str {
        self.raws.last().map_or("null", |raw| raw.get())
    }

    fn is_null(&self) -> bool {
        self.text() == "null"
    }

    fn inside(&self, raws: Vec<&'de RawValue>) -> Result<Self, Error> {
        if self.depth == MAX_DEPTH {
            return Err(de::Error::custom("it is nested too deeply"));
        }
        Ok(Self { raws, left: self.left, depth: self.depth + 1 })
    }

    fn count(left: &Cell<usize>) -> Result<(), Error> {
        let more = left.get().checked_sub(1).ok_or_else(|| {
            de::Error::custom(format!("it has more than {MAX_ENTRIES} entries in its lists and objects"))
        })?;
        left.set(more);
        Ok(())
    }

    fn json(&self) -> serde_json::Deserializer<serde_json::de::StrRead<'de>> {
        serde_json::Deserializer::from_str(self.text())
    }

    /// A string as Go decodes it.
    fn string(&self) -> Result<String, Error> {
        let text = self.text();
        serde_json::from_str::<String>(text).or_else(|error| {
            // Halves of surrogate pairs are read as bytes, which are not UTF-8.
            let bytes = if text.starts_with('"') { serde_json::from_str::<Bytes>(text).ok() } else { None };
            bytes.map(|Bytes(bytes)| String::from_utf8_lossy(&bytes).into_owned()).ok_or(error)
        })
    }

    /// The entries of all objects, without `null` values and unknown keys.
    fn fields(&self, names: &'static [&'static str]) -> Result<Vec<Field<'de>>, Error> {
        let mut found: Vec<Field<'de>> = Vec::new();
        for raw in &self.raws {
            serde_json::Deserializer::from_str(raw.get())
                .deserialize_map(Fields { names, found: &mut found })?;
        }
        Ok(found)
    }
}

struct Field<'de> {
    name: &'static str,
    raws: Vec<&'de RawValue>,
}

/// The bytes of a JSON string.
struct Bytes(Vec<u8>);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Copy;
        impl Visitor<'_> for Copy {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
        }
        from.deserialize_bytes(Copy)
    }
}

/// A key of an object, which may hold halves of surrogate pairs as well.
struct Key(String);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Bytes::deserialize(from).map(|Bytes(bytes)| Self(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

/// Collects the fields of a struct from an object.
struct Fields<'f, 'de> {
    names: &'static [&'static str],
    found: &'f mut Vec<Field<'de>>,
}

impl<'de> Visitor<'de> for Fields<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Key(key)) = map.next_key()? {
            let exact = self.names.iter().find(|name| **name == key);
            // The two letters outside of ASCII that Unicode folds to ASCII letters: long s and the Kelvin sign.
            let key = if key.is_ascii() { key } else { key.replace('\u{17f}', "s").replace('\u{212a}', "k") };
            let folded = || self.names.iter().find(|name| name.eq_ignore_ascii_case(&key));
            let Some(name) = exact.or_else(folded) else {
                map.next_value::<de::IgnoredAny>()?;
                continue;
            };
            let raw: &RawValue = map.next_value()?;
            let known = self.found.iter_mut().find(|field| field.name == *name);
            match (raw.get(), known) {
                // In Go, null leaves a string or number unchanged, and empties a list or an object. Here both give the empty value, unless an
                // earlier key has set a value.
                ("null", None) => {}
                ("null", Some(field)) => {
                    let before = field.raws.last().map_or("", |raw| raw.get());
                    if before.starts_with(['[', '{']) {
                        field.raws = vec![raw];
                    }
                }
                (_, Some(field)) if raw.get().starts_with('{') => field.raws.push(raw),
                (_, Some(field)) => field.raws = vec![raw],
                (_, None) => self.found.push(Field { name, raws: vec![raw] }),
            }
        }
        Ok(())
    }
}

/// Passes on the elements of a list and counts them.
struct List<'de, 'a, V> {
    visitor: V,
    left: &'a Cell<usize>,
    depth: usize,
    document: PhantomData<&'de ()>,
}

impl<'de, V: Visitor<'de>> Visitor<'de> for List<'de, '_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.visitor.expecting(f)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_seq(Elements { seq, left: self.left, depth: self.depth })
    }
}

struct Elements<'a, A> {
    seq: A,
    left: &'a Cell<usize>,
    depth: usize,
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Elements<'_, A> {
    type Error = A::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, A::Error> {
        let Some(raw) = self.seq.next_element::<&RawValue>()? else { return Ok(None) };
        Value::count(self.left).map_err(de::Error::custom)?;
        let value = Value { raws: vec![raw], left: self.left, depth: self.depth };
        seed.deserialize(value).map(Some).map_err(de::Error::custom)
    }
}

/// Passes on the entries of an object and counts them.
struct Entries<'de, 'a> {
    pairs: std::vec::IntoIter<(String, &'de RawValue)>,
    next: Option<&'de RawValue>,
    left: &'a Cell<usize>,
    depth: usize,
}

impl<'de> MapAccess<'de> for Entries<'de, '_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, raw)) = self.pairs.next() else { return Ok(None) };
        self.next = Some(raw);
        seed.deserialize(key.into_deserializer()).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        let raws = self.next.take().into_iter().collect();
        seed.deserialize(Value { raws, left: self.left, depth: self.depth })
    }
}

/// Collects the entries of an object and counts them.
struct Collect<'e, 'de, 'a> {
    entries: &'e mut Vec<(String, &'de RawValue)>,
    left: &'a Cell<usize>,
}

impl<'de> Visitor<'de> for Collect<'_, 'de, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Key(key)) = map.next_key()? {
            Value::count(self.left).map_err(de::Error::custom)?;
            self.entries.push((key, map.next_value()?));
        }
        Ok(())
    }
}

/// The fields of a struct, each once.
struct Merged<'de, 'a> {
    fields: std::vec::IntoIter<Field<'de>>,
    next: Option<(&'static str, Value<'de, 'a>)>,
    outer: Value<'de, 'a>,
}

impl<'de> MapAccess<'de> for Merged<'de, '_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some(Field { name, raws }) = self.fields.next() else { return Ok(None) };
        self.next = Some((name, self.outer.inside(raws)?));
        let name: StrDeserializer<'_, Error> = name.into_deserializer();
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        let (name, value) = self.next.take().ok_or_else(|| de::Error::custom("a value without a key"))?;
        seed.deserialize(value)
            .map_err(|error| de::Error::custom(format!("{name}: {}", without_place(&error))))
    }
}

/// Replaces serde_json's line and column, which count from the start of the inner value, by a path.
fn without_place(error: &Error) -> String {
    let said = error.to_string();
    said.rsplit_once(" at line ").map_or(said.clone(), |(said, _)| said.to_owned())
}

macro_rules! numbers {
    ($($method:ident)*) => { $(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            if self.is_null() { visitor.visit_u64(0) } else { (&mut self.json()).$method(visitor) }
        }
    )* };
}

impl<'de> Deserializer<'de> for Value<'de, '_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        (&mut self.json()).deserialize_any(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.is_null() { visitor.visit_bool(false) } else { (&mut self.json()).deserialize_bool(visitor) }
    }

    numbers! { deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_u8 deserialize_u16
    deserialize_u32 deserialize_u64 deserialize_f32 deserialize_f64 }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_string(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_string(if self.is_null() { String::new() } else { self.string()? })
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_string(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.is_null() {
            return visitor.visit_seq(de::value::SeqDeserializer::<_, Error>::new(std::iter::empty::<u8>()));
        }
        let Value { depth, left, .. } = self.inside(Vec::new())?;
        (&mut self.json()).deserialize_seq(List { visitor, left, depth, document: PhantomData })
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let mut entries = Vec::new();
        for raw in self.raws.iter().filter(|raw| raw.get() != "null") {
            serde_json::Deserializer::from_str(raw.get())
                .deserialize_map(Collect { entries: &mut entries, left: self.left })?;
        }
        let Value { depth, left, .. } = self.inside(Vec::new())?;
        visitor.visit_map(Entries { pairs: entries.into_iter(), next: None, left, depth })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let fields = if self.is_null() { Vec::new() } else { self.fields(names)? };
        MapAccessDeserializer::new(Merged { fields: fields.into_iter(), next: None, outer: self })
            .deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! { i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct enum }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Document {
        size: u64,
        media_type: String,
        on: bool,
        list: Vec<String>,
        map: BTreeMap<String, String>,
        inner: Inner,
        maybe: Option<Inner>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default)]
    struct Inner {
        a: String,
        b: String,
    }

    fn read(text: &str) -> Document {
        from_slice(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    /// Expected values are from Go 1.24, `json.Unmarshal` into the same struct.
    #[test]
    fn values_are_those_of_go() {
        assert_eq!(read("{}"), Document::default());
        assert_eq!(
            read(
                r#"{"size":null,"mediaType":null,"on":null,"list":null,"map":null,"inner":null,"maybe":null}"#
            ),
            Document::default()
        );
        assert_eq!(
            read(r#"{"SIZE":3,"MediaTYPE":"x"}"#),
            Document { size: 3, media_type: "x".into(), ..Default::default() }
        );
        assert_eq!(read(r#"{"size":3,"Size":4}"#).size, 4);
        assert_eq!(read(r#"{"mediaType":"a","mediaType":null}"#).media_type, "a");
        assert_eq!(read(r#"{"list":["a"],"list":["b","c"]}"#).list, ["b", "c"]);
        assert_eq!(read(r#"{"list":["a"],"list":null}"#).list, [""; 0]);
        assert_eq!(read(r#"{"list":["a",null]}"#).list, ["a", ""]);
        let inner = |a: &str, b: &str| Inner { a: a.into(), b: b.into() };
        assert_eq!(read(r#"{"inner":{"a":"1","b":"1"},"Inner":{"b":"2"}}"#).inner, inner("1", "2"));
        assert_eq!(read(r#"{"maybe":{"A":"1"}}"#).maybe, Some(inner("1", "")));
        let map = read(r#"{"map":{"x":"1","y":"1"},"map":{"y":"2","Y":null}}"#).map;
        assert_eq!(map.into_iter().map(|(k, v)| k + &v).collect::<Vec<_>>(), ["Y", "x1", "y2"]);
        assert_eq!(read(r#"{"mediaType":"\ud800x"}"#).media_type.trim_start_matches('\u{fffd}'), "x");
        assert_eq!(read(r#"{"mediaType":"\u0041\n"}"#).media_type, "A\n");
        let deep = format!(r#"{{"unknown":{}{},"size":1}}"#, "[".repeat(5000), "]".repeat(5000));
        assert_eq!(read(&deep).size, 1);
        assert_eq!(from_slice::<Document>(b"{\"mediaType\":\"a\xff\"}").unwrap().media_type, "a\u{fffd}");
    }

    #[test]
    fn what_go_refuses_is_refused_in_one_line() {
        for bad in [
            "",
            " ",
            "{",
            "[]",
            "1",
            "{} {}",
            "\u{feff}{}",
            r#"{"size":-1}"#,
            r#"{"size":1.0}"#,
            r#"{"size":1e2}"#,
            r#"{"size":"1"}"#,
            r#"{"size":99999999999999999999}"#,
            r#"{"mediaType":1}"#,
            r#"{"list":{}}"#,
            r#"{"map":[]}"#,
            r#"{"inner":"x"}"#,
            "{\"mediaType\":\"a\nb\"}",
            "{'size':1}",
            "{\"size\":1,}",
        ] {
            let error = from_slice::<Document>(bad.as_bytes()).unwrap_err();
            assert!(!error.is_empty() && !error.contains('\n'), "{bad}: {error:?}");
        }
        let error = from_slice::<Document>(br#"{"inner":{"a":["x"]}}"#).unwrap_err();
        assert_eq!(error, "inner: a: invalid type: sequence, expected a string");
    }

    #[test]
    fn entries_are_bounded() {
        let many: String = (0..=MAX_ENTRIES).map(|i| format!("\"{i}\":\"\",")).collect();
        let text = format!("{{\"map\":{{{}}}}}", many.trim_end_matches(','));
        assert!(from_slice::<Document>(text.as_bytes()).unwrap_err().contains("entries"));
        // Unused values are not limited.
        assert_eq!(read(&text.replace("\"map\"", "\"unknown\"")), Document::default());
        let list = format!("{{\"list\":[{}\"\"]}}", "\"\",".repeat(MAX_ENTRIES));
        assert!(from_slice::<Document>(list.as_bytes()).unwrap_err().contains("entries"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in r#"[{}\[\]",:0-9a-z\\ue.-]{0,60}"#) {
            let _ = from_slice::<Document>(text.as_bytes());
        }
    }
}
