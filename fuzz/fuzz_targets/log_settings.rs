//! libFuzzer's way into [`bodies::log_settings`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::log_settings::run(data));
