//! What a model weighs, with the engine's own loader: from a folder, or over a hub's byte ranges.

use std::{io, ops::Range, path::Path};

use engine::{Description, LocalFiles, ModelFiles};
use tokio::runtime::Handle;

use super::{
    Error, folder,
    hub::{Hub, Listing},
    record,
};

/// Describes a repository: no more of its weights than their headers crosses the network.
///
/// # Errors
/// [`Error`].
pub async fn hub(hub: &Hub, repository: &str, revision: &str) -> Result<Description, Error> {
    let listing = hub.list(repository, revision).await?;
    let files = HubFiles { hub: hub.clone(), repository: repository.to_owned(), listing, runtime: Handle::current() };
    blocking(move || {
        let description = engine::describe(&files)?;
        Ok(Description {
            resolved_revision: files.listing.commit,
            content_hash: record::content_hash(&files.listing.files),
            files: files.listing.files,
            ..description
        })
    })
    .await
}

/// Describes a folder; its files are hashed whole.
///
/// # Errors
/// [`Error`].
pub async fn folder(folder: &Path) -> Result<Description, Error> {
    let folder = folder.to_owned();
    blocking(move || {
        let files = folder::list(&folder, &|_, _| {})?;
        let description = engine::describe(&LocalFiles(folder))?;
        Ok(Description { content_hash: record::content_hash(&files), files, ..description })
    })
    .await
}

async fn blocking(work: impl FnOnce() -> Result<Description, Error> + Send + 'static) -> Result<Description, Error> {
    let panicked = |_| Err(Error::UnsupportedModel("reading the model's headers failed".into()));
    tokio::task::spawn_blocking(work).await.unwrap_or_else(panicked)
}

struct HubFiles {
    hub: Hub,
    repository: String,
    listing: Listing,
    runtime: Handle,
}

impl ModelFiles for HubFiles {
    fn list(&self) -> Vec<(String, u64)> {
        self.listing.files.iter().map(|file| (file.path.clone(), file.size)).collect()
    }

    fn read(&self, path: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        let size = self.listing.files.iter().find(|file| file.path == path).map(|file| file.size);
        let size = size.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let range = range.start.min(size)..range.end.min(size);
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let read = self.hub.read(&self.repository, &self.listing.commit, path, range);
        self.runtime.block_on(read).map_err(io::Error::other)
    }
}
