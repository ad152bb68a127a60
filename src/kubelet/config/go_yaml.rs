//! Converts YAML to JSON like `sigs.k8s.io/yaml`, the library of NVIDIA's plugin. go-yaml v2 resolves scalars by YAML 1.1
//! (`yes` is true, `010` is 8, `1_000` is 1000), the last of several equal keys is used, `<<` merges, documents after the
//! first are ignored, and keys become text.

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Number, Value};
use std::{borrow::Cow, collections::HashMap};

/// The deepest nesting of collections. A configuration has six levels.
const DEEPEST: usize = 64;
/// The most values, including repetitions by aliases. A long text counts as several. A configuration has some dozens.
const MOST_VALUES: usize = 100_000;
/// Prefix of the tags that YAML itself defines.
const CORE: &str = "tag:yaml.org,2002:";

/// The first document of a text; `null` for a text without one.
///
/// # Errors
/// The reason, with its line, for a text that is not YAML or that JSON cannot express.
pub fn parse(text: &str) -> Result<Value, String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader { parser: Parser::new_from_str(text), anchors: HashMap::new(), values: 0 };
    loop {
        match reader.next()? {
            Event::StreamEnd | Event::DocumentEnd => return Ok(Value::Null),
            Event::StreamStart | Event::DocumentStart(_) | Event::Nothing => {}
            event => return Ok(reader.value(event, 0)?.json),
        }
    }
}

struct Reader<'a> {
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    /// Values by anchor number, each with the count of values in it.
    anchors: HashMap<usize, (Node, usize)>,
    values: usize,
}

/// A value, with details that a mapping needs if the value is a key.
#[derive(Clone)]
struct Node {
    json: Value,
    /// A plain `<<`.
    is_merge: bool,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Event<'a>, String> {
        match self.parser.next_event() {
            Some(Ok((event, _))) => Ok(event),
            Some(Err(error)) => Err(error.to_string()),
            None => Ok(Event::StreamEnd),
        }
    }

    fn value(&mut self, event: Event<'a>, depth: usize) -> Result<Node, String> {
        if depth > DEEPEST {
            return Err(format!("values are nested more than {DEEPEST} deep"));
        }
        self.count(1)?;
        let before = self.values;
        let (anchor, node) = match event {
            Event::Alias(number) => {
                let (node, size) =
                    self.anchors.get(&number).cloned().ok_or("an alias has no anchor before it")?;
                self.count(size)?;
                return Ok(node);
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.count(text.len() / 64)?;
                let plain = style == ScalarStyle::Plain;
                let json = scalar(&text, plain, tag.as_deref())?;
                (anchor, Node { json, is_merge: plain && tag.is_none() && text == "<<" })
            }
            Event::SequenceStart(anchor, _) => {
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        Event::SequenceEnd => break,
                        event => items.push(self.value(event, depth + 1)?.json),
                    }
                }
                (anchor, Node { json: Value::Array(items), is_merge: false })
            }
            Event::MappingStart(anchor, _) => {
                let mut members = Map::new();
                loop {
                    let key = match self.next()? {
                        Event::MappingEnd => break,
                        event => self.value(event, depth + 1)?,
                    };
                    let event = self.next()?;
                    let value = self.value(event, depth + 1)?.json;
                    if key.is_merge {
                        merge(&mut members, value)?;
                    } else {
                        members.insert(key_text(key.json)?, value);
                    }
                }
                (anchor, Node { json: Value::Object(members), is_merge: false })
            }
            _ => return Err("the text ends within a value".into()),
        };
        if anchor > 0 {
            self.anchors.insert(anchor, (node.clone(), self.values - before));
        }
        Ok(node)
    }

    /// Aliases of aliases can be exponentially large.
    fn count(&mut self, more: usize) -> Result<(), String> {
        self.values += more;
        if self.values > MOST_VALUES { Err(format!("it has more than {MOST_VALUES} values")) } else { Ok(()) }
    }
}

fn merge(members: &mut Map<String, Value>, value: Value) -> Result<(), String> {
    match value {
        Value::Object(more) => members.extend(more),
        Value::Array(several) => {
            // The first of several takes precedence.
            for one in several.into_iter().rev() {
                let Value::Object(more) = one else { return Err("`<<` merges mappings only".into()) };
                members.extend(more);
            }
        }
        _ => return Err("`<<` merges mappings only".into()),
    }
    Ok(())
}

fn key_text(key: Value) -> Result<String, String> {
    match key {
        Value::String(text) => Ok(text),
        Value::Bool(_) | Value::Number(_) => Ok(key.to_string()),
        _ => Err("a key is a mapping, a list or null".into()),
    }
}

fn scalar(text: &str, plain: bool, tag: Option<&Tag>) -> Result<Value, String> {
    let core: Option<Cow<'_, str>> = tag.map(|tag| {
        let whole = format!("{}{}", tag.handle, tag.suffix);
        Cow::Owned(whole.strip_prefix(CORE).or(whole.strip_prefix("!!")).unwrap_or("str").to_owned())
    });
    match core.as_deref() {
        None if plain => resolved(text),
        Some("null" | "bool" | "int" | "float") => resolved(text),
        _ => Ok(Value::String(text.into())),
    }
}

/// A plain scalar by YAML 1.1, as go-yaml v2 resolves it (resolve.go).
fn resolved(text: &str) -> Result<Value, String> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Ok(Value::Null),
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            return Ok(Value::Bool(true));
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Ok(Value::Bool(false));
        }
        ".nan" | ".NaN" | ".NAN" | ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" | "-.inf"
        | "-.Inf" | "-.INF" => return Err(format!("{text} is not a number that JSON has")),
        _ => {}
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return Ok(Value::String(text.into()));
    }
    let digits = text.replace('_', "");
    let number = integer(&digits).or_else(|| float(&digits));
    Ok(number.map_or_else(|| Value::String(text.into()), Value::Number))
}

/// Go's `strconv.ParseInt` with base 0.
fn integer(text: &str) -> Option<Number> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let lower = digits.to_ascii_lowercase();
    let (base, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, &lower[..]),
    };
    // No second sign.
    if !digits.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return None;
    }
    let value = u64::from_str_radix(digits, base).ok()?;
    if negative { 0_i64.checked_sub_unsigned(value).map(Number::from) } else { Some(Number::from(value)) }
}

fn float(text: &str) -> Option<Number> {
    let digits = text.trim_start_matches(['-', '+']);
    // Rust reads "infinity" and "nan" also, which begin with a letter.
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') || text.len() - digits.len() > 1 {
        return None;
    }
    let value: f64 = text.parse().ok()?;
    // JSON does not distinguish 2 and 2.0.
    #[allow(clippy::cast_possible_truncation, clippy::float_cmp)]
    if value.abs() < 9e15 && value.trunc() == value {
        return Some(Number::from(value as i64));
    }
    Number::from_f64(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn aliases_are_bounded() {
        let long = format!("a: &a {}\nb: [{}]", "x".repeat(30_000), "*a, ".repeat(8000));
        let levels: String =
            (1..9).map(|n| format!("a{n}: &a{n} [{}]\n", format!("*a{}, ", n - 1).repeat(20))).collect();
        for text in [long, format!("a0: &a0 x\n{levels}")] {
            assert!(parse(&text).unwrap_err().contains("more than"), "{}", &text[..20]);
        }
    }

    /// The answers of sigs.k8s.io/yaml 1.3 with go-yaml v2.4.
    #[test]
    fn a_scalar_means_what_it_means_to_go() {
        for (text, json) in [
            ("yes", json!(true)),
            ("y", json!(true)),
            ("On", json!(true)),
            ("TRUE", json!(true)),
            ("tRue", json!("tRue")),
            ("n", json!(false)),
            ("off", json!(false)),
            ("\"yes\"", json!("yes")),
            ("'010'", json!("010")),
            ("!!str yes", json!("yes")),
            ("~", json!(null)),
            ("NULL", json!(null)),
            ("", json!(null)),
            ("010", json!(8)),
            ("0x10", json!(16)),
            ("0o17", json!(15)),
            ("0b11", json!(3)),
            ("-0x1", json!(-1)),
            ("089", json!(89)),
            ("+5", json!(5)),
            ("--5", json!("--5")),
            ("1_000", json!(1000)),
            ("1e3", json!(1000)),
            ("2.0", json!(2)),
            ("2.5", json!(2.5)),
            (".5", json!(0.5)),
            ("1.2.3", json!("1.2.3")),
            ("2001-01-01", json!("2001-01-01")),
            ("60s", json!("60s")),
            ("-", json!([null])),
            ("99999999999999999999", json!(1e20)),
            ("v1", json!("v1")),
        ] {
            assert_eq!(parse(text).unwrap(), json, "{text:?}");
        }
    }

    #[test]
    fn a_document_means_what_it_means_to_go() {
        for (text, json) in [
            ("# nothing", json!(null)),
            ("\u{feff}a: b", json!({"a": "b"})),
            ("a: 1\na: 2", json!({"a": 2})),
            ("1: x\ntrue: z", json!({"1": "x", "true": "z"})),
            ("a: b\n---\na: c", json!({"a": "b"})),
            ("%YAML 1.1\n---\na: b", json!({"a": "b"})),
            (
                "p: &x {a: b}\nq: *x\nr: {<<: *x, c: d}",
                json!({"p": {"a": "b"}, "q": {"a": "b"}, "r": {"a": "b", "c": "d"}}),
            ),
            ("{<<: [{a: 1}, {a: 2, b: 3}]}", json!({"a": 1, "b": 3})),
            ("{\"a\": [1, null, {}]}", json!({"a": [1, null, {}]})),
        ] {
            assert_eq!(parse(text).unwrap(), json, "{text:?}");
        }
    }

    #[test]
    fn what_is_not_yaml_is_refused_and_what_is_huge_also() {
        let bomb = format!(
            "a: &a [{}]\nb: &b [{}]\nc: &c [{}]\nd: [{}]",
            ["x"; 100].join(","),
            ["*a"; 100].join(","),
            ["*b"; 100].join(","),
            ["*c"; 100].join(",")
        );
        for text in ["[", "a: *b", "{? {a: b} : c}", ".inf", "<<: 5", &"[".repeat(100_000), &bomb] {
            assert!(parse(text).is_err(), "{text:.40}");
        }
    }
}
