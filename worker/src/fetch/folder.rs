//! Models that are in a folder already: hashed, then linked or copied.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
};

use engine::DescribedFile;
use sha2::{Digest as _, Sha256};

use super::{Error, OnProgress, check_listing, is_needed, record::hex};

/// Size and SHA-256 of each file of the model, sorted by name.
///
/// # Errors
/// If the folder is missing or holds no model.
pub fn list(folder: &Path, progress: &dyn Fn(u64, u64)) -> Result<Vec<DescribedFile>, Error> {
    let what = folder.display().to_string();
    if !folder.is_dir() {
        return Err(Error::SourceNotFound(what));
    }
    let entries = fs::read_dir(folder).map_err(|error| Error::file(&what, error))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is_needed(name)).collect();
    names.sort();
    check_listing(&what, &names.iter().map(String::as_str).collect::<Vec<_>>())?;
    let size = |name: &String| fs::metadata(folder.join(name)).map(|meta| meta.len());
    let total = names.iter().map(size).sum::<io::Result<u64>>().map_err(|error| Error::file(&what, error))?;
    let mut done = 0;
    let mut files = Vec::with_capacity(names.len());
    for path in names {
        let (size, sha256) = digest(&folder.join(&path), &mut |bytes| {
            done += bytes;
            progress(done, total);
        })
        .map_err(|error| Error::file(&path, error))?;
        files.push(DescribedFile { path, size, sha256: Some(sha256), git_oid: None });
    }
    Ok(files)
}

/// How files get from a folder to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By symbolic links: whoever reads them sees the folder too.
    Link,
    /// By copies, checked again.
    Copy,
}

/// Lists a folder, and brings its files to `to` unless it is the same.
///
/// # Errors
/// As [`list`], if `to` cannot be written, or if a copy differs.
pub async fn bring(folder: &Path, to: &Path, way: Way, progress: OnProgress) -> Result<Vec<DescribedFile>, Error> {
    let (folder, to) = (folder.to_owned(), to.to_owned());
    let work = move || {
        let files = list(&folder, &*progress)?;
        let absolute = fs::canonicalize(&folder).map_err(|error| Error::file(folder.display().to_string(), error))?;
        if fs::canonicalize(&to).is_ok_and(|to| to == absolute) {
            return Ok(files);
        }
        super::prune(&to, &files)?;
        for file in &files {
            bring_one(file, &absolute.join(&file.path), &to.join(&file.path), way)?;
        }
        Ok(files)
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(Error::UnsupportedModel("hashing failed".into())))
}

fn bring_one(file: &DescribedFile, from: &Path, to: &Path, way: Way) -> Result<(), Error> {
    let failed = |error| Error::file(&file.path, error);
    match fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    if way == Way::Link {
        return std::os::unix::fs::symlink(from, to).map_err(failed);
    }
    fs::copy(from, to).map_err(failed)?;
    let (_, sha256) = digest(to, &mut |_| {}).map_err(failed)?;
    if file.sha256.as_ref() != Some(&sha256) {
        let reason = "it changed while it was copied".to_owned();
        return Err(Error::ChecksumMismatch { path: file.path.clone(), reason });
    }
    Ok(())
}

/// Size and SHA-256 of a file; `read` is told the bytes of each piece.
pub(super) fn digest(path: &Path, read: &mut dyn FnMut(u64)) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((size, hex(&hash.finalize())));
        }
        size += n as u64;
        hash.update(&buffer[..n]);
        read(n as u64);
    }
}
