//! The sockets of the resources: serves and registers them, and makes them again when they are removed.

use super::{AGAIN, Plugin};
use crate::{
    api::device_plugin::device_plugin_server::DevicePluginServer,
    grpc,
    registration::{self, Noticed},
    server::Server,
    socket::{self, Socket, Standing},
};
use gpurun::error::Result;
use std::{sync::Arc, time::Instant};
use tokio::task::JoinHandle;

/// A served and registered resource. Dropping it ends the service.
pub(super) struct Running {
    serving: JoinHandle<()>,
    registering: JoinHandle<()>,
    socket: Socket,
    /// Another plugin has taken the socket's name, and the log names it.
    pub(super) is_aside: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.serving.abort();
        self.registering.abort();
    }
}

impl Running {
    /// The socket's name in the kubelet's directory.
    fn endpoint(&self) -> String {
        self.socket.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl Plugin {
    pub(super) async fn notice(&mut self, what: Noticed) {
        match what {
            Noticed::Kubelet => self.register_again(),
            Noticed::Socket(name) => {
                let is_it = |running: &Running| running.socket.path().file_name() == Some(name.as_os_str());
                let Some(resource) =
                    self.servers.iter().find(|(_, running)| is_it(running)).map(|(name, _)| name.clone())
                else {
                    return;
                };
                if !self.lost_socket(&resource).await {
                    return;
                }
            }
        }
        self.publish();
    }

    /// Checks that a resource's socket still exists and is its own. Returns whether the resource must be served at a new socket.
    async fn lost_socket(&mut self, resource: &str) -> bool {
        let Some(running) = self.servers.get_mut(resource) else { return false };
        let path = running.socket.path().to_path_buf();
        let is_gone = match running.socket.standing() {
            Standing::Ours => {
                running.is_aside = false;
                return false;
            }
            Standing::Gone => true,
            Standing::Taken => match socket::listener_of(&path).await {
                // A leftover of a killed plugin.
                None => true,
                Some(other) => {
                    if !running.is_aside {
                        tracing::warn!(
                            "{other} has taken {}: it serves {resource} now, and this plugin waits for its end; run one device \
                             plugin for {resource} on a node",
                            path.display()
                        );
                        running.is_aside = true;
                    }
                    false
                }
            },
        };
        if is_gone {
            tracing::info!("{} was removed: {resource} is registered again", path.display());
            self.servers.remove(resource);
        } else {
            self.again =
                Some(self.again.map_or(Instant::now() + AGAIN, |again| again.min(Instant::now() + AGAIN)));
        }
        is_gone
    }

    /// Checks whether the plugins that have taken sockets have ended.
    pub(super) async fn retake_sockets(&mut self) {
        let aside = self.servers.iter().filter(|(_, running)| running.is_aside);
        let aside: Vec<String> = aside.map(|(name, _)| name.clone()).collect();
        for resource in aside {
            self.lost_socket(&resource).await;
        }
    }

    pub(super) fn start(&self, name: &str, endpoint: &str) -> Result<Running> {
        let (listener, socket) = Socket::bind(&self.options.sockets.join(endpoint))?;
        let service = DevicePluginServer::new(Server {
            resource: name.into(),
            state: self.state.subscribe(),
            metrics: Arc::clone(&self.metrics),
        });
        let serving = tokio::spawn(async move { match grpc::serve(listener, service).await {} });
        let registering = self.register(name, endpoint);
        Ok(Running { serving, registering, socket, is_aside: false })
    }

    /// Registers resources again after a restart of the kubelet, which knows no resources then. Resources that were registered a
    /// moment ago may already be in use, so existing sockets are kept.
    fn register_again(&mut self) {
        self.servers.retain(|_, running| running.socket.standing() != Standing::Gone);
        let own = self.servers.iter().filter(|(_, running)| running.socket.standing() == Standing::Ours);
        let own: Vec<_> = own.map(|(name, running)| (name.clone(), running.endpoint())).collect();
        for (name, endpoint) in own {
            let registering = self.register(&name, &endpoint);
            if let Some(running) = self.servers.get_mut(&name) {
                std::mem::replace(&mut running.registering, registering).abort();
            }
        }
    }

    fn register(&self, name: &str, endpoint: &str) -> JoinHandle<()> {
        let (kubelet, name, endpoint) =
            (self.options.kubelet_socket.clone(), name.to_owned(), endpoint.to_owned());
        let metrics = Arc::clone(&self.metrics);
        tokio::spawn(async move {
            if let Some(kubelet) = kubelet {
                metrics.registration();
                registration::register(&kubelet, &name, &endpoint).await;
            }
        })
    }
}
