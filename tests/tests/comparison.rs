//! After an unclean end of the machine everything is in doubt and nearly everything is there: both sides
//! hash, and only what differs is sent.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use tests::control::Group;
use tests::nbd_client::NbdClient;
use tests::outsider::Outsider;
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
/// What a chunk of the comparison is.
const CHUNK: u64 = 64 << 10;
const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn only_what_differs_is_sent_after_an_unclean_end() -> Result<()> {
    story("comparison by hash", |home| {
        let mut random = home.rng();
        std::fs::create_dir_all(home.path("source"))?;
        let disk = Outsider::create(home.path("source").join("disk.img"))?;
        disk.set_len(SIZE)?;
        let mut piece = vec![0; 1 << 20];
        for at in (0..SIZE).step_by(piece.len()) {
            random.fill(piece.as_mut_slice());
            disk.write_all_at(&piece, at)?;
        }
        let mut pair = Pair::start(home, &PairSpec { volumes: &[("disk", SIZE)], ..PairSpec::default() })?;
        pair.assert_replica_equals_source()?;
        let epoch = pair.source.group()?.number("epoch");
        let log = || Ok::<_, anyhow::Error>(std::fs::read_to_string(home.log("source"))?);
        for round in 1..=2 {
            // The machine dies: the ring is gone, and one per cent of the disk is not what the replica holds.
            pair.source_daemon()?.kill()?;
            pair.lose_ring()?;
            let chunks = SIZE / CHUNK / 100;
            for _ in 0..chunks {
                let at = random.random_range(0..SIZE / CHUNK) * CHUNK;
                random.fill(&mut piece[..4096]);
                disk.write_all_at(&piece[..4096], at + 512 * random.random_range(0..8))?;
            }
            let said = log()?.len();
            pair.start_source()?;
            pair.source.until("served", MINUTE, Group::is_served)?;
            // The second time under writes: what they change while it is compared must come out right, too. A
            // chunk that is written while it is compared mostly differs.
            let (socket, export) = &pair.sockets()[0];
            let mut client = NbdClient::connect(socket, export)?;
            let mut written = 0;
            while round == 2 && pair.source.group()?.state() != "replicating" {
                random.fill(&mut piece[..8192]);
                client.write(&piece[..8192], random.random_range(0..SIZE / 8192) * 8192)?;
                written += 8192;
            }
            pair.until_served()?;
            pair.assert_replica_equals_source()?;
            ensure!(pair.source.group()?.number("epoch") == epoch + round, "an unclean end begins an epoch");
            let sent = content_bytes(&log()?[said..])?;
            let changed = chunks * CHUNK;
            home.figure(format!(
                "{} KiB changed in chunks, {} KiB sent, {} KiB written meanwhile",
                changed >> 10,
                sent >> 10,
                written >> 10
            ));
            ensure!(
                sent > 0 && sent <= changed * 6 / 5 + written * 8,
                "{sent} bytes sent, {changed} changed"
            );
        }
        Ok(())
    })
}

#[test]
fn a_receiver_that_lost_everything_is_not_given_a_part_for_the_whole() -> Result<()> {
    story("comparison, then a new receiver", |home| {
        let mut random = home.rng();
        std::fs::create_dir_all(home.path("source"))?;
        let disk = Outsider::create(home.path("source").join("disk.img"))?;
        let mut content = vec![0; 32 << 20];
        random.fill(content.as_mut_slice());
        disk.write_all_at(&content, 0)?;
        let spec = PairSpec { volumes: &[("disk", content.len() as u64)], ..PairSpec::default() };
        let mut pair = Pair::start(home, &spec)?;
        pair.assert_replica_equals_source()?;
        // An epoch that begins with what differs, not with everything.
        pair.source_daemon()?.kill()?;
        pair.lose_ring()?;
        disk.write_all_at(&[7; 4096], 0)?;
        pair.start_source()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()?;
        // The other site burns; what stands there now holds nothing.
        pair.receiver_daemon()?.kill()?;
        std::fs::remove_dir_all(pair.group_dir())?;
        std::fs::remove_file(pair.replica("disk"))?;
        let epoch = pair.source.group()?.number("epoch");
        pair.start_receiver()?;
        let newer = |group: &Group| group.number("epoch") > epoch && group.state() == "replicating";
        let group = pair.source.until("a new epoch", MINUTE, newer)?;
        home.figure(format!("epoch {epoch} to {} in the running agent", group.number("epoch")));
        pair.assert_replica_equals_source()
    })
}

#[test]
fn of_a_shipped_replica_only_what_differs_is_sent() -> Result<()> {
    story("a seeded replica", |home| {
        let mut random = home.rng();
        let mut content = vec![0; 64 << 20];
        random.fill(content.as_mut_slice());
        let place = home.path("receiver").join("replica").join(GROUP).join("disk.img");
        std::fs::create_dir_all(place.parent().context("it has one")?)?;
        std::fs::write(&place, &content)?;
        // While the copy was on its way, the disk was used.
        let changed = 20;
        for chunk in 0..changed {
            content[chunk * 40 * 65536..][..512].fill(0x5e);
        }
        std::fs::create_dir_all(home.path("source"))?;
        std::fs::write(home.path("source").join("disk.img"), &content)?;
        let volumes = &[("disk", content.len() as u64)];
        let receiver = format!("[[replica]]\ngroup = \"{GROUP}\"\nvolume = \"disk\"\nseeded = true");
        let pair = Pair::start(home, &PairSpec { volumes, receiver: &receiver, ..PairSpec::default() })?;
        pair.assert_replica_equals_source()?;
        let sent = content_bytes(&std::fs::read_to_string(home.log("source"))?)?;
        home.figure(format!("{} KiB of {} MiB sent", sent >> 10, content.len() >> 20));
        ensure!(sent == changed as u64 * CHUNK, "{sent} bytes sent");
        Ok(())
    })
}

/// What the agent's log says of the last synchronisation.
fn content_bytes(log: &str) -> Result<u64> {
    let (_, after) = log.rsplit_once("content_bytes=").context("the log tells no synchronisation")?;
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    Ok(digits.parse()?)
}
