"""Schedule-free: against the paper's three sequences, what is evaluated, masters, and its place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamx

DIRECTIONS = np.random.default_rng(0).normal(size=(12, 5))
START = np.random.default_rng(1).normal(size=5)


def gradient(y, t):
    """A gradient that depends on where it is taken."""
    return y + DIRECTIONS[t]


def sequences(rates, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, power=2.0):
    """Return y and x after each step, as the paper's Algorithm 1 computes them, in float64."""
    x = z = START
    nu, total, largest, out = 0.0, 0.0, 0.0, []
    for t, rate in enumerate(rates, start=1):
        y = (1 - b1) * z + b1 * x
        g = gradient(y, t - 1)
        nu = b2 * nu + (1 - b2) * g**2
        z = z - rate * (g / (np.sqrt(nu / (1 - b2**t)) + eps) + weight_decay * y)
        largest = max(largest, rate)
        total += largest**power
        c = largest**power / total
        x = (1 - c) * x + c * z
        out.append(((1 - b1) * z + b1 * x, x))
    return out


def follow(tx, steps, y=None, dtype=None):
    y = jnp.asarray(START if y is None else y, dtype)
    state, update, out = tx.init(y), jax.jit(tx.update), []
    for t in range(steps):
        g = jnp.asarray(gradient(np.asarray(y.astype(jnp.float32), np.float64), t), y.dtype)
        updates, state = update(g, state, y)
        y = adamx.apply_updates(y, updates)
        out.append((y, adamx.schedule_free_eval_params(state, y)))
    return out, state


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"b1": 0.5, "weight_decay": 0.3},
        {"b2": 0.9, "eps": 0.1},
        {"b1": 1.0, "weight_lr_power": 0.0},
        {"warmup_steps": 5},
        {"warmup_steps": 1},
        {"warmup_steps": 5, "weight_lr_power": 1.0},
    ],
    ids=str,
)
def test_it_is_the_papers_algorithm(given):
    power, warmup = given.get("weight_lr_power", 2.0), given.get("warmup_steps", 1)
    rates = [0.1 * min(1, t / warmup) for t in range(1, 13)]
    known = {name: given[name] for name in given if name in ("b1", "b2", "eps", "weight_decay")}
    wanted = sequences(rates, power=power, **known)
    got, _ = follow(adamx.schedule_free_adamw(0.1, **given), 12, dtype=jnp.float32)
    for (y, x), (wanted_y, wanted_x) in zip(got, wanted, strict=True):
        # float32: the corrected second moment is good to 4e-7, over 12 steps of 0.1
        np.testing.assert_allclose(y, wanted_y, atol=3e-6)
        np.testing.assert_allclose(x, wanted_x, atol=3e-6)


def test_the_weights_go_by_the_largest_rate_so_far_and_no_rate_is_too_small():
    def rate(step):
        return 1e-25 * jnp.asarray([1.0, 4.0, 2.0])[step]

    tx = adamx.schedule_free(adamx.sgd(rate), rate, 0.5)
    z, x, y, state = 0.0, 0.0, jnp.zeros(1), tx.init(jnp.zeros(1))
    for lr, c in ((1.0, 1.0), (4.0, 16 / 17), (2.0, 16 / 33)):
        updates, state = tx.update(jnp.ones(1), state, y)
        y = y + updates
        z -= lr
        x = (1 - c) * x + c * z
        np.testing.assert_allclose(adamx.schedule_free_eval_params(state, y), 1e-25 * x, rtol=1e-6)
    np.testing.assert_allclose(state["max_lr"], 4e-25, rtol=1e-6)
    np.testing.assert_allclose(state["weight_sum"], 33 / 16, rtol=1e-6)


def test_a_rate_of_zero_moves_nothing_and_is_no_division_by_zero():
    tx, y = adamx.schedule_free(adamx.sgd(0.0), 0.0), jnp.ones(2)
    updates, state = tx.update(jnp.ones(2), tx.init(y), y)
    np.testing.assert_array_equal(updates, 0)
    np.testing.assert_array_equal(adamx.schedule_free_eval_params(state, y), 1)


def test_before_the_first_step_nothing_is_averaged():
    y = jnp.asarray(START, jnp.float32)
    state = adamx.schedule_free_adamw(0.1).init(y)
    assert set(state) == {"count", "z", "nu", "weight_sum", "max_lr", "b1", "learning_rate"}
    assert float(state["weight_sum"]) == float(state["max_lr"]) == 0
    np.testing.assert_array_equal(state["z"], y)
    # (y - (1 - b1) y) / b1 rounds twice
    np.testing.assert_allclose(adamx.schedule_free_eval_params(state, y), y, rtol=3e-7)


def test_the_parameters_and_their_copy_can_both_be_donated():
    tx, params = adamx.schedule_free_adamw(0.1), {"w": jnp.ones(3), "b": jnp.ones(3)}
    state, step = tx.init(params), adamx.make_step(tx)
    for _ in range(2):
        params, state = step(params, state, {"w": jnp.ones(3), "b": jnp.ones(3)})
    assert jnp.isfinite(params["w"]).all()


def test_masters_follow_the_float32_trajectory():
    tx = adamx.schedule_free_adamw(1e-3, weight_decay=0.1)
    start = jnp.asarray(START, jnp.bfloat16)
    wide, narrow = start.astype(jnp.float32), start
    masters = adamx.master_weights(tx)
    wide_state, state = tx.init(wide), masters.init(narrow)
    wide_step, step = adamx.make_step(tx), adamx.make_step(masters)
    for t in range(12):
        g = jnp.asarray(DIRECTIONS[t], jnp.bfloat16)
        wide, wide_state = wide_step(wide, wide_state, g.astype(jnp.float32))
        narrow, state = step(narrow, state, g)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_max_ulp(adamx.masters(narrow, state), wide, 4)
    x = adamx.schedule_free_eval_params(state, narrow)
    assert x.dtype == jnp.bfloat16
    wanted = adamx.schedule_free_eval_params(wide_state, wide)
    np.testing.assert_allclose(x.astype(jnp.float32), wanted, rtol=2**-8)


def test_evaluation_leaves_alone_what_is_not_trained_and_knows_its_state():
    tx, params = adamx.schedule_free_adamw(0.1), {"w": jnp.ones(2), "frozen": None}
    state = tx.init(params)
    assert adamx.schedule_free_eval_params(state, params)["frozen"] is None
    assert adamx.schedule_free_eval_params(state, {"w": jnp.ones(2), "frozen": jnp.ones(1)})[
        "frozen"
    ].shape == (1,)
    with pytest.raises(ValueError, match="not the state of a schedule-free optimizer"):
        adamx.schedule_free_eval_params(adamx.adam(0.1).init(params), params)


def test_nothing_follows_it_and_a_clip_of_the_tree_precedes_it():
    tx = adamx.schedule_free_adamw(0.1)
    with pytest.raises(ValueError, match="schedule_free sets the new parameters"):
        adamx.chain(tx, adamx.scale(0.5))
    clipped = adamx.chain(optax.clip_by_global_norm(1.0), tx)
    y = jnp.ones(2)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = clipped.update(y, clipped.init(y), y)
    assert jnp.isfinite(updates).all()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="warmup_steps must be >= 1"):
        adamx.schedule_free_adamw(0.1, 0)
    with pytest.raises(ValueError, match="must be a number where warmup_steps is given"):
        adamx.schedule_free_adamw(optax.constant_schedule(0.1), 3)
    with pytest.raises(ValueError, match=r"b1 must be in \(0, 1\]"):
        adamx.schedule_free_adamw(0.1, b1=0.0)
    with pytest.raises(TypeError, match="inner must be an adamx transformation"):
        adamx.schedule_free(0.1, 0.1)  # pyright: ignore
    with pytest.raises(TypeError, match="schedule_free: got an Optax transformation"):
        adamx.schedule_free(optax.sgd(0.1), 0.1)  # pyright: ignore
    with pytest.raises(ValueError, match="schedule_free: needs the parameters"):
        tx = adamx.schedule_free(adamx.sgd(0.1), 0.1)
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
