//! Whether a router answers: what `helm test` runs in a pod of its own.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::{Instant, sleep, timeout_at};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(500);

/// Asks the gRPC health service at `router` (HOST:PORT) until it serves, for at most [`PATIENCE`].
///
/// # Errors
/// What the last try met.
pub(crate) async fn check(router: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut client = HealthClient::new(wire::connect(router));
    loop {
        let asked = timeout_at(deadline, client.check(HealthCheckRequest::default())).await;
        let asked = asked.with_context(|| format!("{router} did not answer in {} s", PATIENCE.as_secs()))?;
        match asked.map(|reply| reply.into_inner().status()) {
            Ok(ServingStatus::Serving) => return Ok(()),
            Ok(status) if Instant::now() > deadline => bail!("{router} says {}", status.as_str_name()),
            Err(status) if Instant::now() > deadline => {
                return Err(status).with_context(|| format!("ask {router} for its health"));
            }
            _ => sleep(PAUSE).await,
        }
    }
}
