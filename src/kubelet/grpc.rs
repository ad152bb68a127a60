//! gRPC over Unix sockets: serving, and one connection of a client's.

use crate::authority::Lenient;
use http::{Request, Response};
use hyper::{body::Incoming, client::conn::http2::SendRequest, server::conn::http2};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use std::{
    convert::Infallible,
    io,
    path::Path,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};
use tonic::body::Body;
use tower_service::Service;

/// How long is waited where no more connections can be had: descriptors are freed by and by.
pub(crate) const NONE_LEFT: Duration = Duration::from_secs(1);

/// Serves clients until it is dropped.
pub async fn serve<S>(listener: UnixListener, service: S) -> Infallible
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let mut connections = JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else {
            tokio::time::sleep(NONE_LEFT).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        let service = TowerToHyperService::new(service.clone());
        connections.spawn(async move {
            let io = TokioIo::new(Lenient::new(client));
            // A disconnected client also ends it.
            let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await;
        });
    }
}

/// A connection, over which the generated clients speak.
#[derive(Debug, Clone)]
pub struct Channel(SendRequest<Body>);

/// Connects to a Unix socket.
///
/// # Errors
/// When nobody listens there.
pub async fn connect(socket: &Path) -> io::Result<Channel> {
    let io = TokioIo::new(UnixStream::connect(socket).await?);
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.map_err(io::Error::other)?;
    // Ends with the last sender.
    tokio::spawn(connection);
    Ok(Channel(sender))
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // HTTP/2 wants one, and a Unix socket has none.
        let path = request.uri().path_and_query().cloned();
        let uri = http::Uri::builder().scheme("http").authority("localhost");
        if let Ok(uri) = uri.path_and_query(path.unwrap_or(http::uri::PathAndQuery::from_static("/"))).build()
        {
            *request.uri_mut() = uri;
        }
        Box::pin(self.0.send_request(request))
    }
}
