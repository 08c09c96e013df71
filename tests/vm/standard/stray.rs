//! A test of the tests: a device that accesses what it may not access is found out.

use std::thread;
use std::time::{Duration, Instant};

use nvme_async::nvme_spec::{DataPointer, admin};
use nvme_async::{CommandData, OpenOptions};
use tokio::runtime::Builder;

use crate::harness::{in_time, new_dma_faults, url};

/// An address in the middle of those that the driver hands out last.
const NOWHERE: u64 = 0x7000_0000;

#[test]
fn a_stray_access_is_noticed() {
    assert_eq!(new_dma_faults(), Vec::<String>::new());
    in_time(60, || {
        let runtime = Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let options = OpenOptions::new().url(&url("plain", 1));
            let controller = options.open_controller().await.expect("opens");
            let nowhere = DataPointer::Prp {
                prp1: NOWHERE,
                prp2: 0,
            };
            let command = admin::identify_controller().with_data(nowhere);
            let queue = controller.admin_queue();
            // SAFETY: nothing is mapped there, so the IOMMU refuses the transfer.
            let ended = unsafe { queue.submit(command, CommandData::None) }.await;
            // QEMU's controller does not notice.
            ended.expect("it completes");
            controller.shutdown().await.expect("shuts down");
        });
        let start = Instant::now();
        let faults = loop {
            let faults = new_dma_faults();
            if !faults.is_empty() {
                break faults;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "unnoticed");
            thread::sleep(Duration::from_millis(50));
        };
        let place = format!("{NOWHERE:x}");
        assert!(
            faults.iter().all(|fault| fault.contains(&place)),
            "{faults:#?}"
        );
    });
}
