//! Counters and gauges, in Prometheus' text format. [`crate::http_server`] serves them.

use crate::{pods::Held, state::State};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Upper bounds of the histogram, in seconds.
const BUCKETS: [f64; 8] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.1, 1.0];

/// What has been counted.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    allocations: BTreeMap<(String, bool), u64>,
    latency: [u64; BUCKETS.len()],
    latency_count: u64,
    latency_sum: f64,
    xids: BTreeMap<(String, u64), u64>,
    registrations: u64,
    claims: Option<usize>,
    mps_starts: BTreeMap<String, u64>,
}

impl Metrics {
    fn with(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A container was, or was not, given devices of the resource.
    pub fn allocation(&self, resource: &str, given: bool, took: Duration) {
        self.with(|counts| {
            *counts.allocations.entry((resource.into(), given)).or_default() += 1;
            let seconds = took.as_secs_f64();
            for (bound, bucket) in BUCKETS.iter().zip(&mut counts.latency) {
                *bucket += u64::from(seconds <= *bound);
            }
            counts.latency_count += 1;
            counts.latency_sum += seconds;
        });
    }

    /// The driver reported an error.
    pub fn xid(&self, gpu: &str, xid: u64) {
        self.with(|counts| *counts.xids.entry((gpu.into(), xid)).or_default() += 1);
    }

    /// Resources are made known to a kubelet.
    pub fn registration(&self) {
        self.with(|counts| counts.registrations += 1);
    }

    /// A GPU's MPS control daemon is ready.
    pub fn mps_start(&self, gpu: &str) {
        self.with(|counts| *counts.mps_starts.entry(gpu.into()).or_default() += 1);
    }

    /// So many claims are prepared.
    pub fn claims(&self, prepared: usize) {
        self.with(|counts| counts.claims = Some(prepared));
    }

    /// In Prometheus' text format, 0.0.4.
    pub fn text(&self, state: Option<&State>, held: Option<&[Held]>) -> String {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        let head = |text: &mut String, name: &str, kind: &str, help: &str| {
            let _ = writeln!(text, "# HELP gpurun_{name} {help}\n# TYPE gpurun_{name} {kind}");
        };
        head(&mut text, "allocations_total", "counter", "Containers that asked for devices.");
        for ((resource, given), count) in &counts.allocations {
            let result = if *given { "given" } else { "refused" };
            let _ = writeln!(
                text,
                "gpurun_allocations_total{{resource=\"{resource}\",result=\"{result}\"}} {count}"
            );
        }
        head(&mut text, "allocation_duration_seconds", "histogram", "How long an answer took.");
        for (bound, count) in BUCKETS.iter().zip(&counts.latency) {
            let _ = writeln!(text, "gpurun_allocation_duration_seconds_bucket{{le=\"{bound}\"}} {count}");
        }
        let (count, sum) = (counts.latency_count, counts.latency_sum);
        let _ = writeln!(
            text,
            "gpurun_allocation_duration_seconds_bucket{{le=\"+Inf\"}} {count}\n\
             gpurun_allocation_duration_seconds_sum {sum}\ngpurun_allocation_duration_seconds_count {count}"
        );
        head(&mut text, "xid_errors_total", "counter", "Errors that the driver reported.");
        for ((gpu, xid), count) in &counts.xids {
            let _ = writeln!(text, "gpurun_xid_errors_total{{gpu=\"{gpu}\",xid=\"{xid}\"}} {count}");
        }
        head(
            &mut text,
            "registrations_total",
            "counter",
            "How often resources were made known to a kubelet.",
        );
        let _ = writeln!(text, "gpurun_registrations_total {}", counts.registrations);
        if !counts.mps_starts.is_empty() {
            let help = "How often a GPU's MPS control daemon was started and became ready.";
            head(&mut text, "mps_daemon_starts_total", "counter", help);
        }
        for (gpu, count) in &counts.mps_starts {
            let _ = writeln!(text, "gpurun_mps_daemon_starts_total{{gpu=\"{gpu}\"}} {count}");
        }
        if let Some(claims) = counts.claims {
            head(&mut text, "claims_prepared", "gauge", "Claims whose devices containers may use.");
            let _ = writeln!(text, "gpurun_claims_prepared {claims}");
        }
        let Some(state) = state else { return text };
        head(&mut text, "device_healthy", "gauge", "Whether a device may be given out.");
        for resource in &state.resources {
            for device in &resource.devices {
                let _ = writeln!(
                    text,
                    "gpurun_device_healthy{{resource=\"{}\",device=\"{}\"}} {}",
                    resource.name,
                    device.uuid,
                    u8::from(!state.unhealthy.contains_key(&device.uuid))
                );
            }
        }
        head(&mut text, "resource_replicas", "gauge", "How often each device of a resource is given out.");
        for resource in &state.resources {
            let replicas = resource.replicas();
            let _ = writeln!(text, "gpurun_resource_replicas{{resource=\"{}\"}} {replicas}", resource.name);
        }
        head(
            &mut text,
            "pod_resources_up",
            "gauge",
            "Whether the kubelet tells which pods have which devices.",
        );
        let _ = writeln!(text, "gpurun_pod_resources_up {}", u8::from(held.is_some()));
        let Some(held) = held else { return text };
        head(&mut text, "replicas_in_use", "gauge", "How often devices of a resource are in use.");
        let mut in_use: BTreeMap<&str, usize> =
            state.resources.iter().map(|resource| (resource.name.as_str(), 0)).collect();
        for held in held {
            *in_use.entry(&held.resource).or_default() += 1;
        }
        for (resource, count) in in_use {
            let _ = writeln!(text, "gpurun_replicas_in_use{{resource=\"{resource}\"}} {count}");
        }
        head(
            &mut text,
            "device_in_use",
            "gauge",
            "Which container has a device, and how many of its replicas.",
        );
        let mut by_container: BTreeMap<[&str; 5], usize> = BTreeMap::new();
        for held in held {
            let Held { resource, device, namespace, pod, container } = held;
            *by_container.entry([resource, device, namespace, pod, container]).or_default() += 1;
        }
        for ([resource, device, namespace, pod, container], count) in by_container {
            let _ = writeln!(
                text,
                "gpurun_device_in_use{{resource=\"{resource}\",device=\"{device}\",namespace=\"{namespace}\",\
                 pod=\"{pod}\",container=\"{container}\"}} {count}"
            );
        }
        text
    }
}
