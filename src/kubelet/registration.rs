//! Registers a resource with the kubelet, and watches the directory of sockets.

use crate::{
    api::device_plugin::{DevicePluginOptions, RegisterRequest, registration_client::RegistrationClient},
    grpc,
};
use gpurun::error::{Code, OrFail, Result};
use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    io,
    mem::MaybeUninit,
    os::unix::ffi::OsStrExt,
    path::Path,
    time::Duration,
};
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

/// An event in the directory of sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Noticed {
    /// A kubelet has made its socket. At its start the kubelet removes all existing sockets.
    Kubelet,
    /// The file of this name was made, replaced or removed.
    Socket(OsString),
}

/// Watches the directory of the kubelet's socket.
///
/// # Errors
/// [`Code::Config`] if there is no such directory.
pub fn watch(socket: &Path, noticed: mpsc::UnboundedSender<Noticed>) -> Result<()> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    let failed = || format!("{} cannot be watched", directory.display());
    let inotify = inotify::init(CreateFlags::CLOEXEC).or_fail(Code::Internal, failed)?;
    let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM | WatchFlags::DELETE;
    inotify::add_watch(&inotify, directory, flags)
        .or_fail(Code::Config, failed)
        .map_err(|error| error.fix("name the kubelet's socket with --kubelet-socket"))?;
    let socket = socket.to_path_buf();
    let thread = std::thread::Builder::new().name("sockets".into()).spawn(move || {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = Reader::new(&inotify, &mut buffer);
        loop {
            let what = match events.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                    let is_new = event.events().intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
                    match name {
                        // Some events were lost.
                        None => Some(Noticed::Kubelet),
                        name if name == socket.file_name() => is_new.then_some(Noticed::Kubelet),
                        Some(name) => Some(Noticed::Socket(name.to_owned())),
                    }
                }
                Err(Errno::INTR) => None,
                Err(error) => {
                    tracing::error!("a restart of the kubelet will not be noticed: {error}");
                    return;
                }
            };
            if what.is_some_and(|what| noticed.send(what).is_err()) {
                return;
            }
        }
    });
    thread.map(drop).or_fail(Code::Internal, failed)
}
