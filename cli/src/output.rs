//! What people and scripts see: results on stdout, progress and logs on stderr.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::args::LogFormat;
use crate::journal_lines::{Prioritised, goes_to_journal};

/// How often a log sees progress; a terminal sees it all the time.
const PLAIN_PROGRESS: Duration = Duration::from_secs(5);

/// Prints a line of a result. Unlike `println!`, a reader that went away is an error and not a panic.
pub fn line(text: impl AsRef<str>) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref().as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush())?;
    Ok(())
}

/// Prints a result as JSON.
pub fn json(value: &impl Serialize) -> Result<()> {
    line(serde_json::to_string_pretty(value).context("print JSON")?)
}

/// Whether the reader of our stdout went away.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|io| io.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// A size as people read it; exact below 1 KiB.
pub fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

/// Rows under a head, each column as wide as its widest cell.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let render = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![render(&mut head.iter().copied())];
    lines.extend(rows.iter().map(|row| render(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

/// Starts logging to stderr. `AFTERIMAGE_LOG` filters as `RUST_LOG` would (`debug`, `warn,receiver=trace`).
pub fn start_logging(format: LogFormat, screen: Screen) -> Result<()> {
    let filter = std::env::var("AFTERIMAGE_LOG").unwrap_or_else(|_| "info".into());
    let filter = EnvFilter::try_new(&filter)
        .map_err(|error| crate::exit::Fault::usage(format!("AFTERIMAGE_LOG={filter}: {error}")))?;
    let ansi = io::stderr().is_terminal();
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(screen);
    // The journal has its own time for each line.
    let text = tracing_subscriber::fmt::format().with_ansi(ansi);
    // A second start in one process (tests) keeps the first.
    let _ = match (format, goes_to_journal()) {
        (LogFormat::Text, false) => logs.try_init(),
        (LogFormat::Text, true) => logs.event_format(Prioritised(text.without_time())).try_init(),
        (LogFormat::Json, false) => logs.json().try_init(),
        (LogFormat::Json, true) => logs.json().event_format(Prioritised(text.json())).try_init(),
    };
    Ok(())
}

/// stderr, shared by log lines and a status line at the bottom that they must not tear.
#[derive(Clone)]
pub struct Screen {
    bar: ProgressBar,
}

impl Screen {
    /// Logs only.
    pub fn plain() -> Screen {
        Screen { bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()) }
    }

    /// With a status line, if stderr is a terminal.
    pub fn live() -> Screen {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style("{spinner} {msg}"));
        Screen { bar }
    }

    /// Whether a status line would be seen.
    pub fn is_live(&self) -> bool {
        !self.bar.is_hidden()
    }

    /// Shows a status.
    pub fn show(&self, text: String) {
        self.bar.set_message(text);
        self.bar.tick();
    }

    /// Prints a line of the result without tearing the status line.
    pub fn line(&self, text: &str) -> Result<()> {
        self.bar.suspend(|| line(text))
    }

    /// Takes the status line away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl<'a> MakeWriter<'a> for Screen {
    type Writer = ScreenWriter;

    fn make_writer(&'a self) -> ScreenWriter {
        ScreenWriter { bar: self.bar.clone() }
    }
}

/// One log line on its way.
pub struct ScreenWriter {
    bar: ProgressBar,
}

impl Write for ScreenWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bar.suspend(|| io::stderr().lock().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Bytes done of a long piece of work: a bar with its end foretold on a terminal, a line every few seconds in
/// a log.
pub struct Progress {
    what: String,
    bar: ProgressBar,
    started: Instant,
    said: Instant,
}

impl Progress {
    /// Nothing done yet.
    pub fn new(what: impl Into<String>) -> Progress {
        let what = what.into();
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        bar.set_style(style(
            "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left",
        ));
        bar.set_message(what.clone());
        let now = Instant::now();
        Progress { what, bar, started: now, said: now }
    }

    /// `done` of `total` bytes are done.
    pub fn set(&mut self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        if self.bar.is_hidden() && self.said.elapsed() >= PLAIN_PROGRESS {
            self.said = Instant::now();
            eprintln!("{}: {}{}", self.what, share(done, total), self.left(done, total));
        }
    }

    fn left(&self, done: u64, total: u64) -> String {
        let Some(rate) = done.checked_div(self.started.elapsed().as_secs().max(1)).filter(|rate| *rate > 0)
        else {
            return String::new();
        };
        let left = Duration::from_secs(total.saturating_sub(done) / rate);
        format!(", {}/s, {} left", size(rate), humantime::format_duration(left))
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}

fn share(done: u64, total: u64) -> String {
    let percent = (u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or(100);
    format!("{} of {} ({percent} %)", size(done), size(total))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("invariant: the templates of this file are well formed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a".into(), "long cell".into()], vec!["bcd".into(), String::new()]];
        assert_eq!(table(&["X", "Y"], &rows), "X    Y\na    long cell\nbcd");
    }

    #[test]
    fn shares_never_divide_by_nothing() {
        assert_eq!(share(0, 0), "0 B of 0 B (100 %)");
        assert_eq!(share(512, 1024), "512 B of 1.0 KiB (50 %)");
    }

    #[test]
    fn a_closed_pipe_is_told_from_other_errors() {
        let pipe = anyhow::Error::new(io::Error::from(io::ErrorKind::BrokenPipe)).context("print");
        assert!(is_broken_pipe(&pipe));
        assert!(!is_broken_pipe(&anyhow::anyhow!("x")));
    }
}
