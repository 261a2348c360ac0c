//! libFuzzer's way into [`bodies::lock_call`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::lock_call::run(data));
