//! `nvidia-ctk`: what roles and scripts ask of NVIDIA's toolkit, done gpurun's way.

use super::{
    Context, cdi,
    configure::{self, HOOK, Order, Registration},
};
use crate::{
    apply::{config_file::ConfigFile, dev_char, device_nodes},
    cli::{self, nvidia_ctk as ctk},
    config::{
        self,
        toolkit::{self, Fate, Kind},
    },
    error::{Code, Error, OrFail, Result},
    formats::toml_document::TomlDocument,
    inventory::Host,
    out, output,
};
use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
};
use toml_edit::{Array, Item, value};

/// containerd's main file.
const CONTAINERD_MAIN_FILE: &str = "/etc/containerd/config.toml";
/// Where CRI-O's drop-in of NVIDIA's is.
const CRIO_DROP_IN: &str = "/etc/crio/crio.conf.d/99-nvidia.toml";

/// What was typed.
pub fn run(typed: &ctk::NvidiaCtk) -> Result<u8> {
    match &typed.command {
        ctk::Command::Runtime(ctk::Runtime::Configure(args)) => runtime_configure(args),
        ctk::Command::Cdi(ctk::Cdi::Generate(args)) => cdi_generate(args),
        ctk::Command::Cdi(ctk::Cdi::Transform(cli::CdiTransform::Root(args))) => cdi::transform_root(args),
        ctk::Command::Cdi(ctk::Cdi::List(args)) => cdi::list(&args.spec_dir, false),
        ctk::Command::Hook { words } => hook(words),
        ctk::Command::System(ctk::System::CreateDeviceNodes(args)) => create_device_nodes(args),
        ctk::Command::System(ctk::System::CreateDevCharSymlinks(args)) => create_dev_char_symlinks(args),
        ctk::Command::Config(args) => toolkit_config(args, typed.config.as_deref()),
        // NVIDIA's says nothing, too.
        ctk::Command::Info => Ok(0),
    }
}

fn runtime_configure(args: &ctk::Configure) -> Result<u8> {
    let hook = args.config_mode == ctk::ConfigMode::OciHook;
    let engine = match args.runtime {
        // The hook's file is Podman's, too, whatever engine is named.
        _ if hook => cli::Engine::Podman,
        ctk::Engine::Docker => cli::Engine::Docker,
        ctk::Engine::Containerd => cli::Engine::Containerd,
        ctk::Engine::Crio => cli::Engine::Crio,
    };
    let file = match engine {
        // --config alone is the file to change; with --drop-in-config it is the main file.
        cli::Engine::Crio => {
            let named = args.drop_in_config.clone().or_else(|| args.config.clone());
            Some(named.unwrap_or_else(|| CRIO_DROP_IN.into()))
        }
        cli::Engine::Podman => Some(args.oci_hook_path.clone()),
        cli::Engine::Containerd => args.drop_in_config.clone().or_else(|| args.config.clone()),
        cli::Engine::Docker => args.config.clone(),
    };
    let has_drop_in = args.drop_in_config.is_some() && file == args.drop_in_config;
    let source = match engine {
        cli::Engine::Crio => args.config.clone().filter(|_| file != args.config),
        cli::Engine::Containerd if has_drop_in => {
            Some(args.config.clone().unwrap_or_else(|| CONTAINERD_MAIN_FILE.into()))
        }
        _ => None,
    };
    if args.config.is_some() && file != args.config && source.is_none() {
        tracing::warn!("--config is not used: a hook's file stands alone");
    }
    if args.drop_in_config.is_some() && file != args.drop_in_config {
        tracing::warn!(
            "--drop-in-config is not used: Docker has no drop-ins, and a hook's file stands alone"
        );
    }
    if args.executable_path.is_some() || args.config_source == ctk::ConfigSource::Command {
        tracing::warn!(
            "--config-source and --executable-path are not used: the engine's files are read, and it is not run"
        );
    }
    let (named, program) = if hook {
        (&args.nvidia_runtime_hook_path, HOOK)
    } else {
        (&args.nvidia_runtime_path, "nvidia-container-runtime")
    };
    let path = match named {
        Some(path) if path.is_absolute() => path.clone(),
        Some(name) => configure::find(&name.to_string_lossy())?,
        None => configure::find(program)?,
    };
    configure::carry_out(&Order {
        engine,
        file,
        source,
        wanted: Registration {
            name: args.nvidia_runtime_name.clone(),
            path: configure::absolute(&path)?,
            default: args.nvidia_set_as_default,
            cdi: args.cdi,
        },
        hook,
        remove: false,
        dry_run: args.dry_run,
    })
}

/// Becomes gpurun-hook, which has the hook's standard input and none of our environment.
fn hook(words: &[OsString]) -> Result<u8> {
    let program = configure::find("gpurun-hook")?;
    let error = std::process::Command::new(&program).args(words).env_clear().exec();
    Err(error)
        .or_fail(Code::Internal, || format!("{} cannot be run", program.display()))
        .map_err(|error| error.fix("install gpurun-hook again, beside nvidia-ctk"))
}

fn cdi_generate(args: &ctk::CdiGenerate) -> Result<u8> {
    let one_hook = "one hook does what the container needs, and runs no ldconfig";
    let in_the_root = "files are looked for in the driver root";
    let no_version = "Tegra's lists do not say the driver's version, with which an image's own libraries would be compared";
    for (flag, used, reason) in [
        ("--ldconfig-path", args.ldconfig_path.is_some(), one_hook),
        ("--library-search-path", !args.library_search_path.is_empty(), in_the_root),
        ("--config-search-path", !args.config_search_path.is_empty(), in_the_root),
        ("--enable-hook", !args.enable_hook.is_empty(), one_hook),
        ("--feature-flag", !args.feature_flag.is_empty(), "they choose between ways of NVIDIA's toolkit"),
        ("--csv.compat-container-root", args.csv_compat_container_root.is_some(), no_version),
    ] {
        if used {
            tracing::warn!("{flag} is not used: {reason}");
        }
    }
    let context = Context::new(&cli::Global {
        driver_root: args.driver_root.clone(),
        dev_root: args.dev_root.clone(),
        simulated_host: cli::environment::variable("GPURUN_SIMULATED_HOST").map(PathBuf::from),
        config: cli::environment::variable("GPURUN_CONFIG").map(PathBuf::from),
        log: tracing::level_filters::LevelFilter::OFF,
        log_format: cli::LogFormat::Text,
        json: false,
    })?;
    cdi::generate(
        &context,
        &cli::CdiGenerate {
            output: args.output.clone(),
            document: cli::CdiDocument {
                format: args.format,
                mode: args.mode,
                engine: None,
                vendor: args.vendor.clone(),
                class: args.class.clone(),
                device_name_strategy: args.device_name_strategy.clone(),
                device_id: args.device_id.clone(),
                no_all_device: args.no_all_device,
                hook: args.nvidia_cdi_hook_path.clone(),
                csv_file: args.csv_file.clone(),
                csv_ignore_pattern: args.csv_ignore_pattern.clone(),
            },
        },
        &args.disable_hook,
    )
}

fn create_device_nodes(args: &ctk::CreateDeviceNodes) -> Result<u8> {
    let host = host(args.root.as_deref(), args.dev_root.as_deref());
    if args.load_kernel_modules {
        load_kernel_modules(&host, args.dry_run)?;
    }
    if args.control_devices {
        make_control_nodes(&host, args.dry_run)?;
    } else {
        tracing::warn!("no device node was asked for: --control-devices");
    }
    Ok(0)
}

fn create_dev_char_symlinks(args: &ctk::CreateDevCharSymlinks) -> Result<u8> {
    let host = host(args.driver_root.as_deref(), None);
    if args.create_all {
        tracing::warn!("--create-all is not used: links are made to device nodes that are there");
    }
    if args.load_kernel_modules {
        load_kernel_modules(&host, args.dry_run)?;
    }
    if args.create_device_nodes {
        make_control_nodes(&host, args.dry_run)?;
    }
    let nodes = host.driver_nodes();
    if !args.dry_run {
        return dev_char::link_all(&args.dev_char_path, &nodes).map(|_| 0);
    }
    for node in nodes {
        let link = args.dev_char_path.join(format!("{}:{}", node.major, node.minor));
        if !link.exists() {
            out!("ln -s {} {}", node.path.0.display(), link.display())?;
        }
    }
    Ok(0)
}

/// Where NVIDIA's programs look for the driver.
fn host(root: Option<&Path>, dev_root: Option<&Path>) -> Host {
    let named = |key| std::env::var_os(key).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let (None, Some(dir)) = (root, named("GPURUN_SIMULATED_HOST")) {
        return Host::simulated(&dir);
    }
    let roots = || ["ROOT", "NVIDIA_DRIVER_ROOT", "DRIVER_ROOT"].into_iter().find_map(named);
    let root = root.map(Into::into).or_else(roots).unwrap_or_else(|| "/".into());
    Host::new(root, dev_root.map(Into::into))
}

/// Loads the driver's modules.
pub fn load_kernel_modules(host: &Host, dry_run: bool) -> Result<()> {
    for module in ["nvidia", "nvidia-uvm", "nvidia-modeset"] {
        let command = device_nodes::modprobe(&host.driver_root, module);
        if dry_run {
            out!("{}", command.join(" "))?;
        } else {
            device_nodes::run(&command)?;
        }
    }
    Ok(())
}

/// Makes the control nodes that are not there.
pub fn make_control_nodes(host: &Host, dry_run: bool) -> Result<()> {
    for (path, numbers) in host.missing_control_nodes() {
        match numbers {
            Some((major, minor)) if dry_run => {
                out!("mknod -m 0666 {} c {major} {minor}", path.0.display())?;
            }
            Some((major, minor)) => device_nodes::make(&path, major, minor)?,
            None => tracing::warn!("{} is not made: its kernel module is not loaded", path.0.display()),
        }
    }
    Ok(())
}

fn toolkit_config(args: &ctk::Config, named: Option<&Path>) -> Result<u8> {
    if let Some(ctk::Default::Default { output }) = &args.default {
        return print(&toolkit::default_text(), output.as_deref());
    }
    let path = args.config_file.as_deref().or(named).map_or_else(toolkit::file, Into::into);
    let file = ConfigFile::open(&path)?;
    let default = toolkit::default_text();
    let separators: Vec<char> = args.set_list_separator.as_deref().unwrap_or(":,").chars().collect();
    let text = set(file.text().unwrap_or(&default), &args.set, &separators)
        .map_err(|error| error.context(format!("{} cannot be used", path.display())))?;
    if Path::new(config::DEFAULT_FILE).exists() {
        tracing::warn!("gpurun reads {} and not {}", config::DEFAULT_FILE, path.display());
    }
    if args.in_place {
        return file.replace(Some(&text)).map(|()| 0);
    }
    print(&text, args.output.as_deref())
}

fn print(text: &str, output: Option<&Path>) -> Result<u8> {
    match output {
        Some(path) => ConfigFile::open(path)?.replace(Some(text))?,
        None => output::write(text.as_bytes())?,
    }
    Ok(0)
}

/// The text with these assignments, `KEY=VALUE`.
fn set(text: &str, assignments: &[String], separators: &[char]) -> Result<String> {
    let mut document = TomlDocument::parse(text)?;
    for assignment in assignments {
        let (name, typed) = assignment.split_once('=').unwrap_or((assignment, "true"));
        let key = toolkit::KEYS.iter().find(|key| key.path == name).ok_or_else(|| {
            Error::new(Code::Usage, format!("there is no key {name}"))
                .fix("nvidia-ctk config default prints them")
        })?;
        if let Fate::Nothing(reason) = key.fate {
            tracing::warn!("{name} has no effect: {reason}");
        }
        let path: Vec<&str> = name.split('.').collect();
        let item: Item = match key.kind {
            _ if typed == "nil" && key.default.is_none() => {
                document.restore(&path, &TomlDocument::default())?;
                continue;
            }
            Kind::Flag => {
                let flag = typed.parse::<bool>().or_fail(Code::Usage, || format!("{name} is true or false"));
                value(flag.map_err(|error| error.fix(format!("--set {name}=true")))?)
            }
            Kind::Text => value(typed),
            Kind::List => value(typed.split(separators).filter(|one| !one.is_empty()).collect::<Array>()),
        };
        document.set(&path, item)?;
    }
    Ok(document.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_set_in_their_places() {
        let text = "disable-require = false # why\n\n[nvidia-container-runtime]\nruntimes = [\"runc\"]\n";
        let of = |words: &[&str], separators: &[char]| {
            set(text, &words.iter().map(ToString::to_string).collect::<Vec<_>>(), separators)
        };
        let typed = |words: &[&str]| of(words, &[':', ',']);
        let with_semicolons = of(&["nvidia-container-runtime.runtimes=/a:b;c,d"], &[';']).unwrap();
        assert!(with_semicolons.contains(r#"runtimes = ["/a:b", "c,d"]"#), "{with_semicolons}");
        assert_eq!(
            typed(&[
                "disable-require",
                "nvidia-container-runtime.runtimes=crun:runc",
                "nvidia-container-runtime.modes.cdi.annotation-prefixes=a/,b/",
                "nvidia-container-cli.no-cgroups=true",
                "nvidia-container-cli.no-cgroups=false",
                "nvidia-container-runtime.debug=/x=y",
            ])
            .unwrap(),
            "disable-require = true # why\n\n[nvidia-container-runtime]\nruntimes = [\"crun\", \"runc\"]\ndebug = \"/x=y\"\n\n\
             [nvidia-container-runtime.modes.cdi]\nannotation-prefixes = [\"a/\", \"b/\"]\n\n[nvidia-container-cli]\nno-cgroups = false\n"
        );
        assert_eq!(
            typed(&["features.ignore-imex-channel-requests", "features.ignore-imex-channel-requests=nil"])
                .unwrap(),
            text
        );
        assert!(typed(&["disable-require=maybe"]).is_err() && typed(&["no-such-key=1"]).is_err());
    }
}
