//! Where a model's files are read from: a folder here, byte ranges of a hub in the worker.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::PathBuf;

/// The files of one model.
pub trait ModelFiles {
    /// Path and size in bytes of each file.
    fn list(&self) -> Vec<(String, u64)>;

    /// The bytes of a range of a file; shorter only if the file ends there.
    ///
    /// # Errors
    /// What the system or the hub said.
    fn read(&self, path: &str, range: Range<u64>) -> io::Result<Vec<u8>>;
}

/// The files of a folder, without those of folders in it.
#[derive(Debug, Clone)]
pub struct LocalFiles(pub PathBuf);

impl ModelFiles for LocalFiles {
    fn list(&self) -> Vec<(String, u64)> {
        let Ok(entries) = fs::read_dir(&self.0) else {
            return Vec::new();
        };
        let mut files: Vec<(String, u64)> = entries
            .flatten()
            .filter_map(|entry| {
                let metadata = fs::metadata(entry.path()).ok()?;
                let name = entry.file_name().into_string().ok()?;
                metadata.is_file().then_some((name, metadata.len()))
            })
            .collect();
        files.sort();
        files
    }

    fn read(&self, path: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut file = File::open(self.0.join(path))?;
        file.seek(SeekFrom::Start(range.start))?;
        let mut bytes = Vec::new();
        file.take(range.end.saturating_sub(range.start))
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}
