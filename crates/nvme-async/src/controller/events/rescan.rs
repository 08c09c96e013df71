//! Finding out what has changed about the namespaces.

use std::collections::BTreeSet;

use nvme_spec::log::ChangedNamespaces;

use super::super::event_stream::{ControllerEvent, NamespaceChange};
use super::Events;
use crate::Error;
use crate::namespace::registry::Arrivals;
use crate::namespace::seen::Seen;

/// If more namespaces than this come at a time, they are not looked at one by one.
const MANY: usize = 1024;

/// Which namespaces may have changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// These, in increasing order.
    These(Vec<u32>),
    /// More than the controller says.
    Many,
    /// The controller does not say which, or not credibly.
    Unknown,
}

/// What a Changed Namespace List says, without what can't be true.
pub(super) fn listed(address: &str, list: &ChangedNamespaces, max_namespace: u32) -> Which {
    if list.has_overflowed() {
        return Which::Many;
    }
    let mut nsids = Vec::new();
    for nsid in list.iter() {
        let is_next = nsids.last().is_none_or(|&last| nsid > last);
        if nsid > max_namespace || !is_next {
            tracing::warn!(
                address,
                nsid,
                "the list of changed namespaces has an entry that can't be"
            );
            continue;
        }
        nsids.push(nsid);
    }
    // There was an event, so something has changed; unless it was read for an earlier event.
    if nsids.is_empty() {
        return Which::Unknown;
    }
    Which::These(nsids)
}

impl Events {
    /// Reads which namespaces are active and what they are now, updates open handles and tells
    /// subscribers. Of namespaces that nobody has open only those that came or are in the list are
    /// looked at.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped, handles that were not updated yet wait for the next time.
    pub(super) async fn rescan(&self, which: Which) -> Result<(), Error> {
        let Arrivals { came, went } = self.note_active().await?;
        for nsid in went {
            self.publish(ControllerEvent::NamespaceChanged {
                nsid,
                change: NamespaceChange::Detached,
            });
        }
        let is_many = which == Which::Many || came.len() > MANY;
        let came: BTreeSet<u32> = match came.len() {
            ..=MANY => came.into_iter().collect(),
            _ => BTreeSet::new(),
        };
        let mut nsids = came.clone();
        match which {
            Which::These(listed) => {
                let active = listed
                    .into_iter()
                    .filter(|&nsid| self.namespaces.is_active(nsid));
                nsids.extend(active);
            }
            Which::Many | Which::Unknown => nsids.extend(self.namespaces.open()),
        }
        for nsid in nsids {
            let Looked { capacity, change } = self.look_at(nsid).await?;
            let change = match capacity {
                Some(capacity) if came.contains(&nsid) => {
                    Some(NamespaceChange::Attached { capacity })
                }
                _ => change,
            };
            if let Some(change) = change {
                let address = &*self.logs.admin.address;
                tracing::info!(address, nsid, ?change, "a namespace has changed");
                self.publish(ControllerEvent::NamespaceChanged { nsid, change });
            }
        }
        if is_many {
            self.publish(ControllerEvent::ManyNamespacesChanged);
        }
        Ok(())
    }

    /// Reads which namespaces are active.
    pub(super) async fn note_active(&self) -> Result<Arrivals, Error> {
        let ticket = self.namespaces.ticket();
        let active = self
            .logs
            .admin
            .active_namespaces(self.max_namespace)
            .await?;
        Ok(self.namespaces.set_active(ticket, &active))
    }

    /// Asks what a namespace is; nothing if it is not active. What can't be is refused with the
    /// reason.
    pub(crate) async fn see(&self, nsid: u32) -> Result<Result<Option<Seen>, &'static str>, Error> {
        let admin = &self.logs.admin;
        let identify = admin.identify_namespace(nsid).await?;
        let descriptors = match self.has_descriptors && identify.is_active() {
            true => admin.namespace_descriptors(nsid).await.map(Some),
            false => Ok(None),
        };
        let descriptors = match descriptors {
            Ok(descriptors) => descriptors,
            // It may have no identifiers, or it has gone since.
            Err(error @ Error::Command(_)) => {
                tracing::debug!(%error, "a namespace has no descriptors");
                None
            }
            Err(error) => return Err(error),
        };
        Ok(Seen::new(identify, descriptors.as_deref()))
    }

    /// Asks what a namespace that is believed to be active is, and tells its handles.
    pub(crate) async fn look_at(&self, nsid: u32) -> Result<Looked, Error> {
        let address = &*self.logs.admin.address;
        let ticket = self.namespaces.ticket();
        let seen = match self.see(nsid).await {
            Ok(seen) => seen,
            // It may have gone since; another event tells of that.
            Err(error @ Error::Command(_)) => {
                tracing::warn!(%error, "a namespace that has changed could not be looked at");
                return Ok(Looked::default());
            }
            Err(error) => return Err(error),
        };
        match seen {
            Ok(Some(seen)) => {
                let capacity = Some(seen.geometry().capacity());
                let change = self.namespaces.apply(nsid, ticket, seen);
                Ok(Looked { capacity, change })
            }
            Ok(None) => {
                self.namespaces.set_gone(nsid, ticket);
                Ok(Looked::default())
            }
            // What it said before could be, so that stays.
            Err(claim) => {
                tracing::warn!(address, nsid, claim, "a namespace claims what can't be");
                Ok(Looked::default())
            }
        }
    }
}

/// What a look at a namespace has shown.
#[derive(Debug, Default)]
pub(crate) struct Looked {
    /// In bytes; nothing if it is not active or makes no sense.
    capacity: Option<u64>,
    change: Option<NamespaceChange>,
}
