//! A machine whose IOMMU does not check where interrupts go.

use std::fs;

use crate::harness::{self, address, assert_says, program, run, url};

/// VFIO's own switch for it.
const ALLOW: &str = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";

#[test]
fn is_refused_with_what_to_do() {
    run(60, async || {
        let message = nvme_async::open(&url("plain", 1))
            .await
            .expect_err("the kernel refuses");
        let advice = [
            &*address("plain"),
            "interrupt remapping",
            "allow_unsafe_interrupts=1",
        ];
        assert_says(message, &advice);
        let ended = program(&["nvme-async", "identify", &url("plain", 1)]);
        assert_eq!(ended.status, Some(1), "{ended:#?}");
        assert_says(ended.stderr, &advice);
    });
}

#[test]
fn works_when_the_advice_is_followed() {
    run(60, async || {
        fs::write(ALLOW, "Y").expect("root may change the parameter");
        let namespace = harness::open("plain").await;
        namespace.write(4096, vec![7; 4096]).await.expect("writes");
        assert_eq!(
            namespace.read(4096, 4096).await.expect("reads"),
            vec![7; 4096]
        );
        harness::close(namespace).await;
        fs::write(ALLOW, "N").expect("root may change the parameter");
    });
}
