//! `--probe`: queries liveness or readiness of a running plugin at a Unix socket that only its own pod can reach. A port
//! would be open to every pod of the cluster, and a pod that occupies its connections could make the kubelet restart the
//! plugin.

use crate::config::Probe;
use gpurun::error::{Code, Error, OrFail, Result};
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// Timeout for the response of the plugin.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends the query.
///
/// # Errors
/// [`Code::Config`] for a negative or missing response.
pub fn ask(socket: Option<&Path>, question: Probe) -> Result<()> {
    let Some(socket) = socket else {
        return Err(Error::new(Code::Config, "--probe needs the plugin's socket")
            .fix("name it with --probe-socket or PROBE_SOCKET, for the plugin and for the probe"));
    };
    let path = match question {
        Probe::Live => "/healthz",
        Probe::Ready => "/readyz",
    };
    let asked = (|| {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(
            format!("GET {path} HTTP/1.1\r\nHost: plugin\r\nConnection: close\r\n\r\n").as_bytes(),
        )?;
        let mut answer = String::new();
        stream.take(4096).read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    })();
    let answer = asked
        .or_fail(Code::Config, || format!("no plugin answers at {}", socket.display()))
        .map_err(|error| error.fix("start gpurun-device-plugin with --probe-socket naming this socket"))?;
    if answer.starts_with("HTTP/1.1 200 ") {
        return Ok(());
    }
    let reason = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body.trim());
    Err(Error::new(Code::Config, "the plugin is not ready")
        .cause(reason)
        .fix("read the plugin's log: kubectl logs POD"))
}
