#!/usr/bin/env python3
"""Plants broken rules one at a time in a copy of the tree, and lets the simulation find each.

    scripts/mutants.py [--seeds N] [NAME...]     N: seeds tried for each at most (default 2000); NAMEs: only these

Ends non-zero when the unbroken copy fails, when a mutant does not apply or build, or when one survives. Prints a table.
"""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import tomllib

root = pathlib.Path(__file__).resolve().parent.parent
copy = root / "target" / "mutants" / "tree"
environment = {**os.environ, "CARGO_TARGET_DIR": str(root / "target" / "mutants" / "target"), "RUST_BACKTRACE": "0"}


def copied():
    """The tracked and new files of the tree, as they are now; times kept, so that cargo builds only what changed."""
    names = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, text=True)
    for name in filter(None, names.split("\0")):
        source, target = root / name, copy / name
        if not source.is_file():
            continue
        if target.is_file() and target.read_bytes() == source.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def simulated(seeds):
    """Builds the copy and tells stories until one fails: (seed or None, why, seconds)."""
    built = subprocess.run(
        ["cargo", "build", "--locked", "-q", "-p", "afterimage-sim"], cwd=copy, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if built.returncode != 0:
        sys.exit(f"it does not build:\n{built.stdout[-3000:]}")
    began = time.monotonic()
    program = pathlib.Path(environment["CARGO_TARGET_DIR"]) / "debug" / "afterimage-sim"
    told = subprocess.run([program, "--seeds", str(seeds)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds = time.monotonic() - began
    found = re.search(r"^seed (\d+) FAILED: ([^\n]*)", told.stdout, re.M)
    if found:
        return int(found[1]), found[2], seconds
    # A broken rule may also abort the process, as an assertion does that nobody may survive.
    return (None, "", seconds) if told.returncode == 0 else (0, "the process ended: " + told.stdout[-200:], seconds)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=2000)
    arguments.add_argument("names", nargs="*")
    arguments = arguments.parse_args()
    mutants = tomllib.loads((root / "sim" / "mutants.toml").read_text())["mutant"]
    unknown = set(arguments.names) - {mutant["name"] for mutant in mutants}
    if unknown:
        sys.exit(f"no such mutant: {', '.join(sorted(unknown))}")
    copied()
    seed, why, _ = simulated(20)
    if seed is not None:
        sys.exit(f"without a mutant seed {seed} fails: {why}")
    survived = []
    print("| Broken rule | Mutant | Caught by seed | After | What was seen |\n|---|---|---|---|---|", flush=True)
    for mutant in mutants:
        if arguments.names and mutant["name"] not in arguments.names:
            continue
        whole = {}
        for change in mutant["change"]:
            path = copy / change["file"]
            text = path.read_text()
            whole.setdefault(path, text)
            if text.count(change["from"]) != 1:
                sys.exit(f"{mutant['name']}: `from` stands {text.count(change['from'])} times in {change['file']}")
            path.write_text(text.replace(change["from"], change["to"]))
        seed, why, seconds = simulated(arguments.seeds)
        for path, text in whole.items():
            path.write_text(text)
        if seed is None:
            survived.append(mutant["name"])
        shown = "**survived**" if seed is None else seed
        print(f"| {mutant['rule']} | `{mutant['name']}` | {shown} | {seconds:.0f} s | {why[:110].replace('|', '/')} |", flush=True)
    if survived:
        sys.exit(f"survived: {', '.join(survived)}")


main()
