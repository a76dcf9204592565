"""What a schedule gives is limited to its argument's range: schedules end a hair outside."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import on_cpu
from hyperparameters import HYPERPARAMETERS, SCHEDULES, build

import adamx
from adamx.core.checks import DECAY, Range, ranges_of

W = jnp.array([[0.5, -1.0], [2.0, 1.0]])
G = jnp.stack([W + 1.0, 1.0 - 2 * W, 0 * W, 0 * W, W])
TINY = float(jnp.finfo(jnp.float32).tiny)
HAIR = 2.0**-20


def ends(range_: Range) -> list[tuple[float, float]]:
    """What is outside of a range, and the float32 number that it counts as."""
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    pairs = []
    if np.isfinite(range_.low):
        inside = TINY if range_.low > 0 else range_.low
        pairs += [(range_.low - HAIR, inside), (range_.low - 3.0, inside)]
    if np.isfinite(range_.high):
        inside = below_one if range_.open_above else range_.high
        pairs += [(range_.high + HAIR, inside), (range_.high, inside)]
    return pairs


def scheduled_arguments(function: str) -> dict[str, Range]:
    return {name: r for name, r in ranges_of(getattr(adamx, function)).items() if r.schedule}


def rows(function: str, default: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """For each end of each argument the values of all arguments: outside, and inside."""
    outside, inside = [], []
    ranges = scheduled_arguments(function)
    for i, range_ in enumerate(ranges.values()):
        for out, end in ends(range_):
            for found, value in ((outside, out), (inside, end)):
                found.append(np.full(len(ranges), default, np.float32))
                found[-1][i] = value
    return np.array(outside), np.array(inside)


def pairs_of_trajectories(function: str, arrays: bool) -> Any:
    """Run with the values outside and inside, as schedules or as traced arrays."""
    outside, inside = rows(function)

    @jax.jit
    @jax.vmap
    def run(row: jax.Array) -> Any:
        given = dict(zip(scheduled_arguments(function), row, strict=True))
        if not arrays:
            given = {name: lambda _, value=value: value for name, value in given.items()}
        tx = build(function, **given)

        def step(carry: Any, g: jax.Array) -> Any:
            w, state = carry
            updates, state = tx.update(g, state, w)
            return (w + updates, state), (w + updates, state)

        return jax.lax.scan(step, (W, tx.init(W)), G)[1]

    ways = jax.device_get(run(np.concatenate([outside, inside])))
    half = len(outside)
    return jax.tree.map(lambda x: x[:half], ways), jax.tree.map(lambda x: x[half:], ways)


LIMITED = [name for name in HYPERPARAMETERS if len(rows(name)[0])]
assert {name for name in HYPERPARAMETERS if SCHEDULES & {*HYPERPARAMETERS[name].values()}} == {
    name for name in HYPERPARAMETERS if scheduled_arguments(name)
}


FAST = [name for name in LIMITED if not getattr(adamx, name).__module__.startswith(
    "adamx.optimizers")]  # fmt: skip
FAST += ["stable_adamw", "adan"]


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("arrays", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "function",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LIMITED],
)
def test_a_value_outside_counts_as_the_end_of_the_range(function, arrays):
    """What a schedule gives, or a traced number, as `optax.inject_hyperparams` gives."""
    got, wanted = pairs_of_trajectories(function, arrays)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def ends_below_zero() -> tuple[Any, int]:
    """A schedule of Optax from 1 to 0 that ends, compiled, below zero, and its last step."""
    for n in range(3, 30):
        schedule = optax.linear_schedule(1.0, 0.0, n)
        if jax.jit(schedule)(jnp.int32(n)) < 0:
            return schedule, n
    raise AssertionError("no schedule ends outside: what is limited?")


DECAYS: dict[str, Any] = {
    "clip": lambda b: adamx.chain(adamx.clip_by_global_norm(b), adamx.sgd(0.1)),
    "stable_adamw": lambda b: adamx.stable_adamw(0.1, b2=b),
    "rate": lambda b: adamx.adamw(b, weight_decay=b),
    "injected": lambda b: optax.inject_hyperparams(adamx.adam)(0.1, b2=b),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", DECAYS)
def test_a_run_outlives_the_end_of_its_schedule(name):
    on_cpu("compiled for a GPU no such schedule ends outside")
    schedule, last = ends_below_zero()
    tx, w = DECAYS[name](schedule), jnp.ones(3)
    state, step = tx.init(w), adamx.make_step(tx)
    for t in range(last + 4):
        w, state = step(w, state, jnp.full(3, float(t <= last)))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((w, state)))
    if name == "rate":
        assert state["learning_rate"] == 0  # what was used


@pytest.mark.parametrize("python", [True, False])
def test_not_a_number_and_infinity_are_not_hidden(python):
    for bad in (np.nan, np.inf):
        value = float(bad) if python else jnp.float32(bad)
        tx = adamx.adam(lambda _, value=value: value)
        _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
        np.testing.assert_array_equal(state["learning_rate"], bad)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, jnp.float32])
def test_a_decay_of_one_is_the_largest_number_below(kind):
    limited = DECAY.limited(float(kind(1)) if kind is float else jnp.asarray(kind(1)))
    assert limited == 1 - 2.0**-24
    with jax.enable_x64(True):
        limited = DECAY.limited(1.0 if kind is float else jnp.asarray(kind(1)))
        assert limited == 1 - (2.0**-24 if jnp.result_type(kind) == jnp.float32 else 2.0**-53)


def test_the_derivative_at_the_end_of_a_range_is_that_inside():
    def moved(rate):
        return adamx.sgd(rate).update(jnp.array([2.0]), adamx.sgd(rate).init(jnp.ones(1)))[0][0]

    assert jax.grad(moved)(0.0) == -2.0
