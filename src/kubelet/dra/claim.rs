//! A ResourceClaim: which devices the scheduler has allocated to it. Read from the API server; only it says so.

use super::DRIVER;
use gpurun::error::{Code, Error, OrFail, Result};
use serde::Deserialize;
use serde_json::Value;

/// A device of this node that a claim has got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocated {
    /// The request in the claim that it is for.
    pub request: String,
    /// Its name in the node's pool.
    pub device: String,
    /// Whoever watches over devices has it besides who uses it.
    pub admin: bool,
}

#[derive(Deserialize)]
struct Claim {
    metadata: Metadata,
    #[serde(default)]
    status: Status,
}

#[derive(Deserialize)]
struct Metadata {
    uid: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    allocation: Option<Allocation>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Allocation {
    devices: Devices,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Devices {
    results: Vec<Outcome>,
    config: Vec<Configuration>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    request: String,
    driver: String,
    pool: String,
    device: String,
    #[serde(default)]
    admin_access: Option<bool>,
}

#[derive(Deserialize)]
struct Configuration {
    opaque: Option<Opaque>,
}

#[derive(Deserialize)]
struct Opaque {
    driver: String,
    #[serde(default)]
    parameters: Value,
}

/// The devices of this node's pool that a claim with this UID has got from this driver.
///
/// # Errors
/// [`Code::BadRequest`] if it is another claim, has got nothing, or wants of its devices what gpurun does not do.
pub fn allocated(claim: Value, uid: &str, node: &str) -> Result<Vec<Allocated>> {
    let claim: Claim =
        serde_json::from_value(claim).or_fail(Code::BadRequest, || "the claim cannot be understood")?;
    if claim.metadata.uid != uid {
        return Err(Error::new(Code::BadRequest, "the claim is another one of the same name")
            .cause(format!("its UID is {} and not {uid}: the first was deleted", claim.metadata.uid)));
    }
    let allocation = claim.status.allocation.ok_or("its status has no allocation");
    let allocation = allocation.or_fail(Code::BadRequest, || "the claim has got no devices yet")?.devices;
    let ours =
        allocation.config.iter().filter_map(|one| one.opaque.as_ref()).filter(|one| one.driver == DRIVER);
    ours.map(|one| &one.parameters).try_for_each(is_done)?;
    let ours = allocation.results.into_iter().filter(|one| one.driver == DRIVER && one.pool == node);
    let found: Vec<_> = ours
        .map(|one| Allocated {
            request: one.request,
            device: one.device,
            admin: one.admin_access.unwrap_or(false),
        })
        .collect();
    if found.is_empty() {
        return Err(Error::new(Code::BadRequest, "the claim has got no device of this node"));
    }
    Ok(found)
}

/// A configuration of NVIDIA's driver (`resource.nvidia.com`) that says nothing, or no more than what is anyway.
fn is_done(parameters: &Value) -> Result<()> {
    let kind = parameters["kind"].as_str().unwrap_or_default();
    let sharing = &parameters["sharing"];
    let interval = sharing["timeSlicingConfig"]["interval"].as_str().unwrap_or("Default");
    let default = sharing.is_null() || (sharing["strategy"] == "TimeSlicing" && interval == "Default");
    if matches!(kind, "GpuConfig" | "MigDeviceConfig") && default {
        return Ok(());
    }
    Err(Error::new(Code::BadRequest, "the claim configures its devices in a way that gpurun does not know")
        .cause(format!("it says {}", parameters.to_string().chars().take(200).collect::<String>()))
        .fix("leave `devices.config` out of the claim: containers that name one claim share its devices by the driver's own time slices"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn claim(results: &Value, config: &Value) -> Value {
        json!({
            "metadata": {"name": "train", "uid": "uid-1"},
            "spec": {"devices": {"requests": [{"name": "gpus"}]}},
            "status": {"allocation": {"devices": {"results": results, "config": config}}},
        })
    }

    fn result(driver: &str, pool: &str, device: &str) -> Value {
        json!({"request": "gpus", "driver": driver, "pool": pool, "device": device, "adminAccess": null})
    }

    #[test]
    fn the_devices_of_this_node_and_driver_are_the_claims() {
        let watched = json!({"request": "watch", "driver": DRIVER, "pool": "n", "device": "gpu-2", "adminAccess": true});
        let results = json!([result(DRIVER, "n", "gpu-1"), result("net.example", "n", "nic-0"), watched]);
        let found = allocated(claim(&results, &json!(null)), "uid-1", "n").unwrap_err();
        assert!(found.to_string().contains("understood"), "null is no list: {found}");
        let found = allocated(claim(&results, &json!([])), "uid-1", "n").unwrap();
        let one = |request: &str, device: &str, admin| Allocated {
            request: request.into(),
            device: device.into(),
            admin,
        };
        assert_eq!(found, [one("gpus", "gpu-1", false), one("watch", "gpu-2", true)]);
    }

    #[test]
    fn another_claim_or_none_is_refused() {
        let ours = json!([result(DRIVER, "n", "gpu-1")]);
        for (claim, uid, node, reason) in [
            (claim(&ours, &json!([])), "uid-2", "n", "another one of the same name"),
            (claim(&ours, &json!([])), "uid-1", "m", "no device of this node"),
            (json!({"metadata": {"uid": "uid-1"}}), "uid-1", "n", "no devices yet"),
            (
                json!({"metadata": {"uid": "uid-1"}, "status": {"allocation": null}}),
                "uid-1",
                "n",
                "no devices yet",
            ),
            (json!(null), "uid-1", "n", "cannot be understood"),
        ] {
            let error = allocated(claim, uid, node).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn a_configuration_is_done_or_refused() {
        let with = |driver: &str, parameters: Value| {
            let config =
                json!([{"source": "FromClaim", "opaque": {"driver": driver, "parameters": parameters}}]);
            allocated(claim(&json!([result(DRIVER, "n", "gpu-1")]), &config), "uid-1", "n")
        };
        let sharing = |sharing: Value| json!({"apiVersion": "resource.nvidia.com/v1beta1", "kind": "GpuConfig", "sharing": sharing});
        assert!(with("net.example", json!({"kind": "Mtu"})).is_ok());
        assert!(with(DRIVER, sharing(Value::Null)).is_ok());
        assert!(with(DRIVER, sharing(json!({"strategy": "TimeSlicing"}))).is_ok());
        let interval = json!({"strategy": "TimeSlicing", "timeSlicingConfig": {"interval": "Default"}});
        assert!(with(DRIVER, sharing(interval)).is_ok());
        let long = json!({"strategy": "TimeSlicing", "timeSlicingConfig": {"interval": "Long"}});
        for refused in [
            sharing(json!({"strategy": "MPS"})),
            sharing(long),
            json!({"kind": "VfioDeviceConfig"}),
            json!(3),
        ] {
            let error = with(DRIVER, refused).unwrap_err();
            assert!(error.to_string().contains("fix:"), "{error}");
        }
    }
}
