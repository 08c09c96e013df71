//! The only network that a guest may have: ports of this machine's that lead to ports of its own.

use std::str::FromStr;

use anyhow::{Context, Error, Result};

/// Where on the guest's PCI bus the network card sits: before the controllers, and after all that the
/// guest's init looks for, since the kernel numbers virtio devices in their order.
pub(crate) const SLOT: usize = 0xf;
/// The guest's address, which its init script sets.
const GUEST: &str = "10.0.2.15";

/// A TCP port of this machine's loopback, and the guest's port that it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forward {
    host: u16,
    guest: u16,
}

impl FromStr for Forward {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let ports = text.split_once(':').context("HOST:GUEST is expected")?;
        let port = |port: &str| port.parse().with_context(|| format!("`{port}` is no port"));
        Ok(Self {
            host: port(ports.0)?,
            guest: port(ports.1)?,
        })
    }
}

/// QEMU's arguments for a network in which there is nothing else; none without ports.
pub(crate) fn arguments(forwards: &[Forward]) -> Vec<String> {
    if forwards.is_empty() {
        return Vec::new();
    }
    let mut network = "user,id=network,restrict=on".to_owned();
    for Forward { host, guest } in forwards {
        network += &format!(",hostfwd=tcp:127.0.0.1:{host}-{GUEST}:{guest}");
    }
    let device = format!("virtio-net-pci,addr={SLOT:#x},netdev=network,romfile=");
    ["-netdev".to_owned(), network, "-device".to_owned(), device].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_lead_to_the_guest() {
        let forwards = ["40000:6380", "40001:22"].map(|text| text.parse().unwrap());
        let arguments = arguments(&forwards);
        let expected = "user,id=network,restrict=on,hostfwd=tcp:127.0.0.1:40000-10.0.2.15:6380,\
                        hostfwd=tcp:127.0.0.1:40001-10.0.2.15:22";
        assert_eq!(arguments[1], expected);
    }

    #[test]
    fn a_machine_has_no_network_unless_told() {
        assert_eq!(arguments(&[]), [""; 0]);
    }

    #[test]
    fn what_is_no_port_is_refused() {
        for text in ["6380", "a:6380", "40000:", "70000:1", "1:2:3"] {
            assert!(text.parse::<Forward>().is_err(), "{text}");
        }
    }
}
