//! Messages and services of the kubelet's APIs, each in a directory of its own: packages of several have the same name.

use std::{env, fs, path::Path};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for name in ["deviceplugin", "dra", "dra_health", "pluginregistration", "podresources"] {
        let file = format!("{name}.proto");
        println!("cargo::rerun-if-changed=api/{file}");
        let out = Path::new(&env::var("OUT_DIR")?).join(name);
        fs::create_dir_all(&out)?;
        let api = protox::compile([file], ["api"])?;
        tonic_prost_build::configure().build_transport(false).out_dir(out).compile_fds(api)?;
    }
    Ok(())
}
