"""What adamx computes, against the papers in float64, recorded PyTorch runs, and Optax in float32.

The bounds count roundings. A rounding is at most 2^-53 (float64) or 2^-24 (float32) of the number
rounded, and at most one ULP of it. Where terms of both signs are added, the sum may be any amount
smaller than what was rounded; errors are then measured by the same method run on the magnitudes
|g|, in which nothing cancels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import (
    AVERAGE,
    CORRECTED,
    IN_SQRT,
    OPTIMIZERS,
    PAIRS,
    PIECES,
    RATE,
    RATES,
    ROOT_OF_AVERAGE,
    SIZE,
    STEPS,
    G,
    Optimizer,
    Pair,
    T,
    W,
    as_in_torch,
    assert_close,
    at,
    o,
    of_one_sign,
    partial,
    r,
    rates,
    walk,
)
from helpers import by_paper, thinned
from recordings import IN_FAMILY, LEAVES, RECORDING, TORCH
from reference import Trajectory

import adamx
from adamx.transforms.bias_correction import one_minus_power

# --- In float64 against the reference ------------------------------------------------------------


def expected(case: Optimizer, leaf: str) -> tuple[Trajectory, Trajectory]:
    """What an optimizer should do, and the measure of its roundings: the same on magnitudes."""
    excluded = case.masked is not None and leaf == "b"
    method, options = case.masked if case.masked and excluded else (case.method, case.options)
    run = method(W[leaf], G[leaf], learning_rate=RATES, **options)
    without = {k: v for k, v in options.items() if k not in ("weight_decay", "l2")}
    decay = options.get("weight_decay", 0.0) + options.get("l2", 0.0)
    weights = decay * np.abs(run.params[:-1])
    plain = {r.adamw: r.adam, r.sgdw: r.sgd}.get(method)
    added = 0.0 if plain else weights
    magnitudes = (plain or method)(
        0 * np.abs(W[leaf]), np.abs(G[leaf]) + added, learning_rate=RATES, **without
    )
    apart = at(RATES, weights) * weights if plain else 0.0
    return run, dataclasses.replace(magnitudes, updates=np.abs(magnitudes.updates) + apart)


@functools.cache
def run_in_float64() -> dict[str, tuple[Any, Any]]:
    """Run everything in one program, since compiling is what takes time: (updates, states).

    Each step gets the reference's weights, so that a step's error is its own and not that of
    where earlier errors have led.
    """
    with jax.enable_x64(True):
        txs = {name: case.tx(rates) for name, case in OPTIMIZERS.items()}
        weights = {
            name: {leaf: expected(case, leaf)[0].params for leaf in LEAVES}
            for name, case in OPTIMIZERS.items()
        }
        for name, piece in PIECES.items():
            txs[name] = piece.tx()
            weights[name] = {leaf: np.stack([W[leaf]] * STEPS) for leaf in LEAVES}
        return walk(txs, weights, {name: G for name in txs})


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_is_the_reference(name: str, leaf: str) -> None:
    """With a scheduled learning rate; leaf "a" is real, "b" is complex and has real squares.

    A centred variance, nu - |mu|^2, is as inexact as nu: relative to (variance + eps) that is at
    most max nu / eps times as much.
    """
    case = OPTIMIZERS[name]
    run, measure = expected(case, leaf)
    updates, state = run_in_float64()[name]
    state = by_paper(state)
    largest = np.max(np.abs(G[leaf])) ** 2 + case.options.get("initial_scale", 0.0)
    amplified = 1 + largest / case.options["eps"] if "centered" in case.options else 1.0
    assert_close(updates[leaf], run.updates, measure.updates, amplified)
    assert state.keys() == {"count", "learning_rate", *run.slots}
    for slot, values in run.slots.items():
        of_steps = amplified if slot == "trace" else 1.0
        assert_close(state[slot][leaf], values, measure.slots[slot], of_steps)
    np.testing.assert_array_equal(state["count"], T)
    np.testing.assert_array_equal(state["learning_rate"], RATES.astype(np.float32))


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", PIECES)
def test_piece_is_its_formula(name: str, leaf: str) -> None:
    """Each concept alone, and the two scalings that Optax has by name."""
    piece = PIECES[name]
    updates, state = run_in_float64()[name]
    w, g = W[leaf], G[leaf]
    wanted, measure = piece.emitted(g, w), piece.emitted(np.abs(g), np.abs(w))
    # what is real for a complex gradient, its square, is emitted as it is asked for: complex
    assert_close(updates[leaf], wanted.astype(updates[leaf].dtype), measure)
    assert state.keys() - {"learning_rate"} == {"count", *piece.slots}
    for slot, values in piece.slots.items():
        assert_close(state[slot][leaf], values(g), values(np.abs(g)))


STORED: dict[str, tuple[Callable[[Any], adamx.Transformation], str]] = {
    "ema": (lambda dtype: adamx.ema(0.7, dtype), "mu"),
    "nesterov_ema": (lambda dtype: adamx.nesterov_ema(0.7, dtype), "mu"),
    "trace": (lambda dtype: adamx.trace(0.7, accumulator_dtype=dtype), "trace"),
    "ema_of_squares": (lambda dtype: adamx.ema_of_squares(0.7, 1.5, dtype), "nu"),
    "sgd": (lambda dtype: adamx.sgd(1.0, 0.7, accumulator_dtype=dtype), "trace"),
    "adam": (lambda dtype: adamx.adam(1.0, 0.7, 0.97, mu_dtype=dtype), "mu"),
    "adamw": (lambda dtype: adamx.adamw(1.0, 0.7, 0.97, mu_dtype=dtype), "mu"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", STORED)
def test_what_is_kept_narrow_is_what_is_used(name: str, dtype: str) -> None:
    """A slot is rounded to nearest once a step, and the next step and the update start from that.

    The formulas run here in float64 on the stored values. A slot then differs only where the two
    ways of writing the average fall on both sides of a tie, which in 600 values none does; of the
    update 20 roundings are allowed, as in one step above.
    """
    make, slot = STORED[name]
    tx, g, old = make(jnp.dtype(dtype)), G["a"], np.full(W["a"].shape, 1.5 if slot == "nu" else 0.0)
    w = jnp.asarray(W["a"])
    update, state = jax.jit(tx.update), tx.init(w)
    for t in range(1, STEPS + 1):
        updates, state = update(jnp.asarray(g[t - 1]), state, w)
        past, now = 0.7 * old, g[t - 1]
        new = past + {"mu": 0.3 * now, "trace": now, "nu": 0.3 * now**2}[slot]
        new = new.astype(jnp.dtype(dtype)).astype(np.float64)
        assert state[slot].dtype == dtype
        np.testing.assert_array_equal(np.asarray(state[slot]).astype(np.float64), new)
        wanted, measure = new, np.abs(new)
        if name == "nesterov_ema":
            ahead, today = 0.7 / (1 - 0.7 ** (t + 1)), 0.3 / (1 - 0.7**t)
            wanted = ahead * new + today * now
            measure = ahead * np.abs(new) + today * np.abs(now)
        if name == "sgd":
            wanted = -new
        if name.startswith("adam"):
            nu = r.ema_of_squares(g[:t], 0.97)[-1] / (1 - 0.97**t)
            wanted = -new / (1 - 0.7**t) / (np.sqrt(nu) + 1e-8)
            measure = np.abs(wanted)
        if name == "adamw":
            wanted, measure = wanted - 1e-4 * W["a"], measure + 1e-4 * np.abs(W["a"])
        # nu's own roundings, 6 a step in each program and halved by the root, come in adam
        bound = (20 + 6 * t) * 2.0**-53 * measure
        np.testing.assert_array_less(np.abs(updates - wanted), np.where(bound > 0, bound, 1e-300))
        old = new


# --- In float64 against PyTorch ------------------------------------------------------------------

RECORDED = sorted(TORCH.keys() - IN_FAMILY)  # those are in test_family.py


@functools.cache
def run_as_torch() -> dict[str, dict[str, np.ndarray]]:
    """The weights after each step, of all recorded cases in one program."""
    with jax.enable_x64(True):
        txs = {name: as_in_torch(name) for name in RECORDED}

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
@pytest.mark.parametrize("name", RECORDED)
def test_sixty_steps_are_pytorchs(name: str, leaf: str) -> None:
    """To 1e-12 of the way gone, `sum_s |w_s - w_{s-1}|`, and the rounding of w itself.

    The travel |w_t - w_0| would be no measure: gradients change sign, and where an element passes
    its start any difference is any relative one. PyTorch's corrections alone are 1.4e-14 off
    (test_reference.py). Each program rounds w at each step by 2^-53 |w| at most, PyTorch's AdamW
    twice more for the decay: four times that a step. PyTorch does not dampen the first gradient:
    its buffer holds momentum^t g_1 more than the average.
    """
    start, after = RECORDING[f"initial/{leaf}"], RECORDING[f"{name}/{leaf}"]
    if TORCH[name]["hyperparameters"].get("dampening"):
        excess = np.multiply.outer(0.9 ** np.arange(1, 61), RECORDING[f"gradients/{leaf}"][0])
        after = after + 0.1 * np.cumsum(excess, axis=0)
    path = np.concatenate([start[None], after])
    way = np.cumsum(np.abs(np.diff(path, axis=0)), axis=0)
    rounding = at(np.arange(1, 61), way) * 4 * 2.0**-53 * np.max(np.abs(path), axis=0)
    difference = np.abs(run_as_torch()[name][leaf] - after)
    np.testing.assert_array_less(difference, 1e-12 * way + rounding)


# --- In float32 against Optax --------------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", thinned(PAIRS))
def test_steps_are_optaxs_to_a_few_ulps(name: str) -> None:
    """In float32, with Optax's settings, and decays whose powers Optax computes well.

    Parameters in [1, 2] round by half an ULP a step in each program, and the difference of an
    update below 0.03 is less than one of theirs.
    """
    pair = PAIRS[name]
    w, g = of_one_sign()
    found = adamx.compare(
        pair.ours, pair.theirs, {"w": jnp.asarray(w)}, [{"w": jnp.asarray(x)} for x in g]
    )
    for t, (u, p) in enumerate(zip(found.updates, found.params, strict=True), start=1):
        assert u.ulps <= pair.ulps(t), (t, u)
        assert p.ulps <= 2 * t, (t, p)
    assert found.first_beyond(ulps=2 * 60) is None
    assert all(slot.ulps <= 2 * pair.ulps(60) for slot in found.slots.values())
    renamed = {
        "momentum": {"mu/w", "0/ema/w"},
        "rmsprop_momentum": {"trace_of_steps/w", "2/trace/w"},
        "rmsprop_nesterov": {"trace_of_steps/w", "2/trace/w"},
    }.get(name, set())
    assert {path for path in found.unmatched if path.endswith("/w")} == renamed


class Counted(NamedTuple):
    """The state of an Optax Adam, and how many steps it has taken."""

    steps: jax.Array
    inner: Any


def with_true_corrections(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Optax's Adam with defaults, its two bias corrections exchanged for accurate ones."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, inner = tx.update(updates, state.inner, params)
        count = state.steps + 1

        def ratio(decay: float) -> jax.Array:
            inverse = optax.tree.bias_correction(jnp.ones([]), decay, count)
            return 1 / (inverse * one_minus_power(decay, count))  # theirs over the true one

        factor = ratio(0.9) / jnp.sqrt(ratio(0.999))
        return jax.tree.map(lambda u: factor * u, updates), Counted(count, inner)

    return optax.GradientTransformation(
        lambda params: Counted(jnp.zeros([], jnp.int32), tx.init(params)), update
    )


@pytest.mark.usefixtures("standard_promotion")
def test_at_optaxs_defaults_its_bias_correction_is_the_whole_difference() -> None:
    """float32(0.999)^t has a relative error of 1.3e-8 t: 1.3e-5 of 1 - b2^t at t = 1, its root
    6.6e-6 = 55 to 110 ULP; the power's own rounding doubles that in the next steps.

    With its corrections exchanged Optax is as near as elsewhere; the exchange itself makes 8.
    """
    w, g = of_one_sign()
    params, grads = {"w": jnp.asarray(w)}, [{"w": jnp.asarray(x)} for x in g]
    plain = adamx.compare(adamx.adam(RATE), o.adam(RATE), params, grads)
    assert 55 <= plain.updates[0].ulps <= 110
    assert max(u.ulps for u in plain.updates) > 140
    mended = adamx.compare(adamx.adam(RATE), with_true_corrections(o.adam(RATE)), params, grads)
    for t, u in enumerate(mended.updates, start=1):
        assert u.ulps <= CORRECTED + 8 + (AVERAGE + ROOT_OF_AVERAGE) * t, (t, u)


# name: (pair, how large adamx's error may be, as a multiple of Optax's)
CLOSER: dict[str, tuple[Pair, float]] = {
    **{name: (PAIRS[name], 1.0) for name in ("sgd_momentum", "sgd_nesterov", "momentum")},
    "rmsprop": (PAIRS["rmsprop"], 1.0),
    # 0.5 is a float32. The trace of 0.9 sums to 10 (1 - 2.4e-7) in both, since float32(0.9) is
    # that much off; in Optax's RMSprop this meets an error of nu of about the same size and hides.
    "rmsprop_momentum": (
        Pair(
            adamx.rmsprop(RATE, momentum=0.5, **IN_SQRT),
            o.rmsprop(RATE, momentum=0.5),
            partial(r.rmsprop, momentum=0.5, **IN_SQRT),
        ),
        1.0,
    ),
    # Without an average both round equally often, so neither is closer: each root mean square of
    # SIZE columns of errors that hang together scatters by 1 / sqrt(2 * SIZE) = 4 %, their ratio
    # by sqrt(2) of that, and processors differ in the bits: three standard deviations.
    "adagrad": (PAIRS["adagrad"], 1 + 3 * np.sqrt(2) / np.sqrt(2 * SIZE)),
    # An error of some 1e-7 beside one of some 7e-6.
    "adam": (Pair(adamx.adam(RATE), o.adam(RATE), r.adam), 0.05),
    "nadam": (
        Pair(adamx.adam(RATE, nesterov=True), o.nadam(RATE), partial(r.adam, nesterov=True)),
        0.05,
    ),
    "adam_b2_near_one": (
        Pair(adamx.adam(RATE, b2=0.99999), o.adam(RATE, b2=0.99999), partial(r.adam, b2=0.99999)),
        0.001,
    ),
    "rmsprop_centered": (
        Pair(
            adamx.rmsprop(RATE, centered=True, **IN_SQRT),
            o.rmsprop(RATE, centered=True),
            partial(r.rmsprop, centered=True, **IN_SQRT),
        ),
        1.0,
    ),
}


def error(tx: optax.GradientTransformation, method: Callable[..., Trajectory]) -> float:
    """The root mean square of the error of 60 steps in float32, in units of 2^-24."""
    _, g = of_one_sign()
    w = np.zeros(SIZE, np.float32)

    def step(state: Any, grads: jax.Array) -> Any:
        updates, state = tx.update(grads, state, jnp.asarray(w))
        return state, updates

    _, updates = jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.asarray(w)), jnp.asarray(g)))()
    wanted = method(w, g, learning_rate=RATE).updates
    there = wanted != 0
    relative = (np.asarray(updates)[there] - wanted[there]) / wanted[there]
    return float(np.sqrt(np.mean(relative**2))) * 2**24


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", thinned(CLOSER))
def test_float32_is_at_least_as_close_to_the_truth_as_optax(name: str) -> None:
    """The truth is the reference in float64 on the same float32 gradients."""
    pair, share = CLOSER[name]
    ours, theirs = error(pair.ours, pair.method), error(pair.theirs, pair.method)
    assert ours <= share * theirs
    assert ours < 4  # units of 2^-24: 60 steps do not add up


# --- L2 regularisation and decoupled decay -------------------------------------------------------


def test_l2_and_decoupled_decay_are_one_composition_for_sgd() -> None:
    """Between the gradient and the rate there is no scaling, before or after which to stand."""
    l2 = adamx.chain(adamx.add_decayed_weights(0.1), adamx.sgd(RATE))
    scaling = adamx.identity()
    decoupled = adamx.chain(
        scaling, adamx.add_decayed_weights(0.1), adamx.scale_by_learning_rate(RATE)
    )
    assert l2.stages == decoupled.stages[1:]


def test_l2_and_decoupled_decay_are_equal_for_sgd() -> None:
    """SGD on loss + wd/2 |w|^2 is w <- (1 - lr wd) w - lr g, to 2 ULP of w a step.

    Each program rounds w once a step, by half an ULP. What they add to w is below 1 % of it, so
    that its own roundings are small beside that.
    """
    wd = 1.0
    w, g = of_one_sign()
    l2, chained = adamx.sgd(RATE), adamx.chain(adamx.add_decayed_weights(wd), adamx.sgd(RATE))

    @jax.jit
    def step(a: Any, b: Any, c: jax.Array, grads: jax.Array) -> Any:
        regularised = jax.grad(lambda w: jnp.vdot(grads, w) + wd / 2 * jnp.vdot(w, w))(a)
        a = adamx.apply_updates(a, l2.update(regularised, l2.init(a), a)[0])
        b = adamx.apply_updates(b, chained.update(grads, chained.init(b), b)[0])
        return a, b, (1 - RATE * wd) * c - RATE * grads

    a = b = c = jnp.asarray(w)
    for t in range(1, 61):
        a, b, c = step(a, b, c, jnp.asarray(g[t - 1]))
        ulp = np.spacing(np.abs(np.asarray(c)))
        assert np.max(np.abs(np.asarray(a) - np.asarray(c)) / ulp) <= 2 * t
        assert np.max(np.abs(np.asarray(b) - np.asarray(c)) / ulp) <= 2 * t


def test_l2_and_decoupled_decay_differ_for_adam() -> None:
    """By how much a weight shrinks: decoupled alike for all, with L2 the less the larger g is.

    Gradients of +-100 and of +-0.01 by turns, which move nothing for long. In 200 steps AdamW
    shrinks both weights by 1 - (1 - lr wd)^200 = 18.1 %. With L2 Adam divides wd w by the root of
    the average of squares: 0.1 / 100 of the rate a step, 0.2 % in all, for the first; for the
    second g is small beside wd w, and Adam walks down by the rate a step, as it would without g.
    """
    lr, wd, steps = 0.01, 0.1, 200
    g = np.multiply.outer((-1.0) ** np.arange(steps), [100.0, 0.01]).astype(np.float32)

    def shrunk(tx: optax.GradientTransformation) -> np.ndarray:
        def step(carry: Any, grads: jax.Array) -> Any:
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (adamx.apply_updates(params, updates), state), None

        start = jnp.ones(2)
        walk = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), jnp.asarray(g)))
        return np.asarray(walk()[0][0])

    without = shrunk(adamx.adam(lr))
    decoupled = without - shrunk(adamx.adamw(lr, weight_decay=wd))
    l2 = without - shrunk(adamx.chain(adamx.add_decayed_weights(wd), adamx.adam(lr)))
    # 2 %: the first turns of g, in which Adam's averages are short, move the weight by two steps
    np.testing.assert_allclose(decoupled, 1 - (1 - lr * wd) ** steps, rtol=0.02)
    np.testing.assert_allclose(decoupled[0], decoupled[1], rtol=1e-5)
    assert 0.001 < l2[0] < 0.003
    assert l2[1] > 0.9
