//! Home of the examples, end-to-end tests and benchmarks; the library is the crate `nvme-async`.
#![forbid(unsafe_code)]
