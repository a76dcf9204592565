"""The state is a flat dict of named slots with one counter, and outlives a change of configuration.

Runs that are to agree bit for bit are runs of the same compiled program: `update` called eagerly.
"""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamx
from adamx import adapt_state

pytestmark = pytest.mark.usefixtures("quick_compiler")  # both sides are compiled alike

W, B = jnp.array([1.0, -2.0, 3.0]), jnp.array([[0.5]])
PARAMS = {"w": W, "inner": {"b": B}}
FROZEN = {"w": W, "inner": {"b": None}}
MAX = 2**31 - 1


def halving(step):
    return 0.5 ** jnp.asarray(step, jnp.float32)


def gradient(step, tree=PARAMS):
    return jax.tree.map(lambda x: jnp.cos(x + step), tree)


def run(tx, state, steps, params: Any = PARAMS, jit=False):
    """Follow the gradients of some steps from a state; return (params, state)."""
    update = jax.jit(tx.update) if jit else tx.update
    for step in steps:
        updates, state = update(gradient(step, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ------------------------------------------------------------------------------------- the entries

ADAM = {"count", "learning_rate", "mu", "nu"}
ENTRIES: dict[str, tuple[Any, set[str]]] = {
    "identity": (adamx.identity(), {"count"}),
    "scale": (adamx.scale(2.0), {"count"}),
    "decay": (adamx.add_decayed_weights(0.1), {"count"}),
    "bias_correction": (adamx.bias_correction(0.9), {"count"}),
    "sgd": (adamx.sgd(0.1), {"count", "learning_rate"}),
    "sgd momentum": (adamx.sgd(0.1, momentum=0.9), {"count", "learning_rate", "trace"}),
    "momentum": (adamx.momentum(0.1), {"count", "learning_rate", "mu"}),
    "adagrad": (adamx.adagrad(0.1), {"count", "learning_rate", "sum_of_squares"}),
    "rmsprop": (adamx.rmsprop(0.1), {"count", "learning_rate", "nu"}),
    "rmsprop all": (
        adamx.rmsprop(0.1, centered=True, momentum=0.9),
        {"count", "learning_rate", "mu", "nu", "trace_of_steps"},
    ),
    "adam": (adamx.adam(0.1), ADAM),
    "nadam": (adamx.adam(0.1, nesterov=True), ADAM),
    "adam in bfloat16": (adamx.adam(0.1, mu_dtype=jnp.bfloat16), ADAM),
    "adamw": (adamx.adamw(0.1), ADAM),
    "other name": (adamx.chain(adamx.ema(0.9, name="a"), adamx.ema(0.9)), {"count", "a", "mu"}),
    "foreign": (adamx.chain(optax.trace(0.9), adamx.scale(2.0)), {"count", "trace"}),
    "foreign without memory": (adamx.chain(optax.clip(1.0), adamx.ema(0.9)), {"count", "mu"}),
    "foreign optimizer": (adamx.chain(optax.sgd(0.1, momentum=0.9)), {"count", "chain"}),
    "named": (adamx.named("fast", optax.trace(0.9)), {"count", "fast"}),
    "named concept": (adamx.chain(adamx.named("slow", adamx.ema(0.9))), {"count", "slow"}),
    "two of a kind": (
        adamx.chain(adamx.named("fast", optax.trace(0.5)), optax.trace(0.9)),
        {"count", "fast", "trace"},
    ),
}
every = pytest.mark.parametrize("name", ENTRIES)


@every
def test_the_state_is_a_flat_dict_of_what_is_remembered(name):
    tx, entries = ENTRIES[name]
    state = tx.init(PARAMS)
    assert type(state) is dict and set(state) == entries
    assert set(tx.state_names()) | {"count"} == entries


@every
def test_update_keeps_the_entries_and_counts(name):
    tx, _ = ENTRIES[name]
    start = jax.eval_shape(tx.init, PARAMS)
    state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p)[1], PARAMS)
    assert state == start and list(state) == list(start)
    assert state["count"] == jax.ShapeDtypeStruct((), jnp.int32)


@every
def test_names_do_not_depend_on_the_tree(name):
    tx, entries = ENTRIES[name]
    for tree in ({}, {"w": None}, FROZEN):
        assert set(tx.init(tree)) == entries
        assert set(jax.eval_shape(tx.update, tree, tx.init(tree), tree)[1]) == entries


def test_slots_have_the_tree_of_the_parameters_and_none_where_they_have_it():
    state = adamx.adam(0.1).init(FROZEN)
    for name in ("mu", "nu"):
        assert jax.tree.structure(state[name]) == jax.tree.structure(FROZEN)
        assert state[name]["inner"]["b"] is None
    assert adamx.adam(0.1).init({})["mu"] == {}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_mu_dtype_is_that_of_mu_alone(optimizer, nesterov):
    tx = getattr(adamx, optimizer)(0.1, mu_dtype=jnp.bfloat16, nesterov=nesterov)
    for state in (tx.init(W), tx.update(W, tx.init(W), W)[1]):
        assert state["mu"].dtype == jnp.bfloat16 and state["nu"].dtype == jnp.float32


def test_count_is_the_number_of_steps_taken():
    tx = adamx.sgd(0.1)
    state = tx.init(W)
    for steps in range(4):
        assert int(state["count"]) == steps
        _, state = tx.update(W, state)


COUNTING = {
    "adam": adamx.adam(0.1),
    "adam scheduled": adamx.adam(lambda step: 1 / (1 + jnp.asarray(step, jnp.float32))),
    "nadam": adamx.adam(0.1, nesterov=True),
    "nadam, array": adamx.adam(0.1, b1=jnp.float32(0.9), nesterov=True),
    "rmsprop": adamx.rmsprop(0.1, bias_correction=True),
}


@pytest.mark.parametrize("name", COUNTING)
def test_count_saturates_and_the_update_stays_what_it_was(name):
    tx = COUNTING[name]
    state = jax.tree.map(jnp.ones_like, tx.init(W))
    before, _ = tx.update(W, state | {"count": jnp.int32(MAX - 3)}, W)
    for count in (MAX - 2, MAX - 1, MAX):
        updates, new = tx.update(W, state | {"count": jnp.int32(count)}, W)
        assert int(new["count"]) == min(count + 1, MAX) and new["count"].dtype == jnp.int32
        np.testing.assert_allclose(updates, before, rtol=1e-6)  # float32 of the counts is the same


# ------------------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize("how", ["eager", "jitted"])
@pytest.mark.parametrize(
    "schedule",
    [halving, optax.linear_schedule(1.0, 0.0, 4), lambda step: jnp.where(step < 2, 1.0, 0.5)],
    ids=["halving", "linear", "piecewise"],
)
def test_a_scheduled_rate_is_recorded_as_used_and_counted_as_optax_counts(schedule, how):
    tx, other = adamx.sgd(schedule), optax.sgd(schedule)
    state, other_state = tx.init(W), other.init(W)
    update = tx.update if how == "eager" else jax.jit(tx.update)
    assert state["learning_rate"] == schedule(0)  # before the first step: what it will use
    for step in range(5):
        updates, state = update(W, state)
        expected, other_state = other.update(W, other_state)
        np.testing.assert_array_equal(updates, expected)
        assert state["learning_rate"] == schedule(step)
        assert state["learning_rate"].dtype == jnp.float32
        np.testing.assert_array_equal(updates, -state["learning_rate"] * W)


@pytest.mark.parametrize(
    "rate",
    [2.0, 2, np.float64(2), jnp.float32(2), np.array(2.0), lambda _: 2.0, lambda _: 2],
    ids=["float", "int", "NumPy", "array", "NumPy array", "function", "function to int"],
)
def test_a_constant_rate_is_recorded_as_float32(rate):
    tx = adamx.sgd(rate)
    _, state = tx.update(W, tx.init(W))
    for recorded in (tx.init(W)["learning_rate"], state["learning_rate"]):
        assert recorded == 2.0 and recorded.dtype == jnp.float32 and not recorded.weak_type


@pytest.mark.usefixtures("x64")
def test_the_recorded_rate_is_float32_with_x64():
    tx = adamx.sgd(lambda _: jnp.asarray(0.1, jnp.float64))
    state = tx.init(jnp.ones(2, jnp.float64))
    assert state["learning_rate"].dtype == jnp.float32 and state["count"].dtype == jnp.int32


def test_a_traced_rate_is_recorded():
    @jax.jit
    def step(rate):
        tx = adamx.sgd(rate)
        return tx.update(W, tx.init(W))[1]

    assert step(0.5)["learning_rate"] == 0.5


def test_tree_get_finds_what_adamx_alone_holds():
    tx = adamx.adamw(halving)
    _, state = tx.update(W, tx.init(W), W)
    for name in ADAM:
        assert optax.tree_utils.tree_get(state, name) is state[name]
    inside: Any = optax.chain(optax.clip(1.0), tx).init(PARAMS)
    assert optax.tree_utils.tree_get(inside, "mu") is inside[1]["mu"]
    changed: Any = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(0.0))
    assert changed["learning_rate"] == 0.0


# ------------------------------------------------------- what has no memory changes nothing in it

SAME_STATE = {
    "schedule": adamx.adam(halving),
    "array": adamx.adam(jnp.float32(0.1), eps=jnp.float32(1e-8)),
    "decay": adamx.adamw(0.1),
    "scheduled decay": adamx.adamw(0.1, weight_decay=halving),
    "mask": adamx.adamw(0.1, mask={"w": True, "inner": False}),
    "nadam": adamx.adam(0.1, nesterov=True),
    "clip": adamx.chain(optax.clip(1.0), adamx.adam(0.1)),
    "clip by norm": adamx.chain(optax.clip_by_global_norm(1.0), adamx.adamw(0.1)),
    "scale": adamx.chain(adamx.adam(0.1), adamx.scale(0.5)),
    "nested": adamx.chain(adamx.chain(adamx.scale_by_adam()), adamx.sgd(0.1)),
    "L2": adamx.chain(adamx.add_decayed_weights(0.1), adamx.adam(0.1)),
}


@pytest.mark.parametrize("name", SAME_STATE)
def test_a_stage_without_memory_leaves_the_checkpoint_loadable(name):
    tx, saved = SAME_STATE[name], adamx.adam(0.1).init(PARAMS)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(saved)
    jax.eval_shape(tx.update, PARAMS, saved, PARAMS)


# ----------------------------------------------------------------------------------- foreign stages


def test_a_foreign_state_stands_whole_under_its_factory_and_its_name():
    tx = adamx.chain(
        optax.trace(0.5), adamx.named("slow", optax.trace(0.9)), adamx.scale_by_learning_rate(0.1)
    )
    alone: Any = optax.chain(optax.trace(0.5), optax.trace(0.9), optax.scale(-0.1))
    params, state = run(tx, tx.init(PARAMS), range(3))
    expected, (fast, slow, _) = run(alone, alone.init(PARAMS), range(3), jit=True)
    assert_equal(state["trace"], fast)
    assert_equal(state["slow"], slow)
    assert isinstance(state["trace"], optax.TraceState)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)


def test_a_named_concept_keeps_its_own_state_inside():
    tx = adamx.chain(adamx.named("slow", adamx.ema(0.9)), adamx.ema(0.5))
    _, state = run(tx, tx.init(PARAMS), range(2))
    assert set(state) == {"count", "mu", "slow"} and set(state["slow"]) == {"count", "mu"}
    assert int(state["slow"]["count"]) == int(state["count"]) == 2


# ------------------------------------------------------------------------------------- adapt_state


def adam_after(steps, params=PARAMS, tx=None):
    tx = tx or adamx.adam(0.1)
    return run(tx, tx.init(params), range(steps), params)


def test_a_run_adapted_to_itself_goes_on_bit_for_bit():
    tx = adamx.adam(halving)
    params, saved = adam_after(3, tx=tx)
    state, adaptation = adapt_state(tx, params, saved)
    assert (adaptation.filled, adaptation.dropped) == ((), ())
    assert str(adaptation) == "adapt_state: everything was carried over."
    assert_equal(state, saved)
    got = run(tx, state, range(3, 6), params)
    assert_equal(got, adam_after(6, tx=tx))


def test_a_longer_chain_goes_on_with_the_shorter_ones_slots():
    saved = adam_after(3, tx=adamx.momentum(0.1))[1]
    state, adaptation = adapt_state(adamx.adam(halving), PARAMS, saved)
    assert adaptation.filled == ("nu/inner/b", "nu/w") and adaptation.dropped == ()
    assert str(adaptation) == "adapt_state: filled in 2: nu/inner/b, nu/w."
    assert set(state) == ADAM
    assert_equal(state["mu"], saved["mu"])
    assert int(state["count"]) == 3  # so that a schedule goes on where it was
    assert state["learning_rate"] == np.float32(0.1)
    assert_equal(state["nu"], jax.tree.map(jnp.zeros_like, PARAMS))
    _, state = run(adamx.adam(halving), state, [3])
    assert state["learning_rate"] == halving(3)


def test_a_shorter_chain_drops_what_it_does_not_keep():
    params, saved = adam_after(3)
    tx = adamx.momentum(0.1)
    state, adaptation = adapt_state(tx, params, saved)
    assert adaptation.filled == () and adaptation.dropped == ("nu/inner/b", "nu/w")
    assert str(adaptation) == "adapt_state: dropped 2: nu/inner/b, nu/w."
    assert_equal(state, {name: saved[name] for name in state})
    tx.update(PARAMS, state, PARAMS)


def test_the_report_says_both():
    saved = adam_after(1, tx=adamx.sgd(0.1, momentum=0.9))[1]
    _, adaptation = adapt_state(adamx.momentum(0.1), PARAMS, saved)
    assert str(adaptation) == (
        "adapt_state: filled in 2: mu/inner/b, mu/w. dropped 2: trace/inner/b, trace/w. "
        "began 2: inner/b, w."
    )


@pytest.mark.parametrize(("leaves", "shown", "end"), [(8, 8, "."), (9, 8, ", ....")])
def test_a_long_report_is_cut(leaves, shown, end):
    params = {f"w{i}": W for i in range(leaves)}
    _, adaptation = adapt_state(adamx.momentum(0.1), params, adamx.sgd(0.1).init(params))
    assert len(adaptation.filled) == leaves
    names = ", ".join(f"mu/w{i}" for i in range(shown))
    assert str(adaptation) == f"adapt_state: filled in {leaves}: {names}{end}"


def test_freezing_a_leaf_drops_its_slots_and_thawing_it_fills_them_in():
    tx = adamx.adam(0.1)
    params, saved = adam_after(2)
    state, adaptation = adapt_state(tx, FROZEN, saved)
    assert adaptation.dropped == ("mu/inner/b", "nu/inner/b") and adaptation.filled == ()
    assert state["mu"] == {"w": state["mu"]["w"], "inner": {"b": None}}
    _, state = run(tx, state, [2], FROZEN)

    thawed, adaptation = adapt_state(tx, params, state)
    assert adaptation.filled == ("mu/inner/b", "nu/inner/b") and adaptation.dropped == ()
    assert_equal(thawed["mu"]["w"], state["mu"]["w"])
    np.testing.assert_array_equal(thawed["mu"]["inner"]["b"], [[0.0]])
    tx.update(PARAMS, thawed, PARAMS)


def test_slots_are_cast_to_the_dtype_in_which_they_are_kept():
    narrow, wide = adamx.adam(0.1, mu_dtype=jnp.bfloat16), adamx.adam(0.1)
    _, saved = adam_after(2)
    state, adaptation = adapt_state(narrow, PARAMS, saved)
    assert state["mu"]["w"].dtype == jnp.bfloat16 and state["nu"]["w"].dtype == jnp.float32
    np.testing.assert_array_equal(state["mu"]["w"], saved["mu"]["w"].astype(jnp.bfloat16))
    assert (adaptation.filled, adaptation.dropped) == ((), ())

    back, _ = adapt_state(wide, PARAMS, state)
    assert back["mu"]["w"].dtype == jnp.float32
    np.testing.assert_array_equal(back["mu"]["w"], state["mu"]["w"].astype(jnp.float32))


def lists_for_tuples(state):
    return state | {name: list(state[name]) for name in ("mu", "nu")}


def dicts_by_index(state):
    return state | {
        name: {str(i): leaf for i, leaf in enumerate(state[name])} for name in ("mu", "nu")
    }


@pytest.mark.parametrize("container", [lists_for_tuples, dicts_by_index])
def test_the_containers_of_a_checkpoint_do_not_matter(container):
    params = (W, B)
    params, state = adam_after(2, params)
    saved = jax.tree.map(np.asarray, container(state)) | {"count": np.int64(2)}
    adapted, adaptation = adapt_state(adamx.adam(0.1), params, saved)
    assert (adaptation.filled, adaptation.dropped) == ((), ())
    assert_equal(adapted, state)
    assert adapted["count"].dtype == jnp.int32
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(adapted))


Odd = collections.namedtuple("Odd", "z a")
FOREIGN = adamx.chain(optax.clip(1.0), optax.trace(0.9), adamx.sgd(0.1))


@pytest.mark.parametrize("container", [lambda trace: trace, lambda trace: {"trace": trace.trace}])
def test_a_foreign_stage_is_carried_over(container):
    params, saved = run(FOREIGN, FOREIGN.init(PARAMS), range(2))
    restored = saved | {"trace": container(saved["trace"])}
    state, adaptation = adapt_state(FOREIGN, params, restored)
    assert (adaptation.filled, adaptation.dropped) == ((), ())
    assert_equal(state, saved)
    _, adaptation = adapt_state(adamx.sgd(0.1), params, saved)
    assert adaptation.dropped == ("trace/trace/inner/b", "trace/trace/w")
    _, adaptation = adapt_state(FOREIGN, params, adamx.sgd(0.1).init(PARAMS))
    assert adaptation.filled == ("trace/trace/inner/b", "trace/trace/w")


def test_a_foreign_stage_that_would_lose_a_slot_is_reported():
    params = {"b": jnp.ones(2), "w": jnp.ones(2)}
    for tx in (adamx.chain(optax.ema(0.5)), adamx.skip_nonfinite(optax.ema(0.5))):
        said = pytest.raises(ValueError, match=r"the stage 'ema' returned another tree.* is None")
        with jax.numpy_dtype_promotion("standard"), said:
            tx.update(params | {"b": None}, tx.init(params), params)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_state_of_a_foreign_stage_keeps_its_dtypes(dtype, rounding):
    params = jnp.ones(2, dtype)
    for tx in (
        adamx.accumulate(adamx.chain(optax.trace(0.5), adamx.sgd(0.1)), 1),
        adamx.chain(adamx.scale(1.0), optax.trace(0.5), adamx.sgd(0.1)),
    ):
        step, state = adamx.make_step(tx, rounding=rounding), tx.init(params)
        before = jax.tree.map(jnp.result_type, state)
        with jax.numpy_dtype_promotion("standard"):
            _, state = step(jnp.ones(2, dtype), state, params)
        assert jax.tree.map(jnp.result_type, state) == before


def test_a_random_key_in_a_foreign_state_is_carried_over():
    tx = adamx.chain(optax.add_noise(0.1, 0.5, jax.random.key(7)), adamx.sgd(0.1))
    saved = tx.init(PARAMS)
    (name,) = set(saved) - {"count", "learning_rate"}
    state, adaptation = adapt_state(tx, PARAMS, saved)
    assert (adaptation.filled, adaptation.dropped) == ((), ())
    assert state[name].rng_key == saved[name].rng_key


def test_what_was_dropped_is_sorted():
    saved = adamx.sgd(0.1).init(W) | {"odd": Odd(W, W)}
    _, adaptation = adapt_state(adamx.sgd(0.1), W, saved)
    assert adaptation.dropped == ("odd/a", "odd/z")


def test_what_was_saved_is_left_as_it_was():
    _, saved = adam_after(1)
    before = jax.tree.map(np.array, saved)
    adapt_state(adamx.momentum(0.1), PARAMS, saved)
    assert_equal(jax.tree.map(np.array, saved), before)


def test_the_slots_of_another_model_are_refused():
    saved = adamx.adam(0.1).init({"w": jnp.ones((4, 3)), "inner": {"b": B}})
    with pytest.raises(ValueError) as error:
        adapt_state(adamx.adam(0.1), PARAMS, saved)
    for part in ["adapt_state: 'mu/w'", "shape [4, 3]", "shape [3]", "another model"]:
        assert part in str(error.value)


def test_two_leaves_of_one_path_are_not_carried_over_one_for_the_other():
    tx, params = adamx.momentum(0.1), {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}
    with pytest.raises(ValueError, match="adamx: two leaves have the path 'mu/a/b'"):
        adamx.adapt_state(tx, params, tx.init(params))


def test_complex_slots_are_not_carried_over_to_real_parameters():
    saved = adamx.momentum(0.1).init(jax.tree.map(lambda x: x.astype(jnp.complex64), PARAMS))
    with pytest.raises(ValueError, match=r"adapt_state: 'mu/inner/b'.*complex64.*float32"):
        adapt_state(adamx.momentum(0.1), PARAMS, saved)


def test_complex_parameters_take_complex_slots_and_real_ones():
    tx, params = adamx.momentum(0.1), jax.tree.map(lambda x: x.astype(jnp.complex64), PARAMS)
    for before in (PARAMS, params):
        _, saved = run(tx, tx.init(before), range(2), before)
        state, _ = adapt_state(tx, params, saved)
        assert state["mu"]["w"].dtype == jnp.complex64
        np.testing.assert_array_equal(state["mu"]["w"], saved["mu"]["w"])


@pytest.mark.parametrize(
    ("saved", "given", "hint"),
    [
        (optax.sgd(0.1, momentum=0.9).init(PARAMS), "tuple", "adamx.from_optax"),
        ({"mu": PARAMS}, "a dict with ['mu']", "are the arguments swapped"),
        (None, "NoneType", "are the arguments swapped"),
    ],
    ids=["Optax's", "without count", "None"],
)
def test_what_is_no_state_of_adamx_is_refused(saved, given, hint):
    said = r"^adapt_state: saved must be a state of adamx, with 'count' at the top, got "
    with pytest.raises(TypeError, match=rf"{said}{re.escape(given)}: {hint}"):
        adapt_state(adamx.adam(0.1), PARAMS, saved)
