//! What the driver reports, by way of `gpurun-nvml --watch`: a program of its own, so that an NVML that crashes or hangs takes
//! nothing else with it.

use crate::back_off::BackOff;
use gpurun::{
    error::{Code, OrFail, Result},
    inventory::{
        HostPath,
        nvml::{self, QUIET, Report},
    },
};
use std::{path::Path, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

/// A reader says something at least every [`QUIET`]; one that has said nothing for so long hangs.
const HANGS: Duration = Duration::from_secs(6 * QUIET.as_secs());

/// A reader that is kept running until this is dropped.
#[derive(Debug)]
pub struct Watcher(JoinHandle<()>);

impl Watcher {
    /// Starts one for the driver's library.
    ///
    /// # Errors
    /// [`Code::NvmlFailed`] if gpurun's program is not there.
    pub fn start(nvml: HostPath, reports: mpsc::Sender<Report>) -> Result<Self> {
        let reader = nvml::find_reader()?;
        Ok(Self(tokio::spawn(async move {
            let mut back_off = BackOff::default();
            loop {
                sleep(back_off.wait()).await;
                let started = Instant::now();
                let ended = match watch(&reader, &nvml, &reports).await {
                    Ok(how) => how,
                    Err(error) => error.to_string(),
                };
                tracing::warn!("{} --watch ended: {ended}", reader.display());
                back_off.ended(started.elapsed());
            }
        })))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs it to its end, and says how it was.
async fn watch(reader: &Path, nvml: &HostPath, reports: &mpsc::Sender<Report>) -> Result<String> {
    let failed = || format!("{} cannot be run", reader.display());
    let mut child: Child = Command::new(reader)
        .arg("--watch")
        .arg(&nvml.0)
        // The driver's library obeys variables; it gets none of the user's.
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .or_fail(Code::NvmlFailed, failed)?;
    let mut lines =
        BufReader::new(child.stdout.take().ok_or("it has no pipe").or_fail(Code::NvmlFailed, failed)?)
            .lines();
    loop {
        let line = match timeout(HANGS, lines.next_line()).await {
            Ok(Ok(Some(line))) => line,
            Ok(_) => break,
            Err(_) => {
                // Not waited for: a process that the driver keeps in the kernel does not die.
                let _ = child.start_kill();
                return Ok(format!("it said nothing for {} seconds", HANGS.as_secs()));
            }
        };
        match serde_json::from_str(&line) {
            Ok(Report::Quiet) => {}
            Ok(report) => drop(reports.send(report).await),
            Err(_) => return Ok(format!("it said {line}")),
        }
    }
    let status = child.wait().await.or_fail(Code::NvmlFailed, failed)?;
    Ok(status.to_string())
}
