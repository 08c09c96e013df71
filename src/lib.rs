//! Home of the examples, end-to-end tests and benchmarks; the library is the crate `nvme-async`.
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
