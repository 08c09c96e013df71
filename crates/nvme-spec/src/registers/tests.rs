use std::string::ToString;

use proptest::prelude::*;

use super::*;

#[test]
fn capabilities_by_hand() {
    // MQES 7FFh, CQR, TO 15, DSTRD 0, CSS NVM, MPSMIN 0, MPSMAX 4, CMBS, CRMS both.
    let bits = 0x07ff | 1 << 16 | 15 << 24 | 1 << 37 | 4 << 52 | 1 << 57 | 3 << 59;
    let capabilities = Capabilities::from_bits(bits);
    assert_eq!(capabilities.mqes(), 0x7ff);
    assert_eq!(capabilities.max_queue_entries(), 0x800);
    assert!(capabilities.cqr());
    assert_eq!(capabilities.timeout_ms(), 7500);
    assert_eq!(capabilities.dstrd(), 0);
    assert!(capabilities.supports_nvm_command_set() && !capabilities.supports_all_command_sets());
    assert_eq!(capabilities.min_page_size(), 0x1000);
    assert_eq!(capabilities.max_page_size(), 0x1_0000);
    assert!(capabilities.cmbs() && !capabilities.pmrs() && !capabilities.nsss());
    assert_eq!(capabilities.crms(), 3);
}

#[test]
fn each_capability_is_at_its_bits() {
    let with = Capabilities::new;
    assert_eq!(with().with_mqes(u16::MAX).into_bits(), 0xffff);
    assert_eq!(with().with_cqr(true).into_bits(), 1 << 16);
    assert_eq!(with().with_ams(3).into_bits(), 3 << 17);
    assert_eq!(with().with_to(0xff).into_bits(), 0xff << 24);
    assert_eq!(with().with_dstrd(0xf).into_bits(), 0xf << 32);
    assert_eq!(with().with_nssrs(true).into_bits(), 1 << 36);
    assert_eq!(with().with_css(0xff).into_bits(), 0xff << 37);
    assert_eq!(with().with_bps(true).into_bits(), 1 << 45);
    assert_eq!(with().with_cps(3).into_bits(), 3 << 46);
    assert_eq!(with().with_mpsmin(0xf).into_bits(), 0xf << 48);
    assert_eq!(with().with_mpsmax(0xf).into_bits(), 0xf << 52);
    assert_eq!(with().with_pmrs(true).into_bits(), 1 << 56);
    assert_eq!(with().with_cmbs(true).into_bits(), 1 << 57);
    assert_eq!(with().with_nsss(true).into_bits(), 1 << 58);
    assert_eq!(with().with_crms(3).into_bits(), 3 << 59);
    assert!(with().with_css(0x40).supports_all_command_sets());
}

#[test]
fn configuration_by_hand() {
    let configuration = ControllerConfiguration::new()
        .with_en(true)
        .with_mps(1)
        .with_iosqes(6)
        .with_iocqes(4);
    assert_eq!(configuration.into_bits(), 0x0046_0081);
    let shutdown = configuration.with_shn(ShutdownNotification::Normal);
    assert_eq!(shutdown.into_bits(), 0x0046_4081);
    let all = ControllerConfiguration::new()
        .with_css(6)
        .with_ams(7)
        .with_shn(ShutdownNotification::Abrupt)
        .with_crime(true);
    assert_eq!(all.into_bits(), 0x0100_b860);
}

#[test]
fn status_by_hand() {
    let status = ControllerStatus::from_bits(0x0000_0009);
    assert!(status.rdy() && !status.cfs() && !status.is_gone());
    assert_eq!(status.shst(), ShutdownStatus::Complete);
    assert!(ControllerStatus::from_bits(0x02).cfs());
    assert!(ControllerStatus::from_bits(0x10).nssro());
    assert!(ControllerStatus::from_bits(0x20).pp());
    assert!(ControllerStatus::from_bits(0x40).st());
    assert!(ControllerStatus::GONE.is_gone());
    assert_eq!(ControllerStatus::GONE.shst(), ShutdownStatus::Reserved);
}

#[test]
fn other_registers_by_hand() {
    let attributes = AdminQueueAttributes::new().with_asqs(31).with_acqs(63);
    assert_eq!(attributes.into_bits(), 0x003f_001f);
    let timeouts = ReadyTimeouts::from_bits(0x0002_0014);
    assert_eq!((timeouts.crwmt(), timeouts.crimt()), (0x14, 2));
    let location = CmbLocation::from_bits(0x0001_0102);
    assert_eq!(
        (location.bir(), location.cqda(), location.ofst()),
        (2, true, 0x10)
    );
    let size = CmbSize::from_bits(0x0000_4219);
    assert!(size.sqs() && !size.cqs() && size.rds() && size.wds());
    assert_eq!(size.bytes(), Some(4 << 20));
    assert_eq!(
        CmbSize::new().with_sz(1).with_szu(6).bytes(),
        Some(64 << 30)
    );
    assert_eq!(CmbSize::new().with_sz(1).with_szu(7).bytes(), None);
}

#[test]
fn versions_read_as_they_are_written() {
    assert_eq!(Version::from_bits(0x0002_0000).to_string(), "2.0");
    assert_eq!(Version::from_bits(0x0001_0201).to_string(), "1.2.1");
    assert!(Version::from_bits(0x0001_0400) < Version::from_bits(0x0002_0000));
}

#[test]
fn doorbells_by_hand() {
    use DoorbellKind::{CompletionHead, SubmissionTail};
    assert_eq!(doorbell_offset(0, SubmissionTail, 0), 0x1000);
    assert_eq!(doorbell_offset(0, CompletionHead, 0), 0x1004);
    assert_eq!(doorbell_offset(3, SubmissionTail, 0), 0x1018);
    assert_eq!(doorbell_offset(3, CompletionHead, 2), 0x1070);
    assert_eq!(
        doorbell_offset(u16::MAX, CompletionHead, 0),
        0x1000 + 4 * 0x1_ffff
    );
    // 1000h + 1FFFFh × 8000h still is below 4 GiB, the next stride is not.
    assert_eq!(doorbell_offset(u16::MAX, CompletionHead, 13), 0xffff_9000);
    assert_eq!(doorbell_offset(u16::MAX, CompletionHead, 14), u32::MAX);
    assert_eq!(doorbell_offset(u16::MAX, CompletionHead, 15), u32::MAX);
}

#[test]
fn doorbell_buffers_by_hand() {
    use DoorbellKind::{CompletionHead, SubmissionTail};
    assert_eq!(doorbell_buffer_offset(0, SubmissionTail, 0), 0);
    assert_eq!(doorbell_buffer_offset(0, CompletionHead, 0), 4);
    assert_eq!(doorbell_buffer_offset(3, SubmissionTail, 0), 24);
    assert_eq!(doorbell_buffer_offset(3, CompletionHead, 2), 7 * 16);
    assert_eq!(
        doorbell_buffer_offset(u16::MAX, CompletionHead, 15),
        0x1_ffff * 0x2_0000
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn registers_keep_all_bits(wide: u64, narrow: u32) {
        prop_assert_eq!(Capabilities::from_bits(wide).into_bits(), wide);
        prop_assert_eq!(ControllerConfiguration::from_bits(narrow).into_bits(), narrow);
        prop_assert_eq!(ControllerStatus::from_bits(narrow).into_bits(), narrow);
        prop_assert_eq!(AdminQueueAttributes::from_bits(narrow).into_bits(), narrow);
        prop_assert_eq!(CmbLocation::from_bits(narrow).into_bits(), narrow);
        prop_assert_eq!(CmbSize::from_bits(narrow).into_bits(), narrow);
        prop_assert_eq!(ReadyTimeouts::from_bits(narrow).into_bits(), narrow);
    }

    #[test]
    fn doorbells_do_not_overlap(first: u16, second: u16, dstrd in 0u8..12) {
        use DoorbellKind::{CompletionHead, SubmissionTail};
        let stride = 4 << dstrd;
        let offset = doorbell_offset(first, SubmissionTail, dstrd);
        prop_assert_eq!(doorbell_offset(first, CompletionHead, dstrd), offset + stride);
        let other = doorbell_offset(second, SubmissionTail, dstrd);
        prop_assert!(first == second || offset.abs_diff(other) >= 2 * stride);
    }
}
