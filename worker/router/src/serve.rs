//! Both doors, from the first request to the last.

use std::{future::Future, io, time::Duration};

use tokio::{net::TcpListener, sync::watch};
use tracing::info;

use crate::{edge, grpc, router::Router, vigil};

/// The sockets, bound by the caller.
#[derive(Debug)]
pub struct Listeners {
    /// OpenAI.
    pub http: TcpListener,
    /// Typed.
    pub grpc: TcpListener,
}

/// How the end goes.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    /// How long requests are still taken once the router is no longer ready: until whoever sends them has noticed.
    pub linger: Duration,
    /// How long running requests may take after that.
    pub grace: Duration,
}

/// Why serving cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptors for reflection.
    #[error("reading the gRPC descriptors")]
    Descriptors(#[from] tonic_reflection::server::Error),
    /// A socket.
    #[error("serving gRPC")]
    Grpc(#[source] io::Error),
}

/// Serves until `shutdown`: then it is not ready, lingers, takes no more connections, and ends once all requests have.
///
/// # Errors
/// See [`Error`]; none once it has begun.
pub async fn serve(
    listeners: Listeners,
    router: Router,
    shutdown: impl Future<Output = ()>,
    ending: Ending,
) -> Result<(), Error> {
    let (routes, health) = grpc::routes(&router)?;
    let (stop, stopped) = watch::channel(false);
    let until_stopped = || {
        let mut stopped = stopped.clone();
        async move { drop(stopped.wait_for(|stopped| *stopped).await) }
    };
    let doors = async {
        let http = edge::serve(listeners.http, router.clone(), until_stopped(), ending.grace);
        let grpc = wire::serve_until(listeners.grpc, routes, until_stopped(), ending.grace);
        let ((), grpc) = tokio::join!(http, grpc);
        grpc.map_err(Error::Grpc)
    };
    let end = async {
        shutdown.await;
        router.retire();
        info!(linger = ?ending.linger, "ending: no longer ready");
        tokio::time::sleep(ending.linger).await;
        stop.send_replace(true);
        std::future::pending::<()>().await
    };
    tokio::select! {
        ended = doors => ended,
        () = end => unreachable!("it waits for ever"),
        () = health => unreachable!("it waits for ever"),
        () = vigil::keep(router.clone()) => unreachable!("it watches for ever"),
    }
}
