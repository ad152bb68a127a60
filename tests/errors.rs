//! Every failure has a fix, and every fix names something to type or a file to change.

use gpurun::error::{Code, Error};
use proc_macro2::{TokenStream, TokenTree};
use std::{
    fs,
    path::{Path, PathBuf},
};
use syn::visit::{self, Visit};

/// Programs, options, variables, keys and image forms that a fix may name.
const TYPED: [&str; 61] = [
    "gpurun",
    "docker",
    "podman",
    "containerd",
    "crio",
    "kubectl",
    "helm",
    "systemctl",
    "journalctl",
    "sysctl",
    "modprobe",
    "nvidia-smi",
    "nvidia-modprobe",
    "nvidia-ctk",
    "apt-get",
    "apt ",
    "mount",
    "chmod",
    "chown",
    "chroot",
    "usermod",
    "reboot",
    "reinstall",
    "skopeo",
    "openssl",
    "sudo",
    "ldconfig",
    "mkdir",
    "rmmod",
    "runc",
    "crun",
    "device=",
    "capabilities=",
    "count=",
    "all",
    "true",
    "false",
    "oci:",
    "oci-archive",
    "docker-archive",
    "rootfs:",
    "host:",
    "NAME",
    "HOST",
    "USER",
    "FILE",
    "DIR",
    "IMAGE",
    "UID",
    "GID",
    "config.toml",
    "daemon.json",
    "registries.conf",
    "auth.json",
    "gpu.nvidia.com",
    "sharing.",
    "version",
    "qemu-user-static",
    "Dockerfile",
    "newuidmap",
    "Delegate=",
];

/// Whether a user finds something to type or a file to change in `fix`.
fn can_be_typed(fix: &str) -> bool {
    let option = |word: &str| {
        let word = word.trim_start_matches(['`', '(', '"', '\'']);
        word.strip_prefix("--")
            .or_else(|| word.strip_prefix('-'))
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
    };
    let variable = |word: &str| {
        word.contains('_')
            && word
                .trim_matches(|c: char| !c.is_ascii_alphanumeric())
                .chars()
                .all(|c| !c.is_ascii_lowercase())
    };
    fix.contains('`')
        || fix.contains("{}")
        || fix.contains('{')
        || fix.split_whitespace().any(|word| word.contains('/') || option(word) || variable(word))
        || TYPED.iter().any(|typed| fix.contains(typed))
}

/// The strings in the arguments of `fix` calls, with file and line.
struct Fixes {
    file: PathBuf,
    found: Vec<(PathBuf, usize, String)>,
}

impl Fixes {
    fn strings(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => self.strings(group.stream()),
                TokenTree::Literal(literal) => {
                    if let syn::Lit::Str(text) = syn::Lit::new(literal) {
                        self.found.push((self.file.clone(), text.span().start().line, text.value()));
                    }
                }
                _ => {}
            }
        }
    }
}

impl<'ast> Visit<'ast> for Fixes {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let is_test = |attribute: &syn::Attribute| {
            attribute.path().is_ident("cfg")
                && attribute.parse_args::<syn::Ident>().is_ok_and(|word| word == "test")
        };
        if !item.attrs.iter().any(is_test) {
            visit::visit_item_mod(self, item);
        }
    }
    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        if call.method == "fix" {
            for argument in &call.args {
                match argument {
                    syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => {
                        self.found.push((self.file.clone(), text.span().start().line, text.value()));
                    }
                    // The first token of `format!` is the text; the rest are its arguments.
                    syn::Expr::Macro(call) => {
                        self.strings(call.mac.tokens.clone().into_iter().take(1).collect());
                    }
                    other => {
                        struct Literals<'a>(&'a mut Fixes);
                        impl<'ast> Visit<'ast> for Literals<'_> {
                            fn visit_lit_str(&mut self, text: &'ast syn::LitStr) {
                                self.0.found.push((
                                    self.0.file.clone(),
                                    text.span().start().line,
                                    text.value(),
                                ));
                            }
                            fn visit_pat(&mut self, _: &'ast syn::Pat) {}
                            fn visit_expr_macro(&mut self, call: &'ast syn::ExprMacro) {
                                if call.mac.path.is_ident("format") {
                                    self.0.strings(call.mac.tokens.clone().into_iter().take(1).collect());
                                }
                            }
                        }
                        Literals(self).visit_expr(other);
                    }
                }
            }
        }
        visit::visit_expr_method_call(self, call);
    }
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_failure_says_what_to_type_or_which_file_to_change() {
    for code in Code::ALL {
        assert!(can_be_typed(code.fix()), "{code}: {}", code.fix());
        let shown = Error::new(*code, "it failed").to_string();
        assert!(shown.contains("\n  fix: "), "{shown}");
    }
}

#[test]
fn every_fix_in_the_source_names_something_to_type_or_a_file() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for directory in ["src", "hooks/src"] {
        sources(&project.join(directory), &mut files);
    }
    let mut fixes = Fixes { file: PathBuf::new(), found: Vec::new() };
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        fixes.file = file.strip_prefix(project).unwrap().to_owned();
        fixes.visit_file(&syn::parse_file(&text).unwrap());
    }
    assert!(fixes.found.len() > 150, "only {} fixes were found", fixes.found.len());
    let vague: Vec<String> = fixes
        .found
        .iter()
        .filter(|(_, _, fix)| !can_be_typed(fix))
        .map(|(file, line, fix)| format!("{}:{line}: {fix}", file.display()))
        .collect();
    assert!(
        vague.is_empty(),
        "{} of {} fixes name nothing to type and no file:\n{}",
        vague.len(),
        fixes.found.len(),
        vague.join("\n")
    );
}
