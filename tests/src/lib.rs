//! What the integration tests and benchmarks share: where the repository and its programs are, a fleet, what can happen to
//! it, a collector, a hub.

pub mod collector;
pub mod fault;
pub mod hub;
pub mod local;
pub mod poll;

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies one folder below the root")
}

/// A program of ours, as cargo built it beside the running test or benchmark.
///
/// # Panics
/// If it is not there: `cargo test` of the tests crate alone builds no program of another crate.
pub fn program(name: &str) -> PathBuf {
    let running = env::current_exe().expect("a running program has a path");
    let folder = running.parent().expect("programs lie in target/PROFILE");
    let folder = folder.parent().filter(|_| folder.ends_with("deps")).unwrap_or(folder); // tests do
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run `cargo build` first", path.display());
    path
}

/// A call of a program of ours that heeds nothing of how the machine that tests is set up: its telemetry, logs, proxies
/// and hubs are those of others.
///
/// # Panics
/// As [`program`].
pub fn command(name: &str) -> Command {
    let mut command = Command::new(program(name));
    let kept = ["PATH", "HOME", "TMPDIR"].into_iter().filter_map(|name| Some((name, env::var_os(name)?)));
    command.env_clear().envs(kept);
    command
}
