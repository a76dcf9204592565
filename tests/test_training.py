"""`make_step`: the update and the addition in one jitted program, in place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamx

# what is tested does not depend on optimised code, and compiling takes most of the time
pytestmark = pytest.mark.usefixtures("quick_compiler")


def start():
    return {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, 0.0])}


GRADS = [
    {"w": jnp.full((2, 2), 0.5), "b": jnp.array([-1.0, 2.0])},
    {"w": -jnp.eye(2), "b": jnp.ones(2)},
]


@pytest.mark.parametrize("package", [adamx, optax], ids=["adamx", "optax"])
def test_step_is_update_and_apply(package):
    tx = package.adamw(0.1)
    step = adamx.make_step(tx)

    @jax.jit
    def plain(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        a, b = (start(), tx.init(start())), (start(), tx.init(start()))
        for grads in GRADS:
            a, b = step(*a, grads), plain(*b, grads)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_step_donates_params_and_state_and_leaves_the_gradients():
    tx = adamx.adam(0.1)
    params, state, grads = start(), tx.init(start()), jax.tree.map(jnp.copy, GRADS[0])
    adamx.make_step(tx)(params, state, grads)
    assert params["w"].is_deleted() and state["mu"]["w"].is_deleted()
    assert not grads["w"].is_deleted()


def test_an_array_that_occurs_twice_after_a_step_is_copied():
    """A rate that is set by hand for two groups, and gradients that are the parameters."""
    rate = adamx.adjustable
    tx = adamx.by_path({"w": adamx.adam(rate(0.1))}, default=adamx.adam(rate(0.2)))
    step = adamx.make_step(tx)
    params, state = step(start(), tx.init(start()), GRADS[0])
    copies = lambda *trees: jax.tree.map(jnp.copy, trees)  # noqa: E731

    state["learning_rate"] = dict.fromkeys(state["learning_rate"], jnp.float32(0.05))
    wanted = adamx.make_step(tx)(*copies(params, state, GRADS[1]))
    params, state = step(params, state, GRADS[1])
    jax.tree.map(np.testing.assert_array_equal, (params, state), wanted)

    wanted = adamx.make_step(tx)(*copies(params, state, params))
    got = step(params, state, dict(params))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_stochastic_rounding_leaves_formats_of_8_bits_to_the_nearest_number():
    params = {"h": jnp.ones(3, jnp.bfloat16), "e": jnp.ones(3, jnp.float8_e4m3fn)}
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 0.25, jnp.float32), params)
    got = adamx.apply_updates(params, updates, rounding="stochastic", count=1)
    assert got["e"].dtype == jnp.float8_e4m3fn and (got["e"].astype(jnp.float32) == 1.25).all()
    assert (got["h"].astype(jnp.float32) == 1.25).all()


def test_every_donated_buffer_is_reused_for_the_result_at_its_place():
    tx = adamx.adamw(0.1)
    params, state = start(), tx.init(start())
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state)) if x.ndim]
    after = adamx.make_step(tx)(params, state, GRADS[0])
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(after) if x.ndim] == before


def test_step_hands_on_extra_arguments():
    class scaled_by_value(adamx.Transformation):
        def scalars(self, step):
            return step.extra.get("value", 1.0)

        def emit(self, u, slots, step):
            return u * step.scalars

    tx = adamx.chain(scaled_by_value(), adamx.scale(-1.0))
    params, _ = adamx.make_step(tx)(start(), tx.init(start()), GRADS[0], value=jnp.float32(2.0))
    np.testing.assert_array_equal(params["b"], [2.5, -4.0])


def test_step_keeps_the_dtype_of_16_bit_parameters():
    tx = adamx.adam(0.1)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start())
        params, state = adamx.make_step(tx)(params, tx.init(params), GRADS[0])
    assert params["w"].dtype == jnp.bfloat16
    assert state["nu"]["w"].dtype == jnp.float32


def test_hyperparameters_can_be_mapped_over():
    rates, decays = jnp.array([0.1, 0.01, 0.001]), jnp.array([0.5, 0.9, 0.0])

    def train(rate, decay):
        tx = adamx.adamw(rate, b1=decay, eps=1e-3 * rate, weight_decay=rate)
        params, state = start(), tx.init(start())
        for grads in GRADS:
            updates, state = tx.update(grads, state, params)
            params = adamx.apply_updates(params, updates)
        return params, state["learning_rate"]

    many, used = jax.jit(jax.vmap(train))(rates, decays)
    np.testing.assert_array_equal(used, rates)
    for i, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        one, _ = jax.jit(train)(rate, decay)
        # at most a handful of contractions differ: 8 ULP of parameters of order one
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=8 * 2**-23), many, one
        )
        numbers, _ = train(float(rate), float(decay))
        # 1 - b from a float32 b is that b's: 2^-25 / (1 - b) relative, at most 3e-7 for b <= 0.9
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-6), many, numbers
        )


@pytest.mark.usefixtures("x64")
def test_hyperparameters_can_be_differentiated():
    @jax.jit
    def loss(rate, decay):
        tx = adamx.adam(rate, b1=decay)
        params, state = start(), tx.init(start())
        for grads in GRADS:
            grads = jax.tree.map(lambda g: g.astype(jnp.float64), grads)
            updates, state = tx.update(grads, state, params)
            params: Any = adamx.apply_updates(params, updates)
        return jnp.sum(params["w"])

    rate, decay, h = jnp.float64(0.1), jnp.float64(0.9), 1e-6
    slope = jax.grad(loss, argnums=(0, 1))(rate, decay)
    numeric = [
        (loss(rate + h, decay) - loss(rate - h, decay)) / (2 * h),
        (loss(rate, decay + h) - loss(rate, decay - h)) / (2 * h),
    ]
    # float64 parameters of order 4: a ULP of 2^-51 over 2 h, and h^2 times a third derivative
    np.testing.assert_allclose(slope, numeric, atol=1e-8)
    assert jnp.isfinite(jax.grad(loss, argnums=1)(rate, jnp.float64(0.0)))
