//! The dynamic loader knows a library by its SONAME: the driver's one.
fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnvidia-ml.so.1");
}
