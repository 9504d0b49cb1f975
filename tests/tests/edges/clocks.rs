//! Clocks that were wrong, and the points that `time:` names.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use tests::control::poll;
use tests::nbd_client::NbdClient;
use tests::program::{outcome, run};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;

/// A clock that is ahead by what a file says, in seconds.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
static volatile char *shown;
__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CLOCK_FILE");
    int fd = path ? open(path, O_RDONLY) : -1;
    if (fd < 0) return;
    void *map = mmap(0, 64, PROT_READ, MAP_SHARED, fd, 0);
    if (map != MAP_FAILED) shown = map;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int rc = real(clock, now);
    if (rc == 0 && shown && clock == CLOCK_REALTIME) now->tv_sec += atoll((const char *)shown);
    return rc;
}
"#;

/// Sets the clock, in place: the file is mapped.
fn ahead(clock: &Path, seconds: i64) -> Result<()> {
    Ok(fs::File::options().write(true).open(clock)?.write_all_at(format!("{seconds:<64}").as_bytes(), 0)?)
}

fn write(pair: &Pair<'_>, byte: u8) -> Result<()> {
    let (socket, export) = pair.sockets().remove(0);
    let mut client = NbdClient::connect(&socket, &export)?;
    client.write(&[byte; 4096], 0)?;
    client.flush()?;
    pair.source.wait()
}

/// A time between now and whatever is written next.
fn moment() -> Result<String> {
    let text = run("date", ["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"])?;
    let now = SystemTime::now();
    while now.elapsed().is_ok_and(|passed| passed < Duration::from_millis(5)) {
        std::thread::yield_now();
    }
    Ok(text.trim().to_owned())
}

/// How often the clock was set, as the receiver was told.
fn steps(pair: &Pair<'_>) -> Result<usize> {
    let points = pair.receiver.points(GROUP)?;
    let warnings = points["warnings"].as_array().cloned().unwrap_or_default();
    Ok(warnings
        .iter()
        .filter(|warning| warning.as_str().is_some_and(|text| text.contains("clock jumped")))
        .count())
}

/// A day ahead, and later in 1999, for some writes each: `time:` gives what the disk held, or refuses; what
/// was before is still had, and `lsn:` as ever.
#[test]
fn a_time_is_never_older_content_after_the_clock_was_wrong() -> Result<()> {
    story("wrong clocks", |home| {
        let (source, shim, clock) = (home.path("clock.c"), home.path("clock.so"), home.path("clock"));
        fs::write(&source, SHIM)?;
        fs::write(&clock, " ".repeat(64))?;
        ahead(&clock, 0)?;
        outcome(
            Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&shim).arg(&source).arg("-ldl"),
        )?
        .expect(0)?;
        let environment =
            vec![format!("LD_PRELOAD={}", shim.display()), format!("CLOCK_FILE={}", clock.display())];
        let spec = PairSpec {
            volumes: &[("disk", 1 << 20)],
            source_environment: environment,
            ..PairSpec::default()
        };
        let mut pair = Pair::start(home, &spec)?;
        write(&pair, 1)?;
        let before = moment()?;
        write(&pair, 2)?;
        // The clock is looked at once a second: what lies before the last look is certain.
        std::thread::sleep(Duration::from_millis(2500));
        let mut asked = vec![(1, before)];
        let mut told = 0;
        for (wrong, byte) in [(86_400, 3), (-850_000_000, 5)] {
            // The first while it runs, the second over a stop and start.
            let over_a_start = wrong < 0;
            for (seconds, byte) in [(wrong, byte), (0, byte + 1)] {
                if over_a_start {
                    ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
                }
                ahead(&clock, seconds)?;
                if over_a_start {
                    pair.start_source()?;
                    pair.until_served()?;
                }
                told += 1;
                poll("the step in the stream", Duration::from_secs(20), || {
                    Ok((steps(&pair)? == told).then_some(()))
                })?;
                write(&pair, byte)?;
                asked.push((byte, moment()?));
            }
        }
        let restored = home.path("restored.img");
        for (byte, time) in asked {
            let (at, to) = (format!("time:{time}"), restored.to_string_lossy().into_owned());
            let done = pair.receiver.command(&["restore", GROUP, "--at", &at, "--to", &to, "--force"])?;
            match done.code {
                0 => ensure!(fs::read(&restored)?[0] == byte, "{at} held {byte}: {done}"),
                3 => ensure!(byte != 1 && done.stderr.contains("nearest points"), "{done}"),
                _ => anyhow::bail!("{done}"),
            }
        }
        pair.restore("latest", &restored)?;
        ensure!(fs::read(&restored)?[0] == 6, "latest is the newest");
        Ok(())
    })
}

/// The sides differ: both say so, and `time:` is the source's.
#[test]
fn clocks_that_differ_are_told_by_both_sides() -> Result<()> {
    story("clocks that differ", |home| {
        let pair = Pair::start(home, &PairSpec { volumes: &[("disk", 1 << 20)], ..PairSpec::default() })?;
        for side in [&pair.source, &pair.receiver] {
            let group =
                side.until("a skew", Duration::from_secs(20), |group| group.0["clock_skew_ms"].is_i64())?;
            let skew = group.0["clock_skew_ms"].as_i64().unwrap_or(i64::MAX);
            ensure!(skew.abs() < 5_000, "one machine has one clock: {skew} ms");
        }
        Ok(())
    })
}
