//! HTTP: `/metrics` on a TCP address for Prometheus, and `/healthz` and `/readyz` for the kubelet.
//!
//! Every pod of a cluster can connect to the TCP address, so silent connections must not keep others out. The number of
//! connections per client address is limited, and at the limit the oldest connection without a request is closed. Kubelets
//! probe at a Unix socket of the pod ([`crate::probe`]), which no other pod can reach.

use crate::{grpc, metrics::Metrics, pods::Pods, state::State};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::watch,
    task::AbortHandle,
};

/// The most connections of all clients, and of one address.
const MOST_CLIENTS: usize = 64;
const MOST_OF_ADDRESS: usize = 8;
/// Timeout for a request.
const PATIENCE: Duration = Duration::from_secs(2);

/// Sources of the responses.
#[derive(Debug, Clone)]
pub struct Answers {
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The newest state.
    pub state: watch::Receiver<Option<Arc<State>>>,
    /// The devices of each pod.
    pub pods: Pods,
}

/// A listener that reports client addresses, by which connections are limited.
pub trait Listener {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection.
    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, Option<IpAddr>)>> + Send;
}

impl Listener for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn next(&self) -> io::Result<(Self::Stream, Option<IpAddr>)> {
        let (stream, from) = self.accept().await?;
        Ok((stream, Some(from.ip())))
    }
}

impl Listener for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn next(&self) -> io::Result<(Self::Stream, Option<IpAddr>)> {
        Ok((self.accept().await?.0, None))
    }
}

/// Serves the clients of the listener.
pub async fn serve(listener: impl Listener, answers: Answers) -> Infallible {
    let mut clients = Clients::default();
    loop {
        let Ok((stream, address)) = listener.next().await else {
            tokio::time::sleep(grpc::NONE_LEFT).await;
            continue;
        };
        clients.make_place(address);
        let has_asked = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(converse(stream, answers.clone(), Arc::clone(&has_asked)));
        clients.0.push(Client { address, has_asked, task: task.abort_handle() });
    }
}

/// The connections, the oldest first.
#[derive(Debug, Default)]
struct Clients(Vec<Client>);

#[derive(Debug)]
struct Client {
    address: Option<IpAddr>,
    has_asked: Arc<AtomicBool>,
    task: AbortHandle,
}

impl Clients {
    /// Closes one connection if the limits do not allow another one from this address.
    fn make_place(&mut self, address: Option<IpAddr>) {
        self.0.retain(|client| !client.task.is_finished());
        let of_address = |client: &Client| address.is_some() && client.address == address;
        if self.0.iter().filter(|client| of_address(client)).count() >= MOST_OF_ADDRESS {
            self.close(of_address);
        } else if self.0.len() >= MOST_CLIENTS {
            self.close(|_| true);
        }
    }

    /// Closes the oldest silent one of these connections, or else the oldest.
    fn close(&mut self, one_of: impl Fn(&Client) -> bool) {
        let is_silent = |client: &Client| !client.has_asked.load(Ordering::Relaxed);
        let silent = self.0.iter().position(|client| one_of(client) && is_silent(client));
        if let Some(at) = silent.or_else(|| self.0.iter().position(&one_of)) {
            self.0.remove(at).task.abort();
        }
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    answers: Answers,
    has_asked: Arc<AtomicBool>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        has_asked.store(true, Ordering::Relaxed);
        let answers = answers.clone();
        async move { Ok::<_, Infallible>(answers.to(request.uri().path()).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // A client that does not read the response is disconnected.
    let _ = tokio::time::timeout(2 * PATIENCE, connection).await;
}

impl Answers {
    async fn to(&self, path: &str) -> Response<Full<Bytes>> {
        let state = self.state.borrow().clone();
        let (status, text) = match path {
            "/metrics" => {
                let held = match &state {
                    Some(state) => self.pods.held(state).await,
                    None => None,
                };
                (StatusCode::OK, self.metrics.text(state.as_deref(), held.as_deref()))
            }
            "/healthz" => (StatusCode::OK, "ok\n".into()),
            "/readyz" if state.is_some() => (StatusCode::OK, "ok\n".into()),
            "/readyz" => (StatusCode::SERVICE_UNAVAILABLE, "no devices are offered\n".into()),
            _ => (StatusCode::NOT_FOUND, String::new()),
        };
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        let kind = http::HeaderValue::from_static("text/plain; version=0.0.4");
        response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_silent_connection_makes_place() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _entered = runtime.enter();
        let address = |last: usize| Some(IpAddr::from([10, 0, 0, u8::try_from(last).unwrap()]));
        let client = |last: usize, has_asked: bool| Client {
            address: address(last),
            has_asked: Arc::new(AtomicBool::new(has_asked)),
            task: runtime.spawn(std::future::pending::<()>()).abort_handle(),
        };
        let addresses = |clients: &Clients| clients.0.iter().map(|client| client.address).collect::<Vec<_>>();
        // One address has few connections, so it does not displace other clients.
        let mut clients = Clients(
            (0..=MOST_OF_ADDRESS).map(|number| client(usize::from(number > 0), number == 1)).collect(),
        );
        clients.make_place(address(1));
        assert_eq!(clients.0.len(), MOST_OF_ADDRESS);
        assert_eq!(addresses(&clients)[0], address(0));
        assert!(clients.0[1].has_asked.load(Ordering::Relaxed), "a younger silent one was closed");
        // Many addresses.
        let mut clients = Clients((0..MOST_CLIENTS).map(|number| client(number, number < 2)).collect());
        clients.make_place(address(100));
        assert_eq!(addresses(&clients)[..3], [address(0), address(1), address(3)]);
        let mut clients = Clients((0..MOST_CLIENTS).map(|number| client(number, true)).collect());
        clients.make_place(address(100));
        assert_eq!((clients.0.len(), addresses(&clients)[0]), (MOST_CLIENTS - 1, address(1)));
        let mut clients = Clients((0..MOST_CLIENTS - 1).map(|number| client(number, false)).collect());
        clients.make_place(address(100));
        assert_eq!(clients.0.len(), MOST_CLIENTS - 1, "there is place");
    }
}
