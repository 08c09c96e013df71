//! What virtual machines need beyond cargo: QEMU, installed by apt; a kernel and busybox for the
//! guest, and user-mode Linux, only unpacked from their packages, never installed. And valgrind, and clients
//! of Redis and NBD.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, IsTerminal};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::kernel::Kernel;
use crate::sources::{self, Release};

/// The emulator.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// The first version whose NVMe controller has the property `mqes`.
const QEMU_VERSION: Version = Version(9, 1);

const QEMU_PACKAGE: &str = "qemu-system-x86";
/// Of the same version: older ones have no qemu-storage-daemon in this package.
const QEMU_UTILS_PACKAGE: &str = "qemu-utils";
const KERNEL_PACKAGE: &str = "linux-image-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";
const USER_MODE_LINUX_PACKAGE: &str = "user-mode-linux";

/// Programs that come with every Debian, and the packages that have them.
const PROGRAMS: [(&str, &str); 3] = [
    ("dpkg-deb", "dpkg"),
    ("setpriv", "util-linux"),
    ("xz", "xz-utils"),
];

/// What virtual machines are made of.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) kernel: Kernel,
    /// A statically linked busybox.
    pub(crate) busybox: PathBuf,
}

impl Bed {
    /// Makes the bed, from what is there already and from packages.
    pub(crate) fn prepare(directory: &Path) -> Result<Self> {
        Self::prepare_with(directory, &[])
    }

    /// Makes the bed, and installs further programs that run in it, each with the package that has
    /// it.
    pub(crate) fn prepare_with(directory: &Path, programs: &[(&str, &str)]) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        let mut apt = Apt::new(directory);
        install_missing(&mut apt, programs)?;
        let kernel = unpacked(directory, "kernel", || {
            let package = apt.dependency(KERNEL_PACKAGE, "linux-image-")?;
            apt.download(&package)
        })?;
        let busybox = unpacked(directory, "busybox", || apt.download(BUSYBOX_PACKAGE))?;
        let busybox = ["bin/busybox", "usr/bin/busybox"]
            .into_iter()
            .map(|path| busybox.join(path))
            .find(|path| path.is_file())
            .with_context(|| format!("{BUSYBOX_PACKAGE} has no busybox"))?;
        Ok(Self {
            kernel: Kernel::open(&kernel)?,
            busybox,
        })
    }
}

/// Linux as a process.
#[derive(Debug)]
pub(crate) struct UserModeLinux {
    pub(crate) program: PathBuf,
    /// The directory of its modules.
    pub(crate) modules: PathBuf,
}

impl UserModeLinux {
    /// Obtains the package, unless it is there already.
    pub(crate) fn prepare(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        let mut apt = Apt::new(directory);
        let content = unpacked(directory, "uml", || apt.download(USER_MODE_LINUX_PACKAGE))?;
        let linux = Self {
            program: content.join("usr/bin/linux.uml"),
            modules: content.join("usr/lib/uml/modules"),
        };
        for path in [&linux.program, &linux.modules] {
            let is_there = path.exists();
            ensure!(is_there, "{USER_MODE_LINUX_PACKAGE}: no {}", path.display());
        }
        Ok(linux)
    }
}

/// Installs what counts instructions and knows where they are from, where it is missing. `directory` is
/// for apt's files.
pub(crate) fn install_valgrind(directory: &Path) -> Result<()> {
    install_programs(
        directory,
        &[("valgrind", "valgrind"), ("addr2line", "binutils")],
    )
}

/// Installs the clients that the example `kv` is tested with, and the server that it is compared with
/// (`redis-check-rdb` is that too), where they are missing. `directory` is for apt's files.
pub(crate) fn install_redis(directory: &Path) -> Result<()> {
    const PROGRAMS: [&str; 3] = ["redis-cli", "redis-benchmark", "redis-check-rdb"];
    install_programs(directory, &PROGRAMS.map(|program| (program, "redis-tools")))
}

/// Installs the clients that the NBD server is tested with, where they are missing. `directory` is for
/// apt's files.
pub(crate) fn install_nbd_clients(directory: &Path) -> Result<()> {
    install_programs(
        directory,
        &[
            ("qemu-img", QEMU_UTILS_PACKAGE),
            ("qemu-io", QEMU_UTILS_PACKAGE),
            ("qemu-storage-daemon", QEMU_UTILS_PACKAGE),
            ("nbdcopy", "libnbd-bin"),
            ("nbdinfo", "libnbd-bin"),
        ],
    )
}

/// Installs the packages of those programs that are missing.
fn install_programs(directory: &Path, needed: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = needed
        .iter()
        .filter(|(program, _)| !in_path(program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    Apt::new(directory).install(&packages)?;
    for (program, package) in missing {
        ensure!(in_path(program), "{package} of apt has no {program}");
    }
    Ok(())
}

/// Installs QEMU and programs where they are missing or too old.
fn install_missing(apt: &mut Apt, programs: &[(&str, &str)]) -> Result<()> {
    let missing = || {
        let all = PROGRAMS.iter().chain(programs);
        all.filter(|(program, _)| !in_path(program))
    };
    let mut wanted: Vec<&str> = missing().map(|(_, package)| *package).collect();
    if installed_qemu().is_none_or(|version| version < QEMU_VERSION) {
        wanted.push(QEMU_PACKAGE);
    }
    if wanted.is_empty() {
        return Ok(());
    }
    apt.install(&wanted)?;
    if let Some((program, package)) = missing().next() {
        bail!("apt installed {package}, and there is no {program}");
    }
    match installed_qemu() {
        Some(version) if version >= QEMU_VERSION => Ok(()),
        _ => bail!("{QEMU} {QEMU_VERSION} or later is needed, and apt did not install it"),
    }
}

/// The directory that holds the content of a package, which `download` obtains on first use.
fn unpacked(
    directory: &Path,
    name: &str,
    download: impl FnOnce() -> Result<PathBuf>,
) -> Result<PathBuf> {
    let content = directory.join(name);
    if content.is_dir() {
        return Ok(content);
    }
    let package = download()?;
    let partial = directory.join(format!("{name}.partial"));
    let mut unpack = Command::new("dpkg-deb");
    run(unpack.arg("--extract").arg(&package).arg(&partial))?;
    fs::remove_file(&package).with_context(|| package.display().to_string())?;
    fs::rename(&partial, &content).with_context(|| content.display().to_string())?;
    Ok(content)
}

/// apt with package lists of its own, so that neither the machine's sources nor its lists change.
#[derive(Debug)]
struct Apt {
    directory: PathBuf,
    release: Option<Release>,
    updated: bool,
}

impl Apt {
    fn new(directory: &Path) -> Self {
        let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        Self {
            directory: directory.join("apt"),
            release: Release::parse(&os_release),
            updated: false,
        }
    }

    fn install(&mut self, packages: &[&str]) -> Result<()> {
        let by_hand = self.by_hand(packages);
        let Some(prefix) = as_root() else {
            bail!("packages are missing, and only root can install them. {by_hand}");
        };
        self.update().with_context(|| by_hand.clone())?;
        eprintln!("xtask: installing {}", packages.join(", "));
        let mut command = Command::new(prefix.first().unwrap_or(&"env"));
        command
            .args(prefix.iter().skip(1))
            .args(if prefix.is_empty() { &[][..] } else { &["env"] })
            .args(["DEBIAN_FRONTEND=noninteractive", "apt-get"])
            .args(self.options())
            .args(["--option", "DPkg::Lock::Timeout=300"])
            .args(["install", "--yes", "--no-install-recommends", "--no-remove"]);
        let qemu = self.candidate(QEMU_PACKAGE)?;
        let is_of_qemu = |package: &&str| [QEMU_PACKAGE, QEMU_UTILS_PACKAGE].contains(package);
        if packages.iter().any(is_of_qemu)
            && qemu.is_none_or(|version| version < QEMU_VERSION)
            && let Some(release) = &self.release
        {
            command.args(["--target-release", &release.backports()]);
        }
        // apt's talk is no output of what the user runs.
        let output = command.args(packages).stdin(Stdio::inherit()).output();
        let output = output.context("apt-get install")?;
        if !output.status.success() {
            eprint!("{}", String::from_utf8_lossy(&output.stdout));
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
            bail!("apt-get install failed. {by_hand}");
        }
        Ok(())
    }

    /// What a person does where this program can't.
    fn by_hand(&self, packages: &[&str]) -> String {
        let list = packages.join(" ");
        match &self.release {
            Some(release) if release.needs_backports() => format!(
                "Enable the suite {backports} in /etc/apt and run, as root: apt-get update && \
                 apt-get install --no-install-recommends -t {backports} {list}",
                backports = release.backports(),
            ),
            Some(_) => format!(
                "Run, as root: apt-get update && apt-get install --no-install-recommends {list}"
            ),
            None => format!(
                "This is no Debian; install by other means what these packages of Debian have: \
                 {list} (of QEMU, {QEMU_VERSION} or later)"
            ),
        }
    }

    /// Downloads a package; returns the file.
    fn download(&mut self, package: &str) -> Result<PathBuf> {
        self.update()?;
        let directory = self.directory.join("packages");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        eprintln!("xtask: downloading {package}");
        run(Command::new("apt-get")
            .current_dir(&directory)
            .args(self.options())
            // Unprivileged users of apt's can't write here.
            .args(["--option", "APT::Sandbox::User=root"])
            .args(["--quiet=2", "download", package]))?;
        let file = fs::read_dir(&directory)?.filter_map(Result::ok).next();
        let file = file.with_context(|| format!("apt-get downloaded nothing for {package}"))?;
        Ok(file.path())
    }

    /// The package that `package` depends on and whose name starts with `prefix`.
    fn dependency(&mut self, package: &str, prefix: &str) -> Result<String> {
        self.update()?;
        let text = self.cache(&["depends", "--important", package])?;
        text.lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .with_context(|| format!("{package} depends on no {prefix}*"))
    }

    fn candidate(&self, package: &str) -> Result<Option<Version>> {
        let text = self.cache(&["policy", package])?;
        let candidate = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("Candidate: "));
        Ok(candidate.and_then(Version::parse))
    }

    fn cache(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("apt-cache")
            .args(self.options())
            .args(arguments)
            .env("LC_ALL", "C")
            .stderr(Stdio::inherit())
            .output()
            .context("apt-cache")?;
        ensure!(
            output.status.success(),
            "apt-cache {} failed",
            arguments.join(" ")
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Fetches the package lists, once.
    fn update(&mut self) -> Result<()> {
        if self.updated {
            return Ok(());
        }
        let Some(release) = &self.release else {
            bail!(
                "packages of Debian are needed ({KERNEL_PACKAGE}, {BUSYBOX_PACKAGE}, \
                 {USER_MODE_LINUX_PACKAGE}, {QEMU_PACKAGE}), and this machine is no Debian"
            );
        };
        for path in [
            self.directory.join("sources"),
            self.directory.join("lists/partial"),
        ] {
            fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        }
        sources::derive(
            Path::new("/etc/apt"),
            release,
            &self.directory.join("sources"),
        )?;
        eprintln!("xtask: fetching package lists of {}", release.codename);
        run(Command::new("apt-get")
            .args(self.options())
            .args(["--option", "APT::Sandbox::User=root"])
            .args(["--option", "APT::Update::Error-Mode=any"])
            .args(["--quiet=2", "update"]))?;
        self.updated = true;
        Ok(())
    }

    fn options(&self) -> Vec<String> {
        let path = |name: &str| self.directory.join(name).display().to_string();
        [
            "Dir::Etc::SourceList=/dev/null".to_owned(),
            format!("Dir::Etc::SourceParts={}", path("sources")),
            format!("Dir::State::Lists={}", path("lists")),
            // Caches of the machine's own lists stay as they are.
            "Dir::Cache::pkgcache=".to_owned(),
            "Dir::Cache::srcpkgcache=".to_owned(),
        ]
        .into_iter()
        .flat_map(|option| ["--option".to_owned(), option])
        .collect()
    }
}

/// What to put before a command to run it as root; `None` if there is no way.
fn as_root() -> Option<&'static [&'static str]> {
    if fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0) {
        return Some(&[]);
    }
    if !in_path("sudo") {
        return None;
    }
    let quiet = Command::new("sudo")
        .args(["-n", "true"])
        .stderr(Stdio::null())
        .status();
    let able = quiet.is_ok_and(|status| status.success()) || io::stdin().is_terminal();
    able.then_some(&["sudo"])
}

fn in_path(program: impl AsRef<OsStr>) -> bool {
    let program = Path::new(program.as_ref());
    env::var_os("PATH").is_some_and(|path| {
        env::split_paths(&path).any(|directory| directory.join(program).is_file())
    })
}

fn installed_qemu() -> Option<Version> {
    let output = Command::new(QEMU).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Version::parse(text.split_once("version ")?.1)
}

/// Runs a helper whose output matters only when it fails.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| name.clone())?;
    if !output.status.success() {
        eprint!("{}", String::from_utf8_lossy(&output.stdout));
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        bail!("{name} failed ({})", output.status);
    }
    Ok(())
}

/// The first two numbers of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl Version {
    /// Reads `9.1...`, with or without Debian's epoch.
    fn parse(text: &str) -> Option<Self> {
        let text = text.split_once(':').map_or(text, |(_, version)| version);
        let mut numbers = text.split(|character: char| !character.is_ascii_digit());
        let mut number = || numbers.next()?.parse().ok();
        Some(Self(number()?, number()?))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}.{}", self.0, self.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        let version = |text| Version::parse(text);
        assert_eq!(
            version("1:10.0.2+ds-2+deb13u1~bpo12+1"),
            Some(Version(10, 0))
        );
        assert_eq!(version("1:7.2+dfsg-7+deb12u18+b3"), Some(Version(7, 2)));
        assert_eq!(version("9.1.0 (Debian 1:9.1.0+ds-1)"), Some(Version(9, 1)));
        assert_eq!(version("(none)"), None);
        assert!(version("1:10.0.2") > Some(QEMU_VERSION));
        assert!(version("1:7.2+dfsg") < Some(QEMU_VERSION));
    }

    #[test]
    fn by_hand_says_what_to_install_and_how() {
        let apt = |os_release: &str| Apt {
            directory: PathBuf::from("/apt"),
            release: Release::parse(os_release),
            updated: false,
        };
        let bookworm = apt("ID=debian\nVERSION_CODENAME=bookworm\nVERSION_ID=\"12\"\n");
        assert_eq!(
            bookworm.by_hand(&[QEMU_PACKAGE, "xz-utils"]),
            "Enable the suite bookworm-backports in /etc/apt and run, as root: apt-get update && \
             apt-get install --no-install-recommends -t bookworm-backports qemu-system-x86 xz-utils"
        );
        assert!(
            apt("ID=fedora\n")
                .by_hand(&[QEMU_PACKAGE])
                .contains("9.1 or later")
        );
    }
}
