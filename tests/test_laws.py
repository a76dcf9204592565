"""Laws that hold for all gradients: what the averages, the scaling and the algebra promise.

Errors are counted in ULPs. One rounding is at most half an ULP of the number rounded. Powers of
two scale a float32 without rounding, which makes some laws exact; gradients there are 0 or within
1e-6 .. 1e6, so that neither they nor their squares leave the normal numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")

STEPS, SIZE = 6, 4
LARGEST = float(np.finfo(np.float32).max)

laws = hypothesis.settings(
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
)


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Float32 numbers between two bounds."""
    low, high = (float(np.float32(x)) for x in (low, high))
    return st.floats(low, high, width=32, allow_subnormal=False)


def histories(element: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    """Gradients of STEPS steps for SIZE elements."""
    return hnp.arrays(np.float32, (STEPS, SIZE), elements=element)


magnitudes = floats(1e-6, 1e6)
ordinary = histories(st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x)))
large = histories(floats(-1e38, 1e38))
any_size = histories(floats(-LARGEST, LARGEST))
decays = floats(0.0, 1 - 2.0**-24)
powers = st.integers(-20, 20).map(lambda n: 2.0**n)


@jax.jit
def _walk(tree: Any, gradients: Any, params: Any) -> Any:
    tx = tree.tx

    def step(state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return state, (updates, state)

    return jax.lax.scan(step, tx.init(params), gradients)[1]


def walk(tx: adamx.Transformation, gradients: Any) -> Any:
    """Return the updates and the states of all steps; the decays that are arrays may change freely.

    What is traced is the composition and the shapes, once.
    """
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), gradients)
    return jax.device_get(_walk(adamx.as_pytree(tx), jax.tree.map(jnp.asarray, gradients), params))


def emitted(tx: adamx.Transformation, gradients: Any) -> Any:
    """Return the updates of all steps."""
    return walk(tx, gradients)[0]


def ulp(x: Any) -> np.ndarray:
    """The unit in the last place of float32 numbers, the smallest normal one's below that."""
    return np.spacing(np.maximum(np.abs(x), np.finfo(np.float32).tiny), dtype=np.float32)


def array(x: float) -> jax.Array:
    """A hyperparameter that does not make another program when it changes."""
    return jnp.asarray(x, jnp.float32)


# --- Averages ------------------------------------------------------------------------------------


@laws
@given(large, decays)
def test_average_stays_in_the_hull_of_the_past(g: np.ndarray, decay: float) -> None:
    """And of its start, 0; to 3 ULP of the largest number so far for each step.

    A step rounds mu_t once, by half an ULP of a number no larger than that, and before it two
    products and a difference, of numbers no larger than that either.
    """
    mu = emitted(adamx.ema(array(decay)), g)
    low = np.minimum(np.minimum.accumulate(g), 0.0)
    high = np.maximum(np.maximum.accumulate(g), 0.0)
    slack = 3 * np.arange(1, STEPS + 1)[:, None] * ulp(np.maximum(-low, high)).astype(np.float64)
    assert np.all(mu >= low - slack)
    assert np.all(mu <= high + slack)


@laws
@given(ordinary, decays, st.sampled_from([0.0, 2.0]))
def test_average_of_squares_is_a_mean_of_squares(
    g: np.ndarray, decay: float, initial: float
) -> None:
    """So it is never negative, and never larger than the largest square or its start."""
    nu = emitted(adamx.ema_of_squares(array(decay), initial), g)
    high = np.maximum(np.maximum.accumulate(np.square(g)), initial)
    assert np.all(nu >= 0)
    assert np.all(nu <= high + 3 * np.arange(1, STEPS + 1)[:, None] * ulp(high))


@laws
@given(any_size, decays)
def test_average_of_squares_of_finite_numbers_is_never_nan(g: np.ndarray, decay: float) -> None:
    """Nor negative; also where squares overflow: a step too small is better than none ever after.

    Squares that float32 does not hold, of gradients above 1.8e19, make what follows inexact.
    """
    assert np.all(emitted(adamx.ema_of_squares(array(decay)), g) >= 0)


@laws
@given(any_size)
def test_sum_of_squares_never_falls_and_never_is_infinite(g: np.ndarray) -> None:
    """It stops at the largest number."""
    s = emitted(adamx.sum_of_squares(0.5), g)
    assert np.all(s[0] >= 0.5)
    assert np.all(np.diff(s, axis=0) >= 0)
    assert np.all(np.isfinite(s))


@laws
@given(large, decays)
def test_arrived_average_stays(g: np.ndarray, decay: float) -> None:
    """A constant is a fixed point: to the last bit where the memory is long, to 2 ULP where the
    average is made of two products, each rounded, and forgets at once what they lose. A product
    below the smallest normal number, 2^-126, may count as 0.
    """
    arrived = _step_from(adamx.as_pytree(adamx.ema(array(decay))), jnp.asarray(g))
    assert np.all(np.abs(arrived - g) <= (0 if decay >= 0.5 else 2 * (ulp(g) + 2.0**-126)))


@jax.jit
def _step_from(tree: Any, mu: jax.Array) -> jax.Array:
    tx = tree.tx
    return tx.update(mu, {**tx.init(mu), "mu": mu})[0]


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.99999])
@pytest.mark.parametrize("squares", [False, True])
def test_average_of_a_constant_has_the_gain_it_should_have(decay: float, squares: bool) -> None:
    """From 0 the average of a constant c in step t is (1 - decay^t) c, for 1 / (1 - decay) steps.

    Each step rounds by half an ULP, 0.29 ULP in root mean square, in one or the other direction:
    three standard deviations after t steps are 0.87 ULP sqrt(t), or 1e-7 sqrt(t); the gain itself
    adds 2e-7. With the factors 0.999 and 0.001, each rounded, it would be 1.3e-5 off at t = 1000,
    and for 0.99999 6.8e-4 at t = 1e5.
    """
    steps = round(1 / (1 - decay))
    constants = np.array([1.0, 0.7, 1.3, 3.1], np.float32)
    tx = adamx.ema_of_squares(decay) if squares else adamx.ema(decay)

    def step(state: Any, _: None) -> Any:
        updates, state = tx.update(jnp.asarray(constants), state)
        return state, updates

    averages = jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.zeros(4)), None, length=steps)[1])()
    t = np.arange(1, steps + 1)[:, None]
    gain = -np.expm1(t * math.log(decay))
    wide = constants.astype(np.float64)
    wanted = gain * (wide * wide if squares else wide)
    relative = np.abs(np.asarray(averages) - wanted) / wanted
    np.testing.assert_array_less(relative, 1e-7 * (2 + np.sqrt(t)) * np.ones_like(wide))


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.99999])
def test_average_comes_as_near_to_a_constant_as_its_dtype_lets_it(decay: float) -> None:
    """A step of (1 - decay) (g - mu) that is less than half an ULP of mu is rounded away.

    So float32 stops within half an ULP / (1 - decay) of a constant: 3e-3 below 1 for 0.99999. No
    way of writing the average can do better in this dtype without a second number or dice.
    """
    half = 2.0**-25  # half an ULP below 1
    near = jnp.asarray([1 - 0.9 * half / (1 - decay), 1 - 8 * half / (1 - decay)], jnp.float32)
    tx = adamx.ema(decay)
    state = {**tx.init(near), "mu": near}
    after = np.asarray(tx.update(jnp.ones(2), state)[0])
    assert after[0] >= near[0]
    assert after[0] <= 1
    moved = (after[1] - float(near[1])) / half
    assert 7 <= moved <= 9  # 8 half ULPs, rounded to an even number of them


@laws
@given(ordinary, powers)
def test_average_is_homogeneous(g: np.ndarray, c: float) -> None:
    """The average of c g is c times the average, exactly for a power of two; squares c^2."""
    times_c = np.float32(c) * g
    for tx, factor in (
        (adamx.ema(0.9), c),
        (adamx.nesterov_ema(0.9), c),
        (adamx.trace(0.9, nesterov=True), c),
        (adamx.ema_of_squares(0.9), c * c),
        (adamx.sum_of_squares(), c * c),
    ):
        np.testing.assert_array_equal(emitted(tx, times_c), np.float32(factor) * emitted(tx, g))


@laws
@given(floats(-1e6, 1e6), decays)
def test_correction_after_the_average_fixes_constants(constant: float, decay: float) -> None:
    """bias_correction(ema(c)) = c in every step: to the 4e-7 of the correction, 3.4 to 6.7 ULP,
    one for the quotient, and 3 a step for the average, as above.
    """
    tx = adamx.chain(adamx.ema(array(decay)), adamx.bias_correction(array(decay)))
    g = np.full((STEPS, SIZE), constant, np.float32)
    allowed = (8 + 3 * np.arange(1, STEPS + 1)[:, None]) * ulp(g)
    assert np.all(np.abs(emitted(tx, g) - g) <= allowed)


@laws
@given(ordinary, st.sampled_from([0.5, 0.75, 0.9, 0.99]))
def test_trace_is_the_average_over_one_minus_decay(g: np.ndarray, decay: float) -> None:
    """To 6 roundings a step, of the same sum of magnitudes: 4 in the average, 2 in the trace, and
    one for float32(1 / (1 - decay)), float32(1 - decay) and float32(decay) each.
    """
    trace, average = emitted(adamx.trace(array(decay)), g), emitted(adamx.ema(decay), g)
    measure = emitted(adamx.trace(array(decay)), np.abs(g))
    allowed = (3 + 9 * np.arange(1, STEPS + 1)[:, None]) * ulp(measure)
    assert np.all(np.abs(trace - average / np.float32(1 - decay)) <= allowed)


NO_MEMORY: dict[str, tuple[Callable[[], adamx.Transformation], Callable[[Any], Any]]] = {
    "ema": (lambda: adamx.ema(0.0), lambda g: g),
    "ema_of_an_array": (lambda: adamx.ema(array(0.0)), lambda g: g),
    "nesterov_ema": (lambda: adamx.nesterov_ema(0.0), lambda g: g),
    "trace": (lambda: adamx.trace(0.0), lambda g: g),
    "trace_nesterov": (lambda: adamx.trace(0.0, nesterov=True), lambda g: g),
    "bias_correction": (lambda: adamx.bias_correction(0.0), lambda g: g),
    "corrected_ema": (
        lambda: adamx.chain(adamx.ema(0.0), adamx.bias_correction(0.0)),
        lambda g: g,
    ),
    "ema_of_squares": (lambda: adamx.ema_of_squares(0.0), np.square),
    "rms_scaling": (
        lambda: adamx.rms_scaling(second_moment=adamx.ema_of_squares(0.0), eps=0.0),
        np.sign,
    ),
    "adam": (lambda: adamx.scale_by_adam(0.0, 0.0, eps=0.0), np.sign),
}


@laws
@pytest.mark.parametrize("name", NO_MEMORY)
@given(ordinary)
def test_decay_of_zero_is_no_memory(name: str, g: np.ndarray) -> None:
    """Exactly: whatever came before, an average of weight 0 for the past is its last value.

    So Adam without memory is the sign of the gradient; g / sqrt(g^2) has one ULP.
    """
    make, wanted = NO_MEMORY[name]
    exact = wanted is not np.sign
    np.testing.assert_allclose(emitted(make(), g), wanted(g), rtol=0 if exact else 2.0**-23, atol=0)


@laws
@given(any_size, decays)
def test_average_of_the_largest_numbers_is_finite(g: np.ndarray, decay: float) -> None:
    """Whatever their signs: a mean is no larger than what it is made of."""
    assert np.all(np.isfinite(emitted(adamx.ema(array(decay)), g)))


# --- Scaling -------------------------------------------------------------------------------------

SCALINGS: dict[str, Callable[[], adamx.Transformation]] = {
    "rmsprop": lambda: adamx.scale_by_rms(eps=0.0),
    "adagrad": lambda: adamx.rms_scaling(second_moment=adamx.sum_of_squares(), eps=0.0),
    "adam": lambda: adamx.scale_by_adam(eps=0.0),
    "nadam": lambda: adamx.scale_by_adam(eps=0.0, nesterov=True),
    "adam_atan2": lambda: adamx.adam_atan2(1.0),
}


@laws
@pytest.mark.parametrize("name", SCALINGS)
@given(ordinary, powers)
def test_scaling_forgets_the_unit_of_the_gradient(name: str, g: np.ndarray, c: float) -> None:
    """With eps = 0, g -> c g changes nothing, to the last bit for a power of two."""
    tx = SCALINGS[name]()
    np.testing.assert_array_equal(emitted(tx, np.float32(c) * g), emitted(tx, g))


@laws
@pytest.mark.parametrize(
    "name", ["adam", "adamw", "adam_atan2", "rmsprop", "adagrad", "momentum", "sgd"]
)
@given(ordinary)
def test_step_of_minus_g_is_minus_the_step(name: str, g: np.ndarray) -> None:
    """Exactly: rounding to nearest knows no sign (at parameters 0, so also for AdamW)."""
    tx = getattr(adamx, name)(0.1)
    np.testing.assert_array_equal(emitted(tx, -g), -emitted(tx, g))


@laws
@given(ordinary)
def test_scaling_of_nothing_is_nothing(g: np.ndarray) -> None:
    """With eps = 0, 0 / 0 is 0: an element stands still until its first gradient."""
    g[:3, 0] = 0.0
    for make in SCALINGS.values():
        u = emitted(make(), g)
        assert np.all(np.isfinite(u))
        assert np.all(u[np.cumsum(np.abs(g), axis=0) == 0] == 0)


B1, B2 = 0.9, 0.999


def adam_bound(t: Any) -> np.ndarray:
    """The largest |m^| / sqrt(v^) in step t, by Cauchy and Schwarz.

    |m| = (1 - b1) |sum b1^k g_{t-k}| = (1 - b1) |sum (b1^k / b2^(k/2)) (b2^(k/2) g_{t-k})|
       <= (1 - b1) sqrt(sum_{k<t} q^k) sqrt(v / (1 - b2)) with q = b1^2 / b2,
    with equality for g_{t-k} in proportion to (b1 / b2)^k.
    """
    q = B1**2 / B2
    geometric = (1 - q**t) / (1 - q)
    return (1 - B1) / np.sqrt(1 - B2) * np.sqrt(geometric) * np.sqrt(1 - B2**t) / (1 - B1**t)


@laws
@given(st.one_of(ordinary, any_size))
def test_adam_moves_no_further_than_cauchy_and_schwarz_allow(g: np.ndarray) -> None:
    """In each step, in units of the learning rate; 1e-6 for some 15 roundings in float32.

    Also where float32 does not hold a gradient's square. Squares below 2^-126 may count as 0.
    """
    g = np.where(np.abs(g) < 1e-6, 0.0, g).astype(np.float32)
    u = emitted(adamx.scale_by_adam(B1, B2, eps=0.0), g)
    bound = adam_bound(np.arange(1.0, STEPS + 1))[:, None]
    assert np.all(np.abs(u) <= bound * (1 + 1e-6))
    assert np.all(bound < (1 - B1) / math.sqrt(1 - B2) / math.sqrt(1 - B1**2 / B2) / (1 - B1))


def test_adam_reaches_the_bound_of_cauchy_and_schwarz() -> None:
    """With the gradients of equality, of which the last is the largest."""
    age = np.arange(STEPS)[::-1, None]
    g = np.broadcast_to((B1 / B2) ** age, (STEPS, SIZE)).astype(np.float32)
    u = emitted(adamx.scale_by_adam(B1, B2, eps=0.0), g)
    np.testing.assert_allclose(u[-1], adam_bound(float(STEPS)), rtol=1e-6)


# --- Algebra -------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[], adamx.Transformation]] = {
    "sgd": lambda: adamx.sgd(0.1, 0.9, nesterov=True),
    "momentum": lambda: adamx.momentum(0.1),
    "adagrad": lambda: adamx.adagrad(0.1),
    "rmsprop": lambda: adamx.rmsprop(0.1, momentum=0.9),
    "adamw": lambda: adamx.adamw(0.1),
}


@laws
@pytest.mark.parametrize("name", OPTIMIZERS)
@given(ordinary, st.permutations(range(SIZE)))
def test_elements_do_not_know_their_place(name: str, g: np.ndarray, order: list[int]) -> None:
    """Permuting elements before and after an optimizer is the same, to the last bit."""
    tx = OPTIMIZERS[name]()
    np.testing.assert_array_equal(emitted(tx, g[:, order]), emitted(tx, g)[:, order])


def assert_alike(name: str, actual: Any, wanted: Any, g: np.ndarray) -> None:
    """Allow what programs of other shapes may round otherwise, where they fuse product and sum.

    Once a step in an average, twice in a trace of steps, and four times in the emission; measured
    by the optimizer on magnitudes, since sums may cancel.
    """
    measure = emitted(OPTIMIZERS[name](), np.abs(g))
    allowed = (4 + 3 * np.arange(1, STEPS + 1)[:, None]) * ulp(measure)
    assert np.all(np.abs(actual - wanted) <= allowed)


@laws
@pytest.mark.parametrize("name", OPTIMIZERS)
@given(ordinary)
def test_leaves_do_not_know_each_other(name: str, g: np.ndarray) -> None:
    """In a tree each leaf does what it does alone, wherever it stands."""
    tx = OPTIMIZERS[name]()
    tree = {"a": g, "b": -2 * g, "c": 0 * g}
    turned = {"a": 0 * g, "b": g, "c": -2 * g}
    together, other = emitted(tx, tree), emitted(tx, turned)
    for here, there in (("a", "b"), ("b", "c"), ("c", "a")):
        alone = emitted(tx, tree[here])
        assert_alike(name, together[here], alone, tree[here])
        assert_alike(name, other[there], alone, tree[here])


@laws
@pytest.mark.parametrize("name", OPTIMIZERS)
@given(ordinary, st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))
def test_leaf_without_update_keeps_its_slots(name: str, g: np.ndarray, there: list[bool]) -> None:
    """A None among the updates stays None; its slots stay to the last bit, and the other leaf's
    steps are those that it takes alone.
    """
    tx, update = OPTIMIZERS[name](), _update_of(name)
    params = {"a": jnp.zeros(SIZE), "b": jnp.zeros(SIZE)}
    state, taken = tx.init(params), []
    for t in range(STEPS):
        grads = jnp.asarray(g[t])
        tree = {"a": grads, "b": grads if there[t] else None}
        updates, new = update(tree, state, params)
        taken.append(updates["a"])
        assert (updates["b"] is not None) == there[t]
        assert new.keys() == state.keys()
        for slot in new.keys() - {"count", "learning_rate"}:
            if not there[t]:
                np.testing.assert_array_equal(new[slot]["b"], state[slot]["b"])
        state = new
    assert_alike(name, np.stack(taken), emitted(tx, g), g)


@functools.cache
def _update_of(name: str) -> Any:
    return jax.jit(OPTIMIZERS[name]().update)


@laws
@given(ordinary)
def test_chain_is_associative_and_identity_its_neutral_element(g: np.ndarray) -> None:
    """The same composition whatever the brackets, and the same numbers with identities between."""
    a, b, c = adamx.ema(0.9), adamx.scale(-2.0), adamx.trace(0.5)
    left, right = adamx.chain(adamx.chain(a, b), c), adamx.chain(a, adamx.chain(b, c))
    assert left == right == adamx.chain(a, b, c)
    assert hash(left) == hash(right)
    assert adamx.chain(a, adamx.chain(), b, c) == left
    wanted = emitted(left, g)
    between = adamx.chain(adamx.identity(), a, adamx.identity(), b, c, adamx.identity())
    np.testing.assert_array_equal(emitted(between, g), wanted)
    np.testing.assert_array_equal(emitted(adamx.chain(), g), g)
    np.testing.assert_array_equal(emitted(adamx.identity(), g), g)


@laws
@given(ordinary)
def test_fan_out_joins_what_the_branches_do_alone(g: np.ndarray) -> None:
    """combine(add, f, g) = f + g, to one rounding where a program fuses a product and the sum."""
    f = adamx.chain(adamx.ema(0.9), adamx.scale(3.0))
    h = adamx.trace(0.5)
    one, other = emitted(f, g), emitted(h, g)
    both = emitted(adamx.combine(jnp.add, f, h), g)
    assert np.all(np.abs(both - (one + other)) <= ulp(np.abs(one) + np.abs(other)))


@laws
@given(ordinary)
def test_chain_feeds_one_stage_to_the_next(g: np.ndarray) -> None:
    """chain(f, h) on g is h on what f makes of g."""
    f, h = adamx.trace(0.5), adamx.scale_by_rms(0.75)
    np.testing.assert_array_equal(emitted(adamx.chain(f, h), g), emitted(h, emitted(f, g)))


@laws
@given(ordinary)
def test_adam_without_averages_is_rmsprop_corrected(g: np.ndarray) -> None:
    """b1 = 0: no numerator; exactly, since an average without memory is exact."""
    without = adamx.scale_by_adam(b1=0.0, b2=0.9)
    np.testing.assert_array_equal(
        emitted(without, g), emitted(adamx.scale_by_rms(0.9, bias_correction=True), g)
    )
