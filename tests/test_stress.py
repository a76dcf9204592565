"""The stress set: what "solved" and "within the bound" mean, and what the page says."""

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamx

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
stress: Any = importlib.import_module("stress")
which: Any = importlib.import_module("which")
pytestmark = pytest.mark.usefixtures("plain_jax")

SETTINGS = stress.Settings(rates=(0.5, 1.0), steps=6)


def result(least, **given) -> Any:
    """What runs did on a problem from 10 down to 0."""
    least = np.array(least, np.float64)
    zero = np.zeros(least.shape)
    made: dict[str, Any] = {
        "variables": 2, "first": 10.0, "best": 0.0, "peer": 0.0, "away": 1.0, "least": least,
        "last": least, "largest": least, "bad": zero.astype(int), "moved": zero,
        "finite": zero == 0, "steepest": zero, "seconds": 1.0,
    }  # fmt: skip
    return stress.Result(**made | given)


def test_solved_is_all_of_the_decrease_but_the_tolerance():
    found = result([[0.01, 0.0101], [np.nan, -1.0]]).solved(1e-3)
    np.testing.assert_array_equal(found, [[True, False], [False, True]])
    # f_L is not 0: of the decrease from 10 to 4
    np.testing.assert_array_equal(result([[4.5, 4.7]], best=4.0).solved(0.1), [[True, False]])


def test_what_breaks_a_promise_is_told_but_not_of_the_peer():
    chosen = {name: stress.methods()[name] for name in ("optax.adamw", "adamw", "adamw packed8")}
    none = [[np.nan, np.nan]]
    moved = np.array([[9.0, 9.0], [1.0, 1.00002], [0.5, 1.0]])
    finite = np.array([[False, False], [True, True], [True, False]])
    told = stress.broken({"P": result(none * 3, moved=moved, finite=finite)}, chosen)
    assert [line.split(":")[:2] for line in told] == [["P", " adamw"], ["P", " adamw packed8"]]
    assert "1.00002 times" in told[0] and "not finite" in told[1]
    assert not stress.broken({"P": result(none * 3)}, chosen)


def test_the_bound_of_a_storage_without_errors_is_cauchy_and_schwarzs():
    """And of one with errors larger, but by no more than what decays that are so far off give."""
    t = np.arange(1.0, 5000.0)
    exact = stress.reach(t)
    assert exact[0] == 1 and np.all(exact[1:] > 1)
    np.testing.assert_allclose(exact[-1], adamx.ratio_bound(0.9, 0.999) * 0.9966, rtol=1e-3)
    for bound in (stress.reach(t, 2.0**-7, 2.0**-8), stress.reach_of_packed8(t)):
        assert np.all(bound[300:] > exact[300:]) and np.all(bound < 2.6 * exact)


def walked(methods, gradients) -> tuple[Any, ...]:
    """Take steps with given gradients; return the account: bad, moved, finite and steepest."""
    steps = stress.Steps(tuple(methods), dataclasses.replace(SETTINGS, steps=len(gradients)))
    shape = (len(methods), len(SETTINGS.rates), gradients.shape[1])
    _, carry = steps.start(jnp.ones(gradients.shape[1]))
    for t, g in enumerate(gradients):
        grads = jnp.broadcast_to(jnp.asarray(g, jnp.float32), shape)
        _, carry = steps.step(jnp.int32(t), jnp.asarray(steps.reaches), grads, carry)
    return tuple(np.stack([np.asarray(account[i]) for *_, account in carry]) for i in range(4))


@pytest.mark.usefixtures("quick_compiler")
def test_runs_are_accounted_for():
    """A step that is twice too long is seen, a guard judged to its end, a gradient's step noted."""
    adamw = stress.methods()["adamw"]
    twice = dataclasses.replace(adamw, make=lambda lr: adamx.adamw(lambda step: 2 * lr(step)))
    made = [adamw, twice, stress.methods()["skip_nonfinite"]]
    gradients = np.array([[3.0, -1e30], [1e-30, 2.0], [np.inf, 1.0], [1.0, 1.0]])
    bad, moved, finite, steepest = walked(made, gradients)
    np.testing.assert_array_equal(bad, 3)  # the step, from 1
    np.testing.assert_allclose(moved, [[1.0] * 2, [2.0] * 2, [1.0] * 2], rtol=1e-5)
    assert finite.all()  # up to the infinite gradient, and the guard's to the end
    np.testing.assert_allclose(steepest, 1e30)


def any_gradients() -> np.ndarray:
    """Gradients of each size that float32 holds: by turns, rising, falling, once, and late."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (60, 1))
    rise = 10.0 ** np.linspace(-40, 38.5, 60)[:, None]
    late = np.where(np.arange(60)[:, None] < 50, 1e-3, 10.0 ** np.linspace(-5, 38, 8))
    once = np.where(np.arange(60)[:, None] == 0, 10.0 ** np.linspace(-5, 38, 8), 0.0)
    drawn = 10.0 ** rng.uniform(-40, 38.5, (60, 8)) * rng.choice([-1.0, 1.0], (60, 8))
    return np.concatenate([signs * rise, rise, rise[::-1], late, once, drawn], 1)


STORED = [name for name, method in stress.methods().items() if method.reach is not None]
FAST = "adamw packed16"


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == FAST else pytest.mark.slow) for n in STORED]
)
def test_no_gradient_moves_an_element_further_than_the_bound(name):
    bad, moved, finite, _ = walked([stress.methods()[name]], any_gradients())
    assert finite.all() == (name != stress.PEER) and not bad.any()  # Optax's nu becomes infinite
    assert np.all(moved <= 1 + stress.ROUNDING) and np.all(moved > 0.5)


UNSCALED = {"sgd", "sgdw", "momentum", "radam", "simplified_ademamix", "lamb"}
"""Those that do not divide by a root, or not at first; by how much less than they add; or by |u|
and multiply by |w|."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(which.methods().keys() - UNSCALED))
def test_no_gradient_of_the_family_makes_a_long_step(name):
    """Of more than 15 rates, twice Adam's bound; without the limit it is up to 1e19.

    Up to 1e37: a sum of gradients, as MARS and Muon have it, may be infinite above (deviations.md).
    """
    gradients = jnp.asarray(any_gradients() / 32, jnp.float32)
    grads = {"b": gradients, "w": gradients.reshape(60, 9, -1)}
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)
    tx = which.methods()[name](lambda step: 0.1 + 0 * step, jnp.float32(0.1))

    @jax.jit
    def walk(grads):
        def step(state, g):
            updates, state = tx.update(g, state, params)
            return state, updates

        return jax.lax.scan(step, tx.init(params), grads)[1]

    for u in jax.tree.leaves(walk(grads)):
        assert np.isfinite(u).all() and np.abs(u).max() <= 1.5


def test_the_page_has_a_row_for_each_method_and_the_tables_of_the_command():
    text = (ROOT / "docs" / "stress-set.md").read_text().partition(stress.MARK)[2]
    methods = stress.methods()
    results = {"P": result([[np.nan, 0.0]] * len(methods), bad=np.ones((len(methods), 2), int))}
    settings = dataclasses.replace(stress.FULL, rates=(0.5, 1.0))
    for make in stress.TABLES:
        made = make(results, methods, settings)
        part = text.partition(f"## {made.title}\n\n")[2].partition("\n\n")[0].splitlines()
        rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in part]
        assert len(rows) > 2 and {len(row) for row in rows} == {len(rows[0])}, made.title
        assert rows[0][0] == made.columns[0] and rows[0][-1] == made.columns[-1]
        if made.columns[0] == "method":
            assert [row[0] for row in rows[2:]] == list(methods)
        if made.title == "Finite, and within the bound":
            for name, _, broken, longest, *_ in rows[2:]:
                assert name == stress.PEER or broken == "0"
                assert longest == "-" or float(longest) <= 1


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("sif2jax"), reason="pip install '.[benchmarks]'")
def test_storages_keep_their_bounds_on_some_of_the_problems():
    """Gradients up to 3e31 and not finite, minima that are reached, and one that is not."""
    chosen = {name: stress.methods()[name] for name in ("adamw", "adamw packed8", "skip_nonfinite")}
    settings = stress.Settings(rates=(0.1, 1.0), steps=300)
    steps, problems = stress.Steps(tuple(chosen.values()), settings), stress.problems()
    assert not jax.config.read("jax_enable_x64")
    names = "ROSENBR", "CLIFF", "MEXHAT", "NELSONLS", "BROWNBS"
    found = {name: stress.tried(problems[name], steps) for name in names}
    assert not stress.broken(found, chosen)
    assert found["CLIFF"].solved(1e-3).any(-1).all()
    assert not found["BROWNBS"].solved(1e-3).any()
    assert found["NELSONLS"].bad.any() and found["NELSONLS"].steepest.max() > 1e30

    # what packed8 solves since a gradient above 2.2e5 counts as that
    plain, limit = stress.methods()["adamw"], adamx.clip_by_value(2.2e5)
    clipped = dataclasses.replace(plain, make=lambda lr: adamx.chain(limit, adamx.adamw(lr)))
    settings = stress.Settings(rates=(0.001,))
    found = stress.tried(problems["HAHN1LS"], stress.Steps((plain, clipped), settings))
    np.testing.assert_array_equal(found.solved(1e-3), [[False], [True]])
