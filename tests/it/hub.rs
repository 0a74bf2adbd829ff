//! Models of a hub in local mode: fetched once and verified, resumed, and refused in words that help.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::ensure;
use axum::{
    body::{Body, Bytes, to_bytes},
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::Response,
};
use futures::{StreamExt as _, stream};
use tests::{hub, local::signal, poll};
use tokio::{net::TcpListener, task::spawn_blocking};

/// What the hub does to the next whole file of weights.
#[derive(Clone, Copy)]
enum Fault {
    /// Sends so many bytes and then nothing more.
    Stall(usize),
    /// Sends another last byte.
    Change,
}

/// A hub that serves the small model as `me/tiny` and `me/gated-tiny`, with its faults, and a cache.
struct Rig {
    folder: tempfile::TempDir,
    endpoint: String,
    fault: Arc<Mutex<Option<Fault>>>,
    /// Where downloads of weights began.
    downloads: Arc<Mutex<Vec<usize>>>,
}

type Shared = State<(Arc<Mutex<Option<Fault>>>, Arc<Mutex<Vec<usize>>>)>;

async fn meddle(State((fault, downloads)): Shared, request: Request, next: Next) -> Response {
    let range = request.headers().get("range").and_then(|range| range.to_str().ok()?.strip_prefix("bytes="));
    let first = range.map_or(Some(0), |range| range.strip_suffix('-')?.parse().ok());
    let of_weights = request.uri().path().ends_with(".safetensors");
    let (Some(first), true) = (first, of_weights) else {
        return next.run(request).await; // headers are read by ranges that end
    };
    downloads.lock().unwrap().push(first);
    let (head, body) = next.run(request).await.into_parts();
    let body = match fault.lock().unwrap().take() {
        None => body,
        Some(Fault::Stall(bytes)) => {
            let begun = async move { to_bytes(body, usize::MAX).await.map(|whole| whole.slice(..bytes)) };
            Body::from_stream(stream::once(begun).chain(stream::pending()))
        }
        Some(Fault::Change) => {
            let changed = async move {
                to_bytes(body, usize::MAX).await.map(|whole| {
                    let mut whole = whole.to_vec();
                    *whole.last_mut().unwrap() ^= 1;
                    Bytes::from(whole)
                })
            };
            Body::from_stream(stream::once(changed))
        }
    };
    Response::from_parts(head, body)
}

impl Rig {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let owner = folder.path().join("hub/me");
        fs::create_dir_all(&owner).unwrap();
        for name in ["tiny", "gated-tiny"] {
            std::os::unix::fs::symlink(tests::root().join("manifests/models/tiny-r1"), owner.join(name)).unwrap();
        }
        let (fault, downloads) = (Arc::default(), Arc::default());
        let meddling = from_fn_with_state((Arc::clone(&fault), Arc::clone(&downloads)), meddle);
        let routes = hub::routes(&folder.path().join("hub")).unwrap().layer(meddling);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Self { folder, endpoint, fault, downloads }
    }

    fn asking(&self, source: &str, revision: &str) -> std::process::Command {
        let file = self.folder.path().join(format!("{}.yaml", source.replace('/', "-")));
        let yaml = format!(
            "apiVersion: modelfleet.io/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: tiny}}\nspec:\n  \
             model: {{source: \"hf://{source}\", revision: {revision}}}\n"
        );
        fs::write(&file, yaml).unwrap();
        let mut command = tests::command("modelfleet");
        command.arg("local").arg(file).args(["--prompt", "What is 47 + 85?"]).stdin(Stdio::null());
        command.env("HF_ENDPOINT", &self.endpoint).env("XDG_CACHE_HOME", self.folder.path());
        command
    }

    async fn ask(&self, source: &str, revision: &str) -> Output {
        let mut command = self.asking(source, revision);
        spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// The file of weights in the cache, whole or in part.
    fn cached(&self, name: &str) -> Option<PathBuf> {
        let models = fs::read_dir(self.folder.path().join("modelfleet/models")).ok()?;
        models.flatten().map(|model| model.path().join(name)).find(|path| path.exists())
    }
}

fn answers(output: &Output) {
    let (words, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && words.trim_end().ends_with("132"), "{}: {words}\n{said}", output.status);
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_at_once_download_a_model_once_and_a_third_not_at_all() {
    let rig = Rig::start().await;
    let (one, other) = tokio::join!(rig.ask("me/tiny", "main"), rig.ask("me/tiny", "main"));
    answers(&one);
    answers(&other);
    assert_eq!(*rig.downloads.lock().unwrap(), [0]);
    answers(&rig.ask("me/tiny", "main").await);
    assert_eq!(*rig.downloads.lock().unwrap(), [0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_that_was_killed_goes_on_where_it_was() {
    const SENT: usize = 300_000;
    let rig = Rig::start().await;
    *rig.fault.lock().unwrap() = Some(Fault::Stall(SENT));
    let mut killed = rig.asking("me/tiny", "main").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = poll::eventually("the download began", Duration::from_secs(120), async || {
        let part = rig.cached("model.safetensors.part");
        ensure!(part.is_some_and(|part| size(&part) >= SENT as u64), "{:?}", rig.downloads);
        Ok(())
    });
    began.await.unwrap();
    signal(killed.id(), "KILL").unwrap();
    killed.wait().unwrap();
    answers(&rig.ask("me/tiny", "main").await);
    assert_eq!(*rig.downloads.lock().unwrap(), [0, SENT]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_what_the_hub_says_is_refused_and_fetched_anew() {
    let rig = Rig::start().await;
    *rig.fault.lock().unwrap() = Some(Fault::Change);
    let refused = rig.ask("me/tiny", "main").await;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && refused.stdout.is_empty(), "{said}");
    assert!(said.contains("hf://me/tiny") && said.contains("model.safetensors: has digest"), "{said}");
    assert!(rig.cached("model.safetensors").is_none() && rig.cached("model.safetensors.part").is_none());
    answers(&rig.ask("me/tiny", "main").await);
    assert_eq!(*rig.downloads.lock().unwrap(), [0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_hub_refuses_is_said_in_words_that_help() {
    let rig = Rig::start().await;
    for (source, revision, words) in [
        ("me/gated-tiny", "main", "the hub refuses me/gated-tiny (401): it is gated, private or missing; give a token"),
        ("me/nothing", "main", "me/nothing"),
        ("me/tiny", "nowhere", "nowhere"),
    ] {
        let refused = rig.ask(source, revision).await;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && refused.stdout.is_empty(), "{source} at {revision}: {said}");
        assert!(said.contains(&format!("hf://{source}")) && said.contains(words), "{source} at {revision}: {said}");
    }
    let mut command = rig.asking("me/gated-tiny", "main");
    command.env("HF_TOKEN", hub::TOKEN);
    answers(&spawn_blocking(move || command.output().unwrap()).await.unwrap());
}
