//! A hub of the Hugging Face kind, as far as a download needs it: what is in a repository, and byte ranges of its files.
//!
//! Each repository has the revisions `main` and `next`, which are commits of the same files. Repositories whose name
//! begins with `gated-` want the token [`TOKEN`].

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use anyhow::Context;
use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path as Segments, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What repositories that are gated want.
pub const TOKEN: &str = "hf_cluster_tests";

/// A file: its content, the SHA-256 of it, and its id as a blob of git, both in hex.
struct File {
    content: Bytes,
    sha256: String,
    blob: String,
}

/// Files by path, by `OWNER/NAME`.
type Repositories = BTreeMap<String, BTreeMap<String, File>>;

/// The hub over `folder`, whose files are read once.
///
/// # Errors
/// If a folder or file cannot be read.
pub fn routes(folder: &Path) -> anyhow::Result<Router> {
    let mut repositories = Repositories::new();
    for owner in children(folder)? {
        for name in children(&folder.join(&owner))? {
            let files = files(&folder.join(&owner).join(&name))?;
            repositories.insert(format!("{owner}/{name}"), files);
        }
    }
    Ok(Router::new()
        .route("/api/models/{owner}/{name}", get(default_revision))
        .route("/api/models/{owner}/{name}/revision/{revision}", get(revision))
        .route("/{owner}/{name}/resolve/{revision}/{*path}", get(file))
        .with_state(Arc::new(repositories)))
}

fn children(folder: &Path) -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn files(folder: &Path) -> anyhow::Result<BTreeMap<String, File>> {
    let mut files = BTreeMap::new();
    for name in children(folder)? {
        let content = Bytes::from(fs::read(folder.join(&name)).with_context(|| format!("reading {name}"))?);
        let sha256 = hex(&Sha256::digest(&content));
        let blob = [format!("blob {}\0", content.len()).as_bytes(), &content].concat();
        let blob = hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref());
        files.insert(name, File { content, sha256, blob });
    }
    Ok(files)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The commit that a branch or a commit means.
fn commit(revision: &str) -> Option<String> {
    let commit = |branch: &str| hex(&Sha256::digest(branch)[..20]);
    ["main", "next"].into_iter().find(|branch| *branch == revision || commit(branch) == revision).map(commit)
}

type Hub = State<Arc<Repositories>>;

async fn default_revision(
    hub: Hub,
    Segments((owner, name)): Segments<(String, String)>,
    headers: HeaderMap,
) -> Response {
    revision(hub, Segments((owner, name, "main".to_owned())), headers).await
}

async fn revision(
    State(repositories): Hub,
    Segments((owner, name, revision)): Segments<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let id = format!("{owner}/{name}");
    let (files, commit) = match find(&repositories, &id, &revision, &headers) {
        Ok(found) => found,
        Err(refusal) => return refusal,
    };
    let siblings: Vec<Value> = files.iter().map(|(path, file)| sibling(path, file)).collect();
    Json(json!({"id": id, "sha": commit, "private": false, "gated": false, "siblings": siblings})).into_response()
}

/// Large files are told with their SHA-256 too.
fn sibling(path: &str, file: &File) -> Value {
    let mut sibling = json!({"rfilename": path, "size": file.content.len(), "blobId": file.blob});
    if path.ends_with(".safetensors") {
        sibling["lfs"] = json!({"sha256": file.sha256, "size": file.content.len(), "pointerSize": 134});
    }
    sibling
}

async fn file(
    State(repositories): Hub,
    Segments((owner, name, revision, path)): Segments<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let (files, commit) = match find(&repositories, &format!("{owner}/{name}"), &revision, &headers) {
        Ok(found) => found,
        Err(refusal) => return refusal,
    };
    let Some(file) = files.get(&path) else {
        return refuse(StatusCode::NOT_FOUND, "EntryNotFound");
    };
    let size = file.content.len();
    let mut response = match headers.get(header::RANGE) {
        None => file.content.clone().into_response(),
        Some(range) => match range.to_str().ok().and_then(|range| parse_range(range, size)) {
            None => refuse(StatusCode::RANGE_NOT_SATISFIABLE, "RangeNotSatisfiable"),
            Some((first, last)) => {
                let range = format!("bytes {first}-{last}/{size}");
                let part = file.content.slice(first..=last);
                (StatusCode::PARTIAL_CONTENT, [(header::CONTENT_RANGE, range)], part).into_response()
            }
        },
    };
    for (name, value) in [("x-repo-commit", &commit), ("etag", &format!("\"{}\"", file.sha256))] {
        response.headers_mut().insert(name, HeaderValue::from_str(value).expect("hex is a header value"));
    }
    response
}

/// First and last byte of `bytes=FIRST-[LAST]`, inside `size`.
fn parse_range(range: &str, size: usize) -> Option<(usize, usize)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let first: usize = first.parse().ok()?;
    let last = if last.is_empty() { size } else { last.parse().ok()? };
    (first <= last && first < size).then(|| (first, last.min(size - 1)))
}

/// The files and the commit of a revision.
#[allow(clippy::result_large_err, reason = "the refusal is what the client gets")]
fn find<'a>(
    repositories: &'a Repositories,
    id: &str,
    revision: &str,
    headers: &HeaderMap,
) -> Result<(&'a BTreeMap<String, File>, String), Response> {
    let files = repositories.get(id).ok_or_else(|| refuse(StatusCode::NOT_FOUND, "RepoNotFound"))?;
    let token = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if id.contains("/gated-") && token != Some(&format!("Bearer {TOKEN}")) {
        return Err(refuse(StatusCode::UNAUTHORIZED, "GatedRepo"));
    }
    let commit = commit(revision).ok_or_else(|| refuse(StatusCode::NOT_FOUND, "RevisionNotFound"))?;
    Ok((files, commit))
}

fn refuse(status: StatusCode, code: &'static str) -> Response {
    (status, [("x-error-code", code)], Json(json!({"error": code}))).into_response()
}
