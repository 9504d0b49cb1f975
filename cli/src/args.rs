//! The command line, as a contract: names and meanings are added to, never bent. `tests/help/` holds every
//! help text.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

mod up;

pub use up::{DiskArg, UpArgs};

/// Continuous replication of Linux block devices, with every past write a recovery point.
#[derive(Debug, Parser)]
#[command(name = "afterimage", version, propagate_version = false, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 not possible at that point or in this state, 4 corruption found."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Every command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Protect disks in one process: NBD front, replicator and a local receiver
    Up(UpArgs),
    /// Run the source daemon
    Replicate(DaemonArgs),
    /// Run the receiving daemon
    Receive(DaemonArgs),
    /// Show groups, their state and positions
    Status(StatusArgs),
    /// Wait until everything captured so far is on the replica
    Wait(WaitArgs),
    /// Show the recoverable window, bookmarks, and gaps with their reasons
    Points(PointsArgs),
    /// Name the present moment of a group; prints its lsn
    Bookmark(BookmarkArgs),
    /// Capture a device by the kernel module again, and synchronise it
    Attach(DeviceArgs),
    /// End the capture of a device, until it is attached again
    Detach(DeviceArgs),
    /// Write a group or volume as it was at any past write into a file, directory or device
    Restore(RestoreArgs),
    /// Bring a group's replica to a past moment, in place, and keep it there; frames go on being received
    Rewind(RewindArgs),
    /// Let a rewound replica roll forward to the newest again
    Resume(ResumeArgs),
    /// Overwrite a replica that others changed, by a new synchronisation; what it holds stays reachable
    Resync(ResyncArgs),
    /// Keep a bookmark, and everything since, from being dropped by retention
    Hold(HoldArgs),
    /// Take whichever copy of a group's source connects next, also one that was refused as a copy of another
    Admit(AdmitArgs),
    /// Compare a group's replica with its disks while they are used; exit code 4 where something differs
    Verify(VerifyArgs),
    /// Check a group's stored segments now, and fetch from the source what rotted; `status` tells what was
    /// found
    Scrub(ScrubArgs),
    /// List, check or print journal and undo files
    #[command(subcommand)]
    Journal(JournalCommand),
    /// Make or show the identity that a peer pins
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Work with settings files
    #[command(subcommand)]
    Conf(ConfCommand),
    /// Show it on real data: protect, write a file system, bookmark, ransom it, restore, prove by hash
    Demo(DemoArgs),
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text each.
    #[default]
    Text,
    /// One JSON object each.
    Json,
}

/// Which daemon a command speaks to.
#[derive(Clone, Debug, Default, Args)]
pub struct Target {
    /// The daemon's control socket [default: $AFTERIMAGE_CONTROL]
    #[arg(long, value_name = "SOCKET", conflicts_with = "dir")]
    pub control: Option<PathBuf>,
    /// The directory given to `up`, or a daemon's `dir`: means DIR/control.sock
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// `replicate`, `receive`.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Settings; `afterimage conf check FILE` shows what they come to
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

/// `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print the daemon's JSON
    #[arg(long)]
    pub json: bool,
    /// Show it again every second
    #[arg(long)]
    pub watch: bool,
    #[command(flatten)]
    pub target: Target,
}

/// `wait`.
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// How long to wait at most
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub timeout: Duration,
    #[command(flatten)]
    pub target: Target,
}

/// `points`.
#[derive(Debug, Args)]
pub struct PointsArgs {
    /// Name of the group
    #[arg(value_parser = parse_name)]
    pub group: String,
    /// Print the daemon's JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub target: Target,
}

/// `bookmark`.
#[derive(Debug, Args)]
pub struct BookmarkArgs {
    /// Name of the group
    #[arg(value_parser = parse_name)]
    pub group: String,
    /// Name of the bookmark; where a name is used twice, the newer one is meant
    pub name: String,
    #[command(flatten)]
    pub target: Target,
}

/// `attach`, `detach`.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// The device as the settings name it, or its volume's name
    pub device: PathBuf,
    #[command(flatten)]
    pub target: Target,
}

/// `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Name of the group
    #[arg(value_parser = parse_name, required_unless_present = "cancel")]
    pub group: Option<String>,
    /// Which moment: latest, lsn:N, time:RFC3339 (time:2026-01-31T12:00:00Z), bookmark:NAME or found:N
    #[arg(long, value_name = "POINT", value_parser = crate::restore::parse_point, required_unless_present = "cancel")]
    pub at: Option<String>,
    /// Target: a file or block device for one volume, a directory for several
    #[arg(long, value_name = "PATH", required_unless_present = "cancel")]
    pub to: Option<PathBuf>,
    /// End the restore that a daemon writes to TARGET; `status` lists those that run
    #[arg(long, value_name = "TARGET", conflicts_with_all = ["group", "at", "to", "volume", "journal", "dry_run", "force"])]
    pub cancel: Option<PathBuf>,
    /// Only this volume
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub volume: Option<String>,
    /// Read a directory whose daemon does not run: groups/NAME, or the receiver's directory
    #[arg(long, value_name = "DIR", conflicts_with = "control", conflicts_with = "dir")]
    pub journal: Option<PathBuf>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Overwrite the target if it exists
    #[arg(long)]
    pub force: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub target: Target,
}

/// `rewind`.
#[derive(Debug, Args)]
pub struct RewindArgs {
    /// Name of the group
    #[arg(value_parser = parse_name)]
    pub group: String,
    /// Which moment: latest (the last consistent one), lsn:N, time:RFC3339 or bookmark:NAME
    #[arg(long, value_name = "POINT", value_parser = crate::restore::parse_point)]
    pub at: String,
    #[command(flatten)]
    pub place: Place,
}

/// `resume`.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// Name of the group
    #[arg(value_parser = parse_name)]
    pub group: String,
    #[command(flatten)]
    pub place: Place,
}

/// `resync`.
#[derive(Debug, Args)]
pub struct ResyncArgs {
    /// Name of the group
    #[arg(value_parser = parse_name)]
    pub group: String,
    /// Yes: what others wrote to the replica is overwritten
    #[arg(long, required = true)]
    pub overwrite: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub target: Target,
}

/// `hold`.
#[derive(Debug, Args)]
pub struct HoldArgs {
    /// Name of the group
    #[arg(value_parser = parse_name)]
    pub group: String,
    /// Name of the bookmark; where a name is used twice, the newer one is meant
    pub name: String,
    /// Let it go again
    #[arg(long)]
    pub release: bool,
    #[command(flatten)]
    pub place: Place,
}

/// `admit`.
#[derive(Debug, Args)]
pub struct AdmitArgs {
    /// Name of the group
    #[arg(value_parser = parse_name)]
    pub group: String,
    #[command(flatten)]
    pub target: Target,
}

/// `scrub`.
#[derive(Debug, Args)]
pub struct ScrubArgs {
    /// Name of the group
    #[arg(value_parser = parse_name)]
    pub group: String,
    #[command(flatten)]
    pub target: Target,
}

/// `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Name of the group
    #[arg(value_parser = parse_name)]
    pub group: String,
    /// Send what differs again
    #[arg(long)]
    pub repair: bool,
    /// Read at most so much, as 100Mbit [default: the setting resync.rate]
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub rate: Option<u64>,
    /// Only show the verification that runs, or the last one
    #[arg(long, conflicts_with_all = ["repair", "rate", "stop"])]
    pub show: bool,
    /// End the verification that runs
    #[arg(long, conflicts_with_all = ["repair", "rate"])]
    pub stop: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub target: Target,
}

/// Whom an order about a replica is given to.
#[derive(Debug, Args)]
pub struct Place {
    /// Work on a directory whose daemon does not run: groups/NAME, or the receiver's directory
    #[arg(long, value_name = "DIR", conflicts_with = "control", conflicts_with = "dir")]
    pub journal: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub target: Target,
}

/// `journal`.
#[derive(Debug, Subcommand)]
pub enum JournalCommand {
    /// List segments
    Ls(JournalArgs),
    /// Check every byte; exit code 4 and file and offset of each finding where something is damaged
    Verify(JournalArgs),
    /// Print records: lsn, time, op, volume, offset, length
    Dump {
        #[command(flatten)]
        args: JournalArgs,
        /// First lsn
        #[arg(long, value_name = "LSN", default_value_t = 0)]
        from: u64,
        /// Last lsn
        #[arg(long, value_name = "LSN", default_value_t = u64::MAX, hide_default_value = true)]
        to: u64,
    },
}

/// What every `journal` command takes.
#[derive(Debug, Args)]
pub struct JournalArgs {
    /// A journal directory, an undo directory, or a group's directory for both
    pub dir: PathBuf,
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

/// `identity`.
#[derive(Debug, Subcommand)]
pub enum IdentityCommand {
    /// Make a key and certificate; refused where there is one
    New {
        /// Where it is kept: a daemon's `identity_dir`
        #[arg(long, value_name = "DIR", default_value = "identity")]
        dir: PathBuf,
    },
    /// Print the fingerprint that the other side pins
    Show {
        /// Where it is kept: a daemon's `identity_dir`
        #[arg(long, value_name = "DIR", default_value = "identity")]
        dir: PathBuf,
    },
}

/// Which daemon a settings file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// `afterimage replicate`
    Source,
    /// `afterimage receive`
    Receiver,
}

/// `conf`.
#[derive(Debug, Subcommand)]
pub enum ConfCommand {
    /// Print effective settings and where each came from
    Check {
        /// The settings file
        file: PathBuf,
        /// Which daemon it is for [default: told by its keys]
        #[arg(long, value_enum)]
        role: Option<Role>,
    },
}

/// `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Work in this directory and keep it [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Parses this process's command line; usage errors and `--help` end the process here.
pub fn parse() -> Cli {
    let matches = Cli::command().get_matches();
    let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if let (Command::Up(up), Some(matches)) = (&mut cli.command, matches.subcommand_matches("up")) {
        up.disks = up::in_order(matches);
    }
    cli
}

fn parse_name(text: &str) -> Result<String, &'static str> {
    if conf::check_name(text) { Ok(text.to_owned()) } else { Err("a name is 1 to 64 of a-z 0-9 _ -") }
}

/// A rate, bits a second.
fn parse_rate(text: &str) -> Result<u64, &'static str> {
    conf::units::parse_rate(text)
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; 500ms, 60s, 5m are allowed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
