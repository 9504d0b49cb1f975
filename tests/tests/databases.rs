//! Story 3: databases on a protected disk; at any lsn they open, are sound, and hold every commit made by then.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use tests::control::Control;
use tests::nbd::{FuseDisk, Loop, Mount};
use tests::program::{need, outcome, run};
use tests::rig::Up;
use tests::{Home, nbd, story};

const GROUP: &str = "default";
const POINTS: usize = 20;
const SQLITE_COMMITS: u64 = 1000;
const POSTGRES_COMMITS: u64 = 1000;

/// A commit, and the newest lsn once it had returned.
struct Commit {
    id: u64,
    lsn: u64,
}

/// A shell of a database, one statement at a time: each is answered before the next.
struct Shell {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Shell {
    fn start(command: &mut Command) -> Result<Shell> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("piped")?);
        Ok(Shell { child, stdin, stdout })
    }

    /// Runs statements whose last one prints `end`.
    fn run(&mut self, statements: &str, end: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("open until it is closed")?;
        writeln!(stdin, "{statements}")?;
        stdin.flush()?;
        let mut line = String::new();
        while line.trim() != end {
            line.clear();
            ensure!(self.stdout.read_line(&mut line)? > 0, "the database's shell ended at {statements}");
        }
        Ok(())
    }

    fn close(mut self) -> Result<()> {
        self.stdin = None;
        ensure!(self.child.wait()?.success(), "the database's shell failed");
        Ok(())
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A protected disk with ext4 on it, mounted.
struct Disk {
    mount: Mount,
    device: Loop,
    fuse: FuseDisk,
}

impl Disk {
    fn make(home: &Home, up: &Up<'_>) -> Result<Disk> {
        need(&nbd::PROGRAMS)?;
        need(&["mkfs.ext4"])?;
        let fuse = FuseDisk::attach(home, &up.control.group()?.of_volume("disk", "nbd_uri")?)?;
        let device = Loop::attach(&fuse.path())?;
        run("mkfs.ext4", ["-q".as_ref(), device.path().as_os_str()])?;
        let mount = Mount::on(&home.path("live"), device.path(), "noatime")?;
        Ok(Disk { mount, device, fuse })
    }

    fn unmount(self) -> Result<()> {
        self.mount.unmount()?;
        drop(self.device);
        self.fuse.unmount()
    }
}

/// Commits up to `lsn` must be among `found`; returns how many.
fn assert_holds(commits: &[Commit], lsn: u64, found: &[u64]) -> Result<usize> {
    let due: Vec<&Commit> = commits.iter().filter(|commit| commit.lsn <= lsn).collect();
    for commit in &due {
        ensure!(found.contains(&commit.id), "commit {} (lsn {}) is missing", commit.id, commit.lsn);
    }
    Ok(due.len())
}

/// Restores random moments of the commits and hands each mounted image to `check`, which counts the commits due.
fn at_random_points(
    home: &Home,
    control: &Control,
    commits: &[Commit],
    mut check: impl FnMut(&Path, u64) -> Result<usize>,
) -> Result<()> {
    let mut random = home.rng();
    let (first, last) = (commits.first().context("commits")?.lsn, commits.last().context("commits")?.lsn);
    let mut due = 0;
    for _ in 0..POINTS {
        let lsn = random.random_range(first..=last);
        let image = home.path("restored.img");
        control.restore(GROUP, &format!("lsn:{lsn}"), &image)?;
        let device = Loop::attach(&image)?;
        let mount = Mount::on(&home.path("past"), device.path(), "noatime")?;
        due += check(mount.path(), lsn).with_context(|| format!("lsn {lsn}"))?;
        mount.unmount()?;
    }
    home.figure(format!("{POINTS} random lsns from {first} to {last}: sound, with all of {due} commits due"));
    Ok(())
}

fn numbers(text: &str) -> Result<Vec<u64>> {
    text.split_whitespace()
        .map(|word| word.parse().with_context(|| format!("{word:?} is a number")))
        .collect()
}

#[test]
fn sqlite_holds_every_commit_made_by_then() -> Result<()> {
    story("SQLite", |home| {
        need(&["sqlite3"])?;
        let up = Up::start(home, &["--size", "192MiB", "--volume", "disk"])?;
        let disk = Disk::make(home, &up)?;
        let commits = sqlite_life(&disk.mount.path().join("story.db"), &up.control, home.rng())?;
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
    for id in 1..=SQLITE_COMMITS {
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
        let folder = disk.mount.path().join("cluster");
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
            // The lock of a server that ran when the moment was: what a machine that lost power would find, too. It names a
            // process by a number that here may be anybody's.
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
    let seconds = env::var("AFTERIMAGE_PGBENCH_SECONDS").unwrap_or_else(|_| "120".into());
    let mut bench = postgres.command("pgbench");
    bench.args(["-n", "-c", "2", "-R", "150", "-T", &seconds]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut bench = bench.spawn()?;
    let mut life = || -> Result<Vec<Commit>> {
        let mut shell = Shell::start(postgres.command("psql").args(["-qAtX", "-v", "ON_ERROR_STOP=1"]))?;
        let mut commits = Vec::new();
        for id in 1..=POSTGRES_COMMITS {
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
