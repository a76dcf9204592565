"""The benchmark for accelerators runs, small, on whatever there is; what it counts is right."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
accelerator: Any = importlib.import_module("accelerator")
pytestmark = pytest.mark.usefixtures("plain_jax")


@pytest.fixture(scope="module")
def quick(plain_jax, tmp_path_factory):
    """The tables of --quick, and the page."""
    page = tmp_path_factory.mktemp("accelerator") / "accelerator.md"
    return accelerator.main(["--quick", "--markdown", str(page)]), page.read_text()


@pytest.fixture(scope="module")
def rows(quick):
    (table,), _ = quick
    assert all(len(row) == len(table.columns) for row in table.rows)
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


@pytest.mark.slow
def test_the_page_says_when_with_what_and_on_which_device_it_was_measured(quick):
    tables, page = quick
    assert all(table.markdown() in page for table in tables)
    for fact in ("date", "device", "jax", "jaxlib", "optax", "adamx"):
        assert re.search(rf"^- {fact}: \S", page, re.MULTILINE)


# Parameter, state and gradient read, parameter and state written; the gradient again where its norm
# comes first, and in LAMB both moments too. The rest is scalars among 4096 parameters: at most two,
# of 4 bytes, 2 * 2 * 4 / 4096, and four with a guard, in a cell of four digits.
MOVED = {
    "float32": 2 * (4 + 8) + 4,
    "packed16": 2 * (4 + 4) + 4,
    "packed8": 2 * (4 + 2) + 4,
    "bf16, masters": 2 * (2 + 2 + 8) + 2,
    "bf16, remainder8 and packed8": 2 * (2 + 1 + 2) + 2,
    "optax": 2 * (4 + 8) + 4,
    "clip": 2 * (4 + 8) + 4 + 4,
    "optax, clip": 2 * (4 + 8) + 4 + 4,
    "clip and guard": 2 * (4 + 8) + 4 + 4,
    "optax, clip and guard": 2 * (4 + 8) + 4 + 4,
    "lamb": 2 * (4 + 8) + 4 + 12,
    "optax, lamb": 2 * (4 + 8) + 4 + 12,
}


def tables_of(text):
    """Return the tables of a page, without titles and notes."""
    found = []
    for part in text.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        columns, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
        found.append(accelerator.Table("", "", columns, rows))
    return found


def test_the_page_begins_with_what_its_tables_say_of_optaxs_time():
    page = (Path(__file__).parents[1] / "docs/on-a-gpu.md").read_text()
    answer = accelerator.answer(tables_of(page))
    assert page.startswith(f"# Steps measured on a GPU\n\n{answer}\n\n")


def test_the_ranges_leave_out_what_was_not_measured():
    columns = ["", "time / optax"]
    first = [["float32", "1.067 [1.051, 1.136]"], ["packed8", "does not fit"]]
    second = [["float32", "1.001 [0.9, 1.1]"], ["packed16", "0.682 [0.6, 0.7]"]]
    tables = [accelerator.Table("", "", columns, rows) for rows in (first, second)]
    told = " ".join(accelerator.answer(tables).split())
    assert told.startswith("AdamW in float32 takes 1.00 to 1.07 of the time of Optax's. ")
    assert '"packed16"` it takes 0.68. The ranges' in told and "packed8" not in told


def test_each_step_is_timed_beside_optaxs_of_the_same_method():
    """Optax's own beside itself, which shows the resolution."""
    peers = {name: x.peer for name, x in accelerator.candidates().items() if "Flash" not in name}
    assert peers.keys() == MOVED.keys()
    for name, peer in peers.items():
        method = name.removeprefix("optax, ")
        assert peer == (
            f"optax, {method}" if method in ("clip", "clip and guard", "lamb") else "optax"
        ), name


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_what_a_step_has_to_move_is_counted_in_its_arrays(name, rows):
    scalars = 0.02 if "guard" in name else 0.01
    assert MOVED[name] <= float(rows[name]["bytes/param"]) < MOVED[name] + scalars
    # a program moves at least that, and starts a kernel to do so
    assert float(rows[name]["moved/param"]) >= MOVED[name]
    assert int(rows[name]["kernels"]) >= int(rows[name]["fusions"]) > 0
    assert rows[name]["finite"] == "yes"


@pytest.mark.slow
def test_the_bandwidth_is_these_bytes_by_the_time(rows):
    for row in rows.values():
        seconds, rate = float(row["ms"]) / 1e3, float(row["GB/s"]) * 1e9
        # the cells have three digits and four
        assert float(row["bytes/param"]) * 2**12 / seconds == pytest.approx(rate, rel=6e-3)


def test_what_does_not_fit_is_said_and_not_run(monkeypatch):
    monkeypatch.setattr(accelerator, "memory", lambda: 1.0)
    with Progress(disable=True) as progress:
        meter = accelerator.Meter(progress, 0)
        table = accelerator.steps(2**12, 1, accelerator.QUICK, meter)
    assert {row[2] for row in table.rows} == {"does not fit"}
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_the_options_reach_the_settings():
    arguments = ["--sizes", "64k", "1000", "--leaves", "5", "--rounds", "7", "--seed", "3"]
    settings, page = accelerator.parse(arguments)
    assert (settings.sizes, settings.leaves) == ((2**16, 1000), (5,))
    assert (settings.rounds, settings.seed, page) == (7, 3, None)
    assert accelerator.parse([]) == (accelerator.Settings(), None)
