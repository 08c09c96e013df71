//! Finding out what has changed about the namespaces.

use std::collections::BTreeSet;
use std::sync::Arc;

use nvme_spec::log::ChangedNamespaces;

use super::super::event_stream::{ControllerEvent, NamespaceChange};
use super::Events;
use crate::Error;
use crate::namespace::live::Geometry;
use crate::namespace::registry::Arrivals;

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
            self.look_at(nsid, came.contains(&nsid)).await?;
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

    async fn look_at(&self, nsid: u32, is_new: bool) -> Result<(), Error> {
        let address = &*self.logs.admin.address;
        let ticket = self.namespaces.ticket();
        let identify = match self.logs.admin.identify_namespace(nsid).await {
            Ok(identify) => identify,
            // It may have gone since; another event tells of that.
            Err(error @ Error::Command(_)) => {
                tracing::warn!(%error, "a namespace that has changed could not be looked at");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let geometry = match Geometry::new(&identify) {
            Ok(Some(geometry)) => geometry,
            Ok(None) => {
                self.namespaces.set_gone(nsid, ticket);
                return Ok(());
            }
            Err(claim) => {
                tracing::warn!(address, nsid, claim, "a namespace claims what can't be");
                return Ok(());
            }
        };
        let change = self
            .namespaces
            .apply(nsid, ticket, Arc::from(identify), geometry);
        let change = match change {
            _ if is_new => Some(NamespaceChange::Attached {
                capacity: geometry.capacity(),
            }),
            change => change,
        };
        if let Some(change) = change {
            tracing::info!(address, nsid, ?change, "a namespace has changed");
            self.publish(ControllerEvent::NamespaceChanged { nsid, change });
        }
        Ok(())
    }
}
