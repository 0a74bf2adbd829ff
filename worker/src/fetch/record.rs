//! What a fetch leaves beside the files: their list and the content hash that names them all.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use engine::DescribedFile;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Name of the record in the model's folder.
pub const RECORD: &str = ".modelfleet.json";

/// The record's content.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Of all files together.
    pub content_hash: String,
    /// The files.
    pub files: Vec<DescribedFile>,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is there and cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The record.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The files are not the ones to be served.
    #[error("{dir} holds files with content hash {found}; {wanted} is to be served")]
    OtherContent {
        /// The model's folder.
        dir: PathBuf,
        /// In the record.
        found: String,
        /// As asked for.
        wanted: String,
    },
}

/// SHA-256 over the sorted lines `PATH SIZE DIGEST\n`; the digest is SHA-256 where it is known, else git's.
pub fn content_hash(files: &[DescribedFile]) -> String {
    let digest = |file: &DescribedFile| file.sha256.clone().or_else(|| file.git_oid.clone()).unwrap_or_default();
    let mut lines: Vec<String> =
        files.iter().map(|file| format!("{} {} {}\n", file.path, file.size, digest(file))).collect();
    lines.sort();
    hex(&Sha256::digest(lines.concat()))
}

/// Writes the record of files that were verified; whole or not at all.
///
/// # Errors
/// What the system said.
pub fn write(dir: &Path, files: &[DescribedFile]) -> Result<(), super::Error> {
    let record = Record { content_hash: content_hash(files), files: files.to_vec() };
    let json = serde_json::to_vec_pretty(&record).unwrap_or_default();
    let part = dir.join(".modelfleet.json.part");
    let written = fs::write(&part, json).and_then(|()| fs::rename(&part, dir.join(RECORD)));
    written.map_err(|error| super::Error::file(RECORD, error))
}

/// Checks that the files of a folder are the ones with this content hash. A folder without a record, or a worker that
/// was told no hash, is not checked.
///
/// # Errors
/// If they are others, or the record is unreadable.
pub fn check(dir: &Path, wanted: &str) -> Result<(), Error> {
    let path = dir.join(RECORD);
    let json = match fs::read(&path) {
        Ok(json) => json,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::Read { path, source }),
    };
    let record: Record = serde_json::from_slice(&json).map_err(|error| Error::Read { path, source: error.into() })?;
    if record.content_hash == wanted || wanted.is_empty() {
        return Ok(());
    }
    Err(Error::OtherContent { dir: dir.to_owned(), found: record.content_hash, wanted: wanted.to_owned() })
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, size: u64, sha256: Option<&str>, git_oid: Option<&str>) -> DescribedFile {
        DescribedFile {
            path: path.into(),
            size,
            sha256: sha256.map(str::to_owned),
            git_oid: git_oid.map(str::to_owned),
        }
    }

    #[test]
    fn the_content_hash_is_of_the_sorted_lines() {
        let files = [file("b", 2, None, Some("oid")), file("a", 1, Some("sha"), Some("other"))];
        assert_eq!(content_hash(&files), hex(&Sha256::digest("a 1 sha\nb 2 oid\n")));
    }

    #[test]
    fn other_files_than_wanted_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        check(dir.path(), "anything").unwrap();
        let files = [file("a", 1, Some("sha"), None)];
        write(dir.path(), &files).unwrap();
        check(dir.path(), &content_hash(&files)).unwrap();
        let error = check(dir.path(), "other").unwrap_err();
        assert!(matches!(error, Error::OtherContent { .. }) && error.to_string().contains("other is to be served"));
        fs::write(dir.path().join(RECORD), "no json").unwrap();
        assert!(matches!(check(dir.path(), "other"), Err(Error::Read { .. })));
    }
}
