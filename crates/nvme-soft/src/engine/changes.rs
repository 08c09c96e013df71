//! What the embedder, or a fault, changes between two commands.

use nvme_spec::event::{AsyncEvent, Event};
use nvme_spec::log::CriticalWarning;

use super::Engine;
use crate::change::{ChangeError, NamespaceChange};
use crate::config::{NamespaceConfig, check_lba_size};

impl Engine {
    /// Changes a namespace, and tells a host that asked for it.
    pub(crate) fn change_namespace(&mut self, change: NamespaceChange) -> Result<(), ChangeError> {
        self.settle();
        let (nsid, changed) = match change {
            NamespaceChange::Resize { nsid, bytes } => {
                (nsid, self.namespaces.existing(nsid)?.resize(nsid, bytes)?)
            }
            NamespaceChange::Format { nsid, lba_size } => {
                check_lba_size(lba_size)?;
                let namespace = self.namespaces.existing(nsid)?;
                (nsid, namespace.format(nsid, lba_size)?)
            }
            NamespaceChange::Detach { nsid } => {
                (nsid, self.namespaces.existing(nsid)?.set_attached(false))
            }
            NamespaceChange::Attach { nsid } => {
                (nsid, self.namespaces.existing(nsid)?.set_attached(true))
            }
        };
        if changed {
            self.note_changed_namespace(nsid);
        }
        Ok(())
    }

    /// Adds a namespace, attached, and returns its identifier.
    pub(crate) fn add_namespace(&mut self, config: NamespaceConfig) -> Result<u32, ChangeError> {
        let nsid = self.namespaces.add(config)?;
        self.note_changed_namespace(nsid);
        Ok(nsid)
    }

    /// Sets the composite temperature in kelvins.
    pub(crate) fn set_temperature(&mut self, kelvins: u16) {
        self.admin.health.temperature = kelvins;
        self.check_health();
    }

    /// Sets the critical warnings besides those that follow from the temperature.
    pub(crate) fn set_critical_warning(&mut self, warning: CriticalWarning) {
        self.admin.health.warning = warning;
        self.check_health();
    }

    fn note_changed_namespace(&mut self, nsid: u32) {
        self.admin.changed_namespaces.note(nsid);
        if self.admin.features.async_events().namespace_attributes() {
            self.raise_event(AsyncEvent::report(Event::NamespaceAttributeChanged));
        }
    }
}
