"""What Optax's own functions make of a transformation: branching wrappers, `map_params`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import draw
from table import TRANSFORMATIONS, every

import adamx
from adamx.core.concept import parts
from adamx.core.paths import leaves_by_path

pytestmark = pytest.mark.usefixtures("quick_compiler", "standard_promotion")

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "inner": [jnp.ones(())]}


def example(dtype):
    return draw({"w": jnp.zeros((4, 3), dtype), "b": jnp.zeros((3,), dtype)})


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


# -------------------------------------------------------------------------------------- branches


def early(step: Any, **extra: Any) -> Any:
    return step < 2


WRAPPERS: dict[str, Any] = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, early),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, early),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "MultiSteps that skip": lambda tx: optax.MultiSteps(
        tx, 2, should_skip_update_fn=optax.skip_not_finite
    ),
}


def inner(state):
    """The optimizer's own state; Optax 0.2.6's MultiSteps changes the dtype of its sum."""
    return getattr(state, "inner_opt_state", None) or state.inner_state


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if fast and case.kind else pytest.mark.slow)
        for dtype, fast in ((jnp.bfloat16, True), (jnp.float32, False), (jnp.float16, False))
        for name, case in TRANSFORMATIONS.items()
        if fast or case.kind or case.masters
    ],
)
def test_the_branches_of_optaxs_wrappers_have_one_type(name, dtype):
    """Without running them.

    The updates of masters are float32: where another branch returns something like the gradients,
    these have to be float32 too.
    """
    tx, params = TRANSFORMATIONS[name].make(), example(dtype)
    wide = in_float32(params) if TRANSFORMATIONS[name].masters else params

    def program(params, wide):
        for wrapper, make in WRAPPERS.items():
            outer, grads = make(tx), params if wrapper.startswith("MultiSteps") else wide
            state = outer.init(params)
            updates, after = outer.update(grads, state, params)
            assert types(inner(after)) == types(inner(state)) and types(updates) == types(wide)
        return params

    jax.eval_shape(program, params, wide)


@pytest.mark.parametrize(
    ("keep", "dtype"),
    [
        ("remainder", jnp.bfloat16),
        pytest.param("float32", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("float32", jnp.float16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_masters_inside_optaxs_wrappers_are_the_same_masters(wrapper, keep, dtype):
    """Bit for bit: 16-bit gradients cast to float32 are the same numbers."""
    tx, params = adamx.master_weights(adamx.sgd(2.0**-10), keep), example(dtype)
    outer = WRAPPERS[wrapper](tx)
    alone = around = params
    state, wrapped, update = tx.init(alone), outer.init(around), jax.jit(outer.update)
    for seed in (1, 2):
        grads = draw(params, seed)
        updates, state = tx.update(grads, state, alone)
        alone = optax.apply_updates(alone, updates)
        for _ in range(2 if wrapper.startswith("MultiSteps") else 1):
            updates, wrapped = update(in_float32(grads), wrapped, around)
            around = optax.apply_updates(around, updates)
    pairs = (around, alone), (adamx.masters(around, inner(wrapped)), adamx.masters(alone, state))
    for pair in pairs:
        jax.tree.map(np.testing.assert_array_equal, *pair)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (around, params)), strict=True))


# ------------------------------------------------------------------------------------ map_params

_tree = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
MASKS = {
    "a tree": _tree,
    "a function that looks inside": lambda p: {"w": p["w"].ndim > 1, "b": False, "inner": [False]},
    "a prefix": {"w": True, "b": False, "inner": False},
    "patterns": ("w", "inner/*"),
}
MASKED = ("add_decayed_weights", "add_cautious_decayed_weights", "adamw", "adamaxw", "lion", "sgdw",
          "lamb", "nadamw", "adan", "adam_mini", "stable_adamw", "ademamix", "cautious_adamw",
          "cautious_lion", "adamw_independent", "laprop", "adam_atan2", "adamc",
          "mars", "simplified_ademamix")  # fmt: skip


def assert_params_are_mapped(tx):
    """Each slot gets the specs of the parameters, everything else of adamx the other value."""
    state: Any = jax.eval_shape(tx.init, PARAMS)
    specs = jax.tree.map(jnp.ndim, PARAMS)
    mapped: Any = optax.tree.map_params(
        tx,
        lambda x, spec: None if x is None else spec,
        state,
        specs,
        transform_non_params=lambda x: "other",
        is_leaf=lambda x: x is None,  # a parameter without a slot
    )
    assert mapped.keys() == state.keys()
    stages = {part.name for part in parts(tx) if isinstance(part, adamx.named)}
    for entry in mapped.keys() - stages:
        found = leaves_by_path(mapped[entry])
        if entry in tx.tree_names():
            there = leaves_by_path(state[entry])
            assert found == {p: n for p, n in leaves_by_path(specs).items() if p in there}
        else:
            assert set(found.values()) == {"other"}


@every
def test_map_params_tells_slots_from_the_rest(name):
    assert_params_are_mapped(TRANSFORMATIONS[name].make())


@pytest.mark.parametrize("kind", MASKS)
def test_map_params_with_a_mask(kind):
    for name in MASKED:
        assert_params_are_mapped(getattr(adamx, name)(0.5, mask=MASKS[kind]))


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("groups", [None, ("*",), ("w", "*/0")])
def test_map_params_with_a_monitor(every, groups):
    tx = adamx.monitor(adamx.adamw(0.1, mask=_tree), every, groups)
    assert_params_are_mapped(tx)
    state = tx.init({})  # nothing to measure
    updates, after = tx.update({}, state, {})
    assert updates == {} and types(after) == types(state)
    assert adamx.statistics(after).keys() == {"count", "monitor_step", "learning_rate"}
