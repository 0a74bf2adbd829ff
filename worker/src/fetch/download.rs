//! Downloads files, resumes what was cut, and checks what came.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read as _, Write as _},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use engine::DescribedFile;
use reqwest::StatusCode;
use sha2::{Digest as _, Sha256};
use tracing::{info, warn};

use super::{
    Error, OnProgress, folder,
    hub::{Hub, Listing},
    record::hex,
};

/// Files on their way at once.
const AT_ONCE: usize = 4;

/// Brings all files of a listing to `to`. Files that are there already are checked, not fetched again.
///
/// # Errors
/// The first file that cannot be had.
pub async fn all(hub: &Hub, repository: &str, listing: &Listing, to: &Path, progress: OnProgress) -> Result<(), Error> {
    use futures::{StreamExt as _, TryStreamExt as _};
    let total = listing.files.iter().map(|file| file.size).sum();
    let done = Arc::new(AtomicU64::new(0));
    let fetch = |file: DescribedFile| {
        let (done, progress) = (done.clone(), progress.clone());
        let arrived = move |bytes: i64| {
            let before = done.fetch_add(bytes.cast_unsigned(), Ordering::Relaxed);
            progress(before.wrapping_add_signed(bytes), total);
        };
        let one = One { hub, repository, commit: &listing.commit, to, file, arrived: Box::new(arrived) };
        async move { one.fetch().await }
    };
    futures::stream::iter(listing.files.clone()).map(fetch).buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await?;
    info!(files = listing.files.len(), bytes = total, commit = listing.commit, "fetched and verified");
    Ok(())
}

struct One<'a> {
    hub: &'a Hub,
    repository: &'a str,
    commit: &'a str,
    to: &'a Path,
    file: DescribedFile,
    /// Told the bytes that came, or that had to be thrown away.
    arrived: Box<dyn Fn(i64) + Send + Sync + 'a>,
}

impl One<'_> {
    /// 1. A whole file that is right is taken as it is. 2. Attempts continue where the last one was cut. 3. A whole file
    ///    that is wrong is thrown away and fetched once more: what lay there may have been another revision's.
    async fn fetch(self) -> Result<(), Error> {
        let whole = self.to.join(&self.file.path);
        if whole.is_file() && self.check(&whole).await.is_ok() {
            (self.arrived)(signed(self.file.size));
            return Ok(());
        }
        let part = self.to.join(format!("{}.part", self.file.path));
        let resumed = self.length(&part)? > 0;
        self.download(&part).await?;
        if let Err(error) = self.check(&part).await {
            (self.arrived)(-signed(self.length(&part)?));
            fs::remove_file(&part).map_err(|error| self.io(error))?;
            if !resumed {
                return Err(error);
            }
            warn!(path = self.file.path, "what was resumed is wrong; fetching it anew");
            self.download(&part).await?;
            if let Err(error) = self.check(&part).await {
                fs::remove_file(&part).map_err(|error| self.io(error))?;
                return Err(error);
            }
        }
        fs::rename(&part, &whole).map_err(|error| self.io(error))
    }

    async fn download(&self, part: &Path) -> Result<(), Error> {
        let mut attempt = 0;
        (self.arrived)(signed(self.length(part)?.min(self.file.size)));
        loop {
            let before = self.length(part)?;
            if before >= self.file.size && (before > 0 || part.exists()) {
                return Ok(());
            }
            attempt += 1;
            let error = match self.attempt(part, before).await {
                Ok(()) => continue,
                Err(error @ Error::HubUnreachable { .. }) => error,
                Err(error) => return Err(error),
            };
            if self.length(part)? > before {
                attempt = 1; // it goes on, if slowly
            }
            let Some(pause) = self.hub.pause(attempt) else {
                return Err(error);
            };
            warn!(path = self.file.path, attempt, error = crate::serve::chain(&error), "download cut; resuming");
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(&self, part: &Path, offset: u64) -> Result<(), Error> {
        let mut response = self.hub.open(self.repository, self.commit, &self.file.path, offset).await?;
        let resumes = response.status() == StatusCode::PARTIAL_CONTENT;
        let mut file = OpenOptions::new()
            .create(true)
            .append(resumes)
            .write(true)
            .truncate(!resumes)
            .open(part)
            .map_err(|error| self.io(error))?;
        let mut length = if resumes { offset } else { 0 };
        if !resumes {
            (self.arrived)(-signed(offset));
        }
        loop {
            let piece = response.chunk().await.map_err(|_| self.hub.unreachable("the connection was cut".into()))?;
            let Some(piece) = piece else { break };
            length += piece.len() as u64;
            if length > self.file.size {
                return Err(self.wrong(format!("more than {} bytes came", self.file.size)));
            }
            file.write_all(&piece).map_err(|error| self.io(error))?;
            (self.arrived)(signed(piece.len() as u64));
        }
        if length < self.file.size {
            return Err(self.hub.unreachable(format!("{length} of {} bytes came", self.file.size)));
        }
        Ok(())
    }

    /// Compares size and digest with what the hub says of the file.
    async fn check(&self, path: &Path) -> Result<(), Error> {
        let (path, file) = (path.to_owned(), self.file.clone());
        let work = move || match (&file.sha256, &file.git_oid) {
            (Some(want), _) => folder::digest(&path, &mut |_| {}).map(|(size, got)| (size, got, want.clone())),
            (None, Some(want)) => git_blob(&path, want.len()).map(|(size, got)| (size, got, want.clone())),
            (None, None) => Err(io::Error::other("no digest")),
        };
        let checked = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
        let (size, got, want) = checked.map_err(|error| self.io(error))?;
        if size != self.file.size {
            return Err(self.wrong(format!("has {size} bytes; the hub says {}", self.file.size)));
        }
        if got != want {
            return Err(self.wrong(format!("has digest {got}; the hub says {want}")));
        }
        Ok(())
    }

    fn length(&self, path: &Path) -> Result<u64, Error> {
        match fs::metadata(path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(self.io(error)),
        }
    }

    fn wrong(&self, reason: String) -> Error {
        Error::ChecksumMismatch { path: self.file.path.clone(), reason }
    }

    fn io(&self, error: io::Error) -> Error {
        Error::file(&self.file.path, error)
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Size and git's object id of a file, by SHA-1 (40 digits) or SHA-256 (64).
fn git_blob(path: &Path, digits: usize) -> io::Result<(u64, String)> {
    let mut content = Vec::new();
    let mut file = fs::File::open(path)?;
    file.read_to_end(&mut content)?;
    let head = format!("blob {}\0", content.len());
    let oid = match digits {
        40 => {
            let mut hash = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
            hash.update(head.as_bytes());
            hash.update(&content);
            hex(hash.finish().as_ref())
        }
        _ => hex(&Sha256::new().chain_update(head).chain_update(&content).finalize()),
    };
    Ok((content.len() as u64, oid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_ids_are_those_of_git() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hello");
        fs::write(&path, "hello\n").unwrap();
        // `git hash-object hello`
        assert_eq!(git_blob(&path, 40).unwrap(), (6, "ce013625030ba8dba906f756967f9e9ca394464a".into()));
    }
}
