//! Edits a TOML file of another program: comments, order and unchanged parts are kept.

use crate::error::{Code, Error, Result};
use toml_edit::{DocumentMut, Item, Table, TableLike};

/// A file's tables, and how they were written.
#[derive(Debug, Default)]
pub struct TomlDocument {
    root: DocumentMut,
}

impl TomlDocument {
    /// Reads it.
    ///
    /// # Errors
    /// [`Code::Config`] with line and column.
    pub fn parse(text: &str) -> Result<Self> {
        let root = text.parse().map_err(|error: toml_edit::TomlError| {
            let before = &text[..error.span().map_or(0, |span| span.start.min(text.len()))];
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
            Error::new(Code::Config, "it is no TOML")
                .cause(format!("{} at line {line} column {column}", error.message()))
                .fix("correct the file at that line (`gpurun config` shows every key); nothing was changed")
        })?;
        Ok(Self { root })
    }

    /// What is behind these keys.
    pub fn get(&self, path: &[&str]) -> Option<&Item> {
        path.iter().try_fold(self.root.as_item(), |item, key| item.as_table_like()?.get(key))
    }

    /// The text behind these keys.
    pub fn text_at(&self, path: &[&str]) -> Option<&str> {
        self.get(path)?.as_str()
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.root.is_empty()
    }

    /// Whether the table behind these keys has this key and no other.
    pub fn is_only(&self, path: &[&str], key: &str) -> bool {
        let table = self.get(path).and_then(Item::as_table_like);
        table.is_some_and(|table| table.len() == 1 && table.contains_key(key))
    }

    /// Puts a value behind these keys; the tables on the way are made.
    ///
    /// # Errors
    /// [`Code::Config`] if something on the way is no table.
    pub fn set(&mut self, path: &[&str], value: impl Into<Item>) -> Result<()> {
        let value = value.into();
        let Some((last, way)) = path.split_last() else { return Ok(()) };
        let mut table: &mut dyn TableLike = self.root.as_table_mut();
        for key in way {
            let item = table.entry(key).or_insert_with(|| {
                let mut table = Table::new();
                table.set_implicit(true);
                Item::Table(table)
            });
            table = item.as_table_like_mut().ok_or_else(|| {
                Error::new(Code::Config, format!("`{key}` is no table"))
                    .fix(format!("make `{key}` a table, or take it out"))
            })?;
        }
        let indent =
            table.iter().next().and_then(|(first, _)| table.key(first)).map(key_indent).unwrap_or_default();
        match (table.get_mut(last), value) {
            (Some(Item::Value(old)), Item::Value(mut new)) => {
                // The comment at the line's end stays.
                *new.decor_mut() = old.decor().clone();
                if new.to_string() != old.to_string() {
                    *old = new;
                }
            }
            (Some(old), new) => *old = new,
            (None, new) => {
                table.insert(last, new);
                if let Some(mut key) = table.key_mut(last).filter(|_| !indent.is_empty()) {
                    key.leaf_decor_mut().set_prefix(indent);
                }
            }
        }
        Ok(())
    }

    /// Makes what is behind these keys what it was before; the tables on the way that are empty then, and were not there, go.
    ///
    /// # Errors
    /// As [`TomlDocument::set`].
    pub fn restore(&mut self, path: &[&str], before: &Self) -> Result<()> {
        if let Some(item) = before.get(path) {
            return self.set(path, item.clone());
        }
        let Some((last, way)) = path.split_last() else { return Ok(()) };
        let root: &mut dyn TableLike = self.root.as_table_mut();
        let table = way.iter().try_fold(root, |table, key| table.get_mut(key)?.as_table_like_mut());
        if let Some(table) = table.filter(|table| table.contains_key(last)) {
            table.remove(last);
            if table.is_empty() && !way.is_empty() {
                return self.restore(way, before);
            }
        }
        self.restore_header(way, before);
        Ok(())
    }

    /// Takes the header of a table away that had none before, where only tables are left in it.
    fn restore_header(&mut self, path: &[&str], before: &Self) {
        let had_none = before.get(path).and_then(Item::as_table).is_some_and(Table::is_implicit);
        let root = Some(self.root.as_item_mut());
        let item = path.iter().fold(root, |item, key| item?.as_table_like_mut()?.get_mut(key));
        if let Some(table) = item
            .and_then(Item::as_table_mut)
            .filter(|table| had_none && table.iter().all(|(_, item)| item.is_table()))
        {
            table.set_implicit(true);
        }
    }

    /// Renames the keys of the table at this path, if it exists.
    ///
    /// # Errors
    /// [`Code::Config`] if two keys would have the same name.
    pub fn rename_keys(&mut self, path: &[&str], new_name: impl Fn(&str) -> String) -> Result<()> {
        let root: &mut dyn TableLike = self.root.as_table_mut();
        let table = path.iter().try_fold(root, |table, key| table.get_mut(key)?.as_table_like_mut());
        let Some(table) = table else { return Ok(()) };
        let names: Vec<String> = table.iter().map(|(name, _)| name.to_owned()).collect();
        for old in names {
            let new = new_name(&old);
            if new == old {
                continue;
            }
            if table.contains_key(&new) {
                return Err(Error::new(Code::Config, format!("`{old}` and `{new}` are the same table"))
                    .fix(format!("move what `{old}` says to `{new}`")));
            }
            if let Some(item) = table.remove(&old) {
                table.insert(&new, item);
            }
        }
        Ok(())
    }

    /// As it is written; as `before` was written, where nothing but the ends of lines differs.
    pub fn text_after(&self, before: &str) -> String {
        let text = self.text();
        let is_same = text.lines().map(str::trim_end).eq(before.lines().map(str::trim_end));
        if is_same { before.to_owned() } else { text }
    }

    /// As it is written.
    pub fn text(&self) -> String {
        self.root.to_string()
    }
}

/// A copy of a table without its comments, as far to the right as the table is.
pub fn copy(item: &Item) -> Item {
    match item {
        Item::Table(table) => {
            let mut new = Table::new();
            let prefix = table.decor().prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default();
            new.decor_mut().set_prefix(format!("\n{}", indent(prefix)));
            for (name, item) in table {
                new.insert(name, copy(item));
                if let (Some(mut key), Some(old)) = (new.key_mut(name), table.key(name)) {
                    key.leaf_decor_mut().set_prefix(key_indent(old));
                }
            }
            Item::Table(new)
        }
        Item::Value(value) => {
            let mut value = value.clone();
            value.decor_mut().clear();
            Item::Value(value)
        }
        other => other.clone(),
    }
}

fn key_indent(key: &toml_edit::Key) -> String {
    indent(key.leaf_decor().prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default()).to_owned()
}

/// The white space at the beginning of the last line.
fn indent(prefix: &str) -> &str {
    let line = prefix.rsplit('\n').next().unwrap_or_default();
    &line[..line.len() - line.trim_start().len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_broken_file_is_refused_with_its_place() {
        let error = TomlDocument::parse("a = 1\n[b\nc = 2\n").unwrap_err();
        assert!(error.cause_line().contains("line 2 column 3"), "{error}");
        assert!(TomlDocument::parse("a = 1\n").unwrap().set(&["a", "b"], true).is_err());
        assert!(TomlDocument::parse(&"a=[".repeat(100_000)).is_err());
    }

    #[test]
    fn comments_stay_and_a_copy_has_none() {
        let text =
            "# top\n[p.r]\n  # about runc\n  [p.r.runc]\n    # its type\n    t = \"v2\" # why\n# end\n";
        let mut document = TomlDocument::parse(text).unwrap();
        document.set(&["p", "r", "runc", "t"], "v1").unwrap();
        let copied = copy(document.get(&["p", "r", "runc"]).unwrap());
        document.set(&["p", "r", "g"], copied).unwrap();
        document.set(&["p", "r", "g", "on"], true).unwrap();
        assert_eq!(
            document.text(),
            "# top\n[p.r]\n  # about runc\n  [p.r.runc]\n    # its type\n    t = \"v1\" # why\n\n  [p.r.g]\n    t = \"v1\"\n    on = true\n# end\n"
        );
    }

    proptest! {
        #[test]
        fn what_was_put_in_comes_out(text in prop_oneof![
            Just(""), Just("# c\n"), Just("a = 1\n\n[z]\nb = 2\n# end\n"), Just("[p]\nx = 1\n[p.r]\n[z]\n"),
            Just("p.r.x.y = 1\n"), Just("p = { r = { x = { y = 1 } } }\n"), Just("[p.r.x]\n  y = 1\n\n[z.q]\n# last\n"),
            Just("[[l]]\na = 1\n[[l]]\na = 2\n"), Just("a = 1"), Just("a = 1\r\n[z]\r\nb = 2\r\n"),
        ]) {
            let before = TomlDocument::parse(text).unwrap();
            let mut document = TomlDocument::parse(text).unwrap();
            document.set(&["p", "r", "g", "path"], "/g").unwrap();
            let mut document = TomlDocument::parse(&document.text()).unwrap();
            prop_assert_eq!(document.text_at(&["p", "r", "g", "path"]), Some("/g"));
            document.restore(&["p", "r", "g"], &before).unwrap();
            prop_assert_eq!(document.text_after(text), text);
            // A key of a table that had no header, and so none of its own.
            document.set(&["p", "on"], true).unwrap();
            let mut document = TomlDocument::parse(&document.text()).unwrap();
            document.restore(&["p", "on"], &before).unwrap();
            prop_assert_eq!(document.text_after(text), text);
        }

        #[test]
        fn any_text_is_changed_or_refused(text in "(\\[{1,2}[prg.x]{1,5}\\]{1,2}\n|[prg.]{1,3} = ([{][pg] = 1[}]|1|\"a\"|\\[1,\n2\\]) ?(#.)?\r?\n| *\n|# c\n|.){0,8}") {
            let Ok(before) = TomlDocument::parse(&text) else { return Ok(()) };
            let mut document = TomlDocument::parse(&text).unwrap();
            if document.set(&["p", "r", "g", "path"], "/g").is_ok() {
                let again = TomlDocument::parse(&document.text()).unwrap();
                prop_assert_eq!(again.text_at(&["p", "r", "g", "path"]), Some("/g"), "{}", document.text());
            }
            let _ = document.get(&["p", "r"]).map(copy);
            let _ = document.restore(&["p", "r", "g"], &before);
            TomlDocument::parse(&document.text()).unwrap();
        }
    }
}
