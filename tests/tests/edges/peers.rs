//! Peers that are not what they were: a source and its clone.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::control::{Control, poll};
use tests::daemon::Daemon;
use tests::nbd_client::NbdClient;
use tests::program::{afterimage_path, run};
use tests::rig::{Pair, PairSpec};
use tests::story;

const SOON: Duration = Duration::from_secs(30);
/// How often both are looked at, with a write to each before.
const LOOKS: u32 = 60;

/// Removed when the story ends: rings take up memory.
struct Rings(PathBuf);

impl Drop for Rings {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A machine was copied, and both run: the same identity, state and disk. The first stays the source.
#[test]
fn of_a_source_and_its_clone_one_goes_on_and_both_say_so() -> Result<()> {
    story("cloned source", |home| {
        let spec = PairSpec { volumes: &[("v", 4 << 20)], ..PairSpec::default() };
        let mut pair = Pair::start(home, &spec)?;
        pair.source.wait()?;
        ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
        let (first, clone) = (home.path("source"), home.path("clone"));
        run("cp", ["-a".as_ref(), first.as_os_str(), clone.as_os_str()])?;
        let text = fs::read_to_string(home.path("source.toml"))?;
        let ring_dir = text.lines().find_map(|line| line.strip_prefix("ring_dir = ")).context("a ring")?;
        let ring_dir = ring_dir.trim_matches('"').to_owned();
        let rings = Rings(PathBuf::from(format!("{ring_dir}-clone")));
        let text = text
            .replace(&format!("\"{}\"", first.display()), &format!("\"{}\"", clone.display()))
            .replace(&format!("\"{}/", first.display()), &format!("\"{}/", clone.display()))
            .replace(&ring_dir, &rings.0.to_string_lossy());
        fs::write(home.path("clone.toml"), text)?;
        pair.start_source()?;
        let epoch = pair.until_served()?.number("epoch");

        let config = home.path("clone.toml");
        let config = config.to_string_lossy();
        let mut daemon =
            Daemon::start(home, "clone", &afterimage_path()?, ["replicate", "--config", &*config])?;
        let second = Control::new(clone.join("control.sock"));
        let (socket, export) = pair.sockets().remove(0);
        let mut ours = NbdClient::connect(&socket, &export)?;
        let theirs = poll("the clone to serve its disk", SOON, || {
            daemon.expect_alive()?;
            Ok(NbdClient::connect(&clone.join("v.nbd.sock"), &export).ok())
        });
        let mut theirs = theirs?;
        let mut looks = 0;
        poll("both to be looked at", SOON, || {
            let offset = u64::from(looks % 64) * 4096;
            ours.write(&[1; 4096], offset)?;
            theirs.write(&[2; 4096], offset)?;
            let group = pair.source.group()?;
            ensure!(group.state() == "replicating", "the first was displaced: {}", group.0);
            ensure!(group.number("epoch") <= epoch + 1, "they take turns: {}", group.0);
            let group = second.group()?;
            let is_plain = group.state() == "replicating" && group.why().is_empty();
            ensure!(!is_plain, "the clone says replicating: {}", group.0);
            looks += 1;
            Ok((looks >= LOOKS).then_some(()))
        })?;
        pair.source
            .until("the first's word on its copy", SOON, |group| group.why().contains("another copy"))?;
        second.until("the clone's word", SOON, |group| group.why().contains("another copy"))?;
        pair.receiver.until("the receiver's word", SOON, |group| group.0.to_string().contains("copy"))?;
        ours.flush()?;
        pair.assert_replica_equals_source()?;
        ensure!(daemon.stop()?.success(), "the clone ends in order");
        Ok(())
    })
}
