//! What the integration tests share: where the repository and its programs are, a fleet, a collector, a hub.

pub mod collector;
pub mod hub;
pub mod local;

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies one folder below the root")
}

/// A program of ours, as cargo built it beside the running test.
///
/// # Panics
/// If it is not there: `cargo test` of the tests crate alone builds no program of another crate.
pub fn program(name: &str) -> PathBuf {
    let test = env::current_exe().expect("a running test has a path");
    let folder = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
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
