"""Faults that users of Adam reported of other libraries, tried here: whole kinds, not examples."""

import collections
import functools
import pickle
import re
from typing import Any

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import TRANSFORMATIONS, of_each_kind, of_every_other_kind

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")


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


@of_every_other_kind(1)
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


# ------------------------------------------------------------------ one None for a whole branch

TWO = {"enc": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "head": {"bias": jnp.ones(2)}}
NONE_ABOVE = {"enc": None, "head": {"bias": jnp.full(2, 0.5)}}
NONE_BELOW = {"enc": {"kernel": None, "bias": None}, "head": {"bias": jnp.full(2, 0.5)}}
DECAYING = functools.partial(adamx.adamw, 0.1, weight_decay=0.1)


def in_the_encoder(path, leaf):
    return path.startswith("enc") and leaf.ndim > 0


def everywhere(params):
    return jax.tree.map(lambda _: True, params)


READS_THE_TREE: dict[str, tuple[Any, bool]] = {  # and whether its update needs parameters
    "groups": (lambda: adamx.by_path({"enc/*": adamx.sgd(0.1)}, default=adamx.adam(0.1)), False),
    "predicate": (lambda: adamx.by_path({in_the_encoder: None}, default=adamx.adam(0.1)), False),
    "patterns": (lambda: DECAYING(mask="enc/*"), True),
    "all_but": (lambda: DECAYING(mask=adamx.all_but("enc/bias")), True),
    "tree": (lambda: DECAYING(mask=everywhere(TWO)), True),
    "function": (lambda: DECAYING(mask=everywhere), True),
    "monitor": (lambda: adamx.monitor(adamx.adam(0.1), every=1), False),
    "groups of a monitor": (
        lambda: adamx.monitor(adamx.adam(0.1), every=1, groups=("enc/*",)),
        False,
    ),
}


@pytest.mark.parametrize("name", READS_THE_TREE)
def test_a_transformation_that_reads_the_tree_takes_one_none_for_a_branch(name):
    make, needs_params = READS_THE_TREE[name]
    tx = make()
    state = tx.init(TWO)
    for params in (TWO,) if needs_params else (TWO, None):
        updates, after = jax.eval_shape(tx.update, NONE_ABOVE, state, params)
        assert updates["enc"] is None and updates["head"]["bias"].shape == (2,)
        assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", READS_THE_TREE)
def test_one_none_for_a_branch_is_a_none_for_each_of_its_leaves(name, compiled):
    make, needs_params = READS_THE_TREE[name]
    tx = make()
    state = tx.init(TWO)
    update = jax.jit(tx.update) if compiled else tx.update
    for params in (TWO,) if needs_params else (TWO, None):
        above, below = (update(g, state, params) for g in (NONE_ABOVE, NONE_BELOW))
        assert above[0]["enc"] is None and jax.tree.leaves(below[0]["enc"]) == []
        jax.tree.map(np.testing.assert_array_equal, above[0]["head"], below[0]["head"])
        jax.tree.map(np.testing.assert_array_equal, above[1], below[1])


@pytest.mark.slow
@of_each_kind
def test_every_kind_takes_one_none_for_a_branch(name):
    case = TRANSFORMATIONS[name]
    tx = case.make()
    params = {"v": {"b": jnp.ones(2)}, "w": jnp.ones((2, 3))}
    state, grads = tx.init(params), {"w": jnp.full((2, 3), 0.5)}
    try:
        below = tx.update(grads | {"v": {"b": None}}, state, params)
    except ValueError:  # a stage of Optax that cannot have it
        assert case.foreign
        return
    above = tx.update(grads | {"v": None}, state, params)
    assert above[0]["v"] is None
    jax.tree.map(
        np.testing.assert_array_equal, (above[0]["w"], above[1]), (below[0]["w"], below[1])
    )


# ------------------------------------------------------------------------------ unclear errors


@pytest.mark.parametrize("given", [None, [0.1], "0.1", {"rate": 0.1}], ids=repr)
@pytest.mark.parametrize("name", ["learning_rate", "b2", "weight_decay"])
def test_a_schedule_that_returns_no_number_is_named(name, given):
    arguments: dict[str, Any] = {"learning_rate": 0.1, name: lambda step: given}
    field = "decay" if name == "b2" else name
    with pytest.raises(TypeError, match=rf"{field} must be a schedule that returns a number"):
        tx = adamx.adamw(**arguments)  # raises if the state records the value
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), start())


@pytest.mark.parametrize(
    "leaf",
    [np.ones(3, ">f4"), np.array([1.0, None, 2.0], object), np.array(["1", "2", "3"])],
    ids=lambda x: x.dtype.str,
)
def test_an_array_that_jax_cannot_hold_is_named_by_its_path(leaf):
    tx = adamx.adam(0.1)
    state, bad = tx.init(start()), start() | {"b": leaf}
    calls = (
        lambda: tx.init(bad),
        lambda: tx.update(bad, state),
        lambda: tx.update(start(), state, bad),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"leaf 'b' must be .*JAX cannot hold.*astype"):
            call()


@pytest.mark.parametrize("make", [adamx.adabelief, adamx.yogi, adamx.adagrad])
def test_packed8_says_which_slots_it_stores(make):
    with pytest.raises(ValueError, match="averages of one gradient and of its square, but"):
        make(0.1, moments="packed8")


def test_one_pattern_is_no_tuple_of_them():
    for pattern in ("*kernel", re.compile(".*kernel")):
        with pytest.raises(TypeError, match=r"one pattern: groups=\('.*kernel',\)"):
            adamx.monitor(adamx.adam(0.1), groups=pattern)  # pyright: ignore


def test_from_torch_takes_numpys_indices_and_explains_a_step_that_is_no_number():
    moments = {"step": 3.0, "exp_avg": np.ones(3), "exp_avg_sq": np.ones(3)}
    groups = [{"params": [0], "amsgrad": False, "lr": 0.1}]
    tx, params = adamx.adamw(0.1), {"b": jnp.ones(3)}
    given = {"state": {0: moments}, "param_groups": groups}
    found = adamx.from_torch(given, tx, params, names={"b": np.int64(0)})  # pyright: ignore
    assert int(found["count"]) == 3
    for step in (np.nan, np.inf):
        given["state"] = {0: moments | {"step": step}}
        with pytest.raises(ValueError, match=r"\['step'\] must be one whole number, got (nan|inf)"):
            adamx.from_torch(given, tx, params, names={"b": 0})


@pytest.mark.parametrize("kind", [collections.OrderedDict, dict])
def test_a_state_keeps_its_kind_of_dict(kind):
    tx, params = adamx.accumulate(adamx.adam(0.1), 2), start()

    def body(state, _):
        return tx.update(start(), state, params)[1], None

    state = kind(tx.init(params))
    scanned, _ = jax.eval_shape(lambda s: jax.lax.scan(body, s, None, 2), state)
    _, stepped = adamx.make_step(tx)(start(), state, start())  # between two full steps
    assert type(scanned) is type(stepped) is kind
    assert [*stepped] == [*scanned] == [*tx.init(params)]


def test_a_mask_may_be_as_deep_as_the_parameters():
    params: Any = jnp.ones(2)
    for _ in range(500):
        params = {"a": params}
    tx = adamx.sgdw(0.5, weight_decay=0.5, mask=jax.tree.map(lambda _: True, params))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert (jax.tree.leaves(updates)[0] < 0).all()


def test_a_step_with_a_monitor_moves_nothing_between_host_and_device():
    tx = adamx.monitor(adamx.sgd(0.1), every=3, groups=("*",))
    step, params, state, grads = adamx.make_step(tx), start(), tx.init(start()), start()
    params, state = step(params, state, grads)
    with jax.transfer_guard("disallow"):
        for _ in range(4):
            params, state = step(params, state, grads)
    assert int(state["count"]) == 5 and int(state["monitor_step"]) == 2
