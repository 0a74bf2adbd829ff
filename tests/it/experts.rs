//! `modelfleet experts --local`, as a user calls it, beside a fleet that runs.

use std::{process::Stdio, time::Duration};

use anyhow::ensure;
use serde_json::Value;
use tests::poll;

use crate::{http::chat, local::started};

/// Workers tell their loads every ten seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// What `modelfleet experts ARGUMENTS` prints, or what it ends with.
fn experts(arguments: &[&str]) -> Result<String, String> {
    let output = tests::command("modelfleet").arg("experts").args(arguments).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// Rows of all experts of a layer.
fn rows_of(layer: &Value) -> u64 {
    layer["experts"].as_array().into_iter().flatten().filter_map(|expert| expert["rows"].as_u64()).sum()
}

#[tokio::test]
async fn a_local_fleet_is_drawn_with_the_rows_of_its_requests() {
    let (_folder, fleet, url) = started(4);
    let local = format!("--local={}", fleet.admin().unwrap());
    chat(&url, "tiny", "What is 47 + 85?").await.unwrap();
    let told = poll::eventually("all workers have told their rows", PATIENCE, async || {
        let text = experts(&["tiny", &local, "--output", "json"]).map_err(anyhow::Error::msg)?;
        let seen: Value = serde_json::from_str(&text)?;
        let workers = seen["replicas"][0]["workers"].as_array().cloned().unwrap_or_default();
        let all = workers.len() == 4 && workers.iter().all(|worker| worker["unknown"].is_null());
        let layers = seen["replicas"][0]["layers"].as_array().cloned().unwrap_or_default();
        let rows: Vec<u64> = layers.iter().map(rows_of).collect();
        // each token has as many rows in every layer
        ensure!(all && rows.len() == 3 && rows[0] > 0 && rows.iter().all(|rows_of| *rows_of == rows[0]), "{text}");
        Ok(layers)
    });
    for layer in told.await.unwrap() {
        for (number, expert) in layer["experts"].as_array().unwrap().iter().enumerate() {
            assert_eq!(expert["holders"], serde_json::json!([number / 4]), "{layer:#}");
            assert_eq!(expert["copies"], 1);
        }
    }

    let drawn = experts(&["tiny", &local]).unwrap();
    assert!(drawn.starts_with("default/tiny: revision local, replica 0, workers 4/4\nminimum copies 1, "), "{drawn}");
    let worker = drawn.lines().find(|line| line.contains("tiny-0-2")).unwrap();
    let cells: Vec<&str> = worker.split_whitespace().collect();
    assert_eq!(cells, ["2", "tiny-0-2", "127.0.0.1", "8-11", "serves"], "{drawn}");
    let listed = experts(&["tiny", &local, "--layer", "2"]).unwrap();
    assert!(listed.contains("layer 2: ") && listed.contains("  1 (127.0.0.1)\n"), "{listed}");

    let unknown = experts(&["tini", &local]).unwrap_err();
    assert_eq!(unknown, "modelfleet: no ModelDeployment tini in namespace default; there are: tiny\n");
    fleet.stop().unwrap();
    let gone = experts(&["tiny", &local]).unwrap_err();
    assert!(gone.starts_with("modelfleet: no `modelfleet local` is at 127.0.0.1:"), "{gone}");
    let both = experts(&["tiny", &local, "--context", "c"]).unwrap_err();
    assert!(both.contains("cannot be used with"), "{both}");
}
