//! Log lines as systemd's journal takes them: the priority first, `<4>` for a warning (`sd-daemon(3)`).
//!
//! The journal says where its stream is in `JOURNAL_STREAM` (`device:inode`); only when stderr is that very
//! stream are lines marked, so that a redirected or a terminal's log stays as it is.

use std::fmt;
use std::os::fd::AsFd;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// Whether stderr leads into the journal.
pub fn goes_to_journal() -> bool {
    std::env::var("JOURNAL_STREAM").is_ok_and(|stream| is_stream(&stream, std::io::stderr()))
}

fn is_stream(stream: &str, file: impl AsFd) -> bool {
    let Some((device, inode)) = stream.split_once(':') else { return false };
    let (Ok(device), Ok(inode)) = (device.parse::<u64>(), inode.parse::<u64>()) else { return false };
    rustix::fs::fstat(file).is_ok_and(|found| found.st_dev == device && found.st_ino == inode)
}

/// The priority of a level, as `syslog(3)` numbers it.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// Puts the priority before each line of another format.
pub struct Prioritised<F>(pub F);

impl<S, N, F> FormatEvent<S, N> for Prioritised<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn only_the_journals_own_stream_is_marked() {
        let file = tempfile::tempfile().unwrap();
        let found = rustix::fs::fstat(&file).unwrap();
        assert!(is_stream(&format!("{}:{}", found.st_dev, found.st_ino), &file));
        for other in [format!("{}:{}", found.st_dev, found.st_ino + 1), String::new(), "8:x".into()] {
            assert!(!is_stream(&other, &file), "{other}");
        }
    }

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_line_begins_with_its_priority() {
        let kept = Kept::default();
        let into = kept.clone();
        let format = tracing_subscriber::fmt::format().without_time();
        let logs = tracing_subscriber::fmt().with_ansi(false).with_writer(move || into.clone());
        tracing::subscriber::with_default(logs.event_format(Prioritised(format)).finish(), || {
            tracing::error!("a");
            tracing::warn!("b");
            tracing::info!("c");
        });
        let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        let starts: Vec<_> = text.lines().map(|line| &line[..3]).collect();
        assert_eq!(starts, ["<3>", "<4>", "<6>"], "{text}");
    }
}
