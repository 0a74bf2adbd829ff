//! What stands around modelfleet in the cluster tests: a hub that serves a small model, and a collector of telemetry.
//!
//! `surroundings hub FOLDER` serves FOLDER/OWNER/NAME as repositories; `surroundings collector` takes OTLP and tells what
//! it got.

use std::path::Path;

use anyhow::bail;
use tests::{collector, hub};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let http = TcpListener::bind("[::]:8000").await?;
    match arguments.as_slice() {
        ["hub", folder] => axum::serve(http, hub::routes(Path::new(folder))?).await?,
        ["collector"] => collector::serve(http, TcpListener::bind("[::]:4317").await?).await?,
        _ => bail!("usage: surroundings hub FOLDER | surroundings collector"),
    }
    Ok(())
}
