//! `--probe`: asks a running plugin whether it lives or is ready, at a Unix socket that only its own pod has. A port would be open to
//! every pod of the cluster, and a pod that holds its connections would make the kubelet restart the plugin.

use crate::config::Probe;
use gpurun::error::{Code, Error, OrFail, Result};
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// How long the plugin may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks, and returns for a yes.
///
/// # Errors
/// [`Code::Config`] for a no, and for no answer.
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
