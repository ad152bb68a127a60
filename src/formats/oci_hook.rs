//! A file of hooks.d, by which Podman and CRI-O run a hook for their containers (oci-hooks(5), version 1.0.0).

use serde_json::json;
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
