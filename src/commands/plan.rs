//! `gpurun plan`: what `run` with the same words would give the container. Nothing is started, nothing unpacked.

use super::{Context, run};
use crate::{cli::Run, error::Result, image::Image, out};
use serde_json::json;

/// Prints it.
pub fn run(context: &Context, args: &Run) -> Result<u8> {
    let options = run::Options::read(args)?;
    let store = context.store()?;
    let image = Image::open(
        &run::image_reference(&args.image)?,
        &store,
        &context.pull(args.pull, &args.pulling, args.quiet)?,
    )?;
    let injection = run::injection(context, args, &options, &image, &run::environment::environment(args)?)?;
    if context.json {
        out!(
            "{:#}",
            json!({
                "devices": injection.devices,
                "mounts": injection.mounts.iter().map(|m| json!({"source": m.source, "target": m.target, "readOnly": true})).collect::<Vec<_>>(),
                "symlinks": injection.symlinks.iter().map(|s| json!({"link": s.link, "target": s.target})).collect::<Vec<_>>(),
                "env": injection.env,
                "libraryDirs": injection.library_dirs,
                "groups": injection.groups,
                "warnings": injection.warnings,
            })
        )?;
        return Ok(0);
    }
    for node in &injection.devices {
        out!(
            "device   {} {}:{} from {}",
            node.container_path.0.display(),
            node.major,
            node.minor,
            node.path.0.display()
        )?;
    }
    for mount in &injection.mounts {
        out!("mount    {} ro from {}", mount.target.0.display(), mount.source.0.display())?;
    }
    for symlink in &injection.symlinks {
        out!("link     {} -> {}", symlink.link.0.display(), symlink.target.display())?;
    }
    for (name, value) in &injection.env {
        out!("env      {name}={value}")?;
    }
    for directory in &injection.library_dirs {
        out!("loader   {}", directory.0.display())?;
    }
    for warning in &injection.warnings {
        out!("warning  {warning}")?;
    }
    if injection.devices.is_empty() && injection.mounts.is_empty() {
        out!("no GPU was asked for: the container gets nothing of the driver")?;
    }
    Ok(0)
}
