//! Clients of all kinds against the real processes: what is wrong is refused clearly, nothing dies, and what is right
//! goes on to work.

mod grpc;
mod http;
mod wire_level;

use std::process::Command;

use tests::local::{Fleet, Process};

use crate::{http::chat, local::started};

/// A fleet of one worker, its doors, and who runs.
struct Served {
    _folder: tempfile::TempDir,
    fleet: Fleet,
    url: String,
    grpc: String,
    processes: Vec<Process>,
}

impl Served {
    async fn start(shards: u32) -> Self {
        let (_folder, fleet, url) = tokio::task::block_in_place(|| started(shards));
        let (grpc, processes) = (fleet.grpc().await.unwrap(), fleet.processes());
        Self { _folder, fleet, url, grpc, processes }
    }

    /// Nobody died of what was done, and a good request is answered.
    async fn lives(&self) {
        assert_eq!(chat(&self.url, "tiny", "What is 2 + 2?").await.unwrap().content, "4");
        assert_eq!(self.fleet.processes(), self.processes, "{:#?}", self.fleet.printed());
    }

    async fn end(self) {
        self.lives().await;
        self.fleet.stop().unwrap();
    }
}

/// `MODELFLEET_PYTHON` names a Python that has the `openai` package; `tests/run` provides one.
#[tokio::test(flavor = "multi_thread")]
async fn the_openai_package_gets_what_it_knows() {
    let Ok(python) = std::env::var("MODELFLEET_PYTHON") else {
        eprintln!("SKIPPED the_openai_package_gets_what_it_knows: MODELFLEET_PYTHON is not set");
        return;
    };
    let served = Served::start(2).await;
    let script = tests::root().join("tests/cluster/ask.py");
    let url = format!("{}/v1", served.url);
    let direct = [("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")];
    let run = Command::new(python).arg(script).args([&url, "tiny"]).envs(direct).output().unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{}: {said}", run.status);
    served.end().await;
}
