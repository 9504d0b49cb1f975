//! The command `afterimage`: parse, call, print.
//!
//! Where it stands: above every other room. The daemons (`up`, `replicate`, `receive`) start the handles of
//! the rooms below and put a control socket beside them; the other commands are clients of that socket, or
//! read a directory directly (`journal`, `restore --journal`). No logic of replication lives here.
//!
//! Invariants: results go to stdout, everything else to stderr; the exit code is the one that [`exit::Kind`]
//! gives.

mod args;
mod backend;
mod client;
mod conf_check;
mod control;
mod daemon;
mod demo;
mod demo_disk;
mod exit;
mod identity;
mod journal;
mod journal_lines;
mod modes;
mod nbd_client;
mod output;
mod restore;
mod rewind;
mod signals;
mod status;
mod up;
mod up_disk;
mod up_plan;
mod verify;

use std::future::Future;
use std::process::ExitCode;

use anyhow::Context;

use crate::args::{Command, ConfCommand};
use crate::client::Client;

fn main() -> ExitCode {
    modes::for_the_owner_only();
    let cli = args::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        // `afterimage journal dump | head`: the reader has seen enough, which is no failure of ours.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let fault = exit::Fault::of(&error);
            eprintln!("afterimage: {}", fault.message);
            ExitCode::from(fault.kind.exit_code())
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Up(args) => serve(up::run(args)),
        Command::Replicate(args) => serve(daemon::replicate(args)),
        Command::Receive(args) => serve(daemon::receive(args)),
        Command::Status(args) => call(status::status(Client::find(&args.target)?, args.json, args.watch)),
        Command::Wait(args) => call(status::wait(Client::find(&args.target)?, args.timeout)),
        Command::Points(args) => call(status::points(Client::find(&args.target)?, args.group, args.json)),
        Command::Bookmark(args) => call(status::bookmark(Client::find(&args.target)?, args.group, args.name)),
        Command::Attach(args) => call(status::attach(Client::find(&args.target)?, args.device)),
        Command::Detach(args) => call(status::detach(Client::find(&args.target)?, args.device)),
        Command::Restore(args) => call(restore::run(args)),
        Command::Rewind(args) => call(rewind::rewind(args)),
        Command::Resume(args) => call(rewind::resume(args)),
        Command::Resync(args) => call(rewind::resync(args)),
        Command::Hold(args) => call(rewind::hold(args)),
        Command::Verify(args) => call(verify::run(args)),
        Command::Admit(args) => call(status::admit(Client::find(&args.target)?, args.group)),
        Command::Scrub(args) => call(status::scrub(Client::find(&args.target)?, args.group)),
        Command::Journal(command) => journal::run(command),
        Command::Identity(command) => identity::run(command),
        Command::Conf(ConfCommand::Check { file, role }) => conf_check::run(&file, role),
        Command::Demo(args) => demo::run(&args),
    }
}

/// Runs a daemon on its runtime.
fn serve(daemon: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("afterimage")
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(daemon);
    // A blocking thread that still hangs on a dead disk must not keep a stopped daemon alive.
    runtime.shutdown_background();
    result
}

/// Runs a client command: one connection, one thread.
fn call(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(command)
}
