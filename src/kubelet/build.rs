//! Messages and services of the kubelet's APIs.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in ["deviceplugin.proto", "dra.proto", "pluginregistration.proto"] {
        println!("cargo::rerun-if-changed={file}");
        let api = protox::compile([file], ["."])?;
        tonic_prost_build::configure().build_transport(false).compile_fds(api)?;
    }
    Ok(())
}
