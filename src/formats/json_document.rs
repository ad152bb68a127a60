//! Edits a JSON file of another program: unchanged parts keep their exact text.

use crate::error::{Code, Error, OrFail, Result};
use jsonc_parser::{
    ParseOptions,
    cst::{CstInputValue, CstObject, CstRootNode},
};
use serde_json::{Map, Value};

/// An object, and how it was written.
#[derive(Debug)]
pub struct JsonDocument {
    /// The byte order mark of the file, if any. Editors on Windows write it, and dockerd accepts it (moby's
    /// getConflictFreeConfiguration).
    mark: &'static str,
    root: CstRootNode,
}

/// UTF-8's byte order mark.
const MARK: &str = "\u{feff}";

impl JsonDocument {
    /// Reads it. An empty text is an empty object, and so is `null`: Go reads it as one that is missing, as everywhere below.
    ///
    /// # Errors
    /// [`Code::Config`] with line and column, where it is no JSON object.
    pub fn parse(text: &str) -> Result<Self> {
        let (mark, text) = text.strip_prefix(MARK).map_or(("", text), |rest| (MARK, rest));
        let text = if matches!(text.trim(), "" | "null") { "{\n}\n" } else { text };
        // The editor's own parser is JSON5's and more; engines read JSON.
        let what = || "it is no JSON object";
        let checked = serde_json::from_str::<Map<String, Value>>(text).or_fail(Code::Config, what);
        let root = checked
            .and_then(|_| CstRootNode::parse(text, &ParseOptions::default()).or_fail(Code::Config, what))
            .map_err(|error| error.fix("correct the file at that line (`python3 -m json.tool FILE` checks it); nothing was changed"))?;
        Ok(Self { mark, root })
    }

    /// The value behind these keys.
    pub fn get(&self, path: &[&str]) -> Option<Value> {
        let whole: Value = serde_json::from_str(&self.root.to_string()).ok()?;
        path.iter().try_fold(&whole, |value, key| value.get(key)).cloned()
    }

    /// Puts a value behind these keys; the objects on the way are made.
    ///
    /// # Errors
    /// [`Code::Config`] if something on the way is no object, or is there twice.
    pub fn set(&mut self, path: &[&str], value: &Value) -> Result<()> {
        if self.get(path).as_ref() == Some(value) {
            return Ok(());
        }
        let Some((last, way)) = path.split_last() else { return Ok(()) };
        let mut object = self.root.object_value_or_set();
        for key in way {
            if let Some(property) = object
                .get(key)
                .filter(|property| property.value().is_some_and(|value| value.as_null_keyword().is_some()))
            {
                property.set_value(CstInputValue::Object(Vec::new()));
            }
            object = object.object_value_or_create(key).ok_or_else(|| {
                Error::new(Code::Config, format!("`{key}` is no object"))
                    .fix(format!("make `{key}` an object, or take it out"))
            })?;
        }
        match object.get(last) {
            Some(property) => property.set_value(input(value)),
            None => drop(object.append(last, input(value))),
        }
        // Of two keys with one name readers take the last, and the editor the first.
        if self.get(path).as_ref() != Some(value) {
            return Err(Error::new(Code::Config, format!("a key of `{}` is there twice", path.join(".")))
                .fix("take one of them out of the file (`python3 -m json.tool FILE` shows the keys)"));
        }
        Ok(())
    }

    /// Makes what is behind these keys what it was before; the objects on the way that are empty then, and were not there, go.
    ///
    /// # Errors
    /// As [`JsonDocument::set`].
    pub fn restore(&mut self, path: &[&str], before: &Self) -> Result<()> {
        if let Some(value) = before.get(path) {
            return self.set(path, &value);
        }
        if let Some(property) = self.object(path).and_then(|(object, last)| object.get(last)) {
            property.remove();
            let way = &path[..path.len().saturating_sub(1)];
            if self.get(way).is_some_and(|object| object.as_object().is_some_and(Map::is_empty))
                && !way.is_empty()
            {
                return self.restore(way, before);
            }
        }
        Ok(())
    }

    /// The object that holds the last of these keys, and the key.
    fn object<'a>(&self, path: &[&'a str]) -> Option<(CstObject, &'a str)> {
        let (last, way) = path.split_last()?;
        let object =
            way.iter().try_fold(self.root.object_value()?, |object, key| object.object_value(key))?;
        Some((object, last))
    }

    /// As it is written; as `before` was written, where it says the same.
    pub fn text_after(&self, before: &str) -> Result<String> {
        let value = |document: &Self| {
            serde_json::from_str::<Value>(&document.root.to_string()).ok().map(|value| value.to_string())
        };
        // Also compares the order, which equality of objects ignores.
        let is_same = value(self) == value(&Self::parse(before)?);
        Ok(if is_same { before.to_owned() } else { self.text() })
    }

    /// As it is written.
    pub fn text(&self) -> String {
        format!("{}{}", self.mark, self.root)
    }
}

fn input(value: &Value) -> CstInputValue {
    match value {
        Value::Null => CstInputValue::Null,
        Value::Bool(value) => CstInputValue::Bool(*value),
        Value::Number(value) => CstInputValue::Number(value.to_string()),
        Value::String(value) => CstInputValue::String(value.clone()),
        Value::Array(values) => CstInputValue::Array(values.iter().map(input).collect()),
        Value::Object(values) => {
            CstInputValue::Object(values.iter().map(|(key, value)| (key.clone(), input(value))).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn changed(text: &str, path: &[&str], value: &Value) -> String {
        let mut document = JsonDocument::parse(text).unwrap();
        document.set(path, value).unwrap();
        document.text()
    }

    #[test]
    fn what_is_not_changed_stays_as_it_was_written() {
        assert_eq!(
            changed("{\n\t\"z\": [1,  2.50],\n\t\"a\": {\"x\":1e3}\n}", &["r", "g"], &json!({"path": "/g"})),
            "{\n\t\"z\": [1,  2.50],\n\t\"a\": {\"x\":1e3},\n\t\"r\": {\n\t\t\"g\": {\n\t\t\t\"path\": \"/g\"\n\t\t}\n\t}\n}"
        );
        assert_eq!(changed("{\"b\": 1}\n", &["b"], &json!(true)), "{\"b\": true}\n");
        assert_eq!(changed("", &["b"], &json!(true)), "{\n  \"b\": true\n}\n");
        for null in ["null", " null\n"] {
            assert_eq!(changed(null, &["b"], &json!(true)), "{\n  \"b\": true\n}\n");
        }
        for (text, path) in
            [("{\"r\": null}", &["r", "g"][..]), ("{\"r\": {\"g\": null}}", &["r", "g", "path"])]
        {
            let document = JsonDocument::parse(&changed(text, path, &json!("/g"))).unwrap();
            assert_eq!(document.get(path), Some(json!("/g")), "{text}");
        }
        let same = "{ \"b\" : true }";
        assert_eq!(changed(same, &["b"], &json!(true)), same);
    }

    #[test]
    fn what_an_engine_could_not_read_is_refused_with_its_place() {
        for (text, place) in [
            ("{\"a\": 1,}", "line 1 column 9"),
            ("{\n  // c\n}", "line 2 column 3"),
            ("{\n'a': 1}", "line 2 column 1"),
            ("[]", "line 1 column 0"),
            ("{} {}", "line 1 column 4"),
        ] {
            let error = JsonDocument::parse(text).unwrap_err();
            assert!(error.cause_line().contains(place), "{text}: {error}");
        }
        assert!(JsonDocument::parse("{\"r\": 1}").unwrap().set(&["r", "g"], &json!(1)).is_err());
        let twice = JsonDocument::parse("{\"r\": {}, \"r\": {}}").unwrap().set(&["r", "g"], &json!(1));
        assert!(twice.unwrap_err().what().contains("twice"));
        assert!(JsonDocument::parse(&"[".repeat(100_000)).is_err());
    }

    proptest! {
        #[test]
        fn what_was_put_in_comes_out(
            text in prop_oneof![
                Just("{}"), Just("{\n}\n"), Just("{\"r\":{}}"), Just("{\n    \"r\": {\n        \"x\": 1\n    }\n}\n"),
                Just("{\"a\": [1, 2], \"r\": {\"x\": {}}, \"b\": null}"), Just("{\r\n \"r\": {\"g\": 3}\r\n}"),
            ],
            value in prop_oneof![Just(json!({"path": "/g"})), Just(json!(true)), Just(json!("x"))],
        ) {
            let before = JsonDocument::parse(text).unwrap();
            let mut document = JsonDocument::parse(&changed(text, &["r", "g"], &value)).unwrap();
            prop_assert_eq!(document.get(&["r", "g"]), Some(value));
            document.restore(&["r", "g"], &before).unwrap();
            prop_assert_eq!(document.text_after(text).unwrap(), text);
        }

        #[test]
        fn any_text_is_changed_or_refused(text in "[\\[\\]{}:,\" \n\tr0-9g\\\\u-]{0,40}", before in "(\\{\"r\": ?(\\{\"g\": 1\\}|[0-9]|null)\\})?") {
            if let (Ok(mut document), Ok(before)) = (JsonDocument::parse(&text), JsonDocument::parse(&before)) {
                if document.set(&["r", "g"], &json!({"path": "/g"})).is_ok() {
                    JsonDocument::parse(&document.text()).unwrap();
                }
                let _ = document.restore(&["r", "g"], &before);
            }
        }

        #[test]
        fn any_object_keeps_what_it_had(
            keys in proptest::collection::vec(("[a-q]{1,3}", prop_oneof![Just("1"), Just("{}"), Just("[ ]"), Just("{ \"x\":[1,{}] }"), Just("\"\\u00e9\"")]), 0..4),
            space in prop_oneof![Just(""), Just(" "), Just("\n"), Just("\r\n\t"), Just("\n    ")],
        ) {
            let body: Vec<String> = keys.iter().map(|(key, value)| format!("{space}\"{key}\"{space}:{space}{value}")).collect();
            let text = format!("{{{}{space}}}", body.join(","));
            let before: Map<String, Value> = serde_json::from_str(&text).unwrap();
            let mut after: Map<String, Value> = serde_json::from_str(&changed(&text, &["r", "g"], &json!("/g"))).unwrap();
            prop_assert_eq!(after.remove("r"), Some(json!({"g": "/g"})));
            prop_assert_eq!(after, before);
        }
    }
}
