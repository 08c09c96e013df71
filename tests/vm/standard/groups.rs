//! Two controllers in one IOMMU group.

use nvme_async::Error;

use crate::harness::{self, address, assert_says, run};
use crate::kernel::Kernel;

/// They share the group and its addresses.
#[test]
fn both_in_one_process() {
    run(120, async || {
        let first = harness::open("group_first").await;
        let second = harness::open("group_second").await;
        for round in 0..20u8 {
            let offset = u64::from(round) * 8192;
            let (one, two) = (vec![round; 64 << 10], vec![!round; 64 << 10]);
            first.write(offset, one.clone()).await.expect("writes");
            second.write(offset, two.clone()).await.expect("writes");
            assert_eq!(first.read(offset, one.len()).await.expect("reads"), one);
            assert_eq!(second.read(offset, two.len()).await.expect("reads"), two);
        }
        // Memory of the one controller as the buffer of the other.
        let mut buffer = first.allocate(64 << 10).expect("allocates");
        buffer.fill(0x3c);
        second.write(0, buffer).await.expect("writes");
        assert_eq!(
            second.read(0, 64 << 10).await.expect("reads"),
            vec![0x3c; 64 << 10]
        );
        harness::close(first).await;
        assert_eq!(second.read(0, 512).await.expect("reads"), vec![0x3c; 512]);
        harness::close(second).await;
    });
}

#[test]
fn one_alone_while_the_kernel_has_the_other() {
    run(120, async || {
        let kernel = Kernel::take(&address("group_second"));
        kernel.disk(1);
        let error = nvme_async::open(&harness::url("group_first", 1)).await;
        let error = error.expect_err("the group can only be given away whole");
        assert!(matches!(error, Error::Open { .. }), "{error:?}");
        let other = address("group_second");
        assert_says(
            error,
            &[
                &*address("group_first"),
                "IOMMU group",
                &*other,
                "nvme-async bind",
            ],
        );
        drop(kernel);
        harness::close(harness::open("group_first").await).await;
    });
}
