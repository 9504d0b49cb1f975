//! Story 3, SQLite: at any lsn it opens, is sound, and holds every commit made by then.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use tests::control::Control;
use tests::database::{Commit, Disk, Shell, assert_holds, at_random_points, numbers};
use tests::program::{need, run};
use tests::story;
use tests::up::Up;

const COMMITS: u64 = 1000;

#[test]
fn sqlite_holds_every_commit_made_by_then() -> Result<()> {
    story("SQLite", |home| {
        need(&["sqlite3"])?;
        let up = Up::start(home, &["--size", "192MiB", "--volume", "disk"])?;
        let disk = Disk::make(home, &up)?;
        let commits = sqlite_life(&disk.path().join("story.db"), &up.control, home.rng())?;
        home.figure(format!("{} commits", commits.len()));
        disk.unmount()?;
        up.control.wait()?;
        at_random_points(home, &up.control, &commits, |root, lsn| {
            let database = root.join("story.db");
            let ask = |sql: &str| run("sqlite3", ["-batch".as_ref(), database.as_os_str(), sql.as_ref()]);
            let verdict = ask("PRAGMA integrity_check")?;
            ensure!(verdict == "ok", "integrity_check: {verdict}");
            assert_holds(&commits, lsn, &numbers(&ask("SELECT id FROM story")?)?)
        })
    })
}

/// Commits one by one, with an index, updates and deletes, and a WAL that is checkpointed often.
fn sqlite_life(database: &Path, control: &Control, mut random: StdRng) -> Result<Vec<Commit>> {
    let mut shell = Shell::start(Command::new("sqlite3").arg("-batch").arg(database))?;
    shell.run(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=50;
         CREATE TABLE story (id INTEGER PRIMARY KEY, text TEXT); CREATE INDEX by_text ON story(text);
         CREATE TABLE noise (id INTEGER PRIMARY KEY, bytes BLOB); SELECT 'made';",
        "made",
    )?;
    let mut commits = Vec::new();
    for id in 1..=COMMITS {
        let other = random.random_range(1..=id);
        let statements = format!(
            "BEGIN; INSERT INTO story VALUES ({id}, hex(randomblob(40)));
             INSERT OR REPLACE INTO noise VALUES ({other}, randomblob(3000)); DELETE FROM noise WHERE id = {other} / 2;
             UPDATE story SET text = hex(randomblob(30)) WHERE id = {other}; COMMIT; SELECT 'done';"
        );
        shell.run(&statements, "done")?;
        commits.push(Commit { id, lsn: control.captured()? });
    }
    shell.close()?;
    Ok(commits)
}
