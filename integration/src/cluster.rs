//! A cluster of one node: Kubernetes 1.20 as `integration/kubernetes` makes it, above containerd 1.6, in a machine of its own.

use crate::{
    cached, certificates_for,
    engines::{Cgroups, Machine, Suite},
    image, run, until,
};
use serde_json::{Value, json};
use std::{fs, io::Write, process::Stdio, thread, time::Duration};

/// The node's address.
const NODE: &str = "10.10.0.1";
/// The API server's, as pods know it: the first of those that services have.
const API_SERVER: &str = "10.96.0.1";
/// Whom the API server knows by which token, and what may be done by which name (RBAC's default roles).
const ACCOUNTS: &str = "admin,admin,1,system:masters
kube-controller-manager,system:kube-controller-manager,2
kube-scheduler,system:kube-scheduler,3
kubelet,system:node:node,4,system:nodes
";
/// Tests may run without the right to lower OOM scores.
const KUBELET: &str = r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
failSwapOn: false
enforceNodeAllocatable: []
nodeStatusUpdateFrequency: 1s
resolvConf: ""
evictionHard: {nodefs.available: "1%", imagefs.available: "1%", memory.available: 50Mi}
"#;
/// Pods have addresses of their own, and reach the node and nobody else.
const NETWORK: &str = r#"{"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "pods0", "isGateway": true,
"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
"#;

/// A cluster. It goes, with all that runs in it, when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    /// Its only node.
    pub node: Machine,
}

impl Cluster {
    /// Starts one, whose node is ready.
    pub fn start() -> Self {
        let node = Machine::start(Suite::Bookworm, Cgroups::possible()[0]);
        let cluster = Self { node };
        cluster.install();
        cluster.start_control_plane();
        for name in ["pause", "busybox", "cuda", "debian-python"] {
            cluster.import(&image(name, "docker.tar").to_string_lossy());
        }
        cluster.start_kubelet();
        cluster.until("the node is ready", |cluster| {
            let conditions = &cluster.get("/api/v1/nodes/node")["status"]["conditions"];
            conditions
                .as_array()
                .into_iter()
                .flatten()
                .any(|one| one["type"] == "Ready" && one["status"] == "True")
        });
        cluster.until("pods have an account", |cluster| {
            cluster.get("/api/v1/namespaces/default/serviceaccounts/default")["secrets"].is_array()
        });
        cluster
    }

    fn install(&self) {
        let programs = self.node.shared().join("kubernetes");
        fs::create_dir(&programs).expect("a new directory");
        for program in fs::read_dir(cached("kubernetes/bin")).expect("a directory").flatten() {
            // They are large.
            fs::hard_link(program.path(), programs.join(program.file_name())).expect("of the same cache");
        }
        let certificates = certificates_for(&format!("IP:{NODE},IP:{API_SERVER},DNS:kubernetes.default.svc"));
        for name in ["ca.crt", "tls.crt", "tls.key"] {
            let file = self.node.path(&format!("/etc/kubernetes/pki/{name}"));
            fs::create_dir_all(file.parent().expect("it is absolute")).expect("a directory of its own");
            fs::copy(certificates.path().join(name), file).expect("a file of its own");
        }
        self.put("/etc/kubernetes/tokens", ACCOUNTS);
        for account in ACCOUNTS.lines().filter_map(|line| line.split(',').next()) {
            let cluster = json!({"server": format!("https://{API_SERVER}"), "certificate-authority": "/etc/kubernetes/pki/ca.crt"});
            let configuration = json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "it",
                "clusters": [{"name": "it", "cluster": cluster}],
                "users": [{"name": "it", "user": {"token": account}}],
                "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}]
            });
            self.put(&format!("/etc/kubernetes/{account}.conf"), &configuration.to_string());
        }
        self.put("/etc/kubernetes/kubelet.yaml", KUBELET);
        // Before Podman's, of which there is one.
        self.put("/etc/cni/net.d/10-pods.conflist", NETWORK);
        self.put(
            "/etc/gpurun/config.toml",
            "runtimes = [\"runc\"]\naccept-nvidia-visible-devices-as-volume-mounts = true\n",
        );
        self.node.sh(&format!(
            "set -e
             ln -s {programs}/[ek]* /usr/local/bin
             mkdir -p /opt/cni /root/.kube /var/lib/kubelet /var/log/pods
             ln -s {programs} /opt/cni/bin
             ln -s /etc/kubernetes/admin.conf /root/.kube/config
             mknod /dev/kmsg c 1 11
             mount --make-rshared /
             ip link add node0 type bridge
             ip address add {NODE}/24 dev node0
             ip link set node0 up
             ip route add default dev node0
             ip address add {API_SERVER}/32 dev lo",
            programs = programs.display(),
        ));
    }

    fn start_control_plane(&self) {
        self.node.sh(&format!(
            "cd /etc/kubernetes
             etcd --data-dir /var/lib/etcd --unsafe-no-fsync > /var/log/etcd.log 2>&1 &
             kube-apiserver --etcd-servers=http://127.0.0.1:2379 --bind-address=0.0.0.0 --secure-port=443 --advertise-address={NODE} \
               --service-cluster-ip-range=10.96.0.0/24 --tls-cert-file=pki/tls.crt --tls-private-key-file=pki/tls.key \
               --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=pki/tls.key \
               --service-account-signing-key-file=pki/tls.key --token-auth-file=tokens --authorization-mode=Node,RBAC \
               --enable-admission-plugins=NodeRestriction --allow-privileged --kubelet-preferred-address-types=InternalIP \
               > /var/log/kube-apiserver.log 2>&1 &"
        ));
        self.node.start_containerd();
        self.until("the API server", |cluster| cluster.get("/readyz") == "ok");
        self.node.sh(
            "cd /etc/kubernetes
             kube-controller-manager --kubeconfig=kube-controller-manager.conf --leader-elect=false --port=0 \
               --service-account-private-key-file=pki/tls.key --root-ca-file=pki/ca.crt --use-service-account-credentials \
               > /var/log/kube-controller-manager.log 2>&1 &
             kube-scheduler --kubeconfig=kube-scheduler.conf --leader-elect=false --port=0 > /var/log/kube-scheduler.log 2>&1 &",
        );
    }

    /// Starts the kubelet, until plugins can register.
    pub fn start_kubelet(&self) {
        self.node.sh(&format!("kubelet --config=/etc/kubernetes/kubelet.yaml --kubeconfig=/etc/kubernetes/kubelet.conf --container-runtime=remote \
               --container-runtime-endpoint=unix:///run/containerd/containerd.sock --hostname-override=node --node-ip={NODE} \
               --cert-dir=/var/lib/kubelet/pki >> /var/log/kubelet.log 2>&1 &
             echo $! > /run/kubelet.pid"));
        self.until("the kubelet's socket", |cluster| {
            let socket = "/var/lib/kubelet/device-plugins/kubelet.sock";
            run(&mut cluster.node.command(&["test", "-S", socket])).code == 0
        });
    }

    /// Kills it.
    pub fn kill_kubelet(&self) {
        self.node.sh("kill -9 $(cat /run/kubelet.pid)");
    }

    /// Imports an image from an archive.
    pub fn import(&self, archive: &str) {
        self.node.sh(&format!("ctr -n k8s.io image import {archive}"));
    }

    /// What `kubectl` answers; it must succeed.
    pub fn kubectl(&self, words: &str) -> String {
        self.node.sh(&format!("kubectl {words}"))
    }

    /// What the API server has by this path, or says; null if it says nothing.
    pub fn get(&self, path: &str) -> Value {
        let said = run(&mut self.node.command(&["kubectl", "get", "--raw", path])).out;
        serde_json::from_str(&said)
            .unwrap_or_else(|_| if said.is_empty() { Value::Null } else { said.into() })
    }

    /// Makes or changes what these manifests say.
    pub fn apply(&self, manifests: &str) {
        let mut command = self.node.command(&["kubectl", "apply", "-f", "-"]);
        let mut kubectl = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("kubectl");
        let mut input = kubectl.stdin.take().expect("it is a pipe");
        input.write_all(manifests.as_bytes()).expect("it reads");
        drop(input);
        assert!(kubectl.wait().expect("our own child").success(), "{manifests}");
    }

    /// Waits until it is so, without taking the processors from those who are waited for.
    pub fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        until(what, || {
            let so = is_so(self);
            if !so {
                thread::sleep(Duration::from_millis(100));
            }
            so
        });
    }

    /// A file of the node's; empty if there is none.
    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.node.path(path)).unwrap_or_default()
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.node.path(path);
        fs::create_dir_all(path.parent().expect("it is absolute")).expect("a directory of its own");
        fs::write(path, text).expect("a file of its own");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            let tell = "kubectl get pods --all-namespaces; kubectl get events --all-namespaces | tail -n 20; tail -n 6 /var/log/*.log | cut -c -300";
            eprintln!("{}", run(&mut self.node.command(&["sh", "-c", tell])).out);
        }
    }
}
