"""Faults that users of Adam reported of other libraries, tried here: whole kinds, not examples."""

import functools
import pickle
from typing import Any

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import TRANSFORMATIONS, of_each_kind

import adamx


@pytest.fixture(autouse=True)
def as_users_run():
    """Optax does not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def start() -> dict[str, Any]:
    return {"w": jnp.arange(1.0, 7.0).reshape(2, 3) / 4, "b": jnp.ones(3)}


# ------------------------------------------------------------------------- a fresh state's arrays

ARRAYS = {
    "adamw": lambda x: adamx.adamw(x),
    "guard": lambda x: adamx.skip_nonfinite(adamx.adamw(x)),
    "groups": lambda x: adamx.by_path({"w": adamx.sgd(x)}, default=adamx.adam(x)),
    "schedule-free": lambda x: adamx.schedule_free_adamw(x, b1=x),
    "clip": lambda x: adamx.chain(adamx.clip_by_global_norm(x, record=True), adamx.sgd(x)),
    "initial": lambda x: adamx.chain(adamx.ema(0.5, initial=x), adamx.sgd(x)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_no_array_of_a_fresh_state_is_one_that_something_else_holds(name):
    given = jnp.float32(0.5)
    tx, params = ARRAYS[name](given), start()
    first, second = tx.init(params), tx.init(params)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((given, params, first, second))]
    assert len(set(places)) == len(places)
    adamx.make_step(tx)(jax.tree.map(jnp.copy, params), first, params)
    assert float(given) == 0.5 and not any(x.is_deleted() for x in jax.tree.leaves(second))


def test_an_injected_rate_inside_optaxs_wrappers_is_donated_once():
    tx = optax.MultiSteps(optax.inject_hyperparams(adamx.adamw)(0.1), 2)
    params, state = start(), tx.init(start())
    step = jax.jit(lambda s, g, p: tx.update(g, s, p), donate_argnums=0)
    _, state = step(state, start(), params)
    updates, state = step(state, start(), params)
    assert all((u != 0).all() for u in jax.tree.leaves(updates))


# ------------------------------------------------------------------------------ slots of a dtype


def narrowed(state):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state)


@of_each_kind
def test_a_state_that_was_cast_is_refused_with_slot_and_dtypes(name):
    tx = TRANSFORMATIONS[name].make()
    state = tx.init(start())
    scalars = [name for name in ("learning_rate", "grad_norm") if name in state]
    for names in (tx.tree_names(), scalars):
        cast = state | {name: narrowed(state[name]) for name in names}
        same = [x.dtype for x in jax.tree.leaves(cast)] == [x.dtype for x in jax.tree.leaves(state)]
        if same:  # it keeps nothing in float32 there
            tx.update(start(), cast, start())
            continue
        with pytest.raises((TypeError, ValueError), match=r"bfloat16.*float32.*adapt_state"):
            tx.update(start(), cast, start())
        with pytest.raises((TypeError, ValueError), match=r"bfloat16.*adapt_state|params"):
            tx.update(start(), cast)


# -------------------------------------------------------------------------------------- masks


class Model(eqx.Module):
    w: Any
    b: Any
    answer: Any = eqx.field(static=True, default=True)

    def __call__(self, *args):
        return self.answer


MASKED: dict[str, Any] = {
    "add_decayed_weights": lambda mask: adamx.add_decayed_weights(0.5, mask),
    "add_cautious_decayed_weights": lambda mask: adamx.add_cautious_decayed_weights(0.5, mask),
    **{
        name: functools.partial(lambda mask, make: make(1.0, mask=mask), make=getattr(adamx, name))
        for name in ("adamw", "lion", "sgdw", "lamb", "nadamw", "adan", "stable_adamw", "adam_mini")
    },
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_that_is_a_tree_is_one_also_where_it_can_be_called(name):
    params, zero = Model(jnp.ones((2, 3)), jnp.ones(3)), Model(jnp.zeros((2, 3)), jnp.zeros(3))
    kwargs = {"weight_decay": 0.5} if name in ("lamb", "adan") else {}
    make = MASKED[name]
    if kwargs:
        make = lambda mask: getattr(adamx, name)(1.0, mask=mask, **kwargs)  # noqa: E731
    tx = make(Model(True, False))
    updates, _ = tx.update(zero, tx.init(params), params)
    assert (updates.w != 0).all() and (updates.b == 0).all()


# ----------------------------------------------------------------------------------- groups


def test_a_groups_settings_replace_what_the_default_was_given_by_position():
    default = functools.partial(adamx.adamw, 1e-3, 0.8, weight_decay=0.5)
    tx = adamx.by_path({"b": {"learning_rate": 1e-2}, "w": {"b2": 0.5}}, default=default)
    assert tx.transformations[0] == adamx.adamw(1e-2, 0.8, weight_decay=0.5)
    assert tx.transformations[1] == adamx.adamw(1e-3, 0.8, 0.5, weight_decay=0.5)


# ------------------------------------------------------------------------------------ pickles


def test_a_pickler_that_can_store_functions_is_left_to_do_so():
    schedule = optax.cosine_decay_schedule(0.5, 10)
    tx = adamx.chain(
        optax.clip(1.0), adamx.adamw(schedule, mask=lambda p: jax.tree.map(jnp.ndim, p))
    )
    back = cloudpickle.loads(cloudpickle.dumps(tx))
    a, b = (one.update(start(), one.init(start()), start())[0] for one in (tx, back))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    with pytest.raises(pickle.PicklingError, match="pickle cannot store"):
        pickle.dumps(tx)
