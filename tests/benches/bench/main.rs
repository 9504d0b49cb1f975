//! `just bench`: every figure beside its peer or bare limit, measured in the same run on the same machine.
//!
//! Arguments: names of parts to run (`front sustained lag restore compare sync`; all without), `--json` for
//! JSON on standard output instead of the table. The disk under test is `AFTERIMAGE_TEST_DIR`, or the
//! temporary directory.

mod bare;
mod compare;
mod cpu;
mod data;
mod fio;
mod front;
mod lag;
mod pair;
mod report;
mod restore;
mod sync;

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::report::Report;

/// In this order.
const PARTS: [&str; 6] = ["front", "sustained", "lag", "restore", "compare", "sync"];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let json = arguments.iter().any(|argument| argument == "--json");
    let parts: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| *wanted == part);
    let binary = match std::env::var_os("AFTERIMAGE_BIN") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/release/afterimage")),
    };
    anyhow::ensure!(
        binary.exists(),
        "{} is missing: run `cargo build --release -p afterimage` first",
        binary.display()
    );
    let base = std::env::var_os("AFTERIMAGE_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir =
        tempfile::Builder::new().prefix("afterimage-bench-").tempdir_in(base).context("make a directory")?;
    let mut report = Report::default();
    eprintln!("{}", report::machine());
    // A part that fails takes no other with it.
    let mut failed = Vec::new();
    for part in PARTS.into_iter().filter(|part| wanted(part)) {
        let done = match part {
            "front" => front::compare(&binary, dir.path(), &mut report),
            "sustained" => bare::measure(dir.path())
                .and_then(|costs| front::sustained(&binary, dir.path(), &costs, &mut report)),
            "lag" => lag::measure(&binary, dir.path(), &mut report),
            "restore" => restore::compare(&binary, dir.path(), &mut report),
            "compare" => compare::measure(&binary, dir.path(), &mut report),
            _ => sync::measure(&mut report),
        };
        if let Err(error) = done {
            eprintln!("  {part} failed: {error:#}");
            failed.push(part);
        }
    }
    if json {
        println!("{:#}", report.json());
    } else {
        println!("{}\n{}", report::machine(), report.table());
    }
    for what in report.short() {
        eprintln!("fell short: {what}");
    }
    anyhow::ensure!(failed.is_empty(), "these parts failed: {}", failed.join(", "));
    Ok(())
}
