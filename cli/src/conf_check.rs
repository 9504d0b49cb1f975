//! `conf check`: what a settings file comes to, and where each value came from.

use std::path::Path;

use anyhow::Result;

use crate::args::Role;
use crate::output;

/// `afterimage conf check FILE`.
pub fn run(file: &Path, role: Option<Role>) -> Result<()> {
    let (daemon, effective) = match role {
        Some(Role::Source) => (conf::Daemon::Replicator, conf::load_replicator(file)?.effective),
        Some(Role::Receiver) => (conf::Daemon::Receiver, conf::load_receiver(file)?.effective),
        None => {
            let checked = conf::check(file)?;
            (checked.daemon, checked.effective)
        }
    };
    let command = match daemon {
        conf::Daemon::Replicator => "replicate",
        conf::Daemon::Receiver => "receive",
    };
    output::line(format!("# settings of `afterimage {command} --config {}`", file.display()))?;
    effective.iter().try_for_each(|setting| output::line(setting.to_string()))
}
