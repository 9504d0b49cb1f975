//! Story 3, PostgreSQL under pgbench: at any lsn it recovers, is sound, and holds every commit made by then.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use tests::control::Control;
use tests::database::{Commit, Disk, Shell, assert_holds, at_random_points, numbers};
use tests::program::{outcome, run};
use tests::up::Up;
use tests::{Home, story};

const COMMITS: u64 = 1000;
/// Longer than the story's own commits take: it is ended with them.
const BENCH_SECONDS: &str = "300";

/// PostgreSQL's programs, run as its own user.
struct Postgres {
    programs: PathBuf,
    sockets: PathBuf,
    user: u32,
    group: u32,
}

impl Postgres {
    fn find(home: &Home) -> Result<Postgres> {
        let versions = fs::read_dir("/usr/lib/postgresql").context("apt-get install postgresql")?;
        let mut found: Vec<PathBuf> =
            versions.map(|entry| Ok(entry?.path().join("bin"))).collect::<Result<_>>()?;
        found.retain(|programs| programs.join("pg_amcheck").exists() && programs.join("initdb").exists());
        found.sort();
        let programs =
            found.pop().context("no PostgreSQL with pg_amcheck here: apt-get install postgresql")?;
        let sockets = home.path("pg");
        fs::create_dir(&sockets)?;
        fs::set_permissions(&sockets, fs::Permissions::from_mode(0o777))?;
        let id = |flag: &str| -> Result<u32> { Ok(run("id", [flag, "postgres"])?.parse()?) };
        Ok(Postgres { programs, sockets, user: id("-u")?, group: id("-g")? })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command
            .uid(self.user)
            .gid(self.group)
            .current_dir("/")
            .env("PGHOST", &self.sockets)
            .env("PGDATABASE", "postgres");
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        Ok(outcome(self.command(program).args(args))?.expect(0)?.stdout)
    }

    fn init(&self, folder: &Path) -> Result<()> {
        let folder = folder.to_string_lossy();
        // Small WAL segments: the story is about commits, not about zeroing files.
        self.run(
            "initdb",
            &["-D", &folder, "-A", "trust", "--no-instructions", "--wal-segsize=1", "-E", "UTF8"],
        )?;
        Ok(())
    }

    fn start(&self, folder: &Path, log: &Path) -> Result<Running<'_>> {
        let options = format!(
            "-c listen_addresses= -c unix_socket_directories={} -c max_wal_size=24MB -c min_wal_size=4MB -c shared_buffers=16MB",
            self.sockets.display()
        );
        let (data, text) = (folder.to_string_lossy(), log.to_string_lossy());
        // Output goes to the log: a server that keeps our pipe open would never let us read to its end.
        let status = self
            .command("pg_ctl")
            .args(["start", "-w", "-t", "60", "-D", &data, "-l", &text, "-o", &options])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        ensure!(
            status.success(),
            "PostgreSQL does not start on {data}: {}",
            fs::read_to_string(log).unwrap_or_default()
        );
        Ok(Running { postgres: self, folder: folder.to_owned(), is_running: true })
    }
}

/// A server; stopped at once when dropped.
struct Running<'a> {
    postgres: &'a Postgres,
    folder: PathBuf,
    is_running: bool,
}

impl Running<'_> {
    fn stop(mut self, mode: &str) -> Result<()> {
        self.is_running = false;
        self.halt(mode)
    }

    fn halt(&self, mode: &str) -> Result<()> {
        let folder = self.folder.to_string_lossy();
        self.postgres.run("pg_ctl", &["stop", "-w", "-m", mode, "-D", &folder])?;
        Ok(())
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.is_running {
            let _ = self.halt("immediate");
        }
    }
}

#[test]
fn postgresql_holds_every_commit_made_by_then() -> Result<()> {
    story("PostgreSQL", |home| {
        let postgres = Postgres::find(home)?;
        let up = Up::start(home, &["--size", "384MiB", "--volume", "disk"])?;
        let disk = Disk::make(home, &up)?;
        let folder = disk.path().join("cluster");
        fs::create_dir(&folder)?;
        run("chown", ["postgres".as_ref(), folder.as_os_str()])?;
        let log = home.path("pg/server.log");
        postgres.init(&folder)?;
        let server = postgres.start(&folder, &log)?;
        let commits = postgres_life(&postgres, &up.control)?;
        server.stop("fast")?;
        home.figure(format!("{} commits beside pgbench", commits.len()));
        disk.unmount()?;
        up.control.wait()?;
        at_random_points(home, &up.control, &commits, |root, lsn| {
            let cluster = root.join("cluster");
            // The lock of a server that ran when the moment was: what a machine that lost power would find,
            // too. It names a process by a number that here may be anybody's.
            if let Err(error) = fs::remove_file(cluster.join("postmaster.pid")) {
                ensure!(error.kind() == std::io::ErrorKind::NotFound, error);
            }
            let server = postgres.start(&cluster, &log)?;
            postgres.run("pg_amcheck", &["--heapallindexed", "--install-missing", "postgres"])?;
            let found = postgres.run("psql", &["-qAtXc", "SELECT id FROM story"])?;
            let due = assert_holds(&commits, lsn, &numbers(&found)?)?;
            server.stop("fast")?;
            Ok(due)
        })
    })
}

/// Commits one by one while pgbench loads the same server.
fn postgres_life(postgres: &Postgres, control: &Control) -> Result<Vec<Commit>> {
    postgres.run("pgbench", &["-i", "-q", "-s", "1"])?;
    postgres.run("psql", &["-qAtXc", "CREATE TABLE story (id bigint PRIMARY KEY, text text)"])?;
    let mut bench = postgres.command("pgbench");
    bench
        .args(["-n", "-c", "2", "-R", "150", "-T", BENCH_SECONDS])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut bench = bench.spawn()?;
    let mut life = || -> Result<Vec<Commit>> {
        let mut shell = Shell::start(postgres.command("psql").args(["-qAtX", "-v", "ON_ERROR_STOP=1"]))?;
        let mut commits = Vec::new();
        for id in 1..=COMMITS {
            let insert =
                format!("INSERT INTO story VALUES ({id}, repeat(md5(random()::text), 20));\n\\echo done");
            shell.run(&insert, "done")?;
            commits.push(Commit { id, lsn: control.captured()? });
            if id % 100 == 0 && bench.try_wait()?.is_some() {
                bail!("pgbench ended before the story did");
            }
        }
        shell.close()?;
        Ok(commits)
    };
    let commits = life();
    // Its server will be stopped under it; it has done its part.
    bench.kill()?;
    bench.wait()?;
    commits
}
