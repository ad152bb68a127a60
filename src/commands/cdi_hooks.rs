//! `nvidia-ctk cdi generate --disable-hook`: removes hooks from a CDI spec.

use crate::formats::cdi::{ContainerEdits, Document, Hook};

/// NVIDIA's hooks in their order, each with its flags among those of `gpurun-hook all`.
const HOOKS: [(&str, &[&str]); 5] = [
    ("create-symlinks", &["--link"]),
    ("enable-cuda-compat", &["--host-driver-version", "--host-cuda-version"]),
    ("update-ldcache", &["--folder"]),
    ("disable-device-node-modification", &[]),
    ("update-application-profile", &[]),
];

/// Removes the hooks with these names from the spec; `all` is every hook. `gpurun-hook all` is replaced by the remaining
/// single hooks. Returns warnings for the user.
pub fn disable(document: &mut Document, names: &[String]) -> Vec<String> {
    let is_disabled = |hook: &str| names.iter().any(|name| name == "all" || name == hook);
    let known = |name: &str| name == "all" || name == "chmod" || HOOKS.iter().any(|(hook, _)| *hook == name);
    let unknown = names.iter().filter(|name| !known(name));
    let mut warnings: Vec<String> =
        unknown.map(|name| format!("--disable-hook={name}: there is no such hook")).collect();
    if !HOOKS.iter().any(|(hook, _)| is_disabled(hook)) {
        return warnings;
    }
    let devices = document.devices.iter_mut().map(|device| &mut device.container_edits);
    for edits in std::iter::once(&mut document.container_edits).chain(devices) {
        disable_in(edits, &is_disabled);
    }
    let lost = [
        (
            "create-symlinks",
            "the driver's libraries have their full names alone, such as libcuda.so.550.163.01",
        ),
        ("update-ldcache", "the loader finds the driver's libraries by LD_LIBRARY_PATH alone"),
    ];
    for (hook, what) in lost.iter().filter(|(hook, _)| is_disabled(hook)) {
        warnings.push(format!("without the hook {hook} {what}"));
    }
    warnings
}

fn disable_in(edits: &mut ContainerEdits, is_disabled: &impl Fn(&str) -> bool) {
    let mut kept = Vec::new();
    for hook in edits.hooks.drain(..) {
        match hook.args.get(1).map(String::as_str) {
            Some("all") => {
                kept.extend(single_hooks(&hook).filter(|(name, _)| !is_disabled(name)).map(|(_, hook)| hook));
            }
            Some(name) if is_disabled(name) => {}
            _ => kept.push(hook),
        }
    }
    edits.hooks = kept;
}

/// The single hooks that `gpurun-hook all` combines.
fn single_hooks(all: &Hook) -> impl Iterator<Item = (&'static str, Hook)> {
    HOOKS.iter().filter_map(move |&(name, flags)| {
        let is_its = |word: &&String| flags.iter().any(|flag| word.split('=').next() == Some(flag));
        let words: Vec<String> = all.args.iter().skip(2).filter(is_its).cloned().collect();
        // A hook without work is left out.
        (flags.is_empty() || !words.is_empty()).then(|| {
            let args = all.args.iter().take(1).cloned().chain([name.to_owned()]).chain(words).collect();
            (name, Hook { args, ..all.clone() })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Document {
        let args = [
            "gpurun-hook",
            "all",
            "--host-driver-version=550.1",
            "--folder=/l",
            "--library=/l/a.so",
            "--link=a::/l/b",
        ];
        let hook = Hook { args: args.map(String::from).into(), path: "/h".into(), ..Hook::default() };
        let container_edits = ContainerEdits { hooks: vec![hook], ..ContainerEdits::default() };
        Document { container_edits, ..Document::default() }
    }

    fn left(names: &[&str]) -> (Vec<String>, usize) {
        let mut document = document();
        let warnings = disable(&mut document, &names.iter().map(ToString::to_string).collect::<Vec<_>>());
        let lines = document.container_edits.hooks.iter().map(|hook| hook.args.join(" ")).collect();
        (lines, warnings.len())
    }

    #[test]
    fn all_hooks_or_single_ones_are_left_out() {
        assert_eq!(left(&["all"]), (vec![], 2));
        assert_eq!(left(&["chmod"]).0, [document().container_edits.hooks[0].args.join(" ")]);
        assert_eq!(left(&["no-such-hook"]).1, 1);
        assert_eq!(
            left(&["update-ldcache", "enable-cuda-compat"]),
            (
                vec![
                    "gpurun-hook create-symlinks --link=a::/l/b".into(),
                    "gpurun-hook disable-device-node-modification".into(),
                    "gpurun-hook update-application-profile".into(),
                ],
                1
            )
        );
    }
}
