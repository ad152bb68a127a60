//! `gpurun config`: everything that can be set, what it is, and who said so.

use crate::{
    cli::Global,
    config::{Found, SETTINGS, Setting, toolkit},
    error::Result,
    out,
};
use serde_json::json;

/// Prints it.
pub fn run(global: &Global) -> Result<u8> {
    let found = Found::open(global.config.as_deref())?;
    // An invalid value is printed, and then reported as an error.
    let checked = found.as_ref().map_or(Ok(()), |found| found.config()?.policy().map(drop));
    let rows: Vec<_> =
        SETTINGS.iter().map(|setting| (setting, value(setting, global, found.as_ref()))).collect();
    if global.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(setting, value)| {
                json!({
                    "option": setting.option, "variable": setting.variable, "key": setting.key,
                    "default": plain(setting.default), "meaning": plain(setting.meaning),
                    "value": value.as_ref().map(|(value, _)| value), "from": value.as_ref().map(|(_, from)| from),
                })
            })
            .collect();
        out!("{:#}", json!(rows))?;
        return checked.map(|()| 0);
    }
    for (setting, value) in rows {
        let name = [setting.key, setting.variable, setting.option].into_iter().find(|name| !name.is_empty());
        let (value, from) = value.unwrap_or_else(|| (plain(setting.default), "default".into()));
        out!("{} = {value}    ({from})", name.unwrap_or_default())?;
        let mut ways: Vec<&str> = vec![setting.option, setting.variable];
        ways.retain(|way| !way.is_empty() && Some(*way) != name);
        let ways = if ways.is_empty() { String::new() } else { format!(" [{}]", ways.join(", ")) };
        out!("    {}; default: {}{ways}", plain(setting.meaning), plain(setting.default))?;
    }
    if let Some(found) = found.filter(|found| !found.unused.is_empty()) {
        out!("\n{} also sets keys without effect:", found.path.display())?;
        for (key, reason) in found.unused {
            out!("{key}: {reason}")?;
        }
    }
    checked.map(|()| 0)
}

/// The value and its source; `None` if it is not set.
fn value(setting: &Setting, global: &Global, found: Option<&Found>) -> Option<(String, String)> {
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let typed = match setting.option {
        "--driver-root" => path(&global.driver_root),
        "--dev-root" => path(&global.dev_root),
        "--simulated-host" => path(&global.simulated_host),
        "--config" => path(&global.config),
        _ => None,
    };
    // NVIDIA's are a container's, and not ours.
    let variable = setting
        .variable
        .starts_with("GPURUN_")
        .then(|| std::env::var(setting.variable).ok().filter(|value| !value.is_empty()))
        .flatten();
    if let Some(typed) = typed.filter(|typed| variable.as_ref() != Some(typed)) {
        return Some((typed, setting.option.into()));
    }
    if let Some(variable) = variable {
        return Some((variable, setting.variable.into()));
    }
    let found = found?;
    let value = found.table.get(setting.key)?;
    let text = value.as_str().map_or_else(|| value.to_string(), Into::into);
    let file = found.path.display();
    let theirs = if found.is_toolkits { toolkit::name_of(setting.key) } else { None };
    Some((text, theirs.map_or_else(|| file.to_string(), |key| format!("{file}: {key}"))))
}

/// Without the marks of the README's table.
fn plain(text: &str) -> String {
    text.replace('`', "")
}
