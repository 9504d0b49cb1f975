//! The source journal of a run: opened, or set aside where it cannot be trusted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::io::Disk;
use journal::writer::Writer;

use super::writer_options;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::state::StateFile;

/// Moves the journal out of the way; where to. The files alone, where a file system is mounted at its place.
fn set_aside(disk: &dyn Disk, settings: &conf::Replicator, dir: &Path) -> std::io::Result<PathBuf> {
    let name = format!("journal.damaged-{}", now_ns());
    let aside = settings.dir.join(&name);
    match disk.rename_dir(dir, &aside) {
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {}
        renamed => return renamed.map(|()| aside),
    }
    let aside = dir.join(name);
    disk.create_dir(&aside)?;
    let is_ours = |name: &String| [".seg", ".spare", ".control"].iter().any(|end| name.ends_with(end));
    for name in disk.list(dir)?.into_iter().filter(is_ours) {
        disk.rename(&dir.join(&name), &aside.join(&name))?;
    }
    disk.sync_dir(&aside)?;
    disk.sync_dir(dir)?;
    Ok(aside)
}

/// Opens the source journal. A damaged one is set aside: the source disk is the truth, so the price is a
/// synchronisation, never a refusal to serve.
pub(super) fn open(
    disk: &Arc<dyn Disk>,
    settings: &conf::Replicator,
    state: &mut StateFile,
) -> Result<(Option<Writer>, Option<String>)> {
    let dir = settings.dir.join("journal");
    let create = |error| Error::because(ErrorKind::Io, format!("create {}", dir.display()), error);
    disk.create_dir(&dir).map_err(create)?;
    let put_away = |why: &dyn std::fmt::Display| {
        let aside = set_aside(disk.as_ref(), settings, &dir)
            .map_err(|error| Error::because(ErrorKind::Io, format!("set aside {}", dir.display()), error))?;
        tracing::error!(%why, aside = %aside.display(), "the source journal is damaged; it is set aside, remove it when it was looked at");
        disk.create_dir(&dir).map_err(create)
    };
    if state.get().journal_damaged {
        put_away(&"a frame that the receiver needs is unreadable")?;
        state.update(|state| state.journal_damaged = false)?;
        return Ok((None, Some("the source journal was damaged".to_owned())));
    }
    if !Writer::exists(disk.as_ref(), &dir)? {
        if disk.list(&dir).is_ok_and(|names| names.iter().any(|name| name.ends_with(".seg"))) {
            put_away(&"its control file is gone")?;
        }
        return Ok((None, (state.get().epoch.number > 0).then(|| "the source journal is gone".to_owned())));
    }
    let current = state.get().epoch;
    match Writer::open(disk.clone(), &dir, writer_options(settings, state), now_ns()) {
        Ok((writer, recovery)) => {
            if let Some(torn) = &recovery.torn {
                tracing::info!(segment = recovery.segment, ?torn, "source journal: torn tail cut");
            }
            let doubt = (writer.appended().epoch != current)
                .then(|| "the last run ended before its epoch had begun in the journal".to_owned());
            Ok((Some(writer), doubt))
        }
        // Another group's: this source lost its control files, and goes on as a new group.
        Err(error) if error.kind == journal::ErrorKind::OutOfOrder => {
            put_away(&error)?;
            Ok((None, Some("the source journal was another group's".to_owned())))
        }
        Err(error) if matches!(error.kind, journal::ErrorKind::Corrupt | journal::ErrorKind::Malformed) => {
            put_away(&error)?;
            Ok((None, Some(format!("the source journal was damaged: {error}"))))
        }
        Err(error) => Err(error.into()),
    }
}
