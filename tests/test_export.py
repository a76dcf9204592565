"""Every transformation's step is lowered for CPU, CUDA and TPU, whatever is at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from table import TRANSFORMATIONS, of_each_kind

import adamx

pytestmark = pytest.mark.usefixtures("promotion_of_foreign_stages")
PLATFORMS = ("cpu", "cuda", "tpu")

# The state of an Optax stage is a named tuple, which JAX asks its users to register by name before
# it is written down. A state of adamx is a dictionary, which needs no such thing.
UNREGISTERED = {"chain_foreign"}


def example(name):
    """Return the jitted step of a transformation, and its arguments."""
    tx, rng = TRANSFORMATIONS[name].make(), np.random.default_rng(0)
    params, grads = (
        {
            "w": jnp.asarray(rng.standard_normal((3, 4), np.float32)),
            "b": jnp.asarray(rng.standard_normal(2, np.float32)),
        }
        for _ in range(2)
    )

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return adamx.apply_updates(params, updates), state

    return step, (params, tx.init(params), grads)


@of_each_kind
def test_the_step_is_lowered_for_every_platform_and_can_be_written_down(name):
    step, arguments = example(name)
    exported = export.export(step, platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    expected = jax.tree.leaves(jax.eval_shape(step, *arguments))
    assert [(x.shape, x.dtype) for x in exported.out_avals] == [
        (x.shape, x.dtype) for x in expected
    ]
    if name not in UNREGISTERED:
        assert len(exported.serialize()) > 0


@pytest.mark.parametrize(
    "name",
    [
        "adamw_packed8",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("sgd_momentum", "adamw", "lion", "clip_then_adamw", "master_weights")
        ),
    ],
)
def test_the_step_that_was_written_down_for_all_platforms_gives_the_same_bits_here(name):
    step, arguments = example(name)
    written = export.export(step, platforms=PLATFORMS)(*arguments).serialize()
    restored = export.deserialize(written)
    expected = step(*arguments)
    params, state = restored.call(*arguments)
    assert jax.tree.structure((params, state)) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, (params, state), expected)
    # and it goes on from there
    grads = arguments[2]
    jax.tree.map(
        np.testing.assert_array_equal, restored.call(params, state, grads), step(*expected, grads)
    )
