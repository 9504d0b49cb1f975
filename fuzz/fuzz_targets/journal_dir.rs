#![no_main]

#[path = "bounds/bounded.rs"]
mod bounded;

#[global_allocator]
static MEMORY: bounded::Bounded = bounded::Bounded;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| journal::fuzz::directory(bytes));
