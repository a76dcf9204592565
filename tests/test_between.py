"""The calls between two full steps: cheap programs, also where wrappers are nested."""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import numbers_of_programs
from table import OUTSIDE

import adamx
from adamx.inspect.program import read_program

EVERY = 4


def accumulated():
    return adamx.accumulate(adamx.adamw(0.1), EVERY)


AROUND = {name: lambda around=around: around(accumulated()) for name, around in OUTSIDE.items()} | {
    "monitor inside": lambda: adamx.accumulate(
        adamx.monitor(adamx.adamw(0.1), every=2, groups=("*",)), EVERY
    ),
    "guard inside": lambda: adamx.accumulate(adamx.skip_nonfinite(adamx.adamw(0.1)), EVERY),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_micro_step_moves_the_sum_and_the_gradient_alone(name):
    """12 bytes a parameter, and one more reading of the gradient for a guard outside."""
    size = 2**20
    params = {"w": jnp.zeros(size)}
    tx = AROUND[name]()
    step = adamx.make_step(tx)
    program = read_program(step.lower(params, tx.init(params), params).compile(), params)
    floor = 16 if "skip" in name else 12
    assert program.always == pytest.approx(floor, rel=1e-3)  # and scalars
    assert program.copies == 0 and program.temp_bytes < size


def start():
    return {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 4, "b": jnp.ones(3)}


def gradients(t: int, bad: bool = False) -> Any:
    grads = jax.tree.map(lambda p: (p + 0.5) * (-1.0) ** t / (t + 1), start())
    return jax.tree.map(lambda g: g * jnp.nan, grads) if bad else grads


FAST = {("alone", ()), ("monitor, skip_nonfinite, masters", (2, 7))}  # both with float32


@pytest.mark.parametrize(
    ("name", "bad", "dtype"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{'bad' if case[1] else 'finite'}-{case[2]}",
            marks=() if case[:2] in FAST and case[2] == "float32" else pytest.mark.slow,
        )
        for case in itertools.product(AROUND, [(), (2, 7)], ["float32", "bfloat16"])
    ],
)
def test_make_step_ends_where_one_program_for_all_calls_ends(name, bad, dtype):
    """Bit for bit: which program a call runs is no part of the result."""
    tx = AROUND[name]()
    if bad and "skip" not in name and "guard" not in name:
        tx = adamx.skip_nonfinite(tx)  # a NaN in the sum hides all that comes after it
    params = jax.tree.map(lambda p: p.astype(dtype), start())

    @jax.jit
    def one(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return adamx.apply_updates(params, updates), state

    a = jax.tree.map(jnp.copy, params), tx.init(params)
    b = params, tx.init(params)
    step = adamx.make_step(tx)
    for t in range(3 * EVERY):
        grads = jax.tree.map(lambda g: g.astype(dtype), gradients(t, t in bad))
        a, b = step(*a, grads), one(*b, grads)
        chex.assert_trees_all_equal(a, b)
    assert int(a[1]["count"]) >= 1


def test_each_program_of_nested_periods_is_compiled_once():
    tx = adamx.monitor(adamx.accumulate(adamx.sgd(0.5), 2), every=3, groups=("*",))
    step, params = adamx.make_step(tx), start()
    state = tx.init(params)
    seen = []
    for t in range(12):
        params, state = step(params, state, gradients(t))
        seen.append((int(state["monitor_step"]), int(state["micro_step"])))
    cycle = itertools.cycle([(1, 1), (2, 0), (0, 1), (1, 0), (2, 1), (0, 0)])
    assert seen == list(itertools.islice(cycle, 12))
    assert int(state["count"]) == 6
    sizes = [program._cache_size() for program in step._programs]  # pyright: ignore
    assert sizes == [0, 1, 1] and step._cache_size() == 3  # pyright: ignore


def test_the_statistics_of_a_micro_step_are_those_of_an_update_of_zero():
    tx = adamx.monitor(adamx.accumulate(adamx.sgd(0.5), 2), every=1, groups=("*",))
    step, params = adamx.make_step(tx), start()
    _, state = step(params, tx.init(params), gradients(0))
    assert float(state["monitor"]["update_norm"]["*"]) == 0.0
    assert float(state["monitor"]["grad_norm"]["*"]) > 0


def test_nothing_waits_for_the_device_and_nothing_is_moved_to_it():
    tx = adamx.monitor(adamx.accumulate(adamx.adamw(0.1), 2), every=3, groups=("*",))
    step, params = adamx.make_step(tx), start()
    state = tx.init(params)
    grads = [gradients(t) for t in range(8)]
    a = step(params, state, grads[0])
    for g in grads[1:6]:
        a = step(*a, g)  # all programs are compiled
    with jax.transfer_guard("disallow"):
        for g in grads[6:]:
            a = step(*a, g)
    assert np.isfinite(a[0]["w"]).all()


def test_each_call_runs_the_cheapest_program_that_does_what_is_due():
    tx = adamx.monitor(adamx.accumulate(adamx.sgd(0.5), 2), every=3, groups=("*",))
    step: Any = adamx.make_step(tx)
    params, state = start(), tx.init(start())
    ran = numbers_of_programs(step)
    for t in range(12):
        params, state = step(params, state, gradients(t))
    # -1 measures and moves nothing, 1 steps, 2 adds alone
    assert ran == [2, 1, -1, 2, 1, 2, -1, 1] * 2


@pytest.mark.parametrize("bad", [(), (2,), (5,), (1, 2, 5)], ids=str)
def test_a_step_that_measures_is_measured_apart_once_and_never_in_a_branch(bad):
    """Also behind a guard, whose skipped steps do not count, and masters, which round."""
    inner = adamx.monitor(adamx.master_weights(adamx.adamw(0.1)), every=3, groups=("*",))
    step: Any = adamx.make_step(adamx.skip_nonfinite(inner))
    params = jax.tree.map(lambda p: p.astype("bfloat16"), start())
    state, ran = step.init(params), numbers_of_programs(step)
    expected = []
    since = 0
    for t in range(9):
        grads = jax.tree.map(lambda g: g.astype("bfloat16"), gradients(t, t in bad))
        before = int(state["monitor_step"])
        expected += [-1, 1] if before == 2 else [1]
        params, state = step(params, state, grads)
        since = since if t in bad else (since + 1) % 3
        assert int(state["monitor_step"]) == since
    assert ran == expected


def test_measuring_has_no_branch_and_copies_nothing():
    params = jnp.zeros(2**20)
    tx = adamx.monitor(adamx.adamw(0.1), every=100)
    step, state = adamx.make_step(tx), tx.init(params)
    due = state | {"monitor_step": np.int32(99)}
    program = read_program(step.lower(params, due, params).compile(), params)
    assert program.always == program.bytes_per_param <= 88.01
    assert program.copies == 0 and program.temp_bytes <= 12.01 * params.size
