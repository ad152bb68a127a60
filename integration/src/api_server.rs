//! A cluster's API server of ours (`integration/api-server`), and pods with an account there.

use crate::{TestHost, certificates, kubelet::Plugin, project, temporary, until};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

/// It ends when it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    process: Child,
    port: String,
    certificates: TempDir,
    objects: TempDir,
    version: &'static str,
}

/// The node on which plugins are.
pub const NODE: &str = "node-1";
/// The name under which a plugin's slices are there.
pub const SLICE: &str = "node-1-gpu.nvidia.com-0";

impl ApiServer {
    /// Starts one with a node, and with this version of resource.k8s.io, or `none`.
    pub fn start(version: &'static str) -> Self {
        let (certificates, objects) = (certificates(), temporary());
        let mut process = Command::new(project().join("integration/api-server"))
            .args([certificates.path(), objects.path()])
            .arg(version)
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut port = String::new();
        let mut said = BufReader::new(process.stdout.take().expect("it is piped"));
        said.read_line(&mut port).expect("it says its port");
        let server = Self { process, port: port.trim().into(), certificates, objects, version };
        server.put("api/v1/nodes", NODE, &json!({"metadata": {"name": NODE, "uid": "uid-of-node-1"}}));
        fs::create_dir_all(server.file(&server.slices(), "x").parent().expect("a directory")).expect("ours");
        server
    }

    fn slices(&self) -> String {
        format!("apis/resource.k8s.io/{}/resourceslices", self.version)
    }

    fn file(&self, directory: &str, name: &str) -> PathBuf {
        self.objects.path().join(directory).join(format!("{name}.json"))
    }

    fn put(&self, directory: &str, name: &str, object: &Value) {
        let file = self.file(directory, name);
        fs::create_dir_all(file.parent().expect("a directory")).expect("a directory of ours");
        let new = file.with_extension("new");
        fs::write(&new, object.to_string())
            .and_then(|()| fs::rename(&new, &file))
            .expect("a directory of ours");
    }

    /// A claim that has got these devices of the node's.
    pub fn allocate(&self, name: &str, uid: &str, devices: &[&str]) {
        let results: Vec<_> = devices
            .iter()
            .map(|device| json!({"request": "gpus", "driver": "gpu.nvidia.com", "pool": NODE, "device": device}))
            .collect();
        self.put_claim(name, uid, &json!({"devices": {"results": results}}));
    }

    /// A claim with an allocation.
    pub fn put_claim(&self, name: &str, uid: &str, allocation: &Value) {
        let claim = json!({"metadata": {"name": name, "uid": uid}, "status": {"allocation": allocation}});
        self.put(
            &format!("apis/resource.k8s.io/{}/namespaces/ml/resourceclaims", self.version),
            name,
            &claim,
        );
    }

    /// Takes a claim away.
    pub fn remove_claim(&self, name: &str) {
        let directory = format!("apis/resource.k8s.io/{}/namespaces/ml/resourceclaims", self.version);
        fs::remove_file(self.file(&directory, name)).expect("it was there");
    }

    /// A slice of somebody's.
    pub fn put_slice(&self, name: &str, spec: &Value) {
        self.put(&self.slices(), name, &json!({"metadata": {"name": name}, "spec": spec}));
    }

    /// Takes a slice away, as a kubelet does that starts.
    pub fn remove_slice(&self, name: &str) {
        fs::remove_file(self.file(&self.slices(), name)).expect("it was there");
    }

    /// A slice, if it is there.
    pub fn slice(&self, name: &str) -> Option<Value> {
        let text = fs::read(self.file(&self.slices(), name)).ok()?;
        Some(serde_json::from_slice(&text).expect("whole files"))
    }

    /// The names of the slice's devices.
    pub fn devices(&self) -> Vec<String> {
        let slice = self.slice(SLICE).unwrap_or_default();
        let devices = slice["spec"]["devices"].as_array().cloned().unwrap_or_default();
        devices.iter().filter_map(|device| device["name"].as_str().map(String::from)).collect()
    }

    /// Waits until these are the slice's devices.
    pub fn until_devices(&self, names: &[&str]) {
        until(&format!("{names:?} in the slice"), || self.devices() == names);
    }

    /// The plugin in a pod with an account there, on the node.
    pub fn plugin(&self, host: &TestHost, options: &[&str]) -> Plugin {
        let script = "mount --make-rprivate / && mount -t tmpfs tmpfs /run && \
            d=/run/secrets/kubernetes.io/serviceaccount && mkdir -p $d && cp $0/ca.crt $d && echo secret > $d/token && exec \"$@\"";
        let plugin = Plugin::command(host, options);
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]).arg(self.certificates.path());
        command.arg(plugin.get_program()).args(plugin.get_args());
        command.env("KUBERNETES_SERVICE_HOST", "127.0.0.1").env("KUBERNETES_SERVICE_PORT", &self.port);
        command.envs(plugin.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Plugin::of(host, command.spawn().expect("util-linux"))
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let _ = self.process.kill().and_then(|()| self.process.wait());
    }
}
