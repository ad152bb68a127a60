//! A mapping of the configuration file, read as Go's encoding/json fills a struct: names in any case, `null` as if it were absent,
//! numbers and booleans for text. Keys that were not read remain, and can be listed in a warning.

use clap::ValueEnum;
use gpurun::error::{Code, Error, Result};
use serde_json::{Map, Value};
use std::path::PathBuf;

/// A mapping, and its place in the file.
#[derive(Debug)]
pub struct Section {
    path: String,
    members: Map<String, Value>,
    /// Whether names are case-sensitive: NVIDIA's plugin decodes `sharing.timeSlicing` and `sharing.mps` by hand.
    is_exact: bool,
}

impl Section {
    /// The mapping at a path.
    ///
    /// # Errors
    /// [`Code::Config`] for another kind of value.
    pub fn new(path: impl Into<String>, value: Value, is_exact: bool) -> Result<Self> {
        let path = path.into();
        match value {
            Value::Null => Ok(Self { path, members: Map::new(), is_exact }),
            Value::Object(members) => Ok(Self { path, members, is_exact }),
            other => Err(wrong(&path, &other, "a mapping")),
        }
    }

    /// The place of a member: `flags.migStrategy`.
    pub fn place(&self, name: &str) -> String {
        if self.path.is_empty() { name.into() } else { format!("{}.{name}", self.path) }
    }

    /// The mapping of this name; empty if it is absent.
    ///
    /// # Errors
    /// [`Code::Config`] for another kind of value.
    pub fn section(&mut self, name: &str, is_exact: bool) -> Result<Self> {
        Self::new(self.place(name), self.take(name).unwrap_or_default(), is_exact)
    }

    /// A value of any kind but null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        let is_it = |key: &str| if self.is_exact { key == name } else { folded(key) == folded(name) };
        let mut keys: Vec<String> = self.members.keys().filter(|key| is_it(key)).cloned().collect();
        // Go sorts the keys before decoding, and the last one is used.
        keys.sort_unstable();
        let values = keys.iter().filter_map(|key| self.members.remove(key));
        values.filter(|value| !value.is_null()).last()
    }

    /// A text, or a value that Go converts to text. An empty text counts as absent.
    ///
    /// # Errors
    /// [`Code::Config`] for another kind of value.
    pub fn text(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Some(value @ (Value::Bool(_) | Value::Number(_))) if !self.is_exact => {
                Ok(Some(value.to_string()))
            }
            Some(other) => Err(wrong(&self.place(name), &other, "a text")),
        }
    }

    /// A path.
    ///
    /// # Errors
    /// [`Code::Config`] for another kind of value.
    pub fn path(&mut self, name: &str) -> Result<Option<PathBuf>> {
        Ok(self.text(name)?.map(PathBuf::from))
    }

    /// `true` or `false`, and YAML's other words for them; text is refused, as Go refuses it.
    ///
    /// # Errors
    /// [`Code::Config`] for another kind of value.
    pub fn switch(&mut self, name: &str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(&self.place(name), &other, "true or false, without quotes")),
        }
    }

    /// One of a few words.
    ///
    /// # Errors
    /// [`Code::Config`] for any other word.
    pub fn choice<T: ValueEnum>(&mut self, name: &str) -> Result<Option<T>> {
        let Some(word) = self.text(name)? else { return Ok(None) };
        choice(&self.place(name), &word).map(Some)
    }

    /// A comma-separated text, or a list of texts.
    ///
    /// # Errors
    /// [`Code::Config`] for another kind of value.
    pub fn words(&mut self, name: &str) -> Result<Option<Vec<String>>> {
        let place = self.place(name);
        let words: Vec<String> = match self.take(name) {
            None => return Ok(None),
            Some(Value::String(text)) => text.split(',').map(|word| word.trim().to_owned()).collect(),
            Some(Value::Array(items)) => items
                .into_iter()
                .map(|item| match item {
                    Value::String(word) => Ok(word),
                    other => Err(wrong(&place, &other, "texts")),
                })
                .collect::<Result<_>>()?,
            Some(other) => return Err(wrong(&place, &other, "a text or a list of texts")),
        };
        Ok(Some(words).filter(|words| words.iter().any(|word| !word.is_empty())))
    }

    /// Adds the places of keys that were not read, except switches that are off and empty values.
    pub fn ignored(self, ignored: &mut Vec<String>) {
        let says_nothing = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(members) => members.is_empty(),
            _ => false,
        };
        let keys = self.members.iter().filter(|(_, value)| !says_nothing(value)).map(|(key, _)| key);
        ignored.extend(keys.map(|key| self.place(key)));
    }
}

/// Parses a word.
///
/// # Errors
/// [`Code::Config`], with the possible words.
pub fn choice<T: ValueEnum>(place: &str, word: &str) -> Result<T> {
    T::from_str(word, false).map_err(|_| {
        let known: Vec<_> = T::value_variants().iter().filter_map(ValueEnum::to_possible_value).collect();
        let known: Vec<_> = known.iter().map(clap::builder::PossibleValue::get_name).collect();
        Error::new(Code::Config, format!("{place} is {word:?}"))
            .cause(format!("it can be {}", known.join(", ")))
            .fix(format!("write one of these words at {place}"))
    })
}

/// A value of the wrong kind.
pub fn wrong(place: &str, value: &Value, wanted: &str) -> Error {
    let place = if place.is_empty() { "the whole file" } else { place };
    let mut shown = value.to_string();
    if let Some((end, _)) = shown.char_indices().nth(60) {
        shown.replace_range(end.., "…");
    }
    Error::new(Code::Config, format!("{place} is {shown}"))
        .cause(format!("it must be {wanted}"))
        .fix(format!("change {place} in the configuration file"))
}

/// Without regard to case, as encoding/json compares names: by Unicode's simple folding, in which two letters beyond ASCII are
/// equal to `s` and `k`.
fn folded(name: &str) -> String {
    let fold = |letter: char| match letter {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    };
    name.chars().map(fold).collect()
}
