//! The machine's apt sources, reduced to those of its Debian release, and its backports suite
//! derived from them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// The Debian release of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Release {
    /// Its name in the sources, for example `bookworm`.
    pub(crate) codename: String,
    /// Its number, which releases that are not out yet don't have.
    pub(crate) number: Option<u32>,
}

impl Release {
    /// Reads the content of os-release(5); `None` when it is not Debian's.
    pub(crate) fn parse(os_release: &str) -> Option<Self> {
        let field = |name: &str| {
            os_release.lines().find_map(|line| {
                let value = line.strip_prefix(name)?.strip_prefix('=')?;
                Some(value.trim_matches('"').to_owned())
            })
        };
        (field("ID")? == "debian").then_some(())?;
        Some(Self {
            codename: field("VERSION_CODENAME")?,
            number: field("VERSION_ID").and_then(|number| number.parse().ok()),
        })
    }

    /// The suite of newer packages rebuilt for this release.
    pub(crate) fn backports(&self) -> String {
        format!("{}-backports", self.codename)
    }

    /// Whether the release's own QEMU is too old: Debian 13 has 10.0.
    pub(crate) fn needs_backports(&self) -> bool {
        self.number.is_some_and(|number| number < 13)
    }
}

/// Writes to `directory` what of the sources under `etc_apt` belongs to `release`, with its
/// backports when it needs them.
pub(crate) fn derive(etc_apt: &Path, release: &Release, directory: &Path) -> Result<()> {
    let mut lines = String::new();
    let mut stanzas = String::new();
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc_apt.join("sources.list.d")) {
        files.extend(entries.filter_map(Result::ok).map(|entry| entry.path()));
    }
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => lines.extend(text.lines().filter_map(|line| from_line(line, release))),
            Some("sources") => stanzas.extend(
                text.split("\n\n")
                    .filter_map(|stanza| from_stanza(stanza, release)),
            ),
            _ => {}
        }
    }
    if lines.is_empty() && stanzas.is_empty() {
        bail!("no source of {} in {}", release.codename, etc_apt.display());
    }
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())
    };
    write("release.list", lines)?;
    write("release.sources", stanzas)
}

fn suites(named: &[&str], release: &Release) -> Vec<String> {
    let dashed = format!("{}-", release.codename);
    let mut suites: Vec<String> = named
        .iter()
        .filter(|suite| **suite == release.codename || suite.starts_with(&dashed))
        .map(|&suite| suite.to_owned())
        .collect();
    let backports = release.backports();
    if release.needs_backports() && suites.contains(&release.codename) {
        suites.push(backports.clone());
    }
    suites.dedup();
    suites
}

/// Of `deb [options] URI SUITE COMPONENT...`, one line for each suite of the release.
fn from_line(line: &str, release: &Release) -> Option<String> {
    let rest = line.trim().strip_prefix("deb")?;
    let rest = rest
        .starts_with(char::is_whitespace)
        .then_some(rest)?
        .trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(bracketed) => {
            let (options, rest) = bracketed.split_once(']')?;
            (format!("[{options}] "), rest)
        }
        None => (String::new(), rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let lines: String = suites(&[suite], release)
        .iter()
        .map(|suite| format!("deb {options}{uri} {suite} main\n"))
        .collect();
    (!lines.is_empty()).then_some(lines)
}

/// Of a stanza of deb822-style sources, the same with the suites of the release only.
fn from_stanza(stanza: &str, release: &Release) -> Option<String> {
    let mut kept = String::new();
    let mut found = Vec::new();
    let mut field = String::new();
    for line in stanza.lines().filter(|line| !line.starts_with('#')) {
        let continued = line.starts_with([' ', '\t']);
        if !continued {
            field = line
                .split(':')
                .next()
                .unwrap_or_default()
                .to_ascii_lowercase();
        }
        let value = if continued {
            line
        } else {
            line.split_once(':')?.1
        };
        match field.as_str() {
            "types" if !value.split_whitespace().any(|kind| kind == "deb") => return None,
            "enabled" if value.trim() == "no" => return None,
            "suites" => found.extend(value.split_whitespace()),
            "types" | "components" => {}
            _ => {
                kept.push_str(line);
                kept.push('\n');
            }
        }
    }
    let suites = suites(&found, release).join(" ");
    (!suites.is_empty())
        .then(|| format!("Types: deb\nSuites: {suites}\nComponents: main\n{kept}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(number: u32) -> Release {
        Release {
            codename: "bookworm".to_owned(),
            number: Some(number),
        }
    }

    #[test]
    fn os_release_tells_the_release() {
        let text =
            "PRETTY_NAME=\"Debian\"\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(Release::parse(text), Some(release(12)));
        let text = "ID=debian\nVERSION_CODENAME=forky\n";
        let unreleased = Release::parse(text).unwrap();
        assert!(!unreleased.needs_backports());
        assert_eq!(
            Release::parse("ID=ubuntu\nVERSION_CODENAME=noble\nID_LIKE=debian\n"),
            None
        );
    }

    #[test]
    fn a_line_yields_its_release_and_the_backports() {
        let line = "deb [signed-by=/k arch=amd64] http://mirror/debian bookworm main contrib";
        assert_eq!(
            from_line(line, &release(12)).as_deref(),
            Some(
                "deb [signed-by=/k arch=amd64] http://mirror/debian bookworm main\n\
                 deb [signed-by=/k arch=amd64] http://mirror/debian bookworm-backports main\n"
            )
        );
        assert_eq!(
            from_line(
                "deb http://mirror/security bookworm-security main",
                &release(13)
            )
            .as_deref(),
            Some("deb http://mirror/security bookworm-security main\n")
        );
        for other in [
            "# deb http://mirror/debian bookworm main",
            "deb-src http://mirror/debian bookworm main",
            "deb http://elsewhere/apt stable main",
            "",
        ] {
            assert_eq!(from_line(other, &release(12)), None, "{other}");
        }
    }

    #[test]
    fn a_stanza_yields_its_release_and_the_backports() {
        let stanza = "Types: deb deb-src\n# a comment\nURIs: http://mirror/debian\n\
                      Suites: bookworm\n bookworm-updates\nComponents: main contrib\n\
                      Signed-By:\n -----BEGIN\n .\n -----END\n";
        assert_eq!(
            from_stanza(stanza, &release(12)).as_deref(),
            Some(
                "Types: deb\nSuites: bookworm bookworm-updates bookworm-backports\n\
                 Components: main\nURIs: http://mirror/debian\nSigned-By:\n -----BEGIN\n .\n \
                 -----END\n\n"
            )
        );
        for other in [
            "Types: deb-src\nURIs: http://mirror/debian\nSuites: bookworm\n",
            "Enabled: no\nTypes: deb\nURIs: http://mirror/debian\nSuites: bookworm\n",
            "Types: deb\nURIs: http://elsewhere\nSuites: nodistro\n",
        ] {
            assert_eq!(from_stanza(other, &release(12)), None, "{other}");
        }
    }

    #[test]
    fn backports_that_are_there_are_not_named_twice() {
        assert_eq!(
            suites(&["bookworm", "bookworm-backports"], &release(12)),
            ["bookworm", "bookworm-backports"]
        );
    }
}
