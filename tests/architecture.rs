//! Holds the house to its plan: imports go one way (request, inventory → plan → apply), the plan touches nothing, and
//! unsafe lives in `sys` alone.

use proc_macro2::{TokenStream, TokenTree};
use std::{
    fs,
    path::{Path, PathBuf},
};
use syn::visit::{self, Visit};

/// What a room may not name: where its sources are, the beginnings of paths, and why.
const REFUSED: [(&str, &[&str], &str); 8] = [
    (
        "request",
        &[
            "crate::inventory",
            "crate::plan",
            "crate::apply",
            "crate::image",
            "crate::commands",
            "crate::sys",
            "std::fs",
            "std::env",
            "std::process",
            "std::time",
            "std::net",
            "rustix",
            "nix",
            "libc",
        ],
        "the request is read from strings alone",
    ),
    (
        "inventory",
        &["crate::request", "crate::plan", "crate::apply", "crate::image", "crate::commands"],
        "the inventory reads what is there, whoever asks for it",
    ),
    (
        "plan",
        &[
            "crate::apply",
            "crate::image",
            "crate::commands",
            "crate::sys",
            "std::fs",
            "std::env",
            "std::process",
            "std::time",
            "std::net",
            "rustix",
            "nix",
            "libc",
        ],
        "the plan is a function of its arguments",
    ),
    ("kubelet/resources.rs", WORLD, "what is offered is a function of the inventory"),
    ("kubelet/preference.rs", WORLD, "what is near is a function of the inventory"),
    ("kubelet/health.rs", WORLD, "the time is an argument"),
    ("kubelet/response.rs", WORLD, "an Injection is lowered as it is"),
    ("kubelet/state.rs", WORLD, "every answer follows from what is known"),
];

/// What the device plugin's decisions may not name: its own other modules that act are below these.
const WORLD: &[&str] = &[
    "crate::apply",
    "crate::commands",
    "crate::grpc",
    "crate::plugin",
    "std::env",
    "std::fs",
    "std::net",
    "std::process",
    "tokio",
    "tonic",
    "rustix",
];

/// Every path that a file names outside its tests, absolute in the crate where it begins with self, super or crate.
struct Paths {
    module: Vec<String>,
    found: Vec<String>,
}

impl Paths {
    fn of(source: &str, module: Vec<String>) -> Vec<String> {
        let mut paths = Self { module, found: Vec::new() };
        paths.visit_file(&syn::parse_file(source).unwrap());
        paths.found
    }

    fn add(&mut self, segments: &[String]) {
        let up = segments.iter().take_while(|segment| *segment == "super").count();
        let mut path = match segments.first().map(String::as_str) {
            Some("self") => [self.module.as_slice(), &segments[1..]].concat(),
            Some("super") => [&self.module[..self.module.len() - up], &segments[up..]].concat(),
            _ => segments.to_vec(),
        };
        // The package's own name is the crate, too, in its programs.
        if path.first().is_some_and(|first| first == "gpurun") {
            path[0] = "crate".into();
        }
        self.found.push(path.join("::"));
    }

    fn add_tree(&mut self, tree: &syn::UseTree, before: &[String]) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_tree(&path.tree, &with(&path.ident)),
            syn::UseTree::Name(name) => self.add(&with(&name.ident)),
            syn::UseTree::Rename(rename) => self.add(&with(&rename.ident)),
            syn::UseTree::Glob(_) => self.add(before),
            syn::UseTree::Group(group) => group.items.iter().for_each(|item| self.add_tree(item, before)),
        }
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Ident>().is_ok_and(|word| word == "test")
    })
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            self.module.push(item.ident.to_string());
            visit::visit_item_mod(self, item);
            self.module.pop();
        }
    }
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_tree(&item.tree, &[]);
    }
    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.add(&segments);
        visit::visit_path(self, path);
    }
    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        // What a macro is given is tokens and no syntax: each run of `a::b::c` in it is a path.
        let mut run: Vec<String> = Vec::new();
        for token in flat(call.tokens.clone()) {
            match token {
                TokenTree::Ident(word) => run.push(word.to_string()),
                TokenTree::Punct(sign) if sign.as_char() == ':' => {}
                _ if !run.is_empty() => self.add(&std::mem::take(&mut run)),
                _ => {}
            }
        }
        if !run.is_empty() {
            self.add(&run);
        }
        visit::visit_macro(self, call);
    }
}

fn flat(tokens: TokenStream) -> Vec<TokenTree> {
    tokens
        .into_iter()
        .flat_map(|token| match token {
            TokenTree::Group(group) => flat(group.stream()),
            other => vec![other],
        })
        .collect()
}

fn names_one_of<'a>(path: &str, refused: &[&'a str]) -> Option<&'a str> {
    let begins =
        |start: &str| path.strip_prefix(start).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
    refused.iter().copied().find(|start| begins(start))
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = dir.is_file().then(|| dir.to_path_buf()).into_iter().collect();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// `crate::plan::cuda` for src/plan/cuda.rs.
fn module(file: &Path) -> Vec<String> {
    let inside = file.strip_prefix(src()).unwrap().with_extension("");
    let names = inside.iter().map(|name| name.to_str().unwrap().to_owned()).filter(|name| name != "mod");
    std::iter::once("crate".to_owned()).chain(names).collect()
}

#[test]
fn imports_go_one_way() {
    for (room, refused, reason) in REFUSED {
        let files = sources(&src().join(room));
        assert!(!files.is_empty(), "there is no room {room}");
        for file in files {
            for path in Paths::of(&fs::read_to_string(&file).unwrap(), module(&file)) {
                if let Some(refused) = names_one_of(&path, refused) {
                    panic!("{} names {path}; {room} may not use {refused}: {reason}", file.display());
                }
            }
        }
    }
}

#[test]
fn unsafe_is_in_sys_alone_and_every_room_forbids_it() {
    let sys = src().join("sys");
    for file in sources(&src()).into_iter().filter(|file| !file.starts_with(&sys)) {
        let text = fs::read_to_string(&file).unwrap();
        for token in flat(text.parse::<TokenStream>().unwrap()) {
            if let TokenTree::Ident(word) = &token {
                assert!(
                    word != "unsafe",
                    "{}:{} is unsafe outside sys",
                    file.display(),
                    word.span().start().line
                );
            }
        }
        if file.ends_with("mod.rs") && file.parent().and_then(Path::parent) == Some(&src()) {
            assert!(
                text.lines().any(|line| line == "#![forbid(unsafe_code)]"),
                "{} does not begin with #![forbid(unsafe_code)]",
                file.display()
            );
        }
    }
}

#[test]
fn a_path_is_found_however_it_is_written() {
    let written = "
        use std::{path::Path, fs::{self, File}};
        use super::super::apply::container as elsewhere;
        mod inner { use super::super::image; }
        fn f() { let _ = std::env::var(\"X\"); println!(\"{:?}\", std::time::Instant::now()); self::g(); gpurun::commands::run(); }
        #[cfg(test)] mod tests { use std::net::TcpStream; }
    ";
    let module = ["crate", "plan", "cuda"].map(str::to_owned).to_vec();
    let found = Paths::of(written, module);
    for path in [
        "std::fs::self",
        "std::fs::File",
        "crate::apply::container",
        "crate::plan::image",
        "std::env::var",
        "crate::plan::cuda::g",
        "crate::commands::run",
    ] {
        assert!(found.iter().any(|one| one == path), "{path} is not in {found:?}");
    }
    assert!(!found.iter().any(|path| path.contains("net")));
    assert_eq!(names_one_of("std::fs::self", &["std::fs"]), Some("std::fs"));
    assert_eq!(names_one_of("crate::planet", &["crate::plan"]), None);
}
