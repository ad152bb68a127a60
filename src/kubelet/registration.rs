//! Makes a resource known to the kubelet, and notices when another kubelet is there.

use crate::{
    api::device_plugin::{DevicePluginOptions, RegisterRequest, registration_client::RegistrationClient},
    grpc,
};
use gpurun::error::{Code, OrFail, Result};
use rustix::{
    fs::inotify::{self, CreateFlags, Reader, WatchFlags},
    io::Errno,
};
use std::{ffi::OsStr, io, mem::MaybeUninit, os::unix::ffi::OsStrExt, path::Path, time::Duration};
use tokio::sync::mpsc;

/// The API's version.
const VERSION: &str = "v1beta1";
/// A socket appears a moment before anybody listens there. Milliseconds.
const AT_FIRST: [u64; 6] = [5, 10, 20, 40, 80, 160];
/// Then a kubelet that does not answer is asked again, less and less often.
const LATER: [u64; 4] = [5_000, 10_000, 30_000, 60_000];

/// Tells the kubelet; again until it has understood. A kubelet that is not there is waited for by [`watch`].
pub async fn register(kubelet: &Path, resource: &str, endpoint: &str) {
    let mut waits = AT_FIRST.into_iter().chain(LATER).chain(std::iter::repeat(LATER[LATER.len() - 1]));
    let mut said = 0;
    loop {
        match once(kubelet, resource, endpoint).await {
            Ok(()) => {
                tracing::info!("{resource} is registered");
                return;
            }
            // Who makes the socket makes it after this, and is seen then.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::info!("{resource} waits for the kubelet: {} is not there", kubelet.display());
                return;
            }
            Err(error) => {
                said += 1;
                if said > AT_FIRST.len() {
                    tracing::warn!("the kubelet does not take {resource}: {error}");
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(waits.next().unwrap_or(LATER[0]))).await;
    }
}

async fn once(kubelet: &Path, resource: &str, endpoint: &str) -> io::Result<()> {
    let channel = grpc::connect(kubelet).await?;
    let request = RegisterRequest {
        version: VERSION.into(),
        endpoint: endpoint.into(),
        resource_name: resource.into(),
        options: Some(options()),
    };
    RegistrationClient::new(channel).register(request).await.map_err(io::Error::other)?;
    Ok(())
}

/// What the kubelet may ask.
pub fn options() -> DevicePluginOptions {
    DevicePluginOptions { pre_start_required: false, get_preferred_allocation_available: true }
}

/// Tells each time that another kubelet has made its socket. One that starts removes every socket there before.
///
/// # Errors
/// [`Code::Config`] where there is no such directory.
pub fn watch(socket: &Path, came: mpsc::UnboundedSender<()>) -> Result<()> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    let failed = || format!("{} cannot be watched", directory.display());
    let inotify = inotify::init(CreateFlags::CLOEXEC).or_fail(Code::Internal, failed)?;
    inotify::add_watch(&inotify, directory, WatchFlags::CREATE | WatchFlags::MOVED_TO)
        .or_fail(Code::Config, failed)
        .map_err(|error| error.fix("name the kubelet's socket with --kubelet-socket"))?;
    let socket = socket.to_path_buf();
    let thread = std::thread::Builder::new().name("kubelets".into()).spawn(move || {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = Reader::new(&inotify, &mut buffer);
        loop {
            let ours = match events.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                    // Without a name: some events were lost.
                    name.is_none() || name == socket.file_name()
                }
                Err(Errno::INTR) => false,
                Err(error) => return tracing::error!("no other kubelet will be noticed: {error}"),
            };
            if ours && came.send(()).is_err() {
                return;
            }
        }
    });
    thread.map(drop).or_fail(Code::Internal, failed)
}
