"""Scheduled hyperparameters over the whole family: b_t in step t, corrected by the product.

Each optimizer gets a schedule for every argument that takes one, all at once, and is compared to
its formula written in NumPy with arrays of decays. A new one is tested by adding a line to MEMBERS.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import thinned
from scheduled import (
    B1,
    MEMBERS,
    NUMBERS,
    SIGNED,
    STEPS,
    ULP,
    T,
    W,
    at,
    build,
    constants,
    ema,
    past,
    schedules,
    walk,
    wanted,
)

import adamx

# what is tested does not depend on optimised code, and compiling takes most of the time
pytestmark = pytest.mark.usefixtures("quick_compiler")


@functools.cache
def run_in_float64() -> Any:
    """All members with all their schedules."""
    with jax.enable_x64(True):
        txs = {name: build(name, schedules()) for name in MEMBERS}
        txs = {name: adamx.chain(tx) for name, tx in txs.items()}
        return walk(txs, lambda name, t: W + MEMBERS[name].walks * np.sum(wanted(name)[:t], axis=0),
                    jnp.float64)  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_every_schedule_acts_in_its_step(name: str) -> None:
    """The roundings are counted in test_agreement.py: 10 and 18 more in each step."""
    updates, state = run_in_float64()[name]
    bound = (10 + 18 * at(T)) * 2.0**-53 * MEMBERS[name].worse * np.abs(wanted(name))
    assert np.all(np.abs(updates - wanted(name)) <= bound)
    for entry, values in MEMBERS[name].recorded.items():
        np.testing.assert_allclose(state[entry], values, rtol=(10 + 18 * STEPS) * 2.0**-53)


def test_every_optimizer_is_in_the_table() -> None:
    functions = [getattr(adamx, name) for name in adamx.__all__]
    optimizers = {
        function.__name__
        for function in functions
        if inspect.isfunction(function)
        and function.__module__.startswith("adamx.optimizers.")
        and "learning_rate" in inspect.signature(function).parameters
    }
    assert optimizers == {MEMBERS[name].of or name for name in MEMBERS}


def test_a_schedule_that_stays_is_the_number() -> None:
    """In float32, where 1 - b^t as a recurrence is a few ULP, one a step, from the closed form.

    Rounding amplifies that as in the law above, save that nothing else is rounded otherwise.
    """
    kinds = {"number": NUMBERS, "schedule": constants()}
    txs = {
        f"{name}/{kind}": build(name, values) for name in MEMBERS for kind, values in kinds.items()
    }
    runs = walk(txs, lambda *_: W, jnp.float32)
    for name, member in MEMBERS.items():
        (a, number), (b, schedule) = (runs[f"{name}/{kind}"] for kind in kinds)
        assert set(schedule) - set(number) == set(member.recorded)
        assert set(number) <= set(schedule)
        bound = (8 + at(T)) * ULP * member.worse * np.abs(a)
        assert np.all(np.abs(a - b) <= bound), name


@pytest.mark.usefixtures("x64")
def test_an_average_of_parameters_weighs_them_by_its_schedule() -> None:
    """As an average from 0, corrected; each step rounds 6 times."""
    tx = adamx.chain(adamx.scale(-1.0), adamx.ema_of_params(schedules()["b1"]))
    w, seen = jnp.asarray(W), []
    state, step = tx.init(w), adamx.make_step(tx)
    for t in range(STEPS):
        w, state = step(w, state, jnp.asarray(SIGNED[t]))
        seen.append(np.asarray(w))
        wanted = ema(np.stack(seen), B1)[-1] / past(B1)[t]
        bound = 6 * (t + 2) * 2.0**-53 * np.max(np.abs(seen))
        assert np.all(np.abs(state["params_ema"] - wanted) <= bound)
        np.testing.assert_allclose(
            state["params_ema_correction"], past(B1)[t], rtol=6 * (t + 2) * 2.0**-53
        )


def _stable(decay: Any) -> adamx.Transformation:
    return adamx.stable_adamw(0.25, b2=decay)


def _averaged(decay: Any) -> adamx.Transformation:
    return adamx.chain(adamx.sgd(0.25), adamx.ema_of_params(decay))


@pytest.mark.parametrize("make", [_stable, _averaged])
def test_a_schedule_that_is_added_to_a_running_training_makes_no_jump(
    make: Callable[[Any], adamx.Transformation],
) -> None:
    """In the state it starts from 0, which means that the decay was always today's."""
    number, schedule = make(0.875), make(lambda _: 0.875)
    g, w = jnp.asarray(SIGNED, jnp.float32), jnp.asarray(W, jnp.float32)
    state = number.init(w)
    for t in range(10):
        _, state = number.update(g[t], state, w)
    carried, adaptation = adamx.adapt_state(schedule, w, state)
    assert adaptation.filled and not any(carried[name] for name in adaptation.filled)
    for t in range(10, 13):
        (x, state), (y, carried) = number.update(g[t], state, w), schedule.update(g[t], carried, w)
        np.testing.assert_allclose(x, y, rtol=8 * ULP)
        for name in state:
            np.testing.assert_allclose(state[name], carried[name], rtol=8 * ULP)


PIECES: dict[str, Callable[[Any], adamx.Transformation]] = {
    "trace": lambda b: adamx.trace(b, nesterov=True),
    "decaying_max": adamx.decaying_max,
    "seeded_ema_of_squares": adamx.seeded_ema_of_squares,
    "additive_average_of_squares": lambda b: adamx.additive_average_of_squares(b, 1.0),
    "ema_of_mean_squares": adamx.ema_of_mean_squares,
    "interpolated_ema": lambda b: adamx.interpolated_ema(b, 0.75),
    "extrapolation": lambda b: adamx.combine(jnp.add, adamx.difference(), adamx.extrapolation(b)),
    "update_clipping": lambda b: adamx.update_clipping(adamx.ema_of_squares(0.5), b),
    "ema_of_params": adamx.ema_of_params,
}


@pytest.mark.parametrize("double", thinned([False, True]))
def test_a_schedule_may_give_any_kind_of_number(double: bool) -> None:
    """Also where a float64 would be wider than the parameters."""
    kinds = {
        "int": 0,
        "integers": jnp.array(0),
        "bfloat16": jnp.bfloat16(0.3),
        "float64": np.float64(0.5),
        "numpy": np.array(0.5),
    }
    txs = {
        f"{name}/{kind}/{way}": make(b)
        for name, make in PIECES.items()
        for kind, value in kinds.items()
        for way, b in (("given", lambda _, value=value: value), ("wanted", float(value)))
    }
    with jax.enable_x64(double):
        runs = walk(txs, lambda *_: W, jnp.float32)
    for name in PIECES:
        for kind in kinds:
            (a, given), (b, wanted) = (runs[f"{name}/{kind}/{way}"] for way in ("given", "wanted"))
            np.testing.assert_allclose(a, b, rtol=(8 + STEPS) * ULP, err_msg=f"{name} {kind}")
            for entry in wanted:
                np.testing.assert_allclose(given[entry], wanted[entry], rtol=(8 + STEPS) * ULP)
                assert given[entry].dtype == wanted[entry].dtype
