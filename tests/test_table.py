"""What the table says of each transformation is true, and each kind has one example."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import devices, draw
from table import TRANSFORMATIONS, every, of_every_other_kind

import adamx
from adamx.core.concept import any_of, parts
from adamx.formula.expressions import replaced, symbol
from adamx.inspect.summary import derived
from adamx.storage.moments import without_storages

# what is tested does not depend on optimised code, and compiling takes most of the time
pytestmark = pytest.mark.usefixtures("quick_compiler")

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


def first_element(tx, grads, state, params):
    """Return what a step makes of the first element of "w": its update and its slots."""
    updates, after = tx.update(grads, state, params)
    trees = [updates, *(after[name] for name in tx.tree_names())]
    return [jnp.ravel(tree["w"])[0] for tree in trees if tree["w"] is not None]


@promoted
@of_every_other_kind(0)
def test_the_line_says_whether_an_update_depends_on_a_whole_leaf_or_tree(name):
    tx = TRANSFORMATIONS[name].make()
    grads = draw(PARAMS, 1)
    first = jnp.arange(12).reshape(4, 3) == 0
    with jax.disable_jit():  # so that no line has programs of its own to compile
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        found = []
        for x in (1.0, -300.0, jnp.nan):
            g, p = (t | {"w": jnp.where(first, t["w"], x * t["w"])} for t in (grads, PARAMS))
            found.append(first_element(tx, g, state, p))
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
        adamx.in_shard_map,
        adamx.master_weights,
        adamx.monitor,
        adamx.named,
        adamx.packed16,
        adamx.schedule_free,
        adamx.skip_nonfinite,
    }


# ---------------------------------------------------------------------- a name has one meaning


SAID_IN_MORE_WAYS = {
    "nu_inf": "its eps may be 0",
    "nu_max": "of a v with or without a correction, as the user composes it",
    "params_ema": "its correction is a power of a constant decay, or a scalar of the state",
    "trace": "of gradients that a stage of Optax has seen before",
    "z": "weights, whatever moves them",
}


def meaning(formula, slot):
    """Return a slot's definition without the hyperparameters' names."""

    def plain(found):
        return symbol("number") if found in formula.values else found

    return str(replaced(formula.definitions[formula.slots[slot]], plain))


def test_slots_of_one_name_are_of_one_formula():
    """A slot is carried over by its name, so a name is never that of something else."""
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    found: dict[str, dict[str, str]] = {}
    for name, case in TRANSFORMATIONS.items():
        tx = case.make()
        formula = derived(tx.for_tree(params).for_leaf("w", params["w"]))
        names = without_storages(tx).tree_names()
        for slot in formula.slots.keys() & set(names):
            said = meaning(formula, slot)
            clipped = re.search(r"\bu\d*_t", said)  # u_t, u2_t: of a clipped gradient
            if not clipped or slot == "trace_of_steps":
                found.setdefault(slot, {}).setdefault(said, name)
    assert {slot for slot, said in found.items() if len(said) > 1} == SAID_IN_MORE_WAYS.keys()
    assert found.keys() >= {"mu", "nu", "trace", "trace_of_steps", "nu_seeded", "mu_scaled"}


OTHERS = {
    "adopt, adamw": (adamx.adopt(0.1), adamx.adamw(0.1)),
    "adamax, adam": (adamx.adamax(0.1), adamx.adam(0.1)),
    "adabelief, yogi": (adamx.adabelief(0.1), adamx.yogi(0.1)),
    "heavy balls": (adamx.sgd(0.1, momentum=0.9), adamx.rmsprop(0.1, momentum=0.9)),
    "laprop, adopt": (adamx.laprop(0.1), adamx.adopt(0.1)),
    "packed_seeded": (adamx.adopt(0.1, moments="packed16"), adamx.adam(0.1, moments="packed16")),
    "packed_normalized": (
        adamx.laprop(0.1, moments="packed16"),
        adamx.adam(0.1, moments="packed16"),
    ),
}


@pytest.mark.parametrize("told", [False, True], ids=["", "saved_by"])
@pytest.mark.parametrize("pair", OTHERS)
def test_what_means_something_else_is_not_carried_over(pair, told):
    old, new = OTHERS[pair]
    _, state = old.update(PARAMS, old.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="adapt_state"):
        new.update(PARAMS, state, PARAMS)
    if pair.startswith("packed") and not told:
        word = {"packed_seeded": "scaled_seeded", "packed_normalized": "normalized"}[pair]
        with pytest.raises(ValueError, match=rf"'packed16_{word}/b' was saved.*saved_by=old_tx"):
            adamx.adapt_state(new, PARAMS, state)
        return
    _, adaptation = adamx.adapt_state(new, PARAMS, state, saved_by=old if told else None)
    had, has = ({*without_storages(tx).tree_names()} for tx in (old, new))
    assert {path.split("/")[0] for path in adaptation.dropped} == had - has
    assert {path.split("/")[0] for path in adaptation.filled} == has - had
    assert had - has


def pairs_of_kinds():
    """Yield each kind with the next one, and with others further on, which are slow."""
    kinds = [name for name, case in TRANSFORMATIONS.items() if case.kind]
    for apart in (1, 5, 8, 11):
        for old, new in zip(kinds, kinds[apart:] + kinds[:apart], strict=True):
            yield pytest.param(old, new, marks=() if apart == 1 else pytest.mark.slow)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("old", "new"), [*pairs_of_kinds()])
def test_a_state_that_was_adapted_is_like_a_fresh_one(old, new):
    device = devices(2)[1]
    params = jax.device_put(PARAMS, device)
    old, new = TRANSFORMATIONS[old].make(), TRANSFORMATIONS[new].make()
    state, _ = adamx.adapt_state(new, params, old.init(params), saved_by=old)
    fresh = new.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for found, wanted in zip(*map(jax.tree.leaves, (state, fresh)), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.devices() == {device}  # the scalars of a fresh state may be anywhere
    again, said = adamx.adapt_state(new, params, state, saved_by=new)
    assert (said.filled, said.dropped) == ((), ())
    jax.tree.map(np.testing.assert_array_equal, again, state)
