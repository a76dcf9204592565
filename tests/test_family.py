"""The younger members of the Adam family, against the papers, recorded PyTorch runs, and Optax.

As test_agreement.py, whose problem, bounds and way of counting roundings these tests share, for
the methods of reference_family.py. In many of them terms of both signs meet, in a difference of
gradients, in a sign, in a norm; each has its own measure of how far a rounding reaches.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import (
    OPTIMIZERS,
    RATES,
    STEPS,
    G,
    T,
    W,
    assert_close,
    at,
    rates,
    walk,
)
from agreement_family import (
    CLIPS,
    FAMILY,
    PAIRS,
    Case,
    along_z,
    as_in_torch,
    contrib,
    in_float32,
    r,
    run_in_float32,
)
from helpers import by_paper, thinned
from recordings import IN_FAMILY, LEAVES, RECORDING

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")

# --- In float64 against the reference ------------------------------------------------------------


@functools.cache
def case_of(name: str, leaf: str) -> Case:
    """The problem of one member and leaf."""
    member = FAMILY[name]
    return Case(W[leaf], G[leaf], RATES, member.method, member.options)


@functools.cache
def run_in_float64() -> dict[str, tuple[Any, Any]]:
    """Run all in one program, since compiling is what takes time: (updates, states).

    As in test_agreement.py each step gets the reference's weights.
    """
    with jax.enable_x64(True):
        txs = {name: member.tx(rates) for name, member in FAMILY.items()}
        weights = {
            name: {leaf: case_of(name, leaf).run.params for leaf in member.leaves}
            for name, member in FAMILY.items()
        }
        gradients = {name: {leaf: G[leaf] for leaf in FAMILY[name].leaves} for name in FAMILY}
        return walk(txs, weights, gradients)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", FAMILY)
def test_member_is_the_reference(name: str, leaf: str) -> None:
    """With a scheduled learning rate, to the roundings counted in `assert_close`."""
    member, case = FAMILY[name], case_of(name, leaf)
    measure = member.measure(case)
    updates, state = run_in_float64()[name]
    state = by_paper(state)
    assert_close(updates[leaf], case.run.updates, measure.updates)
    slots = member.slots(case)
    assert state.keys() == {"count", "learning_rate", *slots, *member.scalars}
    for slot, values in slots.items():
        widest = measure.slots.get(slot, np.abs(values))
        assert_close(state[slot][leaf], values, widest)
    np.testing.assert_array_equal(state["count"], T)
    for rate in jax.tree.leaves(state["learning_rate"]):  # of each group
        np.testing.assert_array_equal(rate, RATES.astype(np.float32))


@pytest.mark.parametrize("name", [name for name, member in FAMILY.items() if member.unlike])
def test_member_is_not_another_version(name: str) -> None:
    """What sources do otherwise is far from what is done here: 1e-4 of the longest step or more.

    The bounds of the test above are some 1e-13 of it.
    """
    member, case = FAMILY[name], case_of(name, "a")
    for options in member.unlike:
        other = dataclasses.replace(case, options=options).run
        apart = np.max(np.abs(other.updates - case.run.updates))
        assert apart > 1e-4 * np.max(np.abs(case.run.updates)), options


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", [name for name in FAMILY if name.startswith("schedule_free")])
def test_schedule_free_eval_params(name: str, leaf: str) -> None:
    """x from y, which is the reference's here, and z, over b1 = 0.8: twice as inexact at most.

    The state keeps b1 in float32, so that x is off by 2^-24 of the distance of y and z over b1.
    """
    state, cases = run_in_float64()[name][1], {leaf: case_of(name, leaf) for leaf in LEAVES}
    run, measure = cases[leaf].run, along_z(cases[leaf])
    for t in (0, STEPS - 1):
        y, z = run.params[t + 1], run.slots["z"][t]
        with jax.enable_x64(True):
            now = jax.tree.map(lambda x, t=t: jnp.asarray(x[t]), state)
            params = {name: jnp.asarray(case.run.params[t + 1]) for name, case in cases.items()}
            x = np.asarray(adamx.schedule_free_eval_params(now, params)[leaf])
        bound = (10 + 18 * t) * 2.0**-52 * (measure.updates[t] + np.abs(y))
        bound += 2.0**-24 * np.abs(y - z) / 0.8
        np.testing.assert_array_less(np.abs(x - r.schedule_free_eval_params(y, z, 0.8)), bound)


# --- In float64 against PyTorch ------------------------------------------------------------------


@functools.cache
def run_as_torch() -> dict[str, dict[str, np.ndarray]]:
    """The weights after each step, of all recorded cases in one program."""
    with jax.enable_x64(True):
        txs = {name: as_in_torch(name)[0] for name in sorted(IN_FAMILY)}

        @jax.jit
        def step(params: Any, states: Any, grads: Any) -> Any:
            pairs = {k: tx.update(grads, states[k], params[k]) for k, tx in txs.items()}
            params = {k: adamx.apply_updates(params[k], u) for k, (u, _) in pairs.items()}
            return params, {k: state for k, (_, state) in pairs.items()}

        start = {leaf: jnp.asarray(RECORDING[f"initial/{leaf}"]) for leaf in LEAVES}
        gradients = {leaf: RECORDING[f"gradients/{leaf}"] for leaf in LEAVES}
        params, states = {k: start for k in txs}, {k: tx.init(start) for k, tx in txs.items()}
        after = []
        for t in range(60):
            params, states = step(params, states, {leaf: g[t] for leaf, g in gradients.items()})
            after.append(jax.device_get(params))
        return jax.tree.map(lambda *values: np.stack(values), *after)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", sorted(IN_FAMILY))
def test_sixty_steps_are_pytorchs(name: str, leaf: str) -> None:
    """To 1e-12 of the way gone and the rounding of w itself, as in test_agreement.py.

    What PyTorch does otherwise comes on top, as much as it is in the reference: it adds RAdam's eps
    before the correction, and keeps NAdam's product of momenta in float32. Of RAdam's rho, near
    1999, PyTorch's rounded power loses 2e-11 (test_reference_family.py).
    """
    start, after = RECORDING[f"initial/{leaf}"], RECORDING[f"{name}/{leaf}"]
    _, method, peculiar = as_in_torch(name)
    g = RECORDING[f"gradients/{leaf}"]
    plain, like_torch = method(start, g), method(start, g, **peculiar)
    path = np.concatenate([start[None], after])
    way = np.cumsum(np.abs(np.diff(path, axis=0)), axis=0)
    rounding = at(np.arange(1, 61), way) * 4 * 2.0**-53 * np.max(np.abs(path), axis=0)
    relative = 2e-11 if name == "radam" else 1e-12
    expected = after + (plain.params - like_torch.params)[1:]
    bound = relative * way + rounding
    np.testing.assert_array_less(np.abs(run_as_torch()[name][leaf] - expected), bound)
    if peculiar and name != "radam":
        assert np.any(np.abs(after - expected) > bound)


# --- In float32 against Optax --------------------------------------------------------------------


def bound_in_float32(measure: np.ndarray, sums: int) -> np.ndarray:
    """What two programs may be apart, from the counts of test_agreement.py.

    In each step 7 ULP of an average and 3.5 of the root of one; 18 with the emission; an ULP is
    2^-23 at most. The sums round the number of their terms in each, and the root halves that.
    """
    t = at(np.arange(1, 61), measure)
    return (18 + 10.5 * t + sums) * 2.0**-23 * measure


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "name", thinned([*(name for name, pair in PAIRS.items() if pair.theirs), *CLIPS])
)
def test_updates_are_optaxs(name: str) -> None:
    """In float32, from the first step to the 60th, with decays whose powers Optax computes well."""
    _, measure, sums = in_float32(name)
    runs = run_in_float32()
    difference = np.abs(runs[f"{name} ours"] - runs[f"{name} theirs"])
    bound = bound_in_float32(measure.updates, sums)
    np.testing.assert_array_less(difference, np.where(bound > 0, bound, 1e-45))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", PAIRS)
def test_defaults_in_float32_are_the_reference(name: str) -> None:
    """At the defaults, where Optax's corrections are 1e-5 off, to the same bound."""
    case, measure, sums = in_float32(name, defaults=True)
    difference = np.abs(run_in_float32()[f"{name} default"] - case.run.updates)
    bound = bound_in_float32(measure.updates, sums)
    np.testing.assert_array_less(difference, np.where(bound > 0, bound, 1e-45))


# --- Where adamx, Optax and the papers part ------------------------------------------------------


def first_updates(tx: Any, gradients: list[float], w: float = 0.0) -> list[float]:
    """The updates of one number."""
    state, updates = tx.init(jnp.array([w])), []
    for g in gradients:
        update, state = tx.update(jnp.array([g]), state, jnp.array([w]))
        updates.append(float(update[0]))
        w += updates[-1]
    return updates


@pytest.mark.usefixtures("standard_promotion")
def test_adan_looks_ahead_as_the_paper() -> None:
    """By b2 = 0.92; Optax 0.2.8 by 1 - b2. With b2 = 1/2 there is no difference."""
    g = [1.0, 3.0, -2.0]
    for b2, same in {0.92: False, 0.5: True}.items():
        ours = first_updates(adamx.adan(1.0, b2=b2), g)
        theirs = first_updates(optax.adan(1.0, b2=b2), g)
        paper = r.adan([0.0], np.array(g)[:, None], learning_rate=1.0, b2=b2, look_ahead="paper")
        np.testing.assert_allclose(ours, paper.updates[:, 0], rtol=1e-5)
        assert np.allclose(ours, theirs, rtol=1e-3) == same


@pytest.mark.usefixtures("standard_promotion")
def test_schedule_free_warms_up_as_the_paper() -> None:
    """The rate of step t is t / 4 of the last; Optax moves z by that of the step before.

    30 ULP: a dozen roundings a step, of numbers of both signs.
    """
    options: dict[str, Any] = {"warmup_steps": 4, "b1": 0.5, "b2": 0.75, "eps": 1e-3}
    g, warm = [1.0, -0.5, 2.0, 1.0, 0.25, -1.0], [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    options_of_both = {k: v for k, v in options.items() if k != "warmup_steps"}
    gradients = np.array(g)[:, None]
    paper = r.schedule_free_adamw([0.5], gradients, learning_rate=warm[1:], **options_of_both)
    late = r.schedule_free_adamw(
        [0.5], gradients, learning_rate=warm[:-1], averaging_rate=warm[1:], **options_of_both
    )
    ours = first_updates(adamx.schedule_free_adamw(1.0, **options), g, 0.5)
    theirs = first_updates(contrib.schedule_free_adamw(1.0, **options), g, 0.5)
    np.testing.assert_allclose(ours, paper.updates[:, 0], rtol=0, atol=30 * 2.0**-23)
    np.testing.assert_allclose(theirs, late.updates[:, 0], rtol=0, atol=30 * 2.0**-23)
    assert theirs[0] == 0.0 and ours[0] < -0.1


def test_nadam_of_pytorch_begins_with_half_the_momentum() -> None:
    """mu_t rises from b1 / 2, and so the first step is shorter than Optax's."""
    squares = adamx.chain(adamx.ema_of_squares(0.999), adamx.bias_correction(0.999))
    pieces = adamx.rms_scaling(adamx.scheduled_nesterov_ema(0.9), second_moment=squares)
    scheduled = adamx.chain(pieces, adamx.scale_by_learning_rate(1.0))
    (torch,), (constant,) = first_updates(scheduled, [1.0]), first_updates(adamx.nadam(1.0), [1.0])
    expected = r.nadam([0.0], [[1.0]], learning_rate=1.0).updates[0, 0]
    np.testing.assert_allclose(torch, expected, rtol=1e-6)
    assert -constant > -torch + 0.1


def test_lamb_where_a_norm_is_zero() -> None:
    """The ratio is one where the weights or the direction are zero (test_reference_family.py)."""
    tx = adamx.lamb(1.0, b1=0.5, b2=0.75, eps=1.0, eps_root=5.0)
    np.testing.assert_allclose(first_updates(tx, [2.0, -1.0]), [-1 / 2, 0.0], atol=1e-6)
    assert first_updates(tx, [0.0, 0.0], 3.0) == [0.0, 0.0]


# --- Completeness --------------------------------------------------------------------------------


def test_every_optimizer_is_judged() -> None:
    """Here or in test_agreement.py, in a row of its name."""
    optimizers = {
        name
        for name in adamx.__all__
        if getattr(adamx, name).__module__.startswith("adamx.optimizers.")
        and "learning_rate" in inspect.signature(getattr(adamx, name)).parameters
    }
    assert optimizers <= FAMILY.keys() | OPTIMIZERS.keys()
    assert {"adamax", "yogi", "lion", "adopt", "lamb", "schedule_free_adamw"} < optimizers
