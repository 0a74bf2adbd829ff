//! The port for probes, Prometheus and people: `/healthz`, `/readyz`, `/metrics`, and pages of JSON.

use std::{future::Future, io, sync::Arc};

use axum::{
    Json, Router,
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
    /// What else this process tells.
    pub pages: Vec<Page>,
}

/// JSON at a path of its own.
pub struct Page {
    /// Such as `/experts`.
    pub path: &'static str,
    /// What stands there now; `Err` holds the reason why there is nothing yet, one line.
    pub read: Read,
}

/// Reads a page.
pub type Read = Arc<dyn Fn() -> Result<serde_json::Value, String> + Send + Sync>;

/// The path at which a worker tells its `ExpertLoad`.
pub const EXPERTS: &str = "/experts";

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
    let Admin { ready, registry, pages } = admin;
    let mut routes = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz::<F>).with_state(Arc::new(ready)))
        .route("/metrics", get(metrics).with_state(registry));
    for Page { path, read } in pages {
        routes = routes.route(path, get(page).with_state(read));
    }
    axum::serve(listener, routes).with_graceful_shutdown(shutdown).await
}

async fn readyz<F: Fn() -> Result<(), String>>(State(ready): State<Arc<F>>) -> Response {
    match ready() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => unavailable(&why),
    }
}

async fn metrics(State(registry): State<Registry>) -> Response {
    match TextEncoder::new().encode_to_string(&registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn page(State(read): State<Read>) -> Response {
    match read() {
        Ok(value) => Json(value).into_response(),
        Err(why) => unavailable(&why),
    }
}

fn unavailable(why: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response()
}

#[cfg(test)]
mod tests;
