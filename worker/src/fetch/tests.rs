//! Fetching from a small hub on loopback that misbehaves as asked.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Response, StatusCode},
};
use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;

use super::{record::hex, *};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub holds, how it misbehaves, and what it was asked.
#[derive(Default)]
struct Fake {
    files: HashMap<String, Vec<u8>>,
    /// Digests that differ from the content's.
    lies: HashMap<String, String>,
    /// Answers to any request, in order, before good ones.
    statuses: Vec<(u16, &'static str)>,
    /// The next body of weights ends after so many bytes.
    cut: Option<usize>,
    /// Where weights are redirected to.
    redirect: Option<String>,
    seen: Vec<(String, HeaderMap)>,
}

type Shared = Arc<Mutex<Fake>>;

async fn hub(fake: Fake) -> (String, Shared) {
    let (listener, shared) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), Arc::new(Mutex::new(fake)));
    let address: SocketAddr = listener.local_addr().unwrap();
    let app = Router::new().fallback(answer).with_state(shared.clone());
    tokio::spawn(async move { axum::serve(listener, app).await });
    (format!("http://{address}"), shared)
}

async fn answer(State(fake): State<Shared>, request: Request) -> Response<Body> {
    let mut fake = fake.lock().unwrap_or_else(PoisonError::into_inner);
    let path = request.uri().path().to_owned();
    fake.seen.push((path.clone(), request.headers().clone()));
    let status = |code: u16, word: &str| {
        Response::builder().status(code).header("x-error-code", word).body(Body::empty()).unwrap()
    };
    if !fake.statuses.is_empty() {
        let (code, word) = fake.statuses.remove(0);
        return status(code, word);
    }
    if path == "/api/models/me/tiny/revision/main" {
        return Response::new(Body::from(fake.listing()));
    }
    let Some(name) = path.strip_prefix(&format!("/me/tiny/resolve/{COMMIT}/")) else {
        return status(404, "");
    };
    if let (Some(target), true) = (&fake.redirect, name.ends_with(".safetensors")) {
        return Response::builder().status(302).header("location", target).body(Body::empty()).unwrap();
    }
    let content = fake.files[name].clone();
    let (code, from) = match request.headers().get("range").map(|range| range.to_str().unwrap()) {
        Some(range) => {
            (StatusCode::PARTIAL_CONTENT, range["bytes=".len()..].split('-').next().unwrap().parse().unwrap())
        }
        None => (StatusCode::OK, 0),
    };
    let mut response = Response::new(match fake.cut.take_if(|_| name.ends_with(".safetensors")) {
        None => Body::from(content[from..].to_vec()),
        Some(bytes) => {
            let head = Ok(content[from..from + bytes].to_vec());
            // a body that is not ready lets the server send what it has
            let cut = async {
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut"))
            };
            Body::from_stream(futures::stream::iter([head]).chain(futures::stream::once(cut)))
        }
    });
    *response.status_mut() = code;
    response
}

impl Fake {
    fn with_model() -> Self {
        let file = |name: &str, content: &[u8]| (name.to_owned(), content.to_vec());
        let files = HashMap::from([
            file("config.json", b"{\"architectures\": []}"),
            file("tokenizer.json", b"{}"),
            file("model.safetensors", &vec![7; 300_000]),
            file("pytorch_model.bin", b"pickle"),
            file("modeling_tiny.py", b"code"),
            file("README.md", b"words"),
        ]);
        Self { files, ..Self::default() }
    }

    /// As the hub lists files: git's digest for small ones, SHA-256 for weights.
    fn listing(&self) -> Vec<u8> {
        let sibling = |(name, content): (&String, &Vec<u8>)| {
            let lie = self.lies.get(name).cloned();
            let mut value = serde_json::json!({"rfilename": name, "size": content.len(), "blobId": lie.clone().unwrap_or_else(|| git(content))});
            if name.ends_with(".safetensors") {
                let sha256 = lie.unwrap_or_else(|| hex(&Sha256::digest(content)));
                value["lfs"] = serde_json::json!({"sha256": sha256, "size": content.len(), "pointerSize": 134});
            }
            value
        };
        let siblings: Vec<_> = self.files.iter().map(sibling).collect();
        serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes()
    }
}

fn git(content: &[u8]) -> String {
    let blob = [format!("blob {}\0", content.len()).as_bytes(), content].concat();
    hex(ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref())
}

fn client(endpoint: &str, token: Option<&str>) -> Hub {
    let options = hub::Options {
        endpoint: endpoint.to_owned(),
        token: token.map(str::to_owned),
        pause: Some(Duration::from_millis(1)),
        ..hub::Options::default()
    };
    Hub::new(&options).unwrap()
}

async fn fetched(hub: &Hub, to: &Path) -> Result<Vec<DescribedFile>, Error> {
    fetch(&Source::Hub("me/tiny".into()), "", to, hub, Arc::new(|_, _| {})).await
}

fn ranges(fake: &Shared) -> Vec<Option<String>> {
    let fake = fake.lock().unwrap();
    let weights = fake.seen.iter().filter(|(path, _)| path.ends_with(".safetensors"));
    weights.map(|(_, headers)| headers.get("range").map(|range| range.to_str().unwrap().to_owned())).collect()
}

#[tokio::test]
async fn a_model_is_fetched_verified_and_recorded_without_code_and_pickles() {
    let (endpoint, fake) = hub(Fake::with_model()).await;
    let dir = tempfile::tempdir().unwrap();
    let seen = Arc::new(Mutex::new((0, 0)));
    let told = seen.clone();
    let progress: OnProgress = Arc::new(move |done, total| *told.lock().unwrap() = (done, total));
    let files =
        fetch(&Source::Hub("me/tiny".into()), "main", dir.path(), &client(&endpoint, None), progress).await.unwrap();
    let names: Vec<_> = files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(std::fs::read(dir.path().join("model.safetensors")).unwrap(), vec![7; 300_000]);
    let total = files.iter().map(|file| file.size).sum();
    assert_eq!(*seen.lock().unwrap(), (total, total));
    record::check(dir.path(), &record::content_hash(&files)).unwrap();

    let before = fake.lock().unwrap().seen.len();
    std::fs::write(dir.path().join("model-00001-of-00002.safetensors"), "of another revision").unwrap();
    fetched(&client(&endpoint, None), dir.path()).await.unwrap();
    assert_eq!(fake.lock().unwrap().seen.len(), before + 1, "only the listing is asked for again");
    assert!(!dir.path().join("model-00001-of-00002.safetensors").exists());
}

#[tokio::test]
async fn a_download_that_was_cut_goes_on_where_it_was() {
    let (endpoint, fake) = hub(Fake { cut: Some(100_000), ..Fake::with_model() }).await;
    let dir = tempfile::tempdir().unwrap();
    fetched(&client(&endpoint, None), dir.path()).await.unwrap();
    let ranges = ranges(&fake);
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert!(ranges[1].as_ref().is_some_and(|range| range.starts_with("bytes=") && range != "bytes=0-"), "{ranges:?}");
}

#[tokio::test]
async fn what_an_earlier_process_left_is_resumed_or_thrown_away() {
    for (left, asked) in [(vec![7; 1000], 1), (vec![8; 1000], 2)] {
        let (endpoint, fake) = hub(Fake::with_model()).await;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.safetensors.part"), &left).unwrap();
        fetched(&client(&endpoint, None), dir.path()).await.unwrap();
        let ranges = ranges(&fake);
        assert_eq!(ranges[0].as_deref(), Some("bytes=1000-"));
        assert_eq!(ranges.len(), asked, "{ranges:?}");
    }
}

#[tokio::test]
async fn two_that_fetch_one_model_at_once_download_it_once() {
    let (endpoint, fake) = hub(Fake::with_model()).await;
    let dir = tempfile::tempdir().unwrap();
    let hub = client(&endpoint, None);
    let both = futures::future::join(fetched(&hub, dir.path()), fetched(&hub, dir.path())).await;
    assert_eq!(both.0.unwrap().len(), both.1.unwrap().len());
    assert_eq!(ranges(&fake), [None], "the other one finds it whole");
}

#[tokio::test]
async fn a_file_with_another_digest_is_refused_and_not_kept() {
    for name in ["model.safetensors", "config.json"] {
        let digits = if name == "config.json" { 40 } else { 64 };
        let lies = HashMap::from([(name.to_owned(), "0".repeat(digits))]);
        let (endpoint, _) = hub(Fake { lies, ..Fake::with_model() }).await;
        let dir = tempfile::tempdir().unwrap();
        let error = fetched(&client(&endpoint, None), dir.path()).await.unwrap_err();
        assert_eq!(error.reason(), "ChecksumMismatch");
        assert!(error.to_string().contains(name) && error.to_string().contains("the hub says 000"), "{error}");
        assert!(!dir.path().join(name).exists() && !dir.path().join(record::RECORD).exists());
    }
}

#[tokio::test]
async fn what_the_hub_refuses_has_its_reason() {
    let table = [
        ((401, "GatedRepo"), "GatedModel"),
        ((403, ""), "GatedModel"),
        ((404, "RevisionNotFound"), "RevisionNotFound"),
        ((404, "RepoNotFound"), "SourceNotFound"),
        ((418, ""), "HubUnreachable"),
    ];
    for (status, reason) in table {
        let (endpoint, fake) = hub(Fake { statuses: vec![status], ..Fake::with_model() }).await;
        let dir = tempfile::tempdir().unwrap();
        let error = fetched(&client(&endpoint, Some("hf_canary")), dir.path()).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{status:?}: {error}");
        assert!(!error.to_string().contains("hf_canary"));
        assert_eq!(fake.lock().unwrap().seen.len(), 1, "{status:?} is not tried again");
    }
}

#[tokio::test]
async fn a_hub_that_has_a_bad_moment_is_asked_again_a_bounded_number_of_times() {
    let (endpoint, _) = hub(Fake { statuses: vec![(503, ""), (429, "")], ..Fake::with_model() }).await;
    let dir = tempfile::tempdir().unwrap();
    fetched(&client(&endpoint, None), dir.path()).await.unwrap();

    let (endpoint, fake) = hub(Fake { statuses: vec![(500, ""); 100], ..Fake::with_model() }).await;
    let error = fetched(&client(&endpoint, None), dir.path()).await.unwrap_err();
    assert_eq!(error.reason(), "HubUnreachable");
    assert!(fake.lock().unwrap().seen.len() < 20);
    let error = fetched(&client("http://127.0.0.1:1", None), dir.path()).await.unwrap_err();
    assert_eq!(error.reason(), "HubUnreachable");
}

#[tokio::test]
async fn the_token_goes_to_the_hub_and_to_nobody_else() {
    let (elsewhere, other) = hub(Fake::with_model()).await;
    let target = format!("{elsewhere}/me/tiny/resolve/{COMMIT}/model.safetensors");
    let (endpoint, fake) = hub(Fake { redirect: Some(target), ..Fake::with_model() }).await;
    let dir = tempfile::tempdir().unwrap();
    fetched(&client(&endpoint, Some("hf_canary")), dir.path()).await.unwrap();
    assert!(fake.lock().unwrap().seen.iter().all(|(_, headers)| headers["authorization"] == "Bearer hf_canary"));
    let other = other.lock().unwrap();
    assert!(!other.seen.is_empty() && other.seen.iter().all(|(_, headers)| !headers.contains_key("authorization")));
}

#[tokio::test]
async fn redirects_inside_are_not_followed() {
    for target in ["http://169.254.169.254/latest", "http://[fe80::1]/", "file:///etc/passwd", "gopher://hub/"] {
        let (endpoint, _) = hub(Fake { redirect: Some(target.into()), ..Fake::with_model() }).await;
        let dir = tempfile::tempdir().unwrap();
        let error = fetched(&client(&endpoint, None), dir.path()).await.unwrap_err();
        assert!(error.to_string().contains("which is not followed"), "{target}: {error}");
    }
}

#[tokio::test]
async fn a_loop_of_redirects_ends() {
    let (endpoint, fake) = hub(Fake::with_model()).await;
    fake.lock().unwrap().redirect = Some(format!("{endpoint}/me/tiny/resolve/{COMMIT}/model.safetensors"));
    let dir = tempfile::tempdir().unwrap();
    let error = fetched(&client(&endpoint, None), dir.path()).await.unwrap_err();
    assert!(error.to_string().contains("more than 5 times"), "{error}");
}

#[tokio::test]
async fn a_folder_is_linked_and_a_claim_copied_both_hashed() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (name, content) in Fake::with_model().files {
        std::fs::write(from.path().join(name), content).unwrap();
    }
    let hub = client("http://127.0.0.1:1", None);
    let sources = [Source::Folder(from.path().to_owned()), Source::Claim(from.path().to_owned())];
    for source in sources.iter().chain(&sources) {
        let files = fetch(source, "", to.path(), &hub, Arc::new(|_, _| {})).await.unwrap();
        assert_eq!(files.len(), 3);
        assert_eq!(files[0].sha256, Some(hex(&Sha256::digest(b"{\"architectures\": []}"))));
        record::check(to.path(), &record::content_hash(&files)).unwrap();
        let config = std::fs::symlink_metadata(to.path().join("config.json")).unwrap();
        assert_eq!(config.is_symlink(), matches!(source, Source::Folder(_)));
    }
    assert_eq!(std::fs::read(to.path().join("tokenizer.json")).unwrap(), b"{}");
    assert!(!to.path().join("modeling_tiny.py").exists());
    let missing = Source::Folder("/nowhere/at/all".into());
    let error = fetch(&missing, "", to.path(), &hub, Arc::new(|_, _| {})).await.unwrap_err();
    assert_eq!(error.reason(), "SourceNotFound");
}

#[tokio::test]
async fn a_folder_without_weights_is_no_model() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("pytorch_model.bin"), "pickle").unwrap();
    let error =
        describe(&Source::Folder(dir.path().to_owned()), "", &client("http://127.0.0.1:1", None)).await.unwrap_err();
    assert_eq!(error.reason(), "UnsupportedModel");
    assert!(error.to_string().contains("has no *.safetensors"), "{error}");
}

#[tokio::test]
async fn a_description_over_the_hub_equals_one_of_the_folder() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1");
    let mut fake = Fake::default();
    for entry in std::fs::read_dir(&folder).unwrap().flatten() {
        fake.files.insert(entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap());
    }
    let (endpoint, fake) = hub(fake).await;
    let hub = client(&endpoint, None);
    let remote = describe(&Source::Hub("me/tiny".into()), "main", &hub).await.unwrap();
    let local = describe(&Source::Folder(folder), "", &hub).await.unwrap();
    assert_eq!(remote.resolved_revision, COMMIT);
    assert_eq!((remote.dense_bytes, &remote.moe_layers), (local.dense_bytes, &local.moe_layers));
    assert_eq!(remote.content_hash, record::content_hash(&remote.files));
    assert!(ranges(&fake).iter().all(Option::is_some), "weights are read by ranges: {:?}", ranges(&fake));
}

#[test]
fn sources_are_read_or_refused_with_what_is_accepted() {
    let parse = |text: &str| Source::parse(text, Path::new("/pvc"));
    assert_eq!(parse("hf://Qwen/Qwen3-30B-A3B").unwrap(), Source::Hub("Qwen/Qwen3-30B-A3B".into()));
    assert_eq!(parse("file:///models/x").unwrap(), Source::Folder("/models/x".into()));
    assert_eq!(parse("pvc://claim/a/b").unwrap(), Source::Claim("/pvc/claim/a/b".into()));
    assert_eq!(parse("pvc://claim").unwrap(), Source::Claim("/pvc/claim/".into()));
    let bad = [
        "",
        "x",
        "s3://a/b",
        "hf://a",
        "hf://a/b/c",
        "hf://a/../b",
        "hf://../b",
        "hf://a/b?x",
        "hf://u:p@a/b",
        "hf://a/.b",
        "file://",
        "file:///a/../b",
        "pvc:///x",
        "pvc://c/../x",
        "pvc://../x",
        "pvc://./x",
        "pvc://",
    ];
    for text in bad {
        let error = parse(text).expect_err(text);
        assert!(error.reason() == "InvalidSource" && error.to_string().contains("use "), "{text}: {error}");
    }
}

#[test]
fn only_what_a_model_needs_is_fetched() {
    for needed in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "generation_config.json",
    ] {
        assert!(is_needed(needed), "{needed}");
    }
    for not in [
        "pytorch_model.bin",
        "model.pt",
        "modeling.py",
        "tokenizer.py",
        "onnx/model.safetensors",
        "../config.json",
        "README.md",
        "config.json/x",
    ] {
        assert!(!is_needed(not), "{not}");
    }
}

#[test]
fn a_token_that_no_header_can_have_is_not_left_out() {
    let options = |token: &str| hub::Options { token: Some(token.into()), ..hub::Options::default() };
    let error = Hub::new(&options("two\nlines")).err().unwrap().to_string();
    assert!(error.ends_with("the token has a character that no header can have"), "{error}");
    assert!(!error.contains("lines"));
    assert!(Hub::new(&options("good\n")).is_ok(), "a file ends with a line end");
}
