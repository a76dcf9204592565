"""Make the measured tables of docs/ anew with small settings, and compare them with those there.

    python .ci/tables.py [PAGE ...]

The commands that write a page run with `--quick` on a copy of it that has no tables. They have to
give it the page's tables again: headings, columns and rows, but for the numbers, since a small run
is of other sizes. Bytes and copies, which are read from compiled programs, have to be the page's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "<!-- tables -->"  # what stands above it is written by hand
PAPERS = ("adam_figure1", "adam_figure4", "adamw_figures1_2", "warm_restarts", "low_precision")
COMMANDS = {
    "around-benchmarks.md": ["benchmarks/around.py"],
    "benchmarks.md": ["benchmarks/side_by_side.py"],
    "family.md": ["benchmarks/family.py"],
    "host-benchmarks.md": ["benchmarks/host.py"],
    "low-precision.md": ["benchmarks/convergence.py"],
    "papers.md": [f"examples/papers/{name}.py" for name in PAPERS],
}
SAMPLES = {  # pages, and in what tables of theirs a small run has not all rows and columns
    "family.md": "on the digits",
    "low-precision.md": "",
    "papers.md": "",
}
TORCH = {"torch", "/ torch"}  # the row and the column that are there where PyTorch is installed
NUMBER = re.compile(r"(?<![A-Za-z\d.])\d[\d.]*(e[+-]?\d+)?")  # not the 32 of float32
BYTES = re.compile(r"bytes|branches|moved|state$")

Tables = dict[tuple[str, str], dict[str, str]]


def tables(text: str) -> Tables:
    """Return each row's cells by column, by its heading and first cell without numbers."""
    found: Tables = {}
    heading, columns = "", []
    for line in text.splitlines():
        if line.startswith("#"):
            heading = NUMBER.sub("#", line.lstrip("# "))
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if not columns:
            columns = [NUMBER.sub("#", column) for column in cells]
        elif cells[0] not in TORCH and set("".join(cells)) - set(":- "):
            row = {k: v for k, v in zip(columns, cells, strict=True) if k not in TORCH}
            found[heading, NUMBER.sub("#", cells[0])] = row
    return found


def rebuilt(page: str, folder: Path) -> Tables:
    """Return the tables that a page's commands write."""
    copy = folder / page
    kept = [x for x in (ROOT / "docs" / page).read_text().splitlines() if not x.startswith("|")]
    copy.write_text("\n".join(kept) + "\n")
    for script in COMMANDS[page]:
        command = [sys.executable, str(ROOT / script), "--quick", "--markdown", str(copy)]
        if script.startswith("examples/"):
            command += ["--no-progress", "--output", str(folder / f"{Path(script).stem}.png")]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    return tables(copy.read_text())


def differences(page: str, folder: Path) -> list[str]:
    """Return in what a page's tables and those that its commands write are not the same."""
    text = (ROOT / "docs" / page).read_text()
    there, made = tables(text.partition(MARK)[2] or text), rebuilt(page, folder)
    told = [f"not on the page: {row}" for row in made.keys() - there.keys()]
    whole = [row for row in there if page not in SAMPLES or SAMPLES[page] not in row[0]]
    told += [f"only on the page: {row}" for row in whole if row not in made]
    told += ["no tables were made"] * (not made)
    for row in made.keys() & there.keys():
        new, old = made[row], there[row]
        if new.keys() - old.keys() or (row in whole and new.keys() != old.keys()):
            told.append(f"other columns: {row}: {', '.join(new)}; there {', '.join(old)}")
        told += [
            f"{row}: {column}: {new[column]}, there {old[column]}"
            for column in new.keys() & old.keys()
            if not alike(column, new[column], old[column])
        ]
    return told


def alike(column: str, new: str, old: str) -> bool:
    """Say whether two cells tell the same, as far as that does not depend on the size.

    In a small array the scalars and what is kept for each row weigh up to 2 % more. Some of Optax's
    wrappers copy each array, so that the number of copies follows that of the arrays.
    """
    try:
        a, b = float(new), float(old)
    except ValueError:
        return True
    if column.startswith("copies"):
        return (a > 0) == (b > 0)
    return not BYTES.search(column) or abs(a - b) <= max(0.02 * b, 0.01)


def main() -> None:
    """Compare the pages that the command line names, or all; exit with 1 where one differs."""
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for page in sys.argv[1:] or COMMANDS:
            told = differences(page, Path(folder))
            print(f"docs/{page}:", *told or ["as its commands write it"], sep="\n    ")
            failed |= bool(told)
    sys.exit(failed)


if __name__ == "__main__":
    main()
