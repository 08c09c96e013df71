//! Asynchronous events: always asked for, and acknowledged by reading their log page.

use std::sync::{Arc, Weak};
use std::time::Instant;

use nvme_spec::event::AsyncEvent;
use nvme_spec::identify::IdentifyController;
use nvme_spec::{admin, feature};
use tokio::runtime::Handle;

use super::ControllerInner;
use crate::Error;
use crate::engine::Notification;

/// Enough of any log page to clear its event.
const LOG_BYTES: u32 = 512;

/// The events that are wanted, of those that the controller has, as Asynchronous Event
/// Configuration takes them.
pub(super) fn configuration(identify: &IdentifyController) -> u32 {
    let wanted = feature::AsyncEventConfiguration::new()
        // Spare, temperature, reliability, read only and volatile memory backup.
        .with_smart_critical_warnings(0x1f)
        .with_namespace_attributes(true);
    wanted.into_bits() & (identify.oaes.get() | 0xff)
}

/// Switches events on and keeps `requests` requests outstanding (NVMe base specification 2.0,
/// "Asynchronous Event Request command").
pub(super) async fn arm(inner: &Arc<ControllerInner>, requests: u8) {
    let wanted = configuration(&inner.identify);
    let set = admin::set_features(feature::id::ASYNC_EVENT_CONFIGURATION, wanted, false);
    if let Err(error) = inner.admin.run(set).await {
        tracing::debug!(%error, "asynchronous events keep their default configuration");
    }
    let weak = Arc::downgrade(inner);
    inner
        .admin
        .queue
        .set_on_event(Box::new(move |notification| {
            // Called by the admin queue's reaper, so inside of a runtime.
            if let Notification::Event(event) = notification
                && let Ok(runtime) = Handle::try_current()
            {
                runtime.spawn(acknowledge(weak.clone(), event));
            }
        }));
    inner.admin.queue.with(|state| {
        for _ in 0..requests {
            state.request_event(Instant::now());
        }
    });
}

/// Reports an event, reads its log page, without which the controller sends no other of its type,
/// and asks for the next one.
async fn acknowledge(inner: Weak<ControllerInner>, event: AsyncEvent) {
    let Some(inner) = inner.upgrade() else {
        return;
    };
    let address = &*inner.admin.address;
    tracing::warn!(address, event = ?event.event(), "the controller reports an event");
    if let Err(error) = read_log(&inner, event.log_page()).await {
        tracing::warn!(address, %error, "the log page of an event could not be read");
    }
    // Only now, so that a controller can't report faster than its events are dealt with.
    inner
        .admin
        .queue
        .with(|state| state.request_event(Instant::now()));
}

async fn read_log(inner: &ControllerInner, page: u8) -> Result<(), Error> {
    let command = admin::get_log_page(page, admin::ALL_NAMESPACES, LOG_BYTES, 0, false);
    inner
        .admin
        .fetch(command, LOG_BYTES as usize)
        .await
        .map(drop)
}
