//! Kubernetes' own messages and services between a kubelet and what it works with, made of the `.proto` files beside this one.

macro_rules! apis {
    ($($(#[$doc:meta])* $name:ident = $file:literal;)*) => {$(
        $(#[$doc])*
        #[allow(missing_docs, clippy::pedantic)]
        pub mod $name {
            include!(concat!(env!("OUT_DIR"), $file));
        }
    )*};
}

apis! {
    /// A device plugin and the kubelet, v1beta1.
    device_plugin = "/deviceplugin/v1beta1.rs";
    /// A driver of claims and the kubelet, v1.
    dra = "/dra/k8s.io.kubelet.pkg.apis.dra.v1.rs";
    /// How such a driver's devices are, v1.
    dra_health = "/dra_health/v1.rs";
    /// How a kubelet learns of a driver.
    registration = "/pluginregistration/pluginregistration.rs";
    /// Which pods have which devices, v1.
    pod_resources = "/podresources/v1.rs";
}
