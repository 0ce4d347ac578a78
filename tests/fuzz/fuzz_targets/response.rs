//! Any bytes as an answer's head.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| plugrack_fuzz::response(input));
