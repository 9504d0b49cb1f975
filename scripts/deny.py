#!/usr/bin/env python3
"""Checks every crate of the product and of the fuzz targets against deny.toml: licences, banned crates, sources.

    scripts/deny.py

The same as `cargo deny check bans licenses sources`, whose build takes longer than all other checks together. Only those keys of
deny.toml are known that it has; another is an error, lest a rule be taken for checked. Ends non-zero and names each crate.
"""
import pathlib
import re
import subprocess
import sys
import tomllib

root = pathlib.Path(__file__).resolve().parent.parent
CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"
KNOWN = {"graph": {"targets"}, "licenses": {"allow"}, "bans": {"multiple-versions", "deny"},
         "sources": {"unknown-registry", "unknown-git"}}


def allowed(expression, allow):
    """Whether an SPDX expression can be met by the licences of `allow` (`MIT/Apache-2.0` is an old way to write OR)."""
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def either():
        met = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            met = both() or met
        return met

    def both():
        met = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            met = one() and met
        return met

    def one():
        token = tokens.pop(0)
        if token == "(":
            met = either()
            tokens.pop(0)
            return met
        if tokens and tokens[0] == "WITH":
            token += " WITH " + tokens[1]
            del tokens[:2]
        return token in allow

    met = either()
    if tokens:
        raise ValueError(f"{expression!r} is no licence expression")
    return met


def complaints(rules, manifest):
    """What is wrong with the crates that `manifest` builds from, and how many those are. Licences and bans by what is built on our
    targets; sources by all of the lock file, which is what may be downloaded."""
    command = ["cargo", "tree", "--locked", "--workspace", "--manifest-path", str(root / manifest), "--prefix", "none",
               "--format", "{p}\t{l}"]
    for target in rules["graph"]["targets"]:
        command += ["--target", target]
    lines = subprocess.check_output(command, text=True).splitlines()
    used = {tuple(line.removesuffix(" (*)").split("\t")) for line in lines if line}
    banned = {ban["crate"] for ban in rules["bans"]["deny"]}
    found = []
    for crate, licence in sorted(used):
        if not licence or not allowed(licence, rules["licenses"]["allow"]):
            found.append(f"{manifest}: {crate}: licence {licence or 'not said'}")
        if crate.split(" ")[0] in banned:
            found.append(f"{manifest}: {crate}: banned")
    lock = tomllib.loads((root / manifest).with_name("Cargo.lock").read_text())
    for package in lock["package"]:
        if package.get("source", CRATES_IO) != CRATES_IO:
            found.append(f"{manifest}: {package['name']} comes from {package['source']}")
    return found, len(used)


def main():
    rules = tomllib.loads((root / "deny.toml").read_text())
    unknown = [f"{section}.{key}" for section in rules for key in rules[section] if key not in KNOWN.get(section, ())]
    if unknown:
        sys.exit(f"deny: deny.toml has rules that are not checked here: {', '.join(unknown)}")
    found = []
    for manifest in ("Cargo.toml", "fuzz/Cargo.toml"):
        wrong, crates = complaints(rules, manifest)
        found += wrong
        print(f"deny: {manifest}: {crates} crates")
    if found:
        sys.exit("\n".join(found))


assert allowed("(MIT OR X) AND ISC", ["MIT", "ISC"]) and not allowed("MIT AND X", ["MIT"]) and allowed("X/MIT", ["MIT"])
if __name__ == "__main__":
    main()
