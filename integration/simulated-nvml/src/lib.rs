//! Stands where libnvidia-ml.so.1 stands on a host that has no GPU.
