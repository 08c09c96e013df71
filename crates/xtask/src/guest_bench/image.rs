//! The files that are read and written.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Advice, fadvise};

const MIB: usize = 1 << 20;

/// A file of data all of which was written, so that no file system has to find room for it. It goes when this does.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) path: PathBuf,
}

impl Image {
    /// Makes a file of so many MiB that are not zeroes.
    pub(super) fn create(path: PathBuf, mib: u64) -> Result<Self> {
        let image = Self { path };
        image.fill(mib).with_context(|| image.name())?;
        Ok(image)
    }

    fn fill(&self, mib: u64) -> Result<()> {
        let mut file = File::create(&self.path)?;
        let mut data = vec![0; MIB];
        for number in 0..mib {
            // No two blocks are alike, and none is empty.
            for (index, word) in data.chunks_exact_mut(8).enumerate() {
                let value = (number << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                word.copy_from_slice(&value.to_le_bytes());
            }
            file.write_all(&data)?;
        }
        file.sync_all()?;
        Ok(())
    }

    /// Writes back what the page cache holds of it, and empties that.
    pub(super) fn leave_cache(&self) -> Result<()> {
        let file = self.open()?;
        file.sync_data().with_context(|| self.name())?;
        fadvise(&file, 0, None, Advice::DontNeed).with_context(|| self.name())
    }

    /// Reads it into the page cache.
    pub(super) fn enter_cache(&self) -> Result<()> {
        let (mut file, mut data) = (self.open()?, vec![0; MIB]);
        while file.read(&mut data).with_context(|| self.name())? > 0 {}
        Ok(())
    }

    /// Writes back what was written, so that this does not go on while others are measured.
    pub(super) fn settle(&self) -> Result<()> {
        self.open()?.sync_data().with_context(|| self.name())
    }

    fn open(&self) -> Result<File> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path);
        file.with_context(|| self.name())
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The type of the file system that a directory is in, as mount(8) names it.
pub(super) fn file_system(directory: &Path) -> Result<String> {
    let path = directory
        .canonicalize()
        .with_context(|| directory.display().to_string())?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
    let found = mounted_at(&mounts, &path);
    let found = found.with_context(|| format!("{} is in no file system", path.display()))?;
    ensure!(!found.is_empty(), "a file system without a type");
    Ok(found.to_owned())
}

/// The last one of the longest mount points that `path` is below.
fn mounted_at<'a>(mounts: &'a str, path: &Path) -> Option<&'a str> {
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?, words.next()?))
    });
    let above = mounts.filter(|(point, _)| path.starts_with(point));
    above
        .max_by_key(|(point, _)| point.len())
        .map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_in_what_was_mounted_last_and_nearest() {
        let mounts = "rootfs / rootfs rw 0 0\n/dev/a / ext4 rw 0 0\n/dev/b /data xfs rw 0 0\n\
                      tmpfs /data/tmp tmpfs rw 0 0\n";
        let kind = |path: &str| mounted_at(mounts, Path::new(path));
        assert_eq!(kind("/work"), Some("ext4"));
        assert_eq!(kind("/data/x"), Some("xfs"));
        assert_eq!(kind("/data/tmp/x"), Some("tmpfs"));
        assert_eq!(kind("/database"), Some("ext4"));
    }

    #[test]
    fn an_image_is_written_and_goes() {
        let path = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        let image = Image::create(path.clone(), 2).unwrap();
        image.leave_cache().unwrap();
        image.enter_cache().unwrap();
        image.settle().unwrap();
        let data = std::fs::read(&path).unwrap();
        assert_eq!(data.len(), 2 * MIB);
        assert!(
            data.chunks_exact(4096)
                .all(|block| block.iter().any(|byte| *byte != 0))
        );
        assert_ne!(data[..MIB], data[MIB..]);
        drop(image);
        assert!(!path.exists());
    }
}
