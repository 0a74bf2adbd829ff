//! Conditions that are looked at until they hold, with a deadline. The other tests of this crate wait by these.

use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Looks until it succeeds, for at most `patience`.
///
/// # Errors
/// The last look's, once the time is over.
pub async fn eventually<T>(
    what: &str,
    patience: Duration,
    mut look: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        match look().await {
            Ok(seen) => return Ok(seen),
            Err(error) if Instant::now() >= deadline => return Err(never(error, what, patience)),
            Err(_) => tokio::time::sleep(PAUSE).await, // polls
        }
    }
}

/// As [`eventually`], on a thread that may block.
///
/// # Errors
/// The last look's, once the time is over.
pub fn until<T>(what: &str, patience: Duration, mut look: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        match look() {
            Ok(seen) => return Ok(seen),
            Err(error) if Instant::now() >= deadline => return Err(never(error, what, patience)),
            Err(_) => std::thread::sleep(PAUSE), // polls
        }
    }
}

fn never(last: anyhow::Error, what: &str, patience: Duration) -> anyhow::Error {
    last.context(format!("waited {patience:?} until {what}"))
}
