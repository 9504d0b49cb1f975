//! `afterimage verify`: a replica is compared with its disk while the disk is written. No write on its way is
//! ever taken for a difference; a byte that rotted on the replica is found, named and, by order, repaired.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tests::nbd_client::NbdClient;
use tests::outsider::Outsider;
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
/// Nothing is written from here on: what rots there stays as it is.
const CALM: u64 = 200 * MIB;
const CHUNK: u64 = 64 << 10;
/// Between two writes.
const PACE: Duration = Duration::from_micros(300);

/// The command's report and exit code.
fn verify(pair: &Pair<'_>, more: &[&str]) -> Result<(Value, i32)> {
    let outcome = pair.source.command(&[&["verify", GROUP, "--json"], more].concat())?;
    ensure!(!outcome.stdout.is_empty(), "no report: {outcome}");
    Ok((serde_json::from_str(&outcome.stdout)?, outcome.code))
}

fn number(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or(u64::MAX)
}

#[test]
fn a_busy_disk_is_compared_without_a_false_alarm_and_a_rotten_byte_is_found() -> Result<()> {
    story("verify", |home| {
        let long = std::env::var_os("AFTERIMAGE_LONG").is_some();
        let load = Duration::from_secs(if long { 600 } else { 60 });
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
        let (socket, export) = pair.sockets()[0].clone();
        let over = AtomicBool::new(false);
        let seed = home.seed();
        let (rounds, writes, busy) = std::thread::scope(|scope| {
            // 4 KiB at random places, and one block that is written all the time.
            let writer = scope.spawn(|| -> Result<u64> {
                let mut random = rand::rngs::StdRng::seed_from_u64(seed ^ 1);
                let mut client = NbdClient::connect(&socket, &export)?;
                let mut block = [0; 4096];
                let mut writes = 0;
                while !over.load(Ordering::Acquire) {
                    random.fill(&mut block);
                    let place = if writes % 8 == 0 { 0 } else { random.random_range(0..CALM / 4096) };
                    client.write(&block, place * 4096)?;
                    writes += 1;
                    std::thread::sleep(PACE);
                }
                Ok(writes)
            });
            let compared = (|| -> Result<(u32, u64)> {
                let started = Instant::now();
                let (mut rounds, mut busy) = (0, 0);
                while started.elapsed() < load {
                    let (report, code) = verify(&pair, &[])?;
                    ensure!(code == 0 && report["state"] == "done", "a false alarm? {report}");
                    ensure!(number(&report, "compared_bytes") == SIZE, "{report}");
                    ensure!(number(&report, "differing_bytes") == 0, "a false alarm: {report}");
                    busy = busy.max(number(&report, "busy_bytes"));
                    rounds += 1;
                }
                Ok((rounds, busy))
            })();
            // Rotten while the load goes on.
            let found = compared.and_then(|(rounds, busy)| {
                // Rot moves no times: a write would be noticed as one by others, so it is made to look as if
                // there was none.
                ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
                let replica = File::options().read(true).write(true).open(pair.replica("disk"))?;
                let left = replica.metadata()?.modified()?;
                let at = CALM + 17 * CHUNK + 1234;
                let mut byte = [0];
                replica.read_exact_at(&mut byte, at)?;
                replica.write_all_at(&[byte[0] ^ 0x10], at)?;
                replica.set_modified(left)?;
                // An open descriptor for writing is a use by others.
                drop(replica);
                pair.start_receiver()?;
                pair.until_served()?;
                let (report, code) = verify(&pair, &[])?;
                ensure!(code == 4, "exit code {code}: {report}");
                let found = &report["differences"];
                ensure!(found.as_array().is_some_and(|found| found.len() == 1), "{report}");
                ensure!(found[0]["volume"] == "disk" && found[0]["repaired"] == false, "{report}");
                ensure!(number(&found[0], "offset") == CALM + 17 * CHUNK, "{report}");
                ensure!(number(&found[0], "length") == 4096, "{report}");
                let (report, code) = verify(&pair, &["--repair"])?;
                ensure!(code == 0 && report["differences"][0]["repaired"] == true, "not repaired: {report}");
                ensure!(verify(&pair, &[])?.1 == 0, "it differs again");
                Ok((rounds, busy))
            });
            over.store(true, Ordering::Release);
            let writes = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
            let (rounds, busy) = found?;
            anyhow::Ok((rounds, writes, busy))
        })?;
        home.figure(format!(
            "{rounds} comparisons under {writes} writes: no false alarm, {busy} bytes too busy at most"
        ));
        ensure!(writes > 1000, "that was no load");
        pair.assert_replica_equals_source()
    })
}

#[test]
fn a_verification_goes_on_after_its_agent_was_killed_and_ends_by_order() -> Result<()> {
    story("verify, killed", |home| {
        let mut pair = Pair::start(home, &PairSpec { volumes: &[("disk", SIZE)], ..PairSpec::default() })?;
        pair.until_served()?;
        let refused = verify(&pair, &["--show"]);
        ensure!(refused.is_err(), "nothing was verified yet");
        // 32 MiB a second.
        let order = json!({ "group": GROUP, "rate_bits_per_s": 32 * 8 * MIB });
        pair.source.ask("POST", "/v1/verify", &order)?;
        let other = pair.source.ask("POST", "/v1/verify", &json!({ "group": GROUP, "repair": true }));
        ensure!(format!("{other:?}").contains("another verification runs"), "{other:?}");
        let path = format!("/v1/verify/{GROUP}");
        let compared = |pair: &Pair<'_>| {
            Ok::<_, anyhow::Error>(number(&pair.source.ask("GET", &path, &Value::Null)?, "compared_bytes"))
        };
        tests::control::poll("half", Duration::from_secs(30), || {
            Ok(Some(compared(&pair)?).filter(|done| *done >= SIZE / 2))
        })?;
        let before = compared(&pair)?;
        pair.source_daemon()?.kill()?;
        pair.start_source()?;
        pair.until_served()?;
        ensure!(compared(&pair)? >= before, "it begins anew");
        let (report, code) = verify(&pair, &["--rate", "268435456bit"])?;
        ensure!(code == 0 && number(&report, "compared_bytes") == SIZE, "{report}");
        pair.source.ask("POST", "/v1/verify", &order)?;
        let (report, _) = verify(&pair, &["--stop"])?;
        ensure!(report["state"] == "stopped", "{report}");
        Ok(())
    })
}
