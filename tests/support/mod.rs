//! What the end-to-end tests share.

pub(crate) mod bounded;
pub(crate) mod faulty;
pub(crate) mod liar;
pub(crate) mod owners;
pub(crate) mod rig;
mod strays;
pub(crate) mod suite;
pub(crate) mod tampered;

/// Whether to run what takes minutes (`NVME_ASYNC_FULL=1`) instead of a cut of it.
pub(crate) fn full() -> bool {
    std::env::var_os("NVME_ASYNC_FULL").is_some_and(|value| value == "1")
}

/// How many times longer everything takes than it usually does (`NVME_ASYNC_SLOWNESS`), as under a
/// sanitizer.
pub(crate) fn slowness() -> u32 {
    let value = std::env::var("NVME_ASYNC_SLOWNESS").ok();
    value.map_or(1, |value| {
        value.parse().expect("NVME_ASYNC_SLOWNESS is a number")
    })
}
