"""Make small mistakes in adamx/, one at a time, and look which test notices each.

    python .ci/mutants.py                        all mutants of .ci/mutants.toml
    python .ci/mutants.py --only eps-left-out    some of them, by their id or kind
    python .ci/mutants.py --list                 only check the list, and say where each mutant is
    python .ci/mutants.py --unmutated            the tests that the list names, on the tree as it is
    python .ci/mutants.py --json after.json      write the killing test of each to a file, too

A mutant is a line or two of the library, and what they become. Each is made in a copy of the tree,
where pytest runs the tests that the list names for it, up to the first that fails: that test kills
the mutant. The outcomes are

    killed     a test failed, as it should
    survived   all of its tests passed: they do not hold what the mutant breaks
    broken     its tests did not run: the old text is not there once, the library cannot be
               imported, or no test was found; the list has to be mended

The exit status is 0 where all were killed. A text is looked for in all of adamx/, so that code may
move; tests have short names in the list, of which one line tells where they are.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")
KINDS = ("formula", "storage", "lifting", "wrapper", "interop", "inspect")
COPIED = ("adamx", "tests", "examples", "benchmarks", "docs", "pyproject.toml", "README.md")
SKIPPED = shutil.ignore_patterns("__pycache__", ".*")
LIMIT = 600  # seconds for one run of pytest
NO_TESTS = "none of its tests is there"
FAILED = re.compile(r"^FAILED (.+?)(?: - .*)?$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake: `old` in `path` becomes `new`; `tests` are the arguments of a pytest each."""

    id: str
    breaks: str
    kind: str
    old: str
    new: str
    tests: list[list[str]]
    path: str

    def make(self, tree: Path) -> None:
        """Make the mistake in a copy of the tree."""
        file = tree / self.path
        file.write_text(file.read_text().replace(self.old, self.new))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant, and the test that killed it or what is wrong with it."""

    word: str
    by: str
    seconds: float


def read_list() -> tuple[list[Mutant], list[str]]:
    """Return the mutants, and what is wrong with those that cannot be made."""
    listed = tomllib.loads(LIST.read_text())
    names = {name: shlex.split(arguments) for name, arguments in listed["tests"].items()}
    sources = {str(p.relative_to(ROOT)): p.read_text() for p in sorted(ROOT.glob("adamx/**/*.py"))}
    mutants, wrong, seen = [], [], set()
    for entry in listed["mutant"]:
        said = [] if entry["id"] not in seen else ["there is another of this id"]
        seen.add(entry["id"])
        found = [path for path, text in sources.items() for _ in range(text.count(entry["old"]))]
        if len(found) != 1:
            said.append(f"old has to stand once in adamx/, and does {len(found)} times: {found}")
        if entry["old"] == entry["new"]:
            said.append("new is old")
        if entry["kind"] not in KINDS:
            said.append(f"kind has to be one of {KINDS}, and is {entry['kind']!r}")
        words = [shlex.split(test) for test in entry["tests"]]
        entry["tests"] = [[*names.get(first, [first]), *more] for first, *more in words]
        files = sorted({first for first, *_ in entry["tests"]})
        said += [f"there are no tests {file}" for file in files if not (ROOT / file).exists()]
        if said:
            wrong.append(f"{entry['id']}: {'; '.join(said)}")
        else:
            mutants.append(Mutant(**entry, path=found[0]))
    return mutants, wrong


def copy_of_tree(where: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, where / name, ignore=SKIPPED)
        else:
            shutil.copy(ROOT / name, where / name)


def run(tree: Path, arguments: list[str]) -> tuple[str, str]:
    """Run pytest up to the first failure; return the outcome's word, and by what."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rf"]
    environment = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "500"}
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return "broken", f"no end after {LIMIT} s of {shlex.join(arguments)}"
    failed = FAILED.search(done.stdout)
    if done.returncode == 1 and failed:
        return "killed", failed[1]
    if done.returncode == 0:
        return "survived", ""
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        return "broken", NO_TESTS
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in said if line.startswith(("E  ", "ERROR"))] or said[-1:]
    return "broken", f"pytest {shlex.join(arguments)}: {' '.join(errors[:1]).strip()}"


def judge(mutant: Mutant, more: list[str]) -> Outcome:
    """Make a mutant in a copy of its own, and run its tests until one fails."""
    start = time.monotonic()
    word, by = "broken", NO_TESTS
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_of_tree(Path(folder))
        mutant.make(Path(folder))
        for arguments in mutant.tests:
            outcome = run(Path(folder), [*arguments, *more])
            if outcome != ("broken", NO_TESTS):  # there may be some behind another name
                word, by = outcome
                if word != "survived":
                    break
    return Outcome(word, by, time.monotonic() - start)


def judge_all(
    mutants: list[Mutant], jobs: int, more: list[str], results: Path | None
) -> dict[str, Outcome]:
    """Judge the mutants, some at a time; print and write down each as it ends."""
    width = max(len(mutant.id) for mutant in mutants)
    outcomes: dict[str, Outcome] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(judge, mutant, more): mutant for mutant in mutants}
        for future in concurrent.futures.as_completed(started):
            mutant, outcome = started[future], future.result()
            outcomes[mutant.id] = outcome
            row = f"{mutant.id:<{width}}  {mutant.kind:<8}  {outcome.word:<8}"
            print(f"{row}  {outcome.seconds:4.0f} s  {outcome.by}".rstrip(), flush=True)
            if results:
                done = {m.id: outcomes[m.id] for m in mutants if m.id in outcomes}
                by = {name: o.by if o.word == "killed" else o.word for name, o in done.items()}
                results.write_text(json.dumps(by, indent=1) + "\n")
    return {mutant.id: outcomes[mutant.id] for mutant in mutants}


def run_unmutated(mutants: list[Mutant], more: list[str]) -> int:
    """Run each set of tests that the mutants name once; return how many fail."""
    sets = dict.fromkeys(tuple(test) for mutant in mutants for test in mutant.tests)
    whole = {test for test in sets if len(test) == 1}
    sets = [test for test in sets if test in whole or test[:1] not in whole]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="unmutated-") as folder:
        copy_of_tree(Path(folder))
        for test in sets:
            word, by = run(Path(folder), [*test, *more])
            bad += word != "survived"
            said = "passed" if word == "survived" else f"failed: {by}"
            print(f"{shlex.join(test)}  {said}", flush=True)
    return bad


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ID", help="ids, or kinds")
    parser.add_argument("--jobs", type=int, default=1, help="how many mutants at a time")
    parser.add_argument("--pytest", default="", metavar="ARGS", help="more arguments of pytest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--list", action="store_true", help="check the list, and run nothing")
    parser.add_argument("--unmutated", action="store_true", help="run the tests without a mutant")
    return parser.parse_args(argv)


def main() -> int:
    """Run what the options say; return the exit status."""
    options = parse()
    mutants, wrong = read_list()
    if options.only:
        known = {name for mutant in mutants for name in (mutant.id, mutant.kind)}
        asked = set(options.only)
        wrong = [line for line in wrong if line.partition(":")[0] in asked]
        wrong += [f"{name}: not in the list" for name in sorted(asked - known) if not wrong]
        mutants = [mutant for mutant in mutants if {mutant.id, mutant.kind} & asked]
    for line in wrong:
        print(f"broken: {line}")
    if options.list:
        for mutant in mutants:
            print(f"{mutant.id} ({mutant.kind}, {mutant.path}): {mutant.breaks}")
        return bool(wrong)
    more = shlex.split(options.pytest)
    if options.unmutated:
        return bool(wrong or run_unmutated(mutants, more))
    outcomes = judge_all(mutants, options.jobs, more, options.json) if mutants else {}
    for word in ("killed", "survived", "broken"):
        ids = [name for name, outcome in outcomes.items() if outcome.word == word]
        ids += [line.partition(":")[0] for line in wrong] if word == "broken" else []
        print(f"{word}: {len(ids)}" + (f" ({', '.join(ids)})" if ids and word != "killed" else ""))
    return bool(wrong or any(outcome.word != "killed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
