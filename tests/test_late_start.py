"""A leaf that is added, thawed or reset in step N takes the steps of a run that began then.

The run that it is compared with starts with all leaves, and its schedules start at N. Its program
is another one, so the two agree to the roundings of a compilation (`assert_close`). So do the leaves
that did not begin late with the run in which no leaf did: XLA:CPU computes the expm1 of two counts
in vector instructions and that of one in scalar ones, which differ by a ULP or two.
"""

import functools
import io
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, draw, spec
from table import TRANSFORMATIONS, of_each_kind

import adamx
from adamx.core.checks import ranges_of

pytestmark = pytest.mark.usefixtures("quick_compiler")

N, MORE = 6, 3
PARAMS = {"old": jnp.array([[0.5, -1.0], [2.0, 0.25]]), "new": jnp.array([[1.0, -2.0, 0.5]])}
LATER = range(N, N + MORE)

# The norm of these updates depends on the memory of all leaves, which differs between the runs.
OF_ALL_MEMORIES = {"clip_last"}


def shifted(tx: Any, steps: int) -> Any:
    """Return a transformation whose schedules start at a step."""

    def later(schedule):
        return lambda count: schedule(count + steps)

    fields = {name: getattr(tx, name) for name in ranges_of(type(tx))}
    fields = {
        name: later(value)
        for name, value in fields.items()
        if callable(value) and not isinstance(value, adamx.adjustable)
    }
    inside = [shifted(child, steps) for child in tx.children]
    return tx.with_children(inside).with_fields(**fields)


def follow(tx, state, steps, params: Any = PARAMS):
    """Return the updates of some steps, and the state; the parameters stay where they are."""
    updates = []
    for step in steps:
        grads = {n: None if p is None else draw(PARAMS, step)[n] for n, p in params.items()}
        out, state = tx.update(grads, state, params)
        updates.append(out)
    return updates, state


def of(updates, leaf):
    return [u[leaf] for u in updates]


WAYS = {
    "reset": (PARAMS, lambda tx, state: adamx.reset(tx, state, PARAMS, "new")),
    "added": ({"old": PARAMS["old"]}, lambda tx, state: adamx.adapt_state(tx, PARAMS, state)[0]),
    "thawed": (
        PARAMS | {"new": None},
        lambda tx, state: adamx.adapt_state(tx, PARAMS, state)[0],
    ),
}


@pytest.mark.usefixtures("promotion_of_foreign_stages")
@of_each_kind
def test_it_takes_the_steps_of_a_run_that_began_then(name):
    tx = TRANSFORMATIONS[name].make()
    expected = None
    for way, (before, begin) in WAYS.items():
        _, state = follow(tx, tx.init(before), range(N), before)
        if any(isinstance(x, dict) and "count" in x for x in state.values()) or "ema" in state:
            with pytest.raises(
                ValueError, match="'new' begins in the middle of the run, and the O"
            ):
                begin(tx, state)
            continue
        late = begin(tx, state)
        if way != "reset" and not set(tx.tree_names()) - {"remainder8", "master"}:
            assert "began" not in late  # it keeps nothing, so nothing of it can be new
            continue
        assert late.keys() == state.keys() | {"began"}
        steps = int(state["count"])
        assert int(late["began"]["new"]["count"]) == steps
        found, after = follow(tx, late, LATER)
        assert spec(after) == spec(late)
        if expected is None:
            anew = shifted(tx, steps)
            expected, _ = follow(anew, anew.init(PARAMS), LATER)
        if name not in OF_ALL_MEMORIES:
            assert_close(of(found, "new"), of(expected, "new"))
        if way == "reset" and name not in OF_ALL_MEMORIES:
            others, _ = follow(tx, state, LATER)
            assert_close(of(found, "old"), of(others, "old"))
