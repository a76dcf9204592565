"""Stochastic rounding: between the two neighbours, right on average, repeatable."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers import mesh_of

import adamx
from adamx.core.rounding import add_noise, random_bits, round_stochastically, step_key

DRAWS = 100_000
FORMATS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
formats = pytest.mark.parametrize("name", FORMATS)


def numbers(name):
    """All finite numbers of a format, in order."""
    every = np.arange(2**16, dtype=np.uint16).view(FORMATS[name])
    with np.errstate(invalid="ignore"):  # NaN is among them
        every = every.astype(np.float64)
    return np.unique(every[np.isfinite(every)])


def uniform_bits(size=DRAWS, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32))


@formats
def test_result_is_one_of_the_two_nearest_numbers_of_the_format(name):
    """Against a search through all numbers of the format, for float32 of every size."""
    every = numbers(name)
    rng = np.random.default_rng(1)
    low, high = (-149, 128) if name == "bfloat16" else (-26, 16)
    x = np.ldexp(rng.uniform(1, 2, DRAWS), rng.integers(low, high, DRAWS)) * rng.choice([-1, 1])
    x = np.concatenate([x, every]).astype(np.float32)
    x = x[np.abs(x.astype(np.float64)) <= every[-1]]
    dtype = jnp.dtype(FORMATS[name])
    with jax.numpy_dtype_promotion("standard"):
        got = np.asarray(round_stochastically(jnp.asarray(x), uniform_bits(x.size), dtype))
    below = every[np.searchsorted(every, x.astype(np.float64), side="right") - 1]
    above = every[np.searchsorted(every, x.astype(np.float64), side="left")]
    got = got.astype(np.float64)
    normal = np.abs(x) >= 2.0**-126  # this processor flushes the subnormals of float32
    assert ((got == below) | (got == above))[normal].all()
    assert np.array_equal(got[normal & (below == above)], x[normal & (below == above)])


@formats
@pytest.mark.parametrize("share", [2**-7, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("start", [1.0, -1.984375, 3e-6, 2.0**-16])
def test_mean_of_1e5_draws_is_the_number(name, share, start):
    """Each draw is one of two values: a binomial, of which 5 deviations are passed by 6e-7."""
    every = numbers(name)
    low = every[np.searchsorted(every, start, side="right") - 1]
    high = every[np.searchsorted(every, low, side="right")]
    x = np.float32(low + share * (high - low))
    true = (float(x) - low) / (high - low)
    drawn = round_stochastically(jnp.full(DRAWS, x), uniform_bits(), jnp.dtype(FORMATS[name]))
    up = float((np.asarray(drawn).astype(np.float64) == high).mean())
    assert abs(up - true) < 5 * np.sqrt(true * (1 - true) / DRAWS)


@formats
def test_what_is_finite_stays_finite_and_the_rest_what_it_is(name):
    dtype = jnp.dtype(FORMATS[name])
    largest = float(jnp.finfo(dtype).max)
    full = np.array([0x7FFFFFFF, 0xFFC00000, 0x7FC00001], np.uint32).view(np.float32)
    x = jnp.asarray(np.array([largest, -largest, np.inf, -np.inf, *full, 0.0, -0.0], np.float32))
    for noise in (0, 2**32 - 1):
        got = round_stochastically(x, jnp.full(x.shape, noise, jnp.uint32), dtype)
        got = np.asarray(got).astype(np.float32)
        np.testing.assert_array_equal(got[:4], x[:4])
        assert np.isnan(got[4:7]).all()
        np.testing.assert_array_equal(got[7:], 0)
        assert np.signbit(got[8]) and not np.signbit(got[7])
    if name == "bfloat16":  # between its largest number and that of float32
        x = jnp.asarray([np.finfo(np.float32).max, -np.finfo(np.float32).max])
        got = round_stochastically(x, jnp.full(2, 2**32 - 1, jnp.uint32), dtype)
        np.testing.assert_array_equal(got.astype(jnp.float32), [largest, -largest])
    else:  # as rounding to nearest has it
        x = jnp.array([65519.0, 65520.0, -65519.0])
        got = round_stochastically(x, jnp.full(3, 2**32 - 1, jnp.uint32), dtype)
        np.testing.assert_array_equal(got.astype(jnp.float32), [65504, np.inf, -65504])


def test_another_dtype_is_refused():
    with pytest.raises(TypeError, match="bfloat16 or float16, got float32"):
        round_stochastically(jnp.ones(1), jnp.zeros(1, jnp.uint32), jnp.float32)


def test_add_noise_carries_nothing_into_a_number_of_the_narrow_format():
    x = jnp.asarray(np.array([1.0, 1.5, -2.25], np.float32))
    bits = add_noise(x, jnp.full(3, 2**32 - 1, jnp.uint32), 8)
    np.testing.assert_array_equal(bits & np.uint32(0xFFFFFF00), x.view(jnp.uint32))


# -------------------------------------------------------------------------------- the random bits


def chi_square(values, bins):
    counts = np.bincount(values, minlength=bins)
    expected = values.size / bins
    return float(np.sum((counts - expected) ** 2) / expected)


@pytest.mark.parametrize("shift", [11, 16, 24])
def test_bits_are_uniform_over_steps_and_over_values(shift):
    """Chi-square with 255 degrees of freedom: mean 255, deviation 22.6; 5 deviations."""
    one = jnp.float32(0.123)
    over_steps = jax.vmap(lambda t: random_bits(step_key(t), one))(jnp.arange(DRAWS))
    values = jnp.asarray(np.random.default_rng(2).normal(size=DRAWS).astype(np.float32))
    for words in (over_steps, random_bits(step_key(7), values)):
        chosen = (np.asarray(words) >> shift) & 255
        assert abs(chi_square(chosen, 256) - 255) < 5 * 22.6


@pytest.mark.parametrize("count", [1, 2, 1000, 2**31 - 1])
def test_rounding_of_many_values_in_one_step_is_unbiased(count):
    """The bits come from the values, so they could hang together with what is cut off."""
    x = np.random.default_rng(3).normal(size=DRAWS).astype(np.float32)
    got = round_stochastically(jnp.asarray(x), random_bits(step_key(count), jnp.asarray(x)), BF16)
    spacing = np.ldexp(1.0, np.frexp(np.abs(x).astype(np.float64))[1] - 8)
    error = (np.asarray(got).astype(np.float64) - x) / spacing
    # an error of rounding has the variance p (1 - p), 1 / 6 on average
    assert abs(error.mean()) < 5 * np.sqrt(1 / 6 / DRAWS)
    share = np.mod(np.abs(x) / spacing, 1)
    assert abs(np.mean((share - 0.5) * error * np.sign(x))) < 5 * np.sqrt(1 / 72 / DRAWS)


BF16 = jnp.bfloat16


def test_words_of_neighbouring_steps_are_not_correlated():
    values = jnp.asarray(np.random.default_rng(6).normal(size=DRAWS).astype(np.float32))
    a, b = (np.asarray(random_bits(step_key(t), values)) / 2.0**32 for t in (5, 6))
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(DRAWS)
    one = jnp.float32(0.123)
    over_steps = jax.vmap(lambda t: random_bits(step_key(t), one))(jnp.arange(DRAWS))
    over_steps = np.asarray(over_steps) / 2.0**32
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(over_steps[:-lag], over_steps[lag:])[0, 1]) < 5 / np.sqrt(DRAWS)


# ---------------------------------------------------------------- parameters, rounded without bias


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_apply_updates_is_right_on_average(dtype):
    """1e5 equal parameters in one step: the place of an element enters, too."""
    params, step = jnp.full(DRAWS, 1.0, dtype), 2.0**-14
    plain = adamx.apply_updates(params, jnp.full(DRAWS, step))
    np.testing.assert_array_equal(plain, params)
    spacing = float(jnp.finfo(dtype).eps)
    for count in (1, 2):
        new = adamx.apply_updates(params, jnp.full(DRAWS, step), rounding="stochastic", count=count)
        assert new.dtype == dtype
        share = step / spacing
        moved = (np.asarray(new).astype(np.float64) - 1).mean()
        assert abs(moved - step) < 5 * spacing * np.sqrt(share * (1 - share) / DRAWS)


def test_apply_updates_repeats_itself_in_any_sharding():
    params = {"w": jnp.asarray(np.random.default_rng(4).normal(size=(64, 6)), jnp.bfloat16)}
    updates = {"w": jnp.full((64, 6), 1e-3)}
    apply = jax.jit(lambda p, u: adamx.apply_updates(p, u, rounding="stochastic", count=3))
    alone = apply(params, updates)
    mesh = mesh_of((2,), ("data",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    split = apply(*jax.device_put((params, updates), where))
    np.testing.assert_array_equal(alone["w"], split["w"])
    eager = adamx.apply_updates(params, updates, rounding="stochastic", count=3)
    np.testing.assert_array_equal(alone["w"], eager["w"])
    other = adamx.apply_updates(params, updates, rounding="stochastic", count=4)
    assert (other["w"] != alone["w"]).any()


def test_apply_updates_rounds_wide_parameters_to_nearest():
    params, updates = jnp.ones(4), jnp.full(4, 1e-3)
    got = adamx.apply_updates(params, updates, rounding="stochastic", count=1)
    np.testing.assert_array_equal(got, params + updates)


def test_apply_updates_is_optax_where_it_rounds_to_nearest():
    params = {"w": jnp.asarray(np.random.default_rng(5).normal(size=100), jnp.bfloat16), "n": None}
    updates = {"w": jnp.full(100, 0.01, jnp.bfloat16), "n": None}
    ours = adamx.apply_updates(params, updates)
    theirs: Any = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(ours["w"], theirs["w"])
    assert ours["n"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "up"}, "rounding must be one of"),
        ({"rounding": "stochastic"}, r"count=state\[\"count\"\]"),
    ],
)
def test_apply_updates_says_what_is_missing(arguments, message):
    with pytest.raises(ValueError, match=message):
        adamx.apply_updates(jnp.ones(2), jnp.ones(2), **arguments)


def test_apply_updates_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="shape"):
        adamx.apply_updates({"w": jnp.ones(2)}, {"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="different trees"):
        adamx.apply_updates({"w": jnp.ones(2)}, {"v": jnp.ones(2)})


def test_make_step_trains_16_bit_parameters_without_masters():
    """2000 steps of 1e-4 on parameters at 1, whose spacing below is 2^-8: 0.2 in all.

    The error of a parameter is a walk of 2000 steps with the variance of one rounding, at most
    (spacing / 2)^2 each, and 4096 of them are averaged: 5 deviations.
    """
    tx = adamx.sgd(1e-4)
    step = adamx.make_step(tx, rounding="stochastic")
    params, grads = jnp.ones(4096, jnp.bfloat16), jnp.ones(4096, jnp.bfloat16)
    state = tx.init(params)
    for _ in range(2000):
        params, state = step(params, state, grads)
    mean = float(params.astype(jnp.float32).mean())
    rate = 1e-4
    # the variance of a rounding is p (1 - p) spacing^2 < p spacing^2, with p = rate / spacing
    walk = np.sqrt(2000 * rate * 2.0**-8)
    assert abs(mean - 0.8) < 5 * walk / np.sqrt(4096)
    assert int(state["count"]) == 2000


def test_make_step_says_what_it_can_round():
    with pytest.raises(ValueError, match="rounding must be one of"):
        adamx.make_step(adamx.sgd(0.1), rounding="up")
    with pytest.raises(TypeError, match="needs the step count in the state of an adamx"):
        adamx.make_step(optax.sgd(0.1), rounding="stochastic")
