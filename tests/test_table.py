"""What the table says of each transformation is true, and each kind has one example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw
from table import TRANSFORMATIONS, every, of_each_kind

import adamx
from adamx.core.concept import any_of, parts

promoted = pytest.mark.usefixtures("promotion_of_foreign_stages")

PARAMS = draw({"w": jnp.zeros((4, 3)), "b": jnp.zeros(())})


def has(tx, *kinds):
    return any_of(tx, lambda part: isinstance(part, kinds))


def is_a_stage_of_optax(part):
    return isinstance(part, adamx.named) and not isinstance(part.tx, adamx.Transformation)


@every
def test_the_line_says_what_the_transformation_is_made_of(name):
    case = TRANSFORMATIONS[name]
    tx = case.make()
    assert case.narrow == has(tx, adamx.Storage)
    assert case.packed == has(tx, adamx.packed16, adamx.packed8)
    assert case.masters == has(tx, adamx.master_weights)
    assert case.foreign == any_of(tx, is_a_stage_of_optax)


def first_element(tx, grads, state):
    """Return what a step makes of the first element of "w": its update and its slots."""
    updates, after = tx.update(grads, state, PARAMS)
    trees = [updates, *(after[name] for name in tx.tree_names())]
    return [jnp.ravel(tree["w"])[0] for tree in trees if tree["w"] is not None]


@promoted
@of_each_kind
def test_the_line_says_whether_an_update_depends_on_a_whole_leaf_or_tree(name):
    tx = TRANSFORMATIONS[name].make()
    grads = draw(PARAMS, 1)
    first = jnp.arange(12).reshape(4, 3) == 0
    with jax.disable_jit():  # so that no line has programs of its own to compile
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        others = [jnp.where(first, grads["w"], x * grads["w"]) for x in (1.0, -300.0, jnp.nan)]
        found = [first_element(tx, grads | {"w": w}, state) for w in others]
    alike = all(map(np.array_equal, found[0] + found[0], found[1] + found[2]))
    # a monitor leaves the update as it is, and measures whole leaves
    assert TRANSFORMATIONS[name].whole == (not alike or has(tx, adamx.monitor))


def test_each_kind_has_one_example_and_what_acts_around_others_has_one():
    lines = [case for case in TRANSFORMATIONS.values() if case.kind]
    assert len(lines) == len({case.kind for case in lines})
    kinds = {type(part) for case in lines for part in parts(case.make())}
    assert kinds >= {
        adamx.accumulate,
        adamx.bfloat16,
        adamx.by_path,
        adamx.combine,
        adamx.master_weights,
        adamx.monitor,
        adamx.named,
        adamx.packed16,
        adamx.packed8,
        adamx.schedule_free,
        adamx.skip_nonfinite,
    }
