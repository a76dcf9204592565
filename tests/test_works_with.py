"""Packages that train with adamx: the page has each, and those at hand are trained here."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamx

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
cases: Any = importlib.import_module("clients_cases")
clients: Any = importlib.import_module("clients")


pytestmark = pytest.mark.usefixtures("plain_jax")


def rows(title: str) -> list[list[str]]:
    """Return the cells of a table of the page."""
    text = (ROOT / "docs" / "works-with.md").read_text()
    lines = text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    found = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    assert len({len(row) for row in found}) == 1
    return found[2:]


def test_the_page_has_a_row_for_each_case() -> None:
    """Run benchmarks/clients.py anew if this fails."""
    found = dict(zip(cases.CASES, rows("The same optimizer"), strict=True))
    for name, of in cases.CASES.items():
        assert found[name][0].split()[0] == re.split("[<>=]", of.requires[0])[0]
        assert found[name][1:3] == [of.what, f"`{of.optimizer}`"]
        assert set(found[name][3:7]) == {"-"} or "**" not in "".join(found[name][3:5]), name
    measured = [name for name, row in found.items() if row[3] != "-"]
    more = rows("What only adamx has")
    assert [row[:2] for row in more] == [[x, f"`{cases.CASES[x].also}`"] for x in measured]
    assert all(np.isfinite(float(cell)) for row in more for cell in row[2:])


@pytest.mark.parametrize("name", cases.CASES)
def test_the_expressions_of_a_case_are_transformations_of_one_library(name: str) -> None:
    of = cases.CASES[name]
    ours, also = (cases.transformation(x, adamx) for x in (of.optimizer, of.also))
    assert all(isinstance(tx, adamx.Transformation) for tx in (ours, also))
    theirs = cases.transformation(of.optimizer, optax)
    assert not isinstance(theirs, adamx.Transformation)


def test_a_name_that_only_optax_has_is_not_taken_for_adamxs() -> None:
    with pytest.raises(NameError, match="novograd"):
        cases.transformation("novograd(0.1)", adamx)


def test_a_difference_is_over_the_largest_magnitude_of_the_tree() -> None:
    a, b = {"w": [1.0, 2.5], "b": -4.0}, {"w": [1.0, 2.0], "b": -4.0}
    assert cases.difference(a, b) == 0.125
    assert cases.difference(b, b) == 0.0
    assert cases.difference({"w": jnp.array([3j])}, {"w": jnp.array([4j])}) == 0.25
    with pytest.raises(ValueError, match="the trees differ"):
        cases.difference({"w": 1.0}, {"v": 1.0})
    with pytest.raises(ValueError, match="the shapes differ"):
        cases.difference({"w": np.ones(1)}, {"w": np.ones(2)})
    with pytest.raises(ValueError, match="not everything is finite"):
        cases.difference({"w": np.nan}, {"w": 1.0})


def made_up(first: float, second: float) -> dict[str, Any]:
    return {
        "versions": {"numpyro": "1.0", "jax": "2.0", "optax": "3.0"}, "losses": first,
        "params": second, "compiled": [4, 5], "ratio": "1.000", "last": [0.5, 0.25, 0.125],
    }  # fmt: skip


def test_a_difference_above_the_bound_and_a_failure_are_shown(tmp_path: Path) -> None:
    of = cases.CASES["numpyro"]
    failed = {"error": "ImportError: a | b"}
    made = clients.tables([of, of], [made_up(1e-6, 1e-3), failed])
    good, bad = made[0].rows
    assert good[0] == "numpyro 1.0, jax 2.0" and good[3:6] == ["1e-06", "**0.001**", "5 / 4"]
    assert bad[3:7] == ["-"] * 4 and bad[7].startswith("**ImportError: a / b**")
    assert made[1].rows == [["numpyro", f"`{of.also}`", "0.125", "0.5"]]
    text = clients.page(made, "# By hand\n\nkept\n\n<!-- tables -->\n\nbefore\n")
    assert text.startswith("# By hand\n\nkept\n\n<!-- tables -->\n\nMeasured on ")
    assert "before" not in text and "ImportError: a / b" in text


def test_the_last_error_of_a_command_is_told() -> None:
    program = "import sys; sys.stderr.write('noise'); raise ValueError('of the case')"
    with pytest.raises(RuntimeError, match="ValueError: of the case"):
        clients.succeeded([sys.executable, "-c", program])
    assert clients.succeeded([sys.executable, "-c", "print(1)"]) == "1\n"


def test_compilations_are_counted() -> None:
    with cases.compilations() as seen:
        step = jax.jit(lambda x: x * 3.0)
        step(np.ones(3, np.float32))
        step(np.ones(3, np.float32))
        step(np.ones(4, np.float32))
    assert len(seen) == 2
    jax.jit(lambda x: x * 5.0)(np.ones(3, np.float32))
    assert len(seen) == 2


# those whose packages are there for other tests, and take a few seconds
AT_HAND = ("orbax", "cloudpickle", "jaxtyping")


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_HAND)
def test_a_case_trains_as_with_optax(name: str) -> None:
    """In an interpreter of its own, as users have JAX."""
    script = ROOT / "benchmarks" / "clients_cases.py"
    told = clients.succeeded([sys.executable, script, name], env=clients.environment())
    found, of = json.loads(told), cases.CASES[name]
    assert 0 < found["losses"] <= of.bound and 0 < found["params"] <= of.bound
    assert re.match(r"\d+\.\d{3} \[", found["ratio"])
    theirs, ours = found["compiled"]
    assert ours <= theirs + 3  # scalars that `init` makes
    assert all(np.isfinite(found["last"])) and found["last"][2] != found["last"][1]
