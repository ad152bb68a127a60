//! A file of hooks.d, by which Podman and CRI-O run a hook for their containers (oci-hooks(5), version 1.0.0).

use serde_json::{Value, json};
use std::path::Path;

/// The hook `program prestart` for every container.
pub fn prestart(program: &Path) -> String {
    let base = program.file_name().unwrap_or_default().to_string_lossy();
    let hook = json!({
        "version": "1.0.0",
        "hook": {
            "path": program,
            "args": [base, "prestart"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        },
        "when": {"always": true, "commands": [".*"]},
        "stages": ["prestart"],
    });
    format!("{hook:#}\n")
}

/// Whether a file is what [`prestart`] wrote for some program.
pub fn is_prestart(text: &str) -> bool {
    let file: Option<Value> = serde_json::from_str(text).ok();
    let program = file.as_ref().and_then(|file| file.pointer("/hook/path")?.as_str());
    program.is_some_and(|program| prestart(Path::new(program)) == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_runs_before_every_container() {
        let text = prestart(Path::new("/usr/bin/nvidia-container-runtime-hook"));
        insta::assert_snapshot!(text);
        assert!(is_prestart(&text));
        assert!(!is_prestart(&text.replace("true", "false")) && !is_prestart("") && !is_prestart("{}"));
    }
}
