"""The benchmark for accelerators runs, small, on whatever there is; what it counts is right."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.progress import Progress

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
accelerator: Any = importlib.import_module("accelerator")


@pytest.fixture(autouse=True, scope="module")
def plain_jax():
    """What is measured is what users run: Optax mixes dtypes that strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
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


# Parameter, state and gradient read, parameter and state written. The rest is scalars, of which
# there are two in 4096 parameters: at most 2 * 2 * 4 / 4096.
MOVED = {
    "float32": 2 * (4 + 8) + 4,
    "packed16": 2 * (4 + 4) + 4,
    "packed8": 2 * (4 + 2) + 4,
    "bf16, masters": 2 * (2 + 2 + 8) + 2,
    "bf16, remainder8 and packed8": 2 * (2 + 1 + 2) + 2,
    "optax": 2 * (4 + 8) + 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_what_a_step_has_to_move_is_counted_in_its_arrays(name, rows):
    assert MOVED[name] <= float(rows[name]["bytes/param"]) < MOVED[name] + 0.01
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
