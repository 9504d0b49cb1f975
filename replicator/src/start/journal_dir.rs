//! The source journal of a run: opened, or set aside where it cannot be trusted.

use std::sync::Arc;

use journal::io::Disk;
use journal::writer::Writer;

use super::writer_options;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::state::StateFile;

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
    let set_aside = |why: &dyn std::fmt::Display| {
        let aside = settings.dir.join(format!("journal.damaged-{}", now_ns()));
        tracing::error!(%why, aside = %aside.display(), "the source journal is damaged; it is set aside, remove it when it was looked at");
        disk.rename_dir(&dir, &aside)
            .map_err(|error| Error::because(ErrorKind::Io, format!("set aside {}", dir.display()), error))?;
        disk.create_dir(&dir).map_err(create)
    };
    if state.get().journal_damaged {
        set_aside(&"a frame that the receiver needs is unreadable")?;
        state.update(|state| state.journal_damaged = false)?;
        return Ok((None, Some("the source journal was damaged".to_owned())));
    }
    if !Writer::exists(disk.as_ref(), &dir)? {
        if disk.list(&dir).is_ok_and(|names| names.iter().any(|name| name.ends_with(".seg"))) {
            set_aside(&"its control file is gone")?;
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
        Err(error) if matches!(error.kind, journal::ErrorKind::Corrupt | journal::ErrorKind::Malformed) => {
            set_aside(&error)?;
            Ok((None, Some(format!("the source journal was damaged: {error}"))))
        }
        Err(error) => Err(error.into()),
    }
}
