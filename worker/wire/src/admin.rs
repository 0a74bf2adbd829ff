//! The port for probes and Prometheus: `/healthz`, `/readyz`, `/metrics`.

use std::{future::Future, io, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus::{Registry, TextEncoder};
use tokio::net::TcpListener;

/// What the port tells.
pub struct Admin<F> {
    /// `Err` holds the reason why this process is not ready, one line for `kubectl describe`.
    pub ready: F,
    /// The metrics.
    pub registry: Registry,
}

/// Serves `admin` on `listener` until `shutdown`. `/healthz` answers as long as the process does.
///
/// # Errors
/// Those of the listener.
pub async fn serve<F>(
    listener: TcpListener,
    admin: Admin<F>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()>
where
    F: Fn() -> Result<(), String> + Send + Sync + 'static,
{
    let routes = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz::<F>))
        .route("/metrics", get(metrics::<F>))
        .with_state(Arc::new(admin));
    axum::serve(listener, routes).with_graceful_shutdown(shutdown).await
}

async fn readyz<F: Fn() -> Result<(), String>>(State(admin): State<Arc<Admin<F>>>) -> Response {
    match (admin.ready)() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn metrics<F>(State(admin): State<Arc<Admin<F>>>) -> Response {
    match TextEncoder::new().encode_to_string(&admin.registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests;
