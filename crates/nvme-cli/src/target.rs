//! Opening what a URL names, and leaving no trace when it turns out to be of no use.

use std::io::ErrorKind;
use std::path::PathBuf;

use nvme_async::{Controller, Namespace, OpenOptions};

use crate::failure::Failure;

/// Whether this is a URL rather than the path of a file. One letter before a colon is no scheme,
/// and a path with a colon can be written as `./a:b`.
pub(crate) fn is_url(text: &str) -> bool {
    text.split_once(':').is_some_and(|(scheme, _)| {
        scheme.len() >= 2
            && scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
    })
}

/// The file behind the namespace that a `file:` URL names.
pub(crate) fn backing_file(url: &str) -> Option<PathBuf> {
    let (path, query) = path_and_query(url)?;
    Some(numbered(path, option(query, "ns").unwrap_or(1)))
}

/// The files behind all namespaces of a `file:` URL.
fn backing_files(url: &str) -> Vec<PathBuf> {
    let Some((path, query)) = path_and_query(url) else {
        return Vec::new();
    };
    let namespaces = option(query, "namespaces").unwrap_or(1).min(256);
    (1..=namespaces)
        .map(|number| numbered(path, number))
        .collect()
}

fn path_and_query(url: &str) -> Option<(&str, &str)> {
    let path = url.strip_prefix("file:")?;
    Some(path.split_once('?').unwrap_or((path, "")))
}

fn option(query: &str, name: &str) -> Option<u32> {
    let mut values = query
        .split('&')
        .filter_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    values.next_back()?.parse().ok()
}

/// Namespaces after the first one have files of their own, named after the first one's.
fn numbered(path: &str, number: u32) -> PathBuf {
    match number {
        1 => path.into(),
        _ => format!("{path}.{number}").into(),
    }
}

/// An open namespace, and the files that exist only because it was opened.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) namespace: Namespace,
    created: Vec<PathBuf>,
}

impl Target {
    /// Opens the namespace that `url` names.
    pub(crate) async fn open(url: &str, options: OpenOptions) -> Result<Self, Failure> {
        let created = absent_files(url);
        match options.url(url).open().await {
            Ok(namespace) => Ok(Self { namespace, created }),
            Err(error) => {
                remove(created);
                Err(error.into())
            }
        }
    }

    /// Closes the namespace's controller and removes files that did not exist before it was
    /// opened: for when nothing was written, because it could not have been.
    pub(crate) async fn discard(self) {
        if let Err(error) = self.namespace.controller().shutdown().await {
            tracing::warn!(%error, "closing an unused controller");
        }
        remove(self.created);
    }
}

/// The files that opening `url` will create, if it creates any.
fn absent_files(url: &str) -> Vec<PathBuf> {
    let mut files = backing_files(url);
    files.retain(|path| {
        // A dangling symbolic link is not absent: what it would create is elsewhere.
        path.symlink_metadata()
            .is_err_and(|error| error.kind() == ErrorKind::NotFound)
    });
    files
}

fn remove(created: Vec<PathBuf>) {
    for path in created {
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(%error, ?path, "removing a file that was just created");
        }
    }
}

/// Whether both are handles of one controller. Those over memory are never shared.
pub(crate) fn is_same_controller(a: &Controller, b: &Controller) -> bool {
    a.address() == b.address() && !a.address().starts_with("mem:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_paths() {
        for url in [
            "nvme://0000:44:00.0/1",
            "file:a.img",
            "mem:?size=1M",
            "http:x",
            "vfio-user:/s",
        ] {
            assert!(is_url(url), "{url}");
        }
        for path in [
            "a.img",
            "/dev/sda",
            "./a:b",
            "C:x",
            "0000:44:00.0",
            ":x",
            "",
            "a b:c",
        ] {
            assert!(!is_url(path), "{path}");
        }
    }

    #[test]
    fn files_behind_urls() {
        assert_eq!(backing_file("file:/a/b?size=1G"), Some("/a/b".into()));
        assert_eq!(backing_file("file:b"), Some("b".into()));
        assert_eq!(backing_file("file:b?namespaces=3&ns=2"), Some("b.2".into()));
        assert_eq!(backing_file("mem:?size=1G"), None);
        assert_eq!(
            backing_files("file:b?namespaces=2&ns=2"),
            ["b", "b.2"].map(PathBuf::from)
        );
        assert!(backing_files("nvme://0000:44:00.0/1").is_empty());
    }
}
