//! `identity`: the key and certificate by which two sides know each other.

use anyhow::Result;
use wire::Identity;

use crate::args::IdentityCommand;
use crate::exit::Fault;
use crate::output;

/// `afterimage identity new|show`.
pub fn run(command: IdentityCommand) -> Result<()> {
    let identity = match command {
        IdentityCommand::New { dir } => Identity::create(&dir)?,
        IdentityCommand::Show { dir } => Identity::load(&dir).map_err(|error| match error.kind {
            wire::ErrorKind::IdentityMissing => {
                let text = format!("{error}; --dir names the directory (a daemon's `identity_dir`)");
                anyhow::Error::new(Fault::not_possible(text))
            }
            _ => error.into(),
        })?,
    };
    output::line(identity.fingerprint().to_string())
}
