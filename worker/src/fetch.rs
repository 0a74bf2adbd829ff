//! Model sources to verified local files.
//!
//! [`hub`] speaks with a Hugging Face hub, [`download`] resumes and checks, [`folder`] checks what is mounted, and
//! [`record`] is what a fetch leaves for the worker that loads the files. [`crate::fetch::report`] tells the operator.
//!
//! Architecture Invariant: only data is fetched, never code or pickles, and a token goes to the hub's own address only.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use engine::{DescribedFile, Description};
use tracing::{info, warn};

mod address;
pub mod describe;
pub mod download;
pub mod folder;
pub mod hub;
pub mod record;
pub mod report;

use folder::Way;
use hub::Hub;

/// Where a model's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `hf://OWNER/NAME`: a repository of the hub.
    Hub(String),
    /// `file://PATH`: the worker will see the same folder.
    Folder(PathBuf),
    /// `pvc://CLAIM/PATH`: only the fetch sees the claim, mounted at `ROOT/CLAIM`.
    Claim(PathBuf),
}

/// Why a model cannot be fetched or described. [`Error::reason`] is for conditions, the rest for people.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source is none.
    #[error("source {source_text} is not usable; use {accepted}")]
    InvalidSource {
        /// What was given.
        source_text: String,
        /// What is accepted.
        accepted: &'static str,
    },
    /// Nothing is there.
    #[error("{0} does not exist")]
    SourceNotFound(String),
    /// The repository has no such revision.
    #[error("{repository} has no revision {revision}")]
    RevisionNotFound {
        /// OWNER/NAME.
        repository: String,
        /// As asked for.
        revision: String,
    },
    /// The hub wants to know who asks, or refuses who does.
    #[error("the hub refuses {what} ({status}): {hint}")]
    GatedModel {
        /// OWNER/NAME.
        what: String,
        /// 401 or 403.
        status: u16,
        /// What to do.
        hint: &'static str,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    ChecksumMismatch {
        /// The file.
        path: String,
        /// Both values.
        reason: String,
    },
    /// The files are there and cannot be served.
    #[error("{0}")]
    UnsupportedModel(String),
    /// The files cannot be read as a model.
    #[error("cannot read the model")]
    Model(#[from] engine::Error),
    /// The hub does not answer, or not as a hub does.
    #[error("the hub at {endpoint}: {reason}")]
    HubUnreachable {
        /// Its address.
        endpoint: String,
        /// What happened in the last attempt.
        reason: String,
    },
    /// The volume is full.
    #[error("no space left for {0}")]
    NoSpace(String),
    /// A local file cannot be read or written.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// The stable reason shown as a condition.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidSource { .. } => "InvalidSource",
            Self::SourceNotFound(_) => "SourceNotFound",
            Self::RevisionNotFound { .. } => "RevisionNotFound",
            Self::GatedModel { .. } => "GatedModel",
            Self::ChecksumMismatch { .. } => "ChecksumMismatch",
            Self::Model(engine::Error::File { .. } | engine::Error::Tensor { .. }) => "InvalidModelFile",
            Self::UnsupportedModel(_) | Self::Model(_) => "UnsupportedModel",
            Self::HubUnreachable { .. } => "HubUnreachable",
            Self::NoSpace(_) => "NoSpace",
            Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound => "SourceNotFound",
            Self::File { .. } => "FileUnusable",
        }
    }

    fn file(path: impl Into<String>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace(path),
            _ => Self::File { path, source },
        }
    }
}

/// Told the bytes that are there and the bytes wanted.
pub type OnProgress = Arc<dyn Fn(u64, u64) + Send + Sync>;

impl Source {
    /// Reads a source; `pvc_root` is where claims are mounted.
    ///
    /// # Errors
    /// [`Error::InvalidSource`] with what is accepted.
    pub fn parse(text: &str, pvc_root: &Path) -> Result<Self, Error> {
        let invalid = |accepted| Error::InvalidSource { source_text: text.chars().take(256).collect(), accepted };
        match text.split_once("://") {
            Some(("hf", repository)) if is_repository(repository) => Ok(Self::Hub(repository.to_owned())),
            Some(("hf", _)) => Err(invalid("hf://OWNER/NAME with letters, digits, '-', '_' and '.'")),
            Some(("file", path)) if is_plain(Path::new(path)) && !path.is_empty() => Ok(Self::Folder(path.into())),
            Some(("file", _)) => Err(invalid("file://PATH without '..'")),
            Some(("pvc", rest)) => {
                let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
                if claim.is_empty() || claim == "." || !is_plain(Path::new(rest)) {
                    return Err(invalid("pvc://CLAIM/PATH without '..'"));
                }
                Ok(Self::Claim(pvc_root.join(claim).join(path.trim_start_matches('/'))))
            }
            _ => Err(invalid("hf://OWNER/NAME, file://PATH or pvc://CLAIM/PATH")),
        }
    }
}

fn is_plain(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_) | Component::RootDir | Component::CurDir))
}

fn is_repository(text: &str) -> bool {
    let name = |part: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        (1..=96).contains(&part.len()) && part.bytes().all(allowed) && !part.starts_with('.') && !part.contains("..")
    };
    matches!(text.split('/').collect::<Vec<_>>()[..], [owner, repo] if name(owner) && name(repo))
}

/// Whether a file of a source is part of the model: weights as safetensors, configuration, tokenizer, template.
pub fn is_needed(path: &str) -> bool {
    let exact = ["config.json", "generation_config.json", "special_tokens_map.json", "model.safetensors.index.json"];
    let weights = path.ends_with(".safetensors");
    let text = path.starts_with("tokenizer") && (path.ends_with(".json") || path.ends_with(".model"));
    let template = path.starts_with("chat_template") && (path.ends_with(".jinja") || path.ends_with(".json"));
    !path.contains('/') && (exact.contains(&path) || weights || text || template)
}

/// Says what is missing if the files cannot be a model.
fn check_listing(what: &str, paths: &[&str]) -> Result<(), Error> {
    let has = |suffix: &str| paths.iter().any(|path| path.ends_with(suffix));
    let accepted = "a model has config.json, tokenizer.json and *.safetensors";
    for (suffix, missing) in [("config.json", "config.json"), (".safetensors", "*.safetensors")] {
        if !has(suffix) {
            return Err(Error::UnsupportedModel(format!("{what} has no {missing}; {accepted}")));
        }
    }
    Ok(())
}

/// Brings a model's files to `to`, verified, and records what they are.
///
/// 1. Waits for another process that does the same. 2. Lists what is needed. 3. Downloads what is not there yet, resuming
///    what was cut. 4. Checks size and digest of each file. 5. Writes the record, last.
///
/// Files of a folder are linked, those of a claim copied.
///
/// # Errors
/// [`Error`]; a download is tried again a bounded number of times first.
pub async fn fetch(
    source: &Source,
    revision: &str,
    to: &Path,
    hub: &Hub,
    progress: OnProgress,
) -> Result<Vec<DescribedFile>, Error> {
    std::fs::create_dir_all(to).map_err(|error| Error::file(to.display().to_string(), error))?;
    let _lock = alone(to).await?;
    let files = match source {
        Source::Hub(repository) => {
            let listing = hub.list(repository, revision).await?;
            prune(to, &listing.files)?;
            download::all(hub, repository, &listing, to, progress).await?;
            listing.files
        }
        Source::Folder(folder) => folder::bring(folder, to, Way::Link, progress).await?,
        Source::Claim(folder) => folder::bring(folder, to, Way::Copy, progress).await?,
    };
    record::write(to, &files)?;
    Ok(files)
}

/// Waits until no other process brings files to this folder. The lock ends with the file, however the process ends.
async fn alone(to: &Path) -> Result<File, Error> {
    let path = to.join(".lock");
    let file = File::create(&path).map_err(|error| Error::file(path.display().to_string(), error))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => info!(folder = %to.display(), "another process brings files here; waiting"),
        Err(TryLockError::Error(error)) => {
            warn!(%error, folder = %to.display(), "this volume knows no locks");
            return Ok(file);
        }
    }
    let wait = move || file.lock().map(|()| file);
    let locked = tokio::task::spawn_blocking(wait).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    locked.map_err(|error| Error::file(path.display().to_string(), error))
}

/// Removes what an earlier fetch left of other files, or the loader would find them.
fn prune(dir: &Path, files: &[DescribedFile]) -> Result<(), Error> {
    let listed = |name: &str| files.iter().any(|file| file.path == name);
    let entries = std::fs::read_dir(dir).map_err(|error| Error::file(dir.display().to_string(), error))?;
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if is_needed(&name) && !listed(&name) {
            std::fs::remove_file(dir.join(&name)).map_err(|error| Error::file(&name, error))?;
        }
    }
    Ok(())
}

/// What a model weighs, from configuration and headers alone.
///
/// # Errors
/// [`Error`].
pub async fn describe(source: &Source, revision: &str, hub: &Hub) -> Result<Description, Error> {
    match source {
        Source::Hub(repository) => describe::hub(hub, repository, revision).await,
        Source::Folder(folder) | Source::Claim(folder) => describe::folder(folder).await,
    }
}

#[cfg(test)]
mod tests;
