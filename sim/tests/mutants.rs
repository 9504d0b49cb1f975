//! Every broken rule of `sim/mutants.toml` finds its place: once, in a file that is there. `just mutants`
//! plants them.

use std::fs;
use std::path::Path;

use toml::{Table, Value};

fn text<'a>(table: &'a Value, key: &str) -> &'a str {
    table.get(key).and_then(Value::as_str).unwrap_or_else(|| panic!("`{key}` is missing in {table}"))
}

fn entries<'a>(table: &'a Value, key: &str) -> &'a [Value] {
    table.get(key).and_then(Value::as_array).unwrap_or_else(|| panic!("`{key}` is missing in {table}"))
}

#[test]
fn every_broken_rule_finds_its_place() {
    let sim = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rules: Table = fs::read_to_string(sim.join("mutants.toml")).unwrap().parse().unwrap();
    let rules = Value::Table(rules);
    for mutant in entries(&rules, "mutant") {
        let name = text(mutant, "name");
        assert!(!text(mutant, "rule").is_empty(), "{name} breaks no rule");
        for change in entries(mutant, "change") {
            let (file, from, to) = (text(change, "file"), text(change, "from"), text(change, "to"));
            let source = fs::read_to_string(sim.join("..").join(file)).unwrap();
            assert_eq!(source.matches(from).count(), 1, "{name}: in {file}: {from}");
            assert_ne!(from, to, "{name} changes nothing");
        }
    }
}
