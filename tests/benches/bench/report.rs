//! Figures as a table and as JSON; each beside the bare limit or peer of the same run.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// One figure.
pub struct Row {
    /// What was measured.
    pub what: String,
    /// Ours, with its unit.
    pub ours: String,
    /// The peer's or the bare limit's, with its unit.
    pub peer: String,
    /// Ours ÷ peer, or the value that is held against the target.
    pub ratio: f64,
    /// Smallest or largest good value; `None` where the figure only informs.
    pub target: Option<Target>,
}

/// What a ratio is held against.
#[derive(Clone, Copy)]
pub enum Target {
    /// At least.
    AtLeast(f64),
    /// At most.
    AtMost(f64),
}

impl Row {
    fn verdict(&self) -> &'static str {
        match self.target {
            None => "",
            Some(Target::AtLeast(limit)) if self.ratio >= limit => "met",
            Some(Target::AtMost(limit)) if self.ratio <= limit => "met",
            Some(_) => "SHORT",
        }
    }

    fn target_text(&self) -> String {
        match self.target {
            None => String::new(),
            Some(Target::AtLeast(limit)) => format!("≥ {limit:.2}"),
            Some(Target::AtMost(limit)) => format!("≤ {limit:.2}"),
        }
    }
}

/// All figures of a run.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Report {
    /// Adds a figure and shows it at once.
    pub fn row(&mut self, row: Row) {
        eprintln!("  {}: {} / {} = {:.3} {}", row.what, row.ours, row.peer, row.ratio, row.verdict());
        self.rows.push(row);
    }

    /// Adds a sentence.
    pub fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        eprintln!("  {note}");
        self.notes.push(note);
    }

    /// What missed its target.
    pub fn short(&self) -> impl Iterator<Item = &str> {
        self.rows.iter().filter(|row| row.verdict() == "SHORT").map(|row| row.what.as_str())
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let width = |cell: fn(&Row) -> usize| self.rows.iter().map(cell).max().unwrap_or(0);
        let (what, ours, peer) = (
            width(|r| r.what.chars().count()),
            width(|r| r.ours.chars().count()),
            width(|r| r.peer.chars().count()),
        );
        for row in &self.rows {
            let _ = writeln!(
                out,
                "{:what$}  {:>ours$}  {:>peer$}  {:>7.3}  {:>7}  {}",
                row.what,
                row.ours,
                row.peer,
                row.ratio,
                row.target_text(),
                row.verdict()
            );
        }
        for note in &self.notes {
            let _ = writeln!(out, "{note}");
        }
        out
    }

    /// The JSON.
    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({"what": row.what, "ours": row.ours, "peer": row.peer, "ratio": row.ratio,
                   "target": row.target_text(), "verdict": row.verdict()})
        };
        json!({"machine": machine(), "rows": self.rows.iter().map(row).collect::<Vec<_>>(), "notes": self.notes})
    }
}

/// Machine, kernel and sizes, as every benchmark prints them.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("")
        .trim_start_matches([' ', '\t', ':']);
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let memory_gib = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok())
        .unwrap_or(0)
        >> 20;
    format!("{model}, {cores} cores, {memory_gib} GiB, Linux {}", read("/proc/sys/kernel/osrelease").trim())
}
