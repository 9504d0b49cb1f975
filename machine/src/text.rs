//! Text that a peer, a file or a client wrote: made harmless before it is kept, shown or logged.
//!
//! Two rules. It is one line of printable characters: control characters, escape sequences, line ends and the
//! marks that turn the direction of writing are written as `\u{1b}`. And it is short: what is cut off ends in
//! `…`. What has passed [`tidy`] passes it again unchanged, so each printer may call it without asking who
//! did before.
//!
//! [`Gate`] is the other half: a peer may cause a log line as often as it likes, and is heard once a minute
//! for a reason.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::{Mutex, now};

/// The longest text of a peer that is kept, bytes: as long as the longest reason that a receiver keeps.
pub const MAX_TEXT_BYTES: usize = 1024;
/// What stands where a text was cut.
const CUT: char = '…';

/// Whether a character is shown as it is. Space is the only white space.
fn is_harmless(c: char) -> bool {
    let turns_direction = matches!(c,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{061c}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    !c.is_control() && !turns_direction
}

/// A text as one printable line of at most `most` bytes.
pub fn tidy_to(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most && text.chars().all(is_harmless) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len().min(most));
    for c in text.chars() {
        let before = out.len();
        if is_harmless(c) {
            out.push(c);
        } else {
            // A `String` takes every write.
            let _ = write!(out, "{}", c.escape_unicode());
        }
        if out.len() > most {
            out.truncate(before);
            // Room for the mark itself.
            while out.len() + CUT.len_utf8() > most && out.pop().is_some() {}
            if CUT.len_utf8() <= most {
                out.push(CUT);
            }
            break;
        }
    }
    Cow::Owned(out)
}

/// A text of a peer, as it is kept, shown and logged.
pub fn tidy(text: &str) -> Cow<'_, str> {
    tidy_to(text, MAX_TEXT_BYTES)
}

/// The same in place.
pub fn tidy_in_place(text: &mut String) {
    if let Cow::Owned(tidied) = tidy(text) {
        *text = tidied;
    }
}

/// As one printable line, whatever its length: for printers of what has been bounded elsewhere.
pub fn one_line(text: &str) -> Cow<'_, str> {
    tidy_to(text, usize::MAX)
}

/// Log lines that a peer causes: one a reason and minute.
#[derive(Debug, Default)]
pub struct Gate(Mutex<BTreeMap<String, Reason>>);

#[derive(Debug)]
struct Reason {
    told: Instant,
    held_back: u64,
}

/// How long a reason is not told again.
pub const QUIET: Duration = Duration::from_secs(60);
/// Reasons that are told apart; one more shares its line with all others.
const MAX_REASONS: usize = 64;

impl Gate {
    /// Whether a line with this reason is due; with it, how many were held back since the last.
    pub fn due(&self, reason: &str) -> Option<u64> {
        let now = now();
        let mut reasons = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let is_old = |reason: &Reason| now.saturating_duration_since(reason.told) >= QUIET;
        let reason = tidy(reason);
        if reasons.len() >= MAX_REASONS && !reasons.contains_key(&*reason) {
            reasons.retain(|_, reason| !is_old(reason));
        }
        let full = reasons.len() >= MAX_REASONS && !reasons.contains_key(&*reason);
        let key = if full { "" } else { &*reason };
        match reasons.get_mut(key) {
            Some(known) if !is_old(known) => {
                known.held_back += 1;
                None
            }
            Some(known) => {
                known.told = now;
                Some(std::mem::take(&mut known.held_back))
            }
            None => {
                reasons.insert(key.to_owned(), Reason { told: now, held_back: 0 });
                Some(0)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_spelled_out() {
        assert_eq!(tidy("disk full: 3 bytes left, Überlauf"), "disk full: 3 bytes left, Überlauf");
        assert_eq!(tidy("\u{1b}[2Jgone"), "\\u{1b}[2Jgone");
        assert_eq!(tidy("a\nb\r\tc\0"), "a\\u{a}b\\u{d}\\u{9}c\\u{0}");
        assert_eq!(
            tidy("\u{202e}cod.exe\u{2066}\u{9b}31m\u{85}"),
            "\\u{202e}cod.exe\\u{2066}\\u{9b}31m\\u{85}"
        );
        assert_eq!(tidy("\u{feff}\u{200b}\u{e0041}\u{2028}"), "\\u{feff}\\u{200b}\\u{e0041}\\u{2028}");
    }

    #[test]
    fn it_is_short_and_stays_as_it_is() {
        for text in ["x".repeat(20_000), "ä".repeat(20_000), "\u{1b}".repeat(20_000), "x".repeat(1023) + "ää"]
        {
            let tidied = tidy(&text).into_owned();
            assert!(tidied.len() <= MAX_TEXT_BYTES && tidied.len() > MAX_TEXT_BYTES - 10, "{}", tidied.len());
            assert!(tidied.ends_with(CUT));
            assert_eq!(tidy(&tidied), tidied);
        }
        assert_eq!(tidy_to("abc", 2), "");
        assert_eq!(tidy_to("abcd", 3), "…");
        assert_eq!(one_line(&"x\n".repeat(1000)).len(), 6000);
    }

    #[test]
    fn a_reason_is_told_once_a_minute_and_strangers_share_a_line() {
        let gate = Gate::default();
        assert_eq!(gate.due("a"), Some(0));
        assert_eq!((gate.due("a"), gate.due("a")), (None, None));
        let told = (0..1000).filter(|at| gate.due(&format!("reason {at}")).is_some()).count();
        assert_eq!(told, MAX_REASONS, "63 of their own, and one line for the rest");
        assert!(gate.0.lock().unwrap().len() <= MAX_REASONS + 1);
        gate.0.lock().unwrap().get_mut("a").unwrap().told = Instant::now() - QUIET;
        assert_eq!(gate.due("a"), Some(2));
    }
}
