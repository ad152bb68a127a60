//! Messages and services of deviceplugin.proto.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=deviceplugin.proto");
    let api = protox::compile(["deviceplugin.proto"], ["."])?;
    tonic_prost_build::configure().build_transport(false).compile_fds(api)?;
    Ok(())
}
