//! Hold: bookmarks that retention may not drop.
//!
//! A hold keeps its point, and so all undo and redo from its point on; it is part of the group's durable
//! state, and retention asks it under the history's lock (`may_begin`). A held history that outgrows the
//! quota stops acknowledgements rather than shrink: the receiver says so, and names the holds.

use serde::{Deserialize, Serialize};

use super::Applier;
use crate::point::{At, ShownMoment};
use crate::state::{Hold, MAX_HOLDS};
use crate::{Error, ErrorKind, Result};

/// What a hold, or its release, came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldReport {
    /// Operator's name of the group.
    pub group: String,
    /// The bookmark.
    pub name: String,
    /// Where it stands.
    pub at: ShownMoment,
    /// Whether it is under hold now.
    pub held: bool,
}

impl Applier {
    /// Puts the newest bookmark of this name under hold, or releases it; durable when it returns. `now_ns` is
    /// this machine's clock.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where the name is not in the history, not under hold, or too many are.
    pub fn hold(&mut self, name: &str, release: bool, now_ns: u64) -> Result<HoldReport> {
        let mut state = self.store.state().clone();
        let not_possible = |at: String| Err(Error::new(ErrorKind::NotPossible, at));
        let known = state.wishes.holds.iter().position(|hold| hold.name == name);
        let at = match (release, known) {
            (true, Some(known)) => state.wishes.holds.remove(known).at,
            (true, None) => {
                let held: Vec<&str> = state.wishes.holds.iter().map(|hold| hold.name.as_str()).collect();
                let held = if held.is_empty() { "none is".to_owned() } else { held.join(", ") };
                return not_possible(format!("bookmark {name:?} is not under hold; under hold: {held}"));
            }
            (false, Some(known)) => {
                let held = &state.wishes.holds[known];
                return not_possible(format!(
                    "bookmark {name:?} is under hold already, at lsn {}: to hold a newer one of that name, release it first",
                    held.at.lsn
                ));
            }
            (false, None) if state.wishes.holds.len() >= MAX_HOLDS => {
                return not_possible(format!(
                    "{MAX_HOLDS} bookmarks are under hold already: release one first"
                ));
            }
            (false, None) => {
                self.check_replicas()?;
                // ⚠ Pinned until the hold is in force: retention may be about to drop the point.
                let (point, _pin) = self.history.resolve_pinned(&At::Bookmark(name.to_owned()))?;
                state.wishes.holds.push(Hold { name: name.to_owned(), at: point.moment, since_ns: now_ns });
                state.check_room().map_err(|error| Error { kind: ErrorKind::NotPossible, ..error })?;
                self.store.store(state)?;
                self.follow_state();
                return Ok(self.hold_report(name, point.moment.into(), true));
            }
        };
        self.store.store(state)?;
        self.follow_state();
        Ok(self.hold_report(name, at.into(), false))
    }

    fn hold_report(&self, name: &str, at: ShownMoment, held: bool) -> HoldReport {
        HoldReport { group: self.store.state().name.clone(), name: name.to_owned(), at, held }
    }
}
