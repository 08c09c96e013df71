//! The guest's kernel and its modules, out of an unpacked Debian package.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

/// The modules that the guest loads, in this order. `nvme` is last: by then vfio-pci has taken
/// its controllers.
const MODULES: [&str; 12] = [
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    // What ext4 asks for by another name.
    "crc32c_generic",
    "ext4",
    "9pnet_virtio",
    "9p",
    "overlay",
    "vfio_iommu_type1",
    "vfio-pci",
    "nvme",
];

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The file that QEMU boots.
    pub(crate) image: PathBuf,
    modules: PathBuf,
}

/// A kernel module, ready to be loaded.
#[derive(Debug)]
pub(crate) struct Module {
    /// The name of its file, without what packs it.
    pub(crate) file: String,
    pub(crate) content: Vec<u8>,
}

impl Kernel {
    /// The kernel of the package that was unpacked into `directory`.
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let image = entry(&directory.join("boot"), "vmlinuz-")?;
        let modules = [
            directory.join("lib/modules"),
            directory.join("usr/lib/modules"),
        ]
        .into_iter()
        .find(|path| path.is_dir())
        .with_context(|| format!("no modules under {}", directory.display()))?;
        let modules = entry(&modules, "")?;
        Ok(Self {
            image: unpacked_image(&image, &directory.join("vmlinux"))?,
            modules,
        })
    }

    /// The guest's modules and what they depend on, each after its dependencies.
    pub(crate) fn modules(&self) -> Result<Vec<Module>> {
        let mut files = Vec::new();
        collect(&self.modules.join("kernel"), &mut files)?;
        let builtin = fs::read_to_string(self.modules.join("modules.builtin"))
            .context("the list of what is built into the kernel")?;
        let builtin: Vec<String> = builtin
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        let mut loaded = Vec::new();
        let mut modules = Vec::new();
        for name in MODULES {
            self.add(
                &name.replace('-', "_"),
                &files,
                &builtin,
                &mut loaded,
                &mut modules,
            )?;
        }
        Ok(modules)
    }

    fn add(
        &self,
        name: &str,
        files: &[PathBuf],
        builtin: &[String],
        loaded: &mut Vec<String>,
        modules: &mut Vec<Module>,
    ) -> Result<()> {
        if loaded.iter().chain(builtin).any(|known| known == name) {
            return Ok(());
        }
        loaded.push(name.to_owned());
        let file = files
            .iter()
            .find(|file| module_name(file).as_deref() == Some(name))
            .with_context(|| format!("{} has no module {name}", self.modules.display()))?;
        let module = Module::read(file)?;
        for dependency in dependencies(&module.content) {
            self.add(&dependency, files, builtin, loaded, modules)?;
        }
        modules.push(module);
        Ok(())
    }
}

/// The module `name`, spelled as the kernel does, somewhere under `directory`.
pub(crate) fn module(directory: &Path, name: &str) -> Result<Module> {
    let mut files = Vec::new();
    collect(directory, &mut files)?;
    files
        .iter()
        .find(|file| module_name(file).as_deref() == Some(name))
        .with_context(|| format!("{} has no module {name}", directory.display()))
        .and_then(|file| Module::read(file))
}

impl Module {
    fn read(file: &Path) -> Result<Self> {
        let content = content(file)?;
        let file = file.file_name().unwrap_or_default().to_string_lossy();
        let end = file.find(".ko").unwrap_or(file.len());
        Ok(Self {
            file: format!("{}.ko", &file[..end]),
            content,
        })
    }
}

/// The only entry of `directory` whose name starts with `prefix`.
fn entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let context = || format!("{}/{prefix}*", directory.display());
    fs::read_dir(directory)
        .with_context(context)?
        .filter_map(Result::ok)
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .with_context(context)
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if module_name(&path).is_some() {
            files.push(path);
        }
    }
    Ok(())
}

/// The module that a file holds, in the kernel's spelling.
fn module_name(file: &Path) -> Option<String> {
    let (name, packing) = file.file_name()?.to_str()?.split_once(".ko")?;
    matches!(packing, "" | ".xz" | ".zst" | ".gz").then(|| name.replace('-', "_"))
}

/// The modules named by the entry `depends` of a module's information section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const ENTRY: &[u8] = b"\0depends=";
    let Some(at) = module
        .windows(ENTRY.len())
        .position(|window| window == ENTRY)
    else {
        return Vec::new();
    };
    let list = &module[at + ENTRY.len()..];
    let end = list
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(list.len());
    String::from_utf8_lossy(&list[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

fn content(file: &Path) -> Result<Vec<u8>> {
    let packed = fs::read(file).with_context(|| file.display().to_string())?;
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return Ok(packed),
    };
    unpack(program, packed).with_context(|| file.display().to_string())
}

fn unpack(program: &str, packed: Vec<u8>) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{program} is needed to unpack"))?;
    let mut stdin = child.stdin.take().context("no pipe to the child")?;
    let writer = thread::spawn(move || stdin.write_all(&packed));
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{program} failed to unpack");
    if writer.join().is_err() {
        bail!("{program} was not fed");
    }
    Ok(output.stdout)
}

/// Unpacks the kernel proper from `image`, because doing so takes an emulated processor 4 s.
/// Where that can't be done, the image boots as it is.
fn unpacked_image(image: &Path, unpacked: &Path) -> Result<PathBuf> {
    if unpacked.exists() {
        return Ok(unpacked.to_owned());
    }
    let bytes = fs::read(image).with_context(|| image.display().to_string())?;
    let Some(payload) = payload(&bytes) else {
        return Ok(image.to_owned());
    };
    let Ok(content) = unpack("xz", payload.to_owned()) else {
        return Ok(image.to_owned());
    };
    let partial = unpacked.with_extension("partial");
    fs::write(&partial, content).with_context(|| partial.display().to_string())?;
    fs::rename(&partial, unpacked).with_context(|| unpacked.display().to_string())?;
    Ok(unpacked.to_owned())
}

/// The xz stream inside of an image that follows the Linux x86 boot protocol: header fields
/// `setup_sects` (0x1f1), `payload_offset` (0x248) and `payload_length` (0x24c).
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let setup_sectors = usize::from(*image.get(0x1f1)?);
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    // The size of what is packed follows the stream.
    let length = word(0x24c)?.checked_sub(4)?;
    let payload = image.get(start..)?.get(..length)?;
    payload.starts_with(b"\xfd7zXZ\0").then_some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_known_by_the_name_that_the_kernel_uses() {
        let name = |file: &str| module_name(Path::new(file));
        assert_eq!(
            name("kernel/drivers/vfio/pci/vfio-pci.ko").as_deref(),
            Some("vfio_pci")
        );
        assert_eq!(name("a/nvme-core.ko.xz").as_deref(), Some("nvme_core"));
        assert_eq!(name("a/modules.builtin"), None);
    }

    #[test]
    fn dependencies_are_read_from_the_information_section() {
        let module = b"\x7fELF\0license=GPL\0depends=vfio-pci-core,vfio\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["vfio_pci_core", "vfio"]);
        assert!(dependencies(b"\0depends=\0name=vfio\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }

    #[test]
    fn payload_is_where_the_boot_protocol_says() {
        let mut image = vec![0; 4 * 512];
        image[0x1f1] = 1;
        image[0x248..0x24c].copy_from_slice(&100_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&20_u32.to_le_bytes());
        assert_eq!(payload(&image), None);
        image[1124..1130].copy_from_slice(b"\xfd7zXZ\0");
        assert_eq!(payload(&image), Some(&image[1124..1140]));
        assert_eq!(payload(&image[..1130]), None);
        assert_eq!(payload(&[]), None);
    }
}
