//! Any bytes as a request's head.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| plugrack_fuzz::head(input));
