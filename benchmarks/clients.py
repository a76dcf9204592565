"""Works with: published packages train small cases with Optax, and with adamx in its place.

    python benchmarks/clients.py --markdown docs/works-with.md      [--only numpyro brax]

Each package gets a virtual environment of its own, in which `clients_cases.py` runs its case. A
package that fails is told with its error. Needs `uv`, which resolves in seconds what pip does not
in half an hour. `--environments` keeps what was installed, for the next time; `--python` is the
interpreter of the environments.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clients_cases import CASES, ROUNDS, Case
from report import Table, processors
from rich.console import Console
from side_by_side import processor

ROOT = Path(__file__).parents[1]
MARK = "<!-- tables -->"
LIMIT = 900  # seconds that an installation, or a case, may take
ERROR = re.compile(r"[\w.]*(Error|Exception)\b")  # the end of a traceback


def succeeded(command: Sequence[str | Path], **settings: Any) -> str:
    """Return what a command printed.

    Raises:
        RuntimeError: its last error, if it fails, takes too long or is not there.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, **settings)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{Path(command[0]).name} took more than {LIMIT} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if ERROR.match(line)]
        told = " ".join((errors[-1] if errors else done.stderr).split())
        raise RuntimeError(told[:300] or f"exit status {done.returncode}")
    return done.stdout


def interpreter(of: Case, environments: Path, python: Path) -> Path:
    """Return the Python of a case's environment, made if it is not there yet."""
    home = environments / of.package.lower()
    found = home / "bin" / "python"
    if not found.exists():
        succeeded(["uv", "venv", "-q", "--python", python, home])
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    succeeded(["uv", "pip", "install", "-q", "--python", found, *needed, *of.requires])
    return found


def environment() -> dict[str, str]:
    """Return the variables with which `clients_cases.py` finds adamx, and what it shares."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    return dict(os.environ) | {"PYTHONPATH": path}


def result(of: Case, environments: Path, python: Path) -> dict[str, Any]:
    """Return what `clients_cases.py` measured, or its `error`."""
    try:
        found = interpreter(of, environments, python)
        script = ROOT / "benchmarks" / "clients_cases.py"
        command = [found, script, of.package, "--cache", environments / "compiled"]
        printed = succeeded(command, env=environment())
        return json.loads(printed.splitlines()[-1])
    except RuntimeError as error:
        return {"error": str(error)}


def results(cases: Sequence[Case], environments: Path, python: Path) -> Iterator[dict[str, Any]]:
    """Measure one case after the other."""
    for number, of in enumerate(cases, 1):
        start = time.perf_counter()
        found = result(of, environments, python)
        told = found.get("error", "done")
        seconds = f"{time.perf_counter() - start:.0f} s"
        print(f"{number}/{len(cases)} {of.package}: {told} ({seconds})", file=sys.stderr)
        yield found


# ---------------------------------------------------------------------------------------- the page


def versions(of: Case, found: Mapping[str, Any]) -> str:
    """Return the packages with their versions, without Optax, which is the same for all."""
    if "error" in found:
        return of.package
    return ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k != "optax")


def bounded(value: float, of: Case) -> str:
    """Return a difference, marked if it is above the case's bound.

    Example:
        >>> bounded(2e-6, CASES["numpyro"]), bounded(2.0, CASES["numpyro"])
        ('2e-06', '**2**')
    """
    return f"{value:.1g}" if value <= of.bound else f"**{value:.1g}**"


def tables(cases: Sequence[Case], found: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the page's tables."""
    same, more = [], []
    for of, row in zip(cases, found, strict=True):
        told = [versions(of, row), of.what, f"`{of.optimizer}`"]
        if "error" in row:
            same.append(
                [*told, "-", "-", "-", "-", f"**{row['error'].replace('|', '/')}** {of.note}"]
            )
            continue
        theirs, ours = row["compiled"]
        same.append([
            *told, bounded(row["losses"], of), bounded(row["params"], of),
            f"{ours} / {theirs}", row["ratio"], of.note,
        ])  # fmt: skip
        more.append([of.package, f"`{of.also}`", *(f"{row['last'][i]:.4g}" for i in (2, 0))])
    return [
        Table(
            "The same optimizer",
            "Differences are the largest absolute one over the largest magnitude in the tree; bold "
            "if above 1e-4 (1e-9 in float64). Compilations: adamx / Optax, in one training. Time: "
            f"adamx / Optax, the median of {ROUNDS['step']} rounds of steps or {ROUNDS['fit']} of "
            "whole fits, tracing included, with the quartiles.",
            ["package", "case", "optimizer", "loss", "parameters", "compiled", "time", "note"],
            same,
        ),
        Table(
            "What only adamx has",
            "The last loss of the same case; beside it, that of the row above with Optax.",
            ["package", "transformation", "last loss", "Optax's above"],
            more,
        ),
    ]


def page(made: Sequence[Table], old: str) -> str:
    """Return the page with new tables; what stands above the mark stays."""
    facts = (
        f"Measured on {datetime.date.today().isoformat()}, {processor()}, {processors()} cores, "
        f"load average {os.getloadavg()[1]:.1f}."
    )
    above = old.partition(MARK)[0].rstrip() or "# Works with"
    return "\n\n".join([above, MARK, facts, *(table.markdown().strip() for table in made)]) + "\n"


def main(argv: Sequence[str] | None = None) -> list[Table]:
    """Run the command; `argv` is the command line, None means the program's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, help="packages", metavar="PACKAGE")
    parser.add_argument("--environments", type=Path, help="a folder in which they stay")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--markdown", type=Path, help="write the tables to this page")
    options = parser.parse_args(argv)
    cases = [CASES[name] for name in options.only or CASES]
    with tempfile.TemporaryDirectory() as folder:
        environments = (options.environments or Path(folder)).absolute()
        made = tables(cases, list(results(cases, environments, options.python)))
    console = Console()
    console.width = max(console.width, 200)
    for table in made:
        console.print("", table.rich())
    if options.markdown:
        old = options.markdown.read_text() if options.markdown.exists() else ""
        options.markdown.write_text(page(made, old))
    return made


if __name__ == "__main__":
    main()
