use std::cell::RefCell;
use std::os::unix::fs::symlink;
use std::rc::Rc;

use tempfile::TempDir;

use super::*;

pub(crate) const ADDRESS: &str = "0000:44:00.0";

/// A directory tree with `sys`, `dev` and `proc`.
pub(crate) struct Machine {
    tree: TempDir,
    /// Attributes whose next writes fail, by the end of their path.
    failing: Rc<RefCell<Vec<&'static str>>>,
    /// Every write, as attribute and text.
    writes: Rc<RefCell<Vec<(String, String)>>>,
}

impl Machine {
    /// With the drivers `nvme` and `vfio-pci`, and nothing else.
    pub(crate) fn new() -> Self {
        let machine = Self {
            tree: tempfile::tempdir().unwrap(),
            failing: Rc::default(),
            writes: Rc::default(),
        };
        for driver in ["nvme", "vfio-pci"] {
            machine.directory(&format!("sys/bus/pci/drivers/{driver}"));
        }
        machine.file("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        machine.file(
            "proc/self/mountinfo",
            "22 1 0:21 / /proc rw shared:12 - proc proc rw\n",
        );
        machine
    }

    pub(crate) fn host(&self) -> Host {
        let kernel = Kernel {
            root: self.tree.path().to_owned(),
            failing: self.failing.clone(),
            writes: self.writes.clone(),
        };
        Host::new(self.tree.path(), kernel)
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.tree.path().join(path)
    }

    pub(crate) fn directory(&self, path: &str) -> PathBuf {
        let path = self.path(path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn file(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Adds a function; `driver` and `group` may be empty.
    pub(crate) fn function(&self, address: &str, class: &str, driver: &str, group: &str) {
        let path = self.directory(&format!("sys/bus/pci/devices/{address}"));
        fs::write(path.join("class"), format!("{class}\n")).unwrap();
        fs::write(path.join("driver_override"), "(null)\n").unwrap();
        if !group.is_empty() {
            let group = self.directory(&format!("sys/kernel/iommu_groups/{group}"));
            symlink(group, path.join("iommu_group")).unwrap();
        }
        if !driver.is_empty() {
            symlink(
                self.path("sys/bus/pci/drivers").join(driver),
                path.join("driver"),
            )
            .unwrap();
        }
    }

    /// Adds a namespace of 1 GiB with one partition, below controller nvme0 of a function.
    pub(crate) fn namespace(&self, address: &str, entry: &str, disk: &str) {
        let controller = format!("sys/bus/pci/devices/{address}/nvme/nvme0");
        self.file(&format!("{controller}/model"), "Model 1000             \n");
        self.file(&format!("{controller}/{entry}/size"), "2097152\n");
        self.directory(&format!("{controller}/hwmon1"));
        self.file(&format!("sys/block/{disk}/dev"), "259:0\n");
        self.directory(&format!("sys/block/{disk}/holders"));
        self.file(&format!("sys/block/{disk}/{disk}p1/partition"), "1\n");
        self.file(&format!("sys/block/{disk}/{disk}p1/dev"), "259:1\n");
        self.directory(&format!("sys/block/{disk}/{disk}p1/holders"));
        self.file(&format!("dev/{disk}"), "");
        self.file(&format!("dev/{disk}p1"), "");
    }

    /// Adds a process that has a file open.
    pub(crate) fn process(&self, pid: u32, command: &str, opened: &str) {
        self.file(&format!("proc/{pid}/comm"), &format!("{command}\n"));
        let fds = self.directory(&format!("proc/{pid}/fd"));
        symlink(opened, fds.join("7")).unwrap();
    }

    /// Makes the next write to an attribute fail.
    pub(crate) fn fail(&self, attribute: &'static str) {
        self.failing.borrow_mut().push(attribute);
    }

    pub(crate) fn writes(&self) -> Vec<(String, String)> {
        self.writes.borrow().clone()
    }

    /// Driver and override of a function.
    pub(crate) fn state(&self, address: &str) -> (Option<String>, String) {
        let path = self.path("sys/bus/pci/devices").join(address);
        (
            link_name(&path.join("driver")),
            attribute(&path.join("driver_override")).unwrap(),
        )
    }
}

/// Reacts to writes as the kernel's driver core does.
struct Kernel {
    root: PathBuf,
    failing: Rc<RefCell<Vec<&'static str>>>,
    writes: Rc<RefCell<Vec<(String, String)>>>,
}

impl Attributes for Kernel {
    fn write(&self, attribute: &Path, text: &str) -> io::Result<()> {
        let name = attribute.file_name().unwrap().to_str().unwrap().to_owned();
        self.writes
            .borrow_mut()
            .push((name.clone(), text.trim().to_owned()));
        let mut failing = self.failing.borrow_mut();
        if let Some(at) = failing.iter().position(|end| attribute.ends_with(end)) {
            failing.remove(at);
            return Err(io::Error::from_raw_os_error(5));
        }
        let device = self.root.join("sys/bus/pci/devices").join(text.trim());
        match name.as_str() {
            "driver_override" => {
                let text = if text.trim().is_empty() {
                    "(null)"
                } else {
                    text.trim()
                };
                fs::write(attribute, format!("{text}\n"))
            }
            "unbind" => fs::remove_file(device.join("driver")),
            "drivers_probe" => {
                let wanted = super::attribute(&device.join("driver_override")).unwrap();
                let driver = if wanted == "(null)" {
                    "nvme"
                } else {
                    wanted.as_str()
                };
                let driver = self.root.join("sys/bus/pci/drivers").join(driver);
                // A driver that is there but refuses the function leaves it without one.
                if driver.join("refuses").exists() || !driver.exists() {
                    return Ok(());
                }
                symlink(driver, device.join("driver"))
            }
            _ => Err(io::Error::from(io::ErrorKind::NotFound)),
        }
    }
}
