//! Whether the volumes' device-mapper tables still lead to the same content.

use std::collections::BTreeMap;
use std::sync::Arc;

use kfilter::mapper;

use crate::capture::Volume;

/// The tables of the attached volumes that are mapped devices, as they were looked at last.
#[derive(Debug, Default)]
pub(super) struct Tables(BTreeMap<u32, mapper::Tables>);

impl Tables {
    /// Those of now.
    pub fn of(volumes: &[Arc<Volume>]) -> Tables {
        let mut tables = Tables::default();
        // What it says of a first look is that there was none before.
        let _ = tables.exchanged(volumes);
        tables
    }

    /// A volume whose table was exchanged since it was looked at last: its id and name. One that was attached
    /// meanwhile is dirty anyway.
    pub fn exchanged(&mut self, volumes: &[Arc<Volume>]) -> Option<(u32, String)> {
        for volume in volumes {
            let Some(disk) = volume.disk() else {
                self.0.remove(&volume.id);
                continue;
            };
            match mapper::Tables::of(disk.rdev()) {
                Ok(None) => {}
                Ok(Some(now)) => {
                    let then = self.0.insert(volume.id, now.clone());
                    if then.is_some_and(|then| !then.is_kept_by(&now)) {
                        return Some((volume.id, volume.name.clone()));
                    }
                }
                // In between two tables, or without the right to ask: looked at again a second later.
                Err(error) => tracing::debug!(%error, volume = %volume.name, "ask for its table"),
            }
        }
        None
    }

    /// The next look finds it exchanged again.
    pub fn forget(&mut self, volume: u32) {
        self.0.insert(volume, mapper::Tables::default());
    }
}
