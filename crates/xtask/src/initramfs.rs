//! The guest's first file system: a cpio archive in the "newc" format, which the kernel unpacks.

/// An archive in the making.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR_FILE: u32 = 0o100_000;

impl Archive {
    /// Adds a directory.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, &[]);
    }

    /// Adds a file that only its owner, who is root, may write.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, REGULAR_FILE | 0o755, content);
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        // Entries with one inode number would be links of each other.
        let inode = self.entries;
        let length = u32::try_from(content.len()).expect("files of the guest are small");
        let name_length = u32::try_from(path.len() + 1).expect("paths are short");
        self.bytes.extend_from_slice(b"070701");
        let fields = [inode, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_header_of_newc() {
        let mut archive = Archive::default();
        archive.file("ab", b"hello");
        let bytes = archive.finish();
        let header = "07070100000001000081ed00000000000000000000000100000000000000050000000000000000\
                      00000000000000000000000300000000";
        assert_eq!(&bytes[..110], header.as_bytes());
        // 110 bytes of header and 3 of name are padded to 116.
        assert_eq!(&bytes[110..124], b"ab\0\0\0\0hello\0\0\0");
        assert!(bytes[124..].starts_with(b"070701"));
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"));
    }
}
