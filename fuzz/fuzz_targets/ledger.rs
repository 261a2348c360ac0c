//! libFuzzer's way into [`bodies::ledger`], which says what is checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::ledger::run(data));
