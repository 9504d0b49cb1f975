//! The help texts are part of the contract: each is kept in `tests/help/`. `UPDATE_HELP=1` writes them anew;
//! read the difference before it goes in.

use std::path::Path;
use std::process::{Command, Stdio};

const COMMANDS: [&[&str]; 28] = [
    &[],
    &["up"],
    &["replicate"],
    &["receive"],
    &["status"],
    &["wait"],
    &["points"],
    &["bookmark"],
    &["attach"],
    &["detach"],
    &["restore"],
    &["rewind"],
    &["resume"],
    &["resync"],
    &["hold"],
    &["verify"],
    &["admit"],
    &["scrub"],
    &["journal"],
    &["journal", "ls"],
    &["journal", "verify"],
    &["journal", "dump"],
    &["identity"],
    &["identity", "new"],
    &["identity", "show"],
    &["conf"],
    &["conf", "check"],
    &["demo"],
];

#[test]
fn help_texts_are_what_they_were() {
    let mut changed = Vec::new();
    for command in COMMANDS {
        let output = Command::new(env!("CARGO_BIN_EXE_afterimage"))
            .args(command)
            .arg("--help")
            .env("COLUMNS", "100")
            .env_remove("AFTERIMAGE_CONTROL")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{command:?}");
        let name = [&["afterimage"], command].concat().join("-");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help").join(format!("{name}.txt"));
        let text = String::from_utf8(output.stdout).unwrap();
        if std::env::var_os("UPDATE_HELP").is_some() {
            std::fs::write(&path, text).unwrap();
        } else if std::fs::read_to_string(&path).unwrap_or_default() != text {
            changed.push(name);
        }
    }
    assert!(changed.is_empty(), "help of {changed:?} differs from tests/help; UPDATE_HELP=1 accepts it");
}
