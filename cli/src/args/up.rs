//! The command line of `up`, whose volumes have an order across two options.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::{LogFormat, parse_name};

/// `up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Where everything is kept; a second `up` with the same DIR continues
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Protect a new sparse disk of this size, DIR/source/NAME.img (64MiB, 10GiB, …); may be repeated
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Vec<u64>,
    /// Protect this file or block device; may be repeated
    #[arg(long, value_name = "PATH")]
    pub disk: Vec<PathBuf>,
    /// Name of a volume, in the order of --size and --disk; one name for several volumes is numbered
    /// [default: disk0, disk1, …]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub volume: Vec<String>,
    /// Name of the group: the volumes share one write order and restore to one instant [default: default]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub group: Option<String>,
    /// Serve NBD on this TCP address too; further volumes on the ports after it. NBD knows no passwords
    #[arg(long, value_name = "IP:PORT")]
    pub nbd_tcp: Option<SocketAddr>,
    /// What is copied at first: all, or what the disks' file systems have allocated [default: all]
    #[arg(long, value_name = "WHAT", value_parser = parse_sync)]
    pub sync: Option<conf::SyncMode>,
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// --size and --disk in the order given.
    #[arg(skip)]
    pub disks: Vec<DiskArg>,
}

/// One volume asked for on `up`'s command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskArg {
    /// `--size`
    Size(u64),
    /// `--disk`
    Disk(PathBuf),
}

/// clap keeps each option's values apart; which volume is the first depends on the order across both.
pub fn in_order(matches: &clap::ArgMatches) -> Vec<DiskArg> {
    let sizes = matches.get_many::<u64>("size").into_iter().flatten().map(|size| DiskArg::Size(*size));
    let disks =
        matches.get_many::<PathBuf>("disk").into_iter().flatten().map(|disk| DiskArg::Disk(disk.clone()));
    let size_at = matches.indices_of("size").into_iter().flatten();
    let disk_at = matches.indices_of("disk").into_iter().flatten();
    let mut all: Vec<(usize, DiskArg)> = size_at.zip(sizes).chain(disk_at.zip(disks)).collect();
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, disk)| disk).collect()
}

fn parse_sync(text: &str) -> Result<conf::SyncMode, String> {
    conf::SyncMode::try_from(text.to_owned()).map_err(str::to_owned)
}

fn parse_size(text: &str) -> Result<u64, String> {
    let bytes = conf::units::parse_bytes(text)?;
    // Whole pages, so that every file system and every client can use all of it.
    if bytes == 0 || bytes % 4096 != 0 {
        return Err("a disk is a multiple of 4096 bytes, and not empty".into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn sizes_and_disks_keep_their_order() {
        let line = ["afterimage", "up", "--dir", "d", "--size", "1MiB", "--disk", "/a", "--size", "2MiB"];
        let matches = Cli::command().try_get_matches_from(line).unwrap();
        let disks = in_order(matches.subcommand_matches("up").unwrap());
        assert_eq!(disks, [DiskArg::Size(1 << 20), DiskArg::Disk("/a".into()), DiskArg::Size(2 << 20)]);
    }

    #[test]
    fn sizes_are_whole_blocks() {
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        for bad in ["0", "100", "4097", "x", "-1"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
