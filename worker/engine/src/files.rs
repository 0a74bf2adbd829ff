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
        // the file bounds what is allocated, whatever was asked for
        let end = range.end.min(file.metadata()?.len());
        let length = end.saturating_sub(range.start);
        let mut bytes = Vec::with_capacity(length as usize);
        file.seek(SeekFrom::Start(range.start))?;
        file.take(length).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_ends_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "0123456789").unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        let files = LocalFiles(dir.path().into());
        assert_eq!(files.list(), [("a".to_string(), 10)]);
        assert_eq!(files.read("a", 2..5).unwrap(), b"234");
        assert_eq!(files.read("a", 8..u64::MAX).unwrap(), b"89");
        assert_eq!(files.read("a", 20..30).unwrap(), b"");
        assert!(files.read("b", 0..1).is_err());
    }
}
